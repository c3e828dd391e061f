"""Columns of CSV, TSV, JSON lines, Parquet and hub data sets, row by row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsdistill.corpus.lines import LIMIT_BYTES, Meter, read_lines

_PARQUET_BATCH_ROWS = 256


def refuse(problem: str) -> None:
    """What is done with a broken row unless something else is asked for.

    Raises:
        ValueError: Always, with the problem.
    """
    raise ValueError(problem)


def csv_rows(
    path: Path,
    columns: Sequence[str],
    meter: Meter,
    *,
    delimiter: str,
    optional: Collection[str] = (),
    header: Sequence[str] | None = None,
    broken: Callable[[str], None] = refuse,
) -> Iterator[tuple[int, tuple[str | None, ...]]]:
    """Cells of some columns; comma-separated files may quote fields, tab-separated ones are read with quoting off.

    Args:
        path: The file, perhaps compressed.
        columns: Names of the wanted columns.
        meter: Counts what is read.
        delimiter: Between fields.
        optional: Those of `columns` that may be absent; their cells are None then.
        header: Names of all columns of a file without a header line.
        broken: Called for each row that has another number of fields than the header or is no row at all, with the
            problem; the row is left out if it returns.

    Yields:
        The number of the line where a row starts, from 1, and its cells in the order of `columns`.

    Raises:
        ValueError: If a column is missing, or quotes do not match over more than one line.
    """
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    csv.field_size_limit(LIMIT_BYTES)
    reader = csv.reader(
        (line for _, line in read_lines(path, meter)), delimiter=delimiter, quoting=quoting, strict=True
    )
    records = _csv_records(reader, path, broken)
    if header is None:
        number, header = next(records, (1, []))
        check_columns([name for name in columns if name not in optional], header, f"{path}: line {number}")
    places = [header.index(name) if name in header else None for name in columns]
    for number, record in records:
        if len(record) != len(header):
            broken(f"{path}: line {number}: {len(record)} fields, but the header has {len(header)}")
            continue
        yield number, tuple([None if at is None else record[at] for at in places])


def _csv_records(reader, path: Path, broken: Callable[[str], None]) -> Iterator[tuple[int, list[str]]]:
    while True:
        start = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            problem = f"{path}: row from line {start} to line {reader.line_num}: {error}"
            if reader.line_num > start:  # how many rows were swallowed is unknown
                raise ValueError(problem) from None
            broken(problem)
            continue
        if record is None:
            return
        if record:
            yield start, record


def jsonl_rows(
    path: Path,
    columns: Sequence[str],
    meter: Meter,
    *,
    optional: Collection[str] = (),
    broken: Callable[[str], None] = refuse,
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Values of some keys of JSON objects, one object a line; arguments and results as in `csv_rows`.

    Raises:
        ValueError: If a key is missing.
    """
    needed = [name for name in columns if name not in optional]
    for number, line in read_lines(path, meter):
        if not line.strip():
            continue
        place = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or a number of more digits than Python reads
            broken(f"{place}: not JSON ({error}); one object per line is needed")
            continue
        if not isinstance(row, dict):
            broken(f"{place}: a JSON {type(row).__name__}, not an object; one object per line is needed")
            continue
        check_columns(needed, row, place)
        yield number, tuple([row.get(name) for name in columns])


def parquet_rows(
    path: Path, columns: Sequence[str], meter: Meter, *, optional: Collection[str] = ()
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Values of some columns with the number of their row, from 1; a few hundred rows in memory at a time.

    Raises:
        ValueError: If the file is not Parquet, or a column is missing.
    """
    before, size = meter.done, path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty")
    row_number = 0
    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            check_columns([name for name in columns if name not in optional], present, str(path))
            wanted = [name for name in dict.fromkeys(columns) if name in present]
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS, columns=wanted):
                meter.done = before + size * (row_number + len(batch)) // file.metadata.num_rows
                values = {name: batch.column(name).to_pylist() for name in wanted}
                nothing = [None] * len(batch)
                for cells in zip(*(values.get(name, nothing) for name in columns), strict=True):
                    row_number += 1
                    yield row_number, cells
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet after row {row_number} ({error})") from None


def read_csv(path: Path, column: str, where: Mapping[str, str], meter: Meter, *, delimiter: str) -> Iterator[str]:
    """Texts of one column of the rows whose cells have the values of `where`.

    Raises:
        ValueError: If a column is missing, a row has another number of fields than the header, or quotes do not match.
    """
    wanted = list(where.values())
    for _, (text, *cells) in csv_rows(path, (column, *where), meter, delimiter=delimiter):
        if cells == wanted and text is not None:
            yield text


def read_jsonl(path: Path, column: str, where: Mapping[str, str], meter: Meter) -> Iterator[str]:
    """Texts of one key of JSON objects, one object a line.

    Raises:
        ValueError: If a line is not a JSON object, lacks a key, or its text is not a string.
    """
    for number, (text, *cells) in jsonl_rows(path, (column, *where), meter):
        if _fit(cells, where):
            yield checked_text(text, column, f"{path}: line {number}")


def read_parquet(path: Path, column: str, where: Mapping[str, str], meter: Meter) -> Iterator[str]:
    """Texts of one column.

    Raises:
        ValueError: If the file is not Parquet, a column is missing, or the text is not a string.
    """
    for number, (text, *cells) in parquet_rows(path, (column, *where), meter):
        if _fit(cells, where):
            yield checked_text(text, column, f"{path}: row {number}")


def read_hub(
    name: str, column: str, where: Mapping[str, str], *, config: str | None, split: str | None
) -> Iterator[str]:
    """Texts of one column of a hub data set (or a local directory of data files), streamed.

    Raises:
        ValueError: If it cannot be found or read, or a column is missing.
    """
    for row_number, row in _hub_rows(name, config, split or "train"):
        place = f"{name}: row {row_number}"
        check_columns((column, *where), row, place)
        if _fit([row[name] for name in where], where):
            yield checked_text(row[column], column, place)


def _hub_rows(name: str, config: str | None, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets  # slow to import, and needed for the hub only
    from datasets.exceptions import DatasetsError

    try:
        yield from enumerate(datasets.load_dataset(name, config, split=split, streaming=True), 1)
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        raise ValueError(f"{name}: no such file, and not readable as a hub data set ({error})") from None


def check_columns(wanted: Sequence[str], present: Collection[str], place: str) -> None:
    """Refuse a row or header without a wanted column.

    Raises:
        ValueError: Names the place, the column and those that are there.
    """
    missing = [name for name in wanted if name not in present]
    if missing:
        names = ", ".join(map(repr, missing))
        raise ValueError(f"{place}: no column {names}; the columns are {', '.join(map(repr, present))}")


def _fit(cells: Iterable[Any], where: Mapping[str, str]) -> bool:
    """Whether cells have the wanted values, written as text; JSON's spelling of true, false and null also counts."""
    return all(
        str(cell) == value or json.dumps(cell, default=str) == value
        for cell, value in zip(cells, where.values(), strict=True)
    )


def checked_text(value: object, column: str, place: str) -> str:
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
