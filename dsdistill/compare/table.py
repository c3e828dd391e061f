"""The Markdown page of a grid: scores, tests, every metric, cost, sizes, failures; all from the results file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from dsdistill.compare.grid import GridSettings
from dsdistill.compare.results import FAILED, FILE, Line
from dsdistill.compare.scores import (
    Row,
    Summary,
    all_metrics,
    budgets,
    cost_of,
    mean_and_deviation,
    shapes_of,
    summarize,
    teacher_seconds,
)
from dsdistill.compare.significance import compare
from dsdistill.speed import Timing

HOW = f"""\
Every number here comes from `{FILE}`, one JSON object per cell, and can be computed from it again:
a **score** is `100 * scores[first split][primary]` (MNLI: the matched split); a field is the mean over seeds +- the
sample standard deviation (n - 1). **average** is the mean over tasks for each seed that has all of them, then mean +-
deviation over those seeds. **majority** is `baseline`, what always guessing the most frequent class (for regression:
the mean) gets. **teacher** is `teacher_scores`, one value per teacher. **kept** is the row's average divided by the
average of its teachers over the same tasks."""

TESTS = """\
Student's paired t-test (two-sided, `scipy.stats.ttest_rel`) between every two rows that differ on one axis; a pair is
the same task and seed in both rows. n: pairs; difference: mean of first - second in points; Holm: p corrected for all
{count} tests of this page. \\* marks Holm < 0.05. The pairs mix tasks of different spread, as in the study."""


def page(settings: GridSettings, lines: Sequence[Line], speeds: Mapping[str, Sequence[Timing]], missing: int) -> str:
    """The whole page.

    Args:
        settings: Of the grid.
        lines: Of its results file.
        speeds: Measured speeds by shape, see `scores.shapes_of`.
        missing: Cells that are neither done nor failed.
    """
    summary = summarize(lines, settings.best_over, settings.teacher_row)
    failed = [line for line in lines if line["status"] == FAILED]
    head = f"{len(summary.lines)} cells done, {len(failed)} failed, {missing} to do."
    parts = [f"# {settings.name}", settings.source.strip(), head]
    if summary.rows:
        parts += ["## Scores", HOW, *choice(settings), *scores(summary)]
        parts += ["## Budgets and cost", budget_sentence(summary), cost(summary)]
        parts += tests(summary.rows)
        parts += ["## Every metric", *(metrics(summary.rows, task) for task in summary.tasks)]
        parts += ["## Sizes and speed", sizes(summary, speeds)]
    if failed:
        parts += ["## Failed cells", *(f"- `{line['cell']}`: {line['error']}" for line in failed)]
    return "\n\n".join(parts) + "\n"


def choice(settings: GridSettings) -> list[str]:
    """What was chosen on the dev set, and that it was."""
    if not settings.best_over:
        return []
    count = math.prod(len(settings.labels(axis)) for axis in settings.best_over)
    axes = " and ".join(settings.best_over)
    return [
        f"Each field shows the best of {count} values of {axes}, chosen by the mean over seeds on the dev set that is "
        "shown, as in the study: these scores flatter all rows alike."
    ]


def scores(summary: Summary) -> list[str]:
    """The main table, and the chosen values if there are any."""
    rows, tasks = summary.rows, summary.tasks
    axes = list(rows[0].labels)
    head = [*axes, *(f"{task} ({summary.metric(task)})" for task in tasks), "average", "kept %", "n"]
    body = []
    for row in rows:
        counts = sorted({len(row.of_task(task)) for task in tasks})
        fields = [field(row.of_task(task)) for task in tasks]
        fields += [field(row.averages(tasks)), number(summary.kept(row), 1), "-".join(map(str, counts))]
        body.append([*row.labels.values(), *fields])
    majority = [summary.baseline(task) for task in tasks]
    body.append([*_named("majority", axes), *map(number, majority), number(statistics.fmean(majority)), "", ""])
    teachers = [summary.teachers(task) for task in tasks]
    if any(teachers):
        average = number(summary.teacher_average())
        body.append([*_named("teacher", axes), *map(field, teachers), average, "100.0", ""])
    return [markdown(head, body), *chosen(summary)]


def _named(name: str, axes: Sequence[str]) -> list[str]:
    """The fields under the axes of a row that has no labels; there is at least one axis."""
    return [name, *[""] * (len(axes) - 1)]


def chosen(summary: Summary) -> list[str]:
    """Which values were best, per row and task."""
    rows = [*summary.rows, *([summary.reference] if summary.reference else [])]
    if not any(row.chosen for row in rows):
        return []
    body = [
        [
            *row.labels.values(),
            *(", ".join(row.chosen[task].values()) if task in row.chosen else "-" for task in summary.tasks),
        ]
        for row in rows
    ]
    return ["Chosen values:", markdown([*rows[0].labels, *summary.tasks], body)]


def budget_sentence(summary: Summary) -> str:
    """Whether all rows were trained for equally long, and how long; else who was not."""
    by_task = budgets(summary.rows)
    if all(len(found) == 1 for found in by_task.values()):
        told = "; ".join(
            f"{task} {steps:,} steps, {seen:,} rows" for task, found in by_task.items() for steps, seen in found
        )
        return f"Equal budgets: all rows had the same number of optimizer steps and training rows per run: {told}."
    told = [
        f"- {task}: {steps:,} steps, {seen:,} rows: {', '.join(names)}"
        for task, found in by_task.items()
        for (steps, seen), names in found.items()
    ]
    return "**Budgets differ** between rows, per run:\n\n" + "\n".join(told)


def cost(summary: Summary) -> str:
    """What each row took."""
    body = []
    for row in summary.rows:
        total = cost_of(row.tried)
        seconds = [number(total.seconds / total.runs, 1), number(total.seconds, 1)]
        body.append([*row.labels.values(), str(total.runs), *seconds, f"{total.steps:,}", f"{total.rows:,}"])
    head = [*summary.rows[0].labels, "runs", "seconds per run", "seconds", "steps", "rows seen"]
    devices = ", ".join(dict.fromkeys(line["device"] for line in summary.lines))
    told = f"Sums over the runs of a row: time in optimizer steps, on {devices}; runs may have shared the device."
    teachers = teacher_seconds(summary.lines)
    if teachers:
        each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in teachers.items())
        told += f" Fine-tuning the teachers took {sum(teachers.values()):.1f} s more, once for all rows: {each}."
    return markdown(head, body) + f"\n\n{told}"


def tests(rows: Sequence[Row]) -> list[str]:
    """The t-tests, a table per axis."""
    results = compare([(row.labels, row.scores()) for row in rows])
    if not results:
        return []
    parts = ["## Paired t-tests", TESTS.format(count=sum(not math.isnan(test.p) for test in results))]
    for axis in rows[0].labels:
        others = [name for name in rows[0].labels if name != axis]
        settings = list(dict.fromkeys(tuple(row.labels[name] for name in others) for row in rows))
        body = [
            [
                *(test.first[name] for name in others),
                *(test.first[axis], test.second[axis], str(test.n), number(test.difference), number(test.t)),
                *(probability(test.p), probability(test.p_holm) + (" \\*" if test.p_holm < 0.05 else "")),
            ]
            for setting in settings
            for test in results
            if test.axis == axis and tuple(test.first[name] for name in others) == setting
        ]
        if body:
            head = [*others, f"first {axis}", f"second {axis}", "n", "difference", "t", "p", "Holm"]
            parts.append(markdown(head, body))
    return parts


def metrics(rows: Sequence[Row], task: str) -> str:
    """All metrics of one task, in their own units."""
    names = list(dict.fromkeys(name for row in rows for name in all_metrics(row, task)))
    body = [[*row.labels.values(), *(field(all_metrics(row, task).get(name, []), 4) for name in names)] for row in rows]
    return f"### {task}\n\n" + markdown([*rows[0].labels, *names], body)


def sizes(summary: Summary, speeds: Mapping[str, Sequence[Timing]]) -> str:
    """Parameters, bytes and measured speed of the shapes in the grid."""
    body = []
    for name, model in shapes_of(summary.lines).items():
        timings = speeds.get(name, ())
        speed = "; ".join(f"{t.rows_per_s:,.0f} ({t.batch} x {t.length}, {t.device})" for t in timings)
        body.append([name, f"{model['parameters']:,}", f"{model['bytes'] / 1e6:,.1f}", speed or "not measured"])
    return markdown(["model", "parameters", "MB", "rows/s (batch x length, device)"], body)


def field(values: Sequence[float], digits: int = 2) -> str:
    """Mean +- sample standard deviation; a single value stands alone."""
    mean, deviation = mean_and_deviation(values)
    return number(mean, digits) + ("" if math.isnan(deviation) else f" +- {deviation:.{digits}f}")


def number(value: float, digits: int = 2) -> str:
    """Fixed digits; a dash for nan."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def probability(p: float) -> str:
    """Three digits after the point, or powers of ten."""
    if math.isnan(p):
        return "-"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
