"""Labels from cells to numbers: class numbers, real numbers, or one 0 or 1 for each class."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsdistill.core import Problem
from dsdistill.corpus.tables import checked_text
from dsdistill.tasks.examples import Examples
from dsdistill.tasks.spec import TaskSpec

SEPARATOR = "|"
"""Between the names in one cell of a multi-label task; no name may hold it."""

_SHOWN = 20


def find_labels(examples: Examples, problem: Problem) -> tuple[str, ...]:
    """The class names of an own task: in the hub's order if it names them, else sorted (numbers by value).

    Raises:
        ValueError: If they are fewer than a task needs, or look like the numbers of a regression.
    """
    cells = examples.labels or []
    if examples.label_names is not None:
        return examples.label_names
    if problem == "multi_label":
        found = {name for row, cell in enumerate(cells) for name in _names(cell, examples, row)}
    else:
        found = {_name(cell, examples, row) for row, cell in enumerate(cells)}
    values = [_real(name) for name in found]
    if problem == "classification" and len(found) > 1 and all(value is not None for value in values):
        for value in values:
            if value is not None and not value.is_integer():
                raise ValueError(f"the labels are numbers such as {value}; use problem: regression, or name `labels`")
    needed = 2 if problem == "classification" else 1
    if len(found) < needed:
        raise ValueError(f"{examples.place(0)} and all others have the labels {sorted(found)}; {needed} are needed")
    if all(value is not None and value.is_integer() for value in values):
        return tuple(sorted(found, key=lambda name: (float(name), name)))
    return tuple(sorted(found))


def encode_labels(spec: TaskSpec, examples: Examples) -> NDArray[Any] | None:
    """Labels as the loss wants them.

    Classes may be written by name or, where no name is a number, by their number in the order of `spec.labels`.

    Returns:
        classification int64 (N,), regression float32 (N,), multi_label float32 (N, C) of 0 and 1; None without labels.

    Raises:
        ValueError: If a label is missing, unknown or out of range; names file, line, label and what is known.
    """
    cells = examples.labels
    if cells is None:
        return None
    if spec.problem == "regression":
        return np.array([_number(cell, spec, examples, row) for row, cell in enumerate(cells)], np.float32)
    numbers = {name: number for number, name in enumerate(spec.labels)}
    if all(_real(name) is None for name in spec.labels):
        numbers |= {str(number): number for number in range(len(spec.labels))}

    def find(name: str, row: int) -> int:
        if name not in numbers:
            shown = ", ".join(spec.labels[:_SHOWN]) + (", ..." if len(spec.labels) > _SHOWN else "")
            raise ValueError(f"{examples.place(row)}: label {name!r} is not one of task {spec.name}: {shown}")
        return numbers[name]

    if spec.problem == "classification":
        return np.array([find(_name(cell, examples, row), row) for row, cell in enumerate(cells)], np.int64)
    labels = np.zeros((len(cells), len(spec.labels)), np.float32)
    for row, cell in enumerate(cells):
        for name in _names(cell, examples, row):
            labels[row, find(name, row)] = 1
    return labels


def _name(cell: Any, examples: Examples, row: int) -> str:
    """One class name.

    Raises:
        ValueError: If the cell is empty, or neither text nor a whole number.
    """
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, int):
        return str(cell)
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise ValueError(f"{examples.place(row)}: no label")
    if not isinstance(cell, str):
        hint = "; use problem: regression for numbers" if isinstance(cell, float) else ""
        raise ValueError(f"{examples.place(row)}: label {cell!r} is a {type(cell).__name__}, not a class name{hint}")
    name = checked_text(cell, "label", examples.place(row)).strip()
    if "\t" in name or len(name.splitlines()) > 1:
        raise ValueError(f"{examples.place(row)}: label {name!r} holds a tab or a line end")
    return name


def _names(cell: Any, examples: Examples, row: int) -> Iterable[str]:
    """Class names of one row of a multi-label task, perhaps none."""
    if cell is None:
        return ()
    parts = [part for part in cell.split(SEPARATOR) if part.strip()] if isinstance(cell, str) else cell
    if not isinstance(parts, list):
        raise ValueError(
            f"{examples.place(row)}: labels {cell!r} are neither a list nor text with {SEPARATOR!r} between names"
        )
    names = [_name(part, examples, row) for part in parts]
    for name in names:
        if SEPARATOR in name:
            raise ValueError(f"{examples.place(row)}: label {name!r} holds {SEPARATOR!r}, which separates labels")
    return names


def _number(cell: Any, spec: TaskSpec, examples: Examples, row: int) -> float:
    value = None if isinstance(cell, bool) else _real(cell)
    if value is None:
        raise ValueError(f"{examples.place(row)}: label {cell!r} is not a number, which task {spec.name} needs")
    low, high = spec.bounds or (-float(np.finfo(np.float32).max), float(np.finfo(np.float32).max))
    if not low <= value <= high:
        raise ValueError(f"{examples.place(row)}: label {value} is out of range; it must be from {low} to {high}")
    return value


def _real(cell: Any) -> float | None:
    """The finite number that a cell holds, or None."""
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None
