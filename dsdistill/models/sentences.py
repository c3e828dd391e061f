"""What a sentence-transformers directory says about its embeddings, read from a teacher and written for a student."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from dsdistill.locate import Source
from dsdistill.models.families import max_length
from dsdistill.objectives.sentences import Pooling

MODULES = "modules.json"
SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json")
POOLINGS: dict[str, Pooling] = {
    "cls": "first",
    "mean": "mean",
    "max": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_length",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
"""How sentence-transformers calls them, and we."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceModules:
    """How a sentence encoder makes one vector of a text.

    Attributes:
        pooling: How the last hidden states become one vector.
        normalised: Whether it has length 1.
        max_length: Tokens of a text that are read, special ones included; None where only the model limits them.
        problem: Why its embeddings cannot be had from the encoder alone, or None; the rest means nothing then.
    """

    pooling: Pooling = "mean"
    normalised: bool = False
    max_length: int | None = None
    problem: str | None = None


def read_sentence_modules(source: Source) -> SentenceModules | None:
    """What a model's `modules.json` and the files that it names say; None if there is none.

    Raises:
        ValueError: If one of the files is damaged.
    """
    listed = _read(source, MODULES)
    if listed is None:
        return None
    parts = listed if isinstance(listed, list) else []
    if not parts or not all(isinstance(part, dict) and {"type", "path"} <= part.keys() for part in parts):
        raise ValueError(f"{source.model}: {MODULES} is no list of modules with a type and a path; get the file again")
    kinds = _kinds(listed)
    settings = _read(source, SETTINGS[0]) or _read(source, f"{listed[0]['path']}/{SETTINGS[0]}") or {}
    mode, problem = "mean", _module_problem(kinds) or _prompt_problem(source)
    if problem is None and settings.get("do_lower_case"):
        problem = "lower-cases texts before its tokenizer reads them (do_lower_case)"
    if problem is None:
        mode, *more = _pooling_modes(_read(source, f"{listed[1]['path']}/config.json") or {})
        if more or mode not in POOLINGS:
            problem = f"pools by {' and '.join([mode, *more])}; what is known is one of {', '.join(POOLINGS)}"
    return SentenceModules(
        pooling=POOLINGS[mode] if problem is None else "mean",
        normalised="Normalize" in kinds,
        max_length=settings.get("max_seq_length"),
        problem=None if problem is None else f"{source.model} {problem}",
    )


def sentence_problem(source: Source) -> str | None:
    """Why a student cannot be a sentence-transformers model as its teacher; None if it can, or the teacher is none."""
    modules = read_sentence_modules(source)
    return None if modules is None else modules.problem


def text_length(modules: SentenceModules | None, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """Tokens of a text that a sentence encoder reads: the least of what it, its tokenizer and its model say."""
    known = (modules.max_length if modules is not None else None, tokenizer.model_max_length, max_length(config))
    return min(length for length in known if length is not None)


def _kinds(listed: list[dict[str, Any]]) -> list[str]:
    return [module["type"].rpartition(".")[2] for module in listed]


def _module_problem(kinds: list[str]) -> str | None:
    """What stands between the encoder's hidden states and the embedding that an encoder alone has not."""
    more = [kind for kind in kinds[1:] if kind not in ("Pooling", "Normalize")]
    if more:
        return f"passes its embeddings through {more[0]}, whose weights a student would not have"
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return f"is built of {', '.join(kinds)}, and not of Transformer, Pooling and perhaps Normalize"
    return None


def _prompt_problem(source: Source) -> str | None:
    settings = _read(source, SETTINGS[1]) or {}
    name = settings.get("default_prompt_name")
    if name is not None and (settings.get("prompts") or {}).get(name):
        return f"puts the prompt {name!r} before every text, which the rows of a corpus have not"
    return None


def _pooling_modes(config: dict[str, Any]) -> tuple[str, ...]:
    """Names as sentence-transformers has them, from its older files (a switch for each) or newer ones (one key)."""
    modes = config.get("pooling_mode")
    if modes is not None:
        return (modes,) if isinstance(modes, str) else tuple(modes)
    prefix = "pooling_mode_"
    switched = [name.removeprefix(prefix) for name, on in config.items() if name.startswith(prefix) and on is True]
    short = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean", "weightedmean_tokens": "weightedmean"}
    return tuple(short.get(name, name) for name in switched) or ("mean",)


def write_sentence_modules(teacher: Source, width: int, directory: Path) -> None:
    """Copy a teacher's sentence-transformers files for a student whose encoder lies in `directory` itself.

    Args:
        teacher: A sentence encoder without `problem`.
        width: Of the student's hidden states.
        directory: Where the student was saved.
    """
    listed = _read(teacher, MODULES)
    assert listed is not None
    for index, kind in enumerate(_kinds(listed)):
        if kind == "Transformer":
            inside, listed[index]["path"] = listed[index]["path"], ""
            for name in SETTINGS:
                _copy(teacher, name if file_beside(teacher, name) else f"{inside}/{name}", directory / name)
        else:
            (directory / listed[index]["path"]).mkdir(parents=True, exist_ok=True)
            name = f"{listed[index]['path']}/config.json"
            _copy(teacher, name, directory / name)
    _write(directory / MODULES, listed)
    pooling = directory / next(m["path"] for m, k in zip(listed, _kinds(listed), strict=True) if k == "Pooling")
    content = json.loads((pooling / "config.json").read_text(encoding="utf-8"))
    sizes = {key: width for key in ("word_embedding_dimension", "embedding_dimension") if key in content}
    _write(pooling / "config.json", content | sizes)


def _copy(source: Source, name: str, to: Path) -> None:
    found = file_beside(source, name)
    if found is not None:
        shutil.copyfile(found, to)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read(source: Source, name: str) -> Any:
    """The content of a JSON file beside the model, or None if there is none."""
    found = file_beside(source, name)
    if found is None:
        return None
    try:
        return json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source.model}: {name} is no JSON ({error}); get the file again") from error


def file_beside(source: Source, name: str) -> Path | None:
    """A file of a model's directory or repository, or None if there is none."""
    found = cached_file(
        source.root,
        name.removeprefix("/"),
        revision=source.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None
