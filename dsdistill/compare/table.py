"""The Markdown page of a grid: scores, tests, every metric, cost, sizes, failures; all from the results file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from dsdistill.compare.grid import GridSettings
from dsdistill.compare.results import DONE, FAILED, FILE, Line
from dsdistill.compare.scores import (
    Row,
    all_metrics,
    baseline_of,
    budgets,
    cost_of,
    mean_and_deviation,
    rows_of,
    shapes_of,
    share_of_teacher,
    task_of,
    tasks_of,
    teachers_of,
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
    rows, tasks = rows_of(lines, settings.best_over), tasks_of(lines)
    done = sum(line["status"] == DONE for line in lines)
    failed = [line for line in lines if line["status"] == FAILED]
    head = f"{done} cells done, {len(failed)} failed, {missing} to do."
    parts = [f"# {settings.name}", settings.source.strip(), head]
    if rows:
        parts += ["## Scores", HOW, *choice(settings), *scores(rows, lines, tasks)]
        parts += ["## Budgets and cost", budget_sentence(rows), cost(rows, lines)]
        parts += tests(rows)
        parts += ["## Every metric", *(metrics(rows, task) for task in tasks)]
        parts += ["## Sizes and speed", sizes(lines, speeds)]
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


def scores(rows: Sequence[Row], lines: Sequence[Line], tasks: Sequence[str]) -> list[str]:
    """The main table, and the chosen values if there are any."""
    metric = {
        task: next(line["primary"] for line in lines if line["status"] == DONE and task_of(line) == task)
        for task in tasks
    }
    axes = list(rows[0].labels)
    head = [*axes, *(f"{task} ({metric[task]})" for task in tasks), "average", "kept %", "n"]
    body = []
    for row in rows:
        fields = [field(row.of_task(task)) for task in tasks]
        average = field(row.averages(tasks))
        kept = number(share_of_teacher(row, lines, tasks), 1)
        counts = sorted({len(row.of_task(task)) for task in tasks})
        body.append([*row.labels.values(), *fields, average, kept, "-".join(map(str, counts))])
    blank = [""] * max(0, len(axes) - 1)
    majority = [baseline_of(lines, task) for task in tasks]
    body.append(
        [*["majority", *blank][: len(axes)], *map(number, majority), number(statistics.fmean(majority)), "", ""]
    )
    teachers = [list(teachers_of(lines, task).values()) for task in tasks]
    if all(teachers):
        average = number(statistics.fmean(map(statistics.fmean, teachers)))
        body.append([*["teacher", *blank][: len(axes)], *map(field, teachers), average, "100.0", ""])
    return [markdown(head, body), *chosen(rows, tasks)]


def chosen(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    """Which values were best, per row and task."""
    if not any(row.chosen for row in rows):
        return []
    body = [
        [*row.labels.values(), *(", ".join(row.chosen[task].values()) if task in row.chosen else "-" for task in tasks)]
        for row in rows
    ]
    return ["Chosen values:", markdown([*rows[0].labels, *tasks], body)]


def budget_sentence(rows: Sequence[Row]) -> str:
    """Whether all rows were trained for equally long, and how long; else who was not."""
    by_task = budgets(rows)
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


def cost(rows: Sequence[Row], lines: Sequence[Line]) -> str:
    """What each row took."""
    body = []
    for row in rows:
        total = cost_of(row.tried)
        body.append(
            [
                *row.labels.values(),
                str(total.runs),
                number(total.seconds / total.runs, 1),
                number(total.seconds, 1),
                f"{total.steps:,}",
                f"{total.rows:,}",
            ]
        )
    devices = ", ".join(dict.fromkeys(line["device"] for line in lines if line["status"] == DONE))
    head = [*rows[0].labels, "runs", "seconds per run", "seconds", "steps", "rows seen"]
    return markdown(head, body) + f"\n\nSums over the runs of a row, on {devices}; runs shared the device."


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


def sizes(lines: Sequence[Line], speeds: Mapping[str, Sequence[Timing]]) -> str:
    """Parameters, bytes and measured speed of the shapes in the grid."""
    body = []
    for name, model in shapes_of(lines).items():
        timings = speeds.get(name, ())
        speed = (
            "; ".join(f"{t.rows_per_s:,.0f} ({t.batch} x {t.length}, {t.device})" for t in timings) or "not measured"
        )
        body.append([name, f"{model['parameters']:,}", f"{model['bytes'] / 1e6:,.1f}", speed])
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
