"""One text column of CSV, TSV, JSON lines, Parquet and hub data sets, row by row."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsdistill.corpus.lines import LIMIT_BYTES, Meter, read_lines

_PARQUET_BATCH_ROWS = 256


def read_csv(path: Path, column: str, where: Mapping[str, str], meter: Meter, *, delimiter: str) -> Iterator[str]:
    """Texts of one column; comma-separated files may quote fields, tab-separated ones are read with quoting off.

    Raises:
        ValueError: If a column is missing, a row has another number of fields than the header, or quotes do not match.
    """
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    csv.field_size_limit(LIMIT_BYTES)
    reader = csv.reader(
        (line for _, line in read_lines(path, meter)), delimiter=delimiter, quoting=quoting, strict=True
    )
    rows = _csv_rows(reader, path)
    header = next(rows)
    _check_columns((column, *where), header, f"{path}: line 1")
    text_at = header.index(column)
    conditions = [(header.index(name), value) for name, value in where.items()]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}: line {reader.line_num}: {len(row)} fields, but the header has {len(header)}")
        if all(row[at] == value for at, value in conditions):
            yield row[text_at]


def _csv_rows(reader, path: Path) -> Iterator[list[str]]:
    start = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}: row from line {start} to line {reader.line_num}: {error}") from None
        if row is None:
            return
        start = reader.line_num + 1
        if row:
            yield row


def read_jsonl(path: Path, column: str, where: Mapping[str, str], meter: Meter) -> Iterator[str]:
    """Texts of one key of JSON objects, one object a line.

    Raises:
        ValueError: If a line is not a JSON object, lacks a key, or its text is not a string.
    """
    for number, line in read_lines(path, meter):
        if not line.strip():
            continue
        place = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({error}); one object per line is needed") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a JSON {type(row).__name__}, not an object; one object per line is needed")
        _check_columns((column, *where), row, place)
        if _fits(row, where):
            yield _checked_text(row[column], column, place)


def read_parquet(path: Path, column: str, where: Mapping[str, str], meter: Meter) -> Iterator[str]:
    """Texts of one column, a few hundred rows in memory at a time.

    Raises:
        ValueError: If the file is not Parquet, a column is missing, or the text is not a string.
    """
    for row_number, row in _parquet_rows(path, (column, *where), meter):
        if _fits(row, where):
            yield _checked_text(row[column], column, f"{path}: row {row_number}")


def _parquet_rows(path: Path, columns: tuple[str, ...], meter: Meter) -> Iterator[tuple[int, dict[str, Any]]]:
    before, size = meter.done, path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty")
    row_number = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(columns, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS, columns=list(dict.fromkeys(columns))):
                meter.done = before + size * (row_number + len(batch)) // file.metadata.num_rows
                for row_number, row in enumerate(batch.to_pylist(), row_number + 1):  # noqa: B020 -- goes on counting
                    yield row_number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet after row {row_number} ({error})") from None


def read_hub(
    name: str, column: str, where: Mapping[str, str], *, config: str | None, split: str | None
) -> Iterator[str]:
    """Texts of one column of a hub data set (or a local directory of data files), streamed.

    Raises:
        ValueError: If it cannot be found or read, or a column is missing.
    """
    for row_number, row in _hub_rows(name, config, split or "train"):
        place = f"{name}: row {row_number}"
        _check_columns((column, *where), row, place)
        if _fits(row, where):
            yield _checked_text(row[column], column, place)


def _hub_rows(name: str, config: str | None, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets  # slow to import, and needed for the hub only
    from datasets.exceptions import DatasetsError

    try:
        yield from enumerate(datasets.load_dataset(name, config, split=split, streaming=True), 1)
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        raise ValueError(f"{name}: no such file, and not readable as a hub data set ({error})") from None


def _check_columns(wanted: tuple[str, ...], present: Collection[str], place: str) -> None:
    missing = [name for name in wanted if name not in present]
    if missing:
        raise ValueError(f"{place}: no column {missing[0]!r}; the columns are {', '.join(map(repr, present))}")


def _fits(row: Mapping[str, Any], where: Mapping[str, str]) -> bool:
    """Whether cells have the wanted values, written as text; JSON's spelling of true, false and null also counts."""
    return all(str(row[name]) == value or json.dumps(row[name], default=str) == value for name, value in where.items())


def _checked_text(value: object, column: str, place: str) -> str:
    """The text of a cell; null is an empty text.

    Raises:
        ValueError: If it is not text, too long, or has zero bytes.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{place}: column {column!r} holds {type(value).__name__}, not text")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: half a surrogate pair at character {error.start}, not text") from None
    if size > LIMIT_BYTES:
        raise ValueError(f"{place}: a text of {size} bytes is over the limit of {LIMIT_BYTES}; break it up")
    if "\0" in value:
        raise ValueError(f"{place}: binary data, not text (zero byte at character {value.index(chr(0))})")
    return value
