"""From the lines of a results file to the numbers of the table: rows, means, deviations, shares, budgets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsdistill.compare.grid import SEED, TASK
from dsdistill.compare.results import DONE, Line

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table: the cells that differ in task and seed only.

    Attributes:
        labels: By axis, tasks and seeds and axes that the best is chosen of left out.
        lines: Of the cells that are shown.
        tried: Of all its cells: more than are shown where the best of an axis is chosen.
        chosen: By task, the labels that were chosen as best.
    """

    labels: Labels
    lines: tuple[Line, ...]
    tried: tuple[Line, ...]
    chosen: Mapping[str, Labels] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Labels as one word."""
        return " ".join(self.labels.values()) or "all"

    def scores(self) -> dict[tuple[str, str], float]:
        """Primary score in points by task and seed."""
        return {(task_of(line), seed_of(line)): primary(line["scores"], line) for line in self.lines}

    def of_task(self, task: str) -> list[float]:
        """Primary scores of one task over seeds."""
        return [score for (name, _), score in self.scores().items() if name == task]

    def averages(self, tasks: Sequence[str]) -> list[float]:
        """Mean over the tasks for each seed that has them all."""
        scores = self.scores()
        seeds = dict.fromkeys(seed for _, seed in scores)
        whole = [seed for seed in seeds if all((task, seed) in scores for task in tasks)]
        return [statistics.fmean(scores[task, seed] for task in tasks) for seed in whole]


def task_of(line: Line) -> str:
    """The table's column of a cell."""
    return line["axes"].get(TASK) or line["task"]


def seed_of(line: Line) -> str:
    """What a cell is averaged over."""
    return line["axes"].get(SEED) or str(line["seed"])


def primary(scores: Mapping[str, Mapping[str, float]], line: Line) -> float:
    """The task's primary metric on the first dev split (MNLI: matched), times 100."""
    return 100 * next(iter(scores.values()))[line["primary"]]


def rows_of(lines: Iterable[Line], best_over: Sequence[str] = ()) -> list[Row]:
    """Group finished cells into rows, in the order of the lines.

    Args:
        lines: Of finished cells.
        best_over: Axes of which each row and task shows the value with the best mean over seeds; those with fewer
            seeds than others are passed over.
    """
    grouped: dict[tuple, list[Line]] = {}
    for line in lines:
        labels = tuple((k, v) for k, v in line["axes"].items() if k not in (TASK, SEED, *best_over))
        grouped.setdefault(labels, []).append(line)
    return [_row(dict(labels), members, best_over) for labels, members in grouped.items()]


def _row(labels: Labels, lines: list[Line], best_over: Sequence[str]) -> Row:
    if not best_over:
        return Row(labels=labels, lines=tuple(lines), tried=tuple(lines))
    kept, chosen = [], {}
    for task in dict.fromkeys(map(task_of, lines)):
        groups: dict[tuple, list[Line]] = {}
        for line in lines:
            if task_of(line) == task:
                groups.setdefault(tuple((axis, line["axes"][axis]) for axis in best_over), []).append(line)
        best = max(groups, key=lambda group: _merit(groups[group]))
        chosen[task] = dict(best)
        kept += groups[best]
    return Row(labels=labels, lines=tuple(kept), tried=tuple(lines), chosen=chosen)


