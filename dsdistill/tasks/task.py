"""Open a task: find its splits, read and check texts and labels, tokenize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsdistill.corpus.lines import COMPRESSIONS
from dsdistill.tasks.examples import Examples, Split, load_hub, read_examples
from dsdistill.tasks.glue import GLUE, GlueTask
from dsdistill.tasks.labels import SEPARATOR, encode_labels, find_labels
from dsdistill.tasks.rows import Rows, tokenize_rows
from dsdistill.tasks.settings import HUB_GLUE, DataSettings
from dsdistill.tasks.spec import METRICS, TaskSpec, check_metrics, default_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEXT, DEFAULT_LABEL, DEFAULT_DEV = "text", "label", "validation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task and its rows, ready to learn from.

    Attributes:
        spec: What it asks of a model.
        train: Training rows, labelled.
        dev: Rows to score, labelled: {"dev": ...}, or {"dev_matched": ..., "dev_mismatched": ...}.
        test: Rows to predict, with or without labels: {}, {"test": ...} or {"test_matched": ..., ...}.
        texts: The training rows' texts, for augmentation.
        pairs: Their second texts, or None.
        notes: Lines for people: rows cut, rows left out.
    """

    spec: TaskSpec
    train: Rows
    dev: Mapping[str, Rows]
    test: Mapping[str, Rows]
    texts: list[str]
    pairs: list[str] | None
    notes: tuple[str, ...]


