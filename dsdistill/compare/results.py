"""The results file of a grid: one JSON line per cell that is done or has failed, and never two for one cell."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from dsdistill.compare.grid import Grid, Run
from dsdistill.compare.kinds import RESULTS, find_object, is_done
from dsdistill.compare.workers import Outcome
from dsdistill.config.problems import read_mapping
from dsdistill.corpus.files import read_json, write_text
from dsdistill.training.run_directory import RECIPE, difference, fingerprint

FILE = "results.jsonl"
DONE, FAILED = "done", "failed"
Line = dict[str, Any]


Scores = dict[str, dict[str, float]]


class _Head(BaseModel):
    """What every line has; there is more in it."""

    cell: str
    axes: dict[str, str]
    recipe_sha256: str


class _FailedLine(_Head):
    status: Literal["failed"]
    error: str


class _DoneLine(_Head):
    status: Literal["done"]
    primary: str
    scores: Scores
    baseline: Scores
    teacher_scores: Scores | None
    teacher_directory: str | None
    student: dict[str, Any]
    teacher: dict[str, Any]
    training: dict[str, Any]


_LINE = TypeAdapter(Annotated[_DoneLine | _FailedLine, Field(discriminator="status")])


def read(path: Path) -> list[Line]:
    """The lines of a results file; none if there is no file.

    Raises:
        ValueError: If a line is not what this module writes; names it.
    """
    if not path.is_file():
        return []
    lines = []
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error}); delete it, the cells are read again") from None
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            _LINE.validate_python(line)
        except (ValueError, RecursionError) as error:
            kind = "no line of results" if isinstance(error, ValidationError) else "no JSON"
            problem = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{path}:{number} is {kind} ({problem}); delete that line, its cell is read again"
            ) from None
        lines.append(line)
    return lines


@contextlib.contextmanager
def changing(path: Path, grid: Grid) -> Iterator[dict[str, Line]]:
    """The lines by cell, to be changed within; written whole at the end. Other processes wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        before = read(path)
        lines = {line["cell"]: line for line in before}
        yield lines
        order = {cell.id: number for number, cell in enumerate(grid.cells)}
        after = sorted(lines.values(), key=lambda line: order.get(line["cell"], len(order)))
        if after != before:
            write_text(path, "".join(json.dumps(line) + "\n" for line in after))


def collect(path: Path, grid: Grid, cells: Iterable[Run], *, retry_failed: bool = False) -> list[Run]:
    """Bring the results file in line with the run directories.

    A kill between a run's end and its line loses nothing, and a line whose run was deleted, or belongs to other
    settings, goes.

    Args:
        path: The results file.
        grid: Says the order of the lines.
        cells: Those that are looked at.
        retry_failed: Forget failures.

    Returns:
        The cells that are still to be run.

    Raises:
        ValueError: If a run directory belongs to another recipe, or the file to another grid.
    """
    todo, problems = [], []
    with changing(path, grid) as lines:
        strange = [line["cell"] for line in lines.values() if list(line["axes"]) != list(grid.settings.axes)]
        if strange:
            raise ValueError(f"{path} has cells of other axes ({strange[0]}); give another `output`")
        for cell in cells:
            line = lines.get(cell.id)
            if line is not None and line["recipe_sha256"] == cell.fingerprint:
                done = is_done(cell.kind, cell.directory)
                if done == (line["status"] == DONE) and (done or not retry_failed):
                    continue
            changed = conflict(cell)
            if changed is not None:
                problems.append(f"{cell.directory} ({changed})")
            elif is_done(cell.kind, cell.directory):
                lines[cell.id] = line_of(cell)
            else:
                lines.pop(cell.id, None)
                todo.append(cell)
        if problems:
            raise ValueError(
                f"{len(problems)} run(s) in {grid.settings.output} have another recipe, first {problems[0]}; "
                "give another output, or move them away"
            )
    return todo


def add_missing(path: Path, grid: Grid) -> None:
    """Add the lines of finished runs that have none, and change nothing else."""
    with changing(path, grid) as lines:
        for cell in grid.cells:
            if cell.id not in lines and is_done(cell.kind, cell.directory) and conflict(cell) is None:
                lines[cell.id] = line_of(cell)


def conflict(run: Run) -> str | None:
    """How the recipe in a run's directory differs from the run's; None if it does not, or there is none.

    Raises:
        ValueError: If the directory holds a recipe that cannot be read.
    """
    file = run.directory / RECIPE
    if not file.is_file():
        return None
    before = find_object(run.kind.check)(read_mapping(file, "recipe"), str(file))
    return None if fingerprint(before) == run.fingerprint else difference(run.directory, run.recipe)


def record(path: Path, grid: Grid, outcome: Outcome) -> Line:
    """Write the line of a cell that has just ended."""
    line = line_of(outcome.run) if outcome.error is None else line_of_failure(outcome)
    with changing(path, grid) as lines:
        lines[outcome.run.id] = line
    return line


def line_of(cell: Run) -> Line:
    """The line of a finished cell: where it stands in the grid, and all of its results.json."""
    results = read_json(cell.directory / RESULTS)
    return {**_head(cell), "status": DONE, **results}


def line_of_failure(outcome: Outcome) -> Line:
    """The line of a failed cell."""
    log = None if outcome.log is None else str(outcome.log)
    return {**_head(outcome.run), "status": FAILED, "error": outcome.error, "log": log}


def _head(cell: Run) -> Line:
    return {
        "cell": cell.id,
        "axes": dict(cell.axes),
        "recipe_sha256": cell.fingerprint,
        "directory": str(cell.directory),
        "teacher_directory": None if cell.teacher is None else str(cell.teacher),
    }