def _merit(lines: list[Line]) -> tuple[int, float]:
    return len(lines), statistics.fmean(primary(line["scores"], line) for line in lines)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); nan for a deviation of fewer than two, and for the mean of none."""
    if not values:
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The numbers of a grid.

    Attributes:
        lines: Of finished cells.
        rows: Of the table.
        tasks: In the order of the lines.
        reference: The row that stands for the teacher, if the grid names one; it is not among `rows`.
    """

    lines: tuple[Line, ...]
    rows: tuple[Row, ...]
    tasks: tuple[str, ...]
    reference: Row | None

    def metric(self, task: str) -> str:
        """Name of the primary metric of a task."""
        return next(line["primary"] for line in self.lines if task_of(line) == task)

    def baseline(self, task: str) -> float:
        """Score of always guessing the majority (the mean, for regression), in points."""
        line = next(line for line in self.lines if task_of(line) == task)
        return primary(line["baseline"], line)

    def teachers(self, task: str, row: Row | None = None) -> list[float]:
        """Scores in points of the teachers of a task, one for each teacher.

        Args:
            task: The task.
            row: Only its teachers; those of all rows if it has none of its own.
        """
        if self.reference is not None:
            return self.reference.of_task(task)
        found = {}
        for line in self.lines if row is None else row.lines:
            if task_of(line) == task and line["teacher_scores"] is not None:
                score = primary(line["teacher_scores"], line)
                found[line["teacher_directory"] or f"{line['teacher']['model']} {score}"] = score
        return list(found.values()) if found or row is None else self.teachers(task)

    def teacher_average(self, row: Row | None = None) -> float:
        """Mean over tasks of the teachers' mean score; nan if a task has none."""
        means = [mean_and_deviation(self.teachers(task, row))[0] for task in self.tasks]
        return statistics.fmean(means)

    def kept(self, row: Row) -> float:
        """The row's average over tasks as a percentage of its teachers' average; nan if either is not whole."""
        teacher = self.teacher_average(row)
        return 100 * mean_and_deviation(row.averages(self.tasks))[0] / teacher if teacher > 0 else math.nan


def summarize(lines: Iterable[Line], best_over: Sequence[str] = (), reference: Labels | None = None) -> Summary:
    """Numbers from the lines of a results file; failed cells are passed over.

    Args:
        lines: Of the results file.
        best_over: See `rows_of`.
        reference: Labels of the row that stands for the teacher.
    """
    done = tuple(line for line in lines if line["status"] == DONE)
    rows = rows_of(done, best_over)
    is_reference = [bool(reference) and dict(reference or {}).items() <= row.labels.items() for row in rows]
    return Summary(
        lines=done,
        rows=tuple(row for row, is_it in zip(rows, is_reference, strict=True) if not is_it),
        tasks=tuple(dict.fromkeys(map(task_of, done))),
        reference=next((row for row, is_it in zip(rows, is_reference, strict=True) if is_it), None),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the runs of a row took, added up.

    Attributes:
        runs: How many.
        seconds: Training.
        steps: Optimizer steps.
        rows: Training rows seen.
    """

    runs: int
    seconds: float
    steps: int
    rows: int


def cost_of(lines: Iterable[Line]) -> Cost:
    """Sum over cells."""
    training = [line["training"] for line in lines]
    return Cost(
        runs=len(training),
        seconds=math.fsum(t["seconds"] for t in training),
        steps=sum(t["steps"] for t in training),
        rows=sum(t["rows"] for t in training),
    )


def budgets(rows: Iterable[Row]) -> dict[str, dict[tuple[int, int], list[str]]]:
    """By task, the budgets (steps, rows seen) of single runs and the names of the table rows that have them."""
    found: dict[str, dict[tuple[int, int], list[str]]] = {}
    for row in rows:
        for line in row.tried:
            names = found.setdefault(task_of(line), {}).setdefault(
                (line["training"]["steps"], line["training"]["rows"]), []
            )
            if row.name not in names:
                names.append(row.name)
    return found


def all_metrics(row: Row, task: str) -> dict[str, list[float]]:
    """Every metric of a task over seeds, as `split metric`, in its own unit."""
    found: dict[str, list[float]] = {}
    for line in row.lines:
        if task_of(line) == task:
            for split, metrics in line["scores"].items():
                for metric, value in metrics.items():
                    found.setdefault(f"{split} {metric}", []).append(value)
    return found


def teacher_seconds(lines: Iterable[Line]) -> dict[str, float]:
    """Seconds of training of each teacher that was fine-tuned for the grid, by its directory's name."""
    return {
        Path(line["teacher_directory"]).name: line["teacher"]["training"]["seconds"]
        for line in lines
        if line["teacher_directory"] is not None and "training" in line["teacher"]
    }


def shapes_of(lines: Iterable[Line]) -> dict[str, dict[str, Any]]:
    """The different students and teachers: `student 3 x 384`, with what results.json says about them."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        for who in ("teacher", "student"):
            found.setdefault(shape_name(who, line[who]), line[who])
    return found


def shape_name(who: str, model: Mapping[str, Any]) -> str:
    """`student 3 x 384`."""
    return f"{who} {model['layers']} x {model['width']}"
