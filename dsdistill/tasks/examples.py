"""Texts and labels as they stand in files and hub data sets, each with its place."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsdistill.corpus.lines import Meter
from dsdistill.corpus.sources import format_of
from dsdistill.corpus.tables import check_columns, checked_text, csv_rows, jsonl_rows, parquet_rows, refuse

Cells = Iterator[tuple[int, tuple[Any, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Where the rows of one split are: in files, or in a data set of the hub's library.

    Attributes:
        name: train, dev, dev_matched, ...
        files: Files read one after the other.
        dataset: A `datasets.Dataset`, instead of files.
        source: The data set's name, for messages.
        texts: One or two columns.
        label: Its column; None if there is none.
        header: Columns of files without a header line.
    """

    name: str
    files: tuple[Path, ...] = ()
    dataset: Any = None
    source: str = ""
    texts: tuple[str, ...]
    label: str | None
    header: tuple[str, ...] | None = None

    @property
    def is_test(self) -> bool:
        """Whether labels may be missing, and no row may be left out, since predictions are counted by row."""
        return self.name.startswith("test")

    @property
    def columns(self) -> tuple[str, ...]:
        """The texts, and the label if there is one."""
        return self.texts if self.label is None else (*self.texts, self.label)

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that may be absent."""
        return (self.label,) if self.is_test and self.label is not None else ()


@dataclass(slots=True)
class Examples:
    """Rows of one split, not yet tokenized.

    Attributes:
        texts: First texts.
        pairs: Second texts, as many, or None.
        labels: Cells of the label column as read, as many, or None if there is no label.
        label_names: Names that a hub data set gives to its labels, in order.
        notes: What a person should know: rows left out.
    """

    texts: list[str] = field(default_factory=list)
    pairs: list[str] | None = None
    labels: list[Any] | None = None
    label_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    _numbers: list[int] = field(default_factory=list)
    _sources: list[tuple[int, str]] = field(default_factory=list)

    def place(self, row: int) -> str:
        """File and line (or row) of an example, for messages."""
        source = bisect_right(self._sources, row, key=lambda entry: entry[0]) - 1
        return f"{self._sources[source][1]} {self._numbers[row]}"


class _Broken:
    """Rows that are left out: counted, the first one remembered."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def __call__(self, problem: str) -> None:
        self.count += 1
        self.first = self.first or problem


def read_examples(split: Split, *, skip_broken: bool = False) -> Examples:
    """Read one split.

    Args:
        split: Where it is.
        skip_broken: Leave out rows that have no text or another number of fields than the header. In a test split
            rows without text are kept, since they need a prediction, and other broken rows are refused.

    Raises:
        ValueError: At the first fault of the input; names file and line.
    """
    broken = _Broken()
    on_empty = broken if skip_broken else refuse
    on_ragged = refuse if split.is_test else on_empty
    examples = Examples(pairs=[] if len(split.texts) == 2 else None)
    labels: list[Any] = []
    for source, rows in _open(split, on_ragged):
        examples._sources.append((len(examples.texts), source))
        _read(rows, source, split, examples, labels, on_empty)
    if not examples.texts:
        raise ValueError(f"{split.source or ' '.join(map(str, split.files))}: no row found")
    if split.label is not None:
        examples.labels, examples.label_names = _named(split, labels)
        if split.is_test:
            examples.labels = _all_or_none(split, examples)
    if broken.count:
        done = "without text kept" if split.is_test else "left out"
        examples.notes = (f"{split.name}: {broken.count} broken rows {done}; the first: {broken.first}",)
    return examples


def _read(
    rows: Cells, source: str, split: Split, examples: Examples, labels: list[Any], on_empty: Callable[[str], None]
) -> None:
    keep_empty, has_label = split.is_test, split.label is not None
    first, *second = split.texts
    for number, cells in rows:
        place = f"{source} {number}"
        text = checked_text(cells[0], first, place)
        pair = checked_text(cells[1], second[0], place) if second else "-"
        if not text.strip() or not pair.strip():
            on_empty(f"{place}: column {second[0] if text.strip() else first!r} has no text")
            if not keep_empty:
                continue
        examples._numbers.append(number)
        examples.texts.append(text)
        if examples.pairs is not None:
            examples.pairs.append(pair)
        if has_label:
            labels.append(cells[-1])


def _open(split: Split, on_ragged: Callable[[str], None]) -> Iterator[tuple[str, Cells]]:
    if split.dataset is not None:
        yield f"{split.source}: row", _hub_rows(split)
    for path in split.files:
        unit = "row" if format_of(path) == "parquet" else "line"
        yield f"{path}: {unit}", _file_rows(path, split, on_ragged)


def _file_rows(path: Path, split: Split, on_ragged: Callable[[str], None]) -> Cells:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    kind, columns, optional, meter = format_of(path), split.columns, split.optional, Meter()
    if kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        return csv_rows(
            path, columns, meter, delimiter=delimiter, optional=optional, header=split.header, broken=on_ragged
        )
    if kind == "jsonl":
        return jsonl_rows(path, columns, meter, optional=optional, broken=on_ragged)
    if kind == "parquet":
        return parquet_rows(path, columns, meter, optional=optional)
    raise ValueError(f"{path}: neither .csv, .tsv, .jsonl, .json nor .parquet (perhaps with .gz, .xz or .zst)")


def load_hub(name: str, config: str | None) -> dict[str, Any]:
    """All splits of a hub data set (or of a local directory of one), each a `datasets.Dataset`.

    Raises:
        ValueError: If it cannot be found or read.
    """
    import datasets  # slow to import, and needed for the hub only
    from datasets.exceptions import DatasetsError

    try:
        return {str(split): dataset for split, dataset in datasets.load_dataset(name, config).items()}
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        where = f"{name}, configuration {config}," if config else name
        raise ValueError(f"{where} is not readable as a hub data set ({' '.join(str(error).split())})") from None


def _hub_rows(split: Split) -> Cells:
    needed = [column for column in split.columns if column not in split.optional]
    check_columns(needed, split.dataset.column_names, split.source)
    start = 1
    for batch in split.dataset.iter(batch_size=1000):
        nothing = [None] * len(batch[split.texts[0]])
        yield from enumerate(zip(*(batch.get(column, nothing) for column in split.columns), strict=True), start)
        start += len(nothing)


def _named(split: Split, labels: list[Any]) -> tuple[list[Any], tuple[str, ...] | None]:
    """Labels by name where a hub data set knows the names of its numbers, and these names; -1 is a missing label."""
    feature = None if split.dataset is None else split.dataset.features.get(split.label)
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    if names is None:
        return labels, None
    by_number: dict[int, str | None] = {-1: None, **dict(enumerate(names))}

    def name(label: Any) -> Any:
        if isinstance(label, list):
            return [name(part) for part in label]
        return by_number.get(label, label)

    return [name(label) for label in labels], tuple(names)


def _all_or_none(split: Split, examples: Examples) -> list[Any] | None:
    """Labels of a test split, None if no row has one."""
    labels = examples.labels or []
    missing = [label is None or label == "" for label in labels]
    if all(missing) or (split.dataset is not None and all(label == -1 for label in labels)):
        return None
    if any(missing):
        raise ValueError(f"{examples.place(missing.index(True))}: no {split.label!r}, but other rows have one")
    return labels