def open_task(name: str, data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Read, check and tokenize all splits of a task.

    Args:
        name: One of GLUE's nine (cola sst2 mrpc qqp stsb mnli qnli rte wnli), or an own name.
        data: Where the rows are.
        tokenizer: A fast tokenizer.

    Raises:
        ValueError: If a setting has no sense for this task, train or dev is missing, or a file is broken; in one
            sentence that names the file and the line.
    """
    check_data(name, data)
    splits = _find_splits(name, data)
    train = read_examples(splits[0], skip_broken=data.skip_broken)
    spec = _spec(name, data, train)
    notes: list[str] = []

    def rows_of(split: Split, examples: Examples) -> Rows:
        labels = encode_labels(spec, examples)
        texts, pairs = examples.texts, examples.pairs
        if split.name == "train" and data.train_rows is not None:
            texts, pairs = texts[: data.train_rows], None if pairs is None else pairs[: data.train_rows]
            labels = None if labels is None else labels[: data.train_rows]
        rows = tokenize_rows(texts, pairs, labels, tokenizer, max_length=data.max_length)
        notes.extend(examples.notes)
        if rows.num_cut:
            notes.append(
                f"{split.name}: {rows.num_cut} of {rows.num_rows} rows are longer than "
                f"max_length={data.max_length} tokens and were cut"
            )
        return rows

    tokenized = {"train": rows_of(splits[0], train)}
    for split in splits[1:]:
        tokenized[split.name] = rows_of(split, read_examples(split, skip_broken=data.skip_broken))
    return Task(
        spec=spec,
        train=tokenized["train"],
        dev={split: rows for split, rows in tokenized.items() if split.startswith("dev")},
        test={split: rows for split, rows in tokenized.items() if split.startswith("test")},
        texts=train.texts[: data.train_rows],
        pairs=None if train.pairs is None else train.pairs[: data.train_rows],
        notes=tuple(notes),
    )


def task_spec(name: str, data: DataSettings) -> TaskSpec:
    """What a task asks of a model; reads the training rows only if nothing else says which classes there are.

    Raises:
        ValueError: As `open_task`, for what is read.
    """
    check_data(name, data)
    if name in GLUE or data.labels is not None or data.problem == "regression":
        return _spec(name, data, None)
    return _spec(name, data, read_examples(_find_splits(name, data)[0], skip_broken=data.skip_broken))


def check_data(name: str, data: DataSettings) -> None:
    """Refuse settings that have no sense for this task; nothing is read.

    Raises:
        ValueError: Names the setting and what to do.
    """
    if name in GLUE:
        for key in ("problem", "labels", "hub_config", "hub_dev"):
            if getattr(data, key) is not None:
                raise ValueError(f"data.{key} has no effect on GLUE's {name}, which fixes it; leave it out")
        for key in ("text", "text_pair", "label"):
            if getattr(data, key) is not None and data.train is None:
                raise ValueError(f"data.{key} has no effect on GLUE's own columns; leave it out")
        return
    if data.directory is not None:
        raise ValueError(f"data.directory is for GLUE's tasks ({', '.join(GLUE)}), not {name!r}; use data.train, dev")
    if data.train is None and data.hub is None:
        raise ValueError(f"{name!r} is none of GLUE's tasks ({', '.join(GLUE)}); name its files in data.train and dev")
    problem = data.problem or "classification"
    if data.labels is not None:
        _check_labels(data.labels, problem)
    for metric in data.metrics or ():
        if metric not in METRICS[problem]:
            raise ValueError(f"data.metrics: {metric!r} is not one of {', '.join(METRICS[problem])} of {problem}")


def _check_labels(labels: list[str], problem: str) -> None:
    if problem == "regression":
        raise ValueError("data.labels has no effect on regression; leave it out")
    if problem == "classification" and len(labels) < 2:
        raise ValueError(f"data.labels={labels}: a classification needs two at least")
    for label in labels:
        separated = problem == "multi_label" and SEPARATOR in label
        if separated or label != label.strip() or "\t" in label or len(label.splitlines()) != 1:
            raise ValueError(f"data.labels: {label!r} is empty, or has characters that separate labels or columns")


def _spec(name: str, data: DataSettings, train: Examples | None) -> TaskSpec:
    if name in GLUE:
        glue = GLUE[name]
        metrics = tuple(data.metrics or glue.metrics)
        return check_metrics(
            TaskSpec(name=name, problem=glue.problem, labels=glue.labels, metrics=metrics, bounds=glue.bounds)
        )
    problem = data.problem or "classification"
    labels: tuple[str, ...] = ()
    if data.labels is not None:
        labels = tuple(data.labels)
    elif train is not None and problem != "regression":
        labels = find_labels(train, problem)
    metrics = tuple(data.metrics or default_metrics(problem, len(labels)))
    return check_metrics(TaskSpec(name=name, problem=problem, labels=labels, metrics=metrics))


def _find_splits(name: str, data: DataSettings) -> list[Split]:
    """Train, then dev, then test splits that exist.

    Raises:
        ValueError: If train or dev is missing, or a hub data set has labels in another order than GLUE.
    """
    if data.train is not None:
        return _own_files(name, data)
    if data.directory is not None:
        return _glue_files(GLUE[name], data.directory)
    return _hub_splits(name, data)


def _texts_and_label(name: str, data: DataSettings) -> tuple[tuple[str, ...], str]:
    """Columns of own files and hub data sets."""
    if data.text is not None:
        texts = (data.text,) if data.text_pair is None else (data.text, data.text_pair)
    else:
        texts = GLUE[name].hub_texts if name in GLUE else (DEFAULT_TEXT,)
    return texts, data.label or DEFAULT_LABEL


def _own_files(name: str, data: DataSettings) -> list[Split]:
    texts, label = _texts_and_label(name, data)
    if name in GLUE and len(texts) != len(GLUE[name].hub_texts):
        raise ValueError(f"data.text, text_pair: GLUE's {name} has {len(GLUE[name].hub_texts)} text(s) in a row")
    return [
        Split(name=split, files=files, texts=texts, label=label)
        for split, files in (("train", data.train), ("dev", data.dev), ("test", data.test))
        if files
    ]


def _glue_files(glue: GlueTask, directory: Path) -> list[Split]:
    folder = directory / glue.folder if (directory / glue.folder).is_dir() else directory
    labelled = ["train", *(f"dev{part}" for part in glue.parts)]
    found: list[Split] = []
    for name in (*labelled, *(f"test{part}" for part in glue.parts)):
        candidates = [folder / f"{name}.tsv{suffix}" for suffix in ("", *COMPRESSIONS)]
        files = tuple(path for path in candidates if path.is_file())[:1]
        if files:
            has_label = name in labelled
            found.append(
                Split(
                    name=name,
                    files=files,
                    texts=glue.texts,
                    label=glue.label if has_label else None,
                    header=glue.header if has_label else None,
                )
            )
    _require_train_and_dev(found, f"{folder}: no {{}}.tsv there", glue.parts)
    return found


def _hub_splits(name: str, data: DataSettings) -> list[Split]:
    texts, label = _texts_and_label(name, data)
    glue = GLUE.get(name)
    hub, config = data.hub or HUB_GLUE, name if glue else data.hub_config
    parts = glue.parts if glue else ("",)
    dev = data.hub_dev or DEFAULT_DEV
    names = {"train": "train", **{f"dev{part}": dev + part for part in parts}}
    names |= {f"test{part}": f"test{part}" for part in parts if f"test{part}" not in names.values()}
    datasets = load_hub(hub, config)
    found = [
        Split(name=split, dataset=datasets[theirs], source=f"{hub}: {theirs}", texts=texts, label=label)
        for split, theirs in names.items()
        if theirs in datasets
    ]
    for split in found:
        _check_label_order(split, glue)
    _require_train_and_dev(found, f"{hub}: no split {{}}; there are {', '.join(datasets)}", parts, dev)
    return found


def _check_label_order(split: Split, glue: GlueTask | None) -> None:
    names: Any = getattr(split.dataset.features.get(split.label), "names", None)
    if glue and names is not None and tuple(names) != glue.labels:
        raise ValueError(f"{split.source}: the labels are {', '.join(names)}, not {', '.join(glue.labels)}, in order")


def _require_train_and_dev(found: list[Split], problem: str, parts: tuple[str, ...], dev: str = "dev") -> None:
    names = [split.name for split in found]
    if "train" not in names:
        raise ValueError(problem.format("train"))
    if not any(name.startswith("dev") for name in names):
        raise ValueError(problem.format(f"{dev}{parts[0]}"))
