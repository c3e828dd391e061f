"""The table of objectives as Markdown, for docs/objectives.md and for people."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from dsdistill.objectives.registry import OBJECTIVES, Objective

MARKERS = ("<!-- objectives -->", "<!-- /objectives -->")
"""What stands before and after the table in a document, each on a line of its own."""

COLUMNS = ("name", "equation", "paper", "student signals", "teacher signals", "parameters")


def markdown_table() -> str:
    """All objectives, one row each, in alphabetical order: `|` inside a cell is escaped, lines end in newlines."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [_cells(OBJECTIVES[name]) for name in sorted(OBJECTIVES)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def with_table(document: str, table: str, markers: tuple[str, str] = MARKERS) -> str:
    """A document with a table between its markers.

    Raises:
        ValueError: If it does not have each marker once, in order.
    """
    start, end = markers
    before, found, rest = document.partition(f"{start}\n")
    old, closed, after = rest.partition(f"{end}\n")
    if not (found and closed) or any(marker in part for marker in markers for part in (before, old, after)):
        raise ValueError(f"has no single pair of lines {start} and {end} for the table; put them in")
    return f"{before}{start}\n{table}{end}\n{after}"


def print_or_update(program: str, description: str | None, table: str, markers: tuple[str, str]) -> None:
    """A command that prints a table, or with `--update FILE` puts it into a document."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument(
        "--update", type=Path, metavar="FILE", help="replace the table between the markers of this file"
    )
    file = parser.parse_args().update
    if file is None:
        print(table, end="")
        return
    try:
        file.write_text(with_table(file.read_text(encoding="utf-8"), table, markers), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(f"{file}: {error}")


def _cells(entry: Objective) -> tuple[str, ...]:
    student, teacher = entry.needs({})
    parameters = "; ".join(f"`{name}`: {_described(parameter)}" for name, parameter in entry.params.items())
    signals = [", ".join(sorted(names)) or "-" for names in (student, teacher)]
    by_default = " (by default)" if callable(entry.student) else ""
    texts = (f"`{entry.equation}`", entry.paper, *(names + by_default for names in signals), parameters or "-")
    return (f"`{entry.name}`", *(text.replace("|", "\\|") for text in texts))


def _described(parameter: inspect.Parameter) -> str:
    kind = _kind(parameter.annotation)
    return kind if parameter.default is parameter.empty else f"{kind} = {_yaml(parameter.default)}"


def _kind(annotation: Any) -> str:
    """The type in words: the choices of a `Literal`, else its plain name."""
    if get_origin(annotation) is Literal:
        return " or ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list"
    if annotation is type(None):
        return "null"
    if get_args(annotation):
        return " or ".join(_kind(choice) for choice in get_args(annotation))
    return getattr(annotation, "__name__", str(annotation))


def _yaml(value: Any) -> str:
    """A value as one writes it in a recipe."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
