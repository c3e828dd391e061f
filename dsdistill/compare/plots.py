"""The pictures of a grid: score by objective and initialisation, and score against inference speed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from dsdistill.compare.scores import Row, Summary, mean_and_deviation, shape_name
from dsdistill.speed import Timing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart by the colour-blind; yellow is left out on white."""

MARKERS = "osD^vPX*<>h8pd"
COLUMNS = (4, 3)
"""Panels beside each other: what leaves fewer places empty."""

AVERAGE = "average"
FAR = 0.5
"""A baseline further left than this share of the others' width is written at the edge, not drawn."""

GREY = "#666666"


def plot_scores(path: Path, title: str, summary: Summary) -> None:
    """A panel per task and one for the average: a line per value of the first axis, a colour per rest of the labels.

    Points are means over seeds, bars sample standard deviations; the dashed line is the teacher, the dotted one the
    majority baseline.
    """
    rows, tasks = summary.rows, summary.tasks
    axis, *others = rows[0].labels
    values = list(dict.fromkeys(row.labels[axis] for row in rows))
    groups = list(dict.fromkeys(_rest(row, others) for row in rows))
    panels = [*tasks, AVERAGE]
    columns = min(len(panels), min(COLUMNS, key=lambda count: -len(panels) % count))
    lines_high = math.ceil(len(panels) / columns)
    height = 1.3 + lines_high * (0.9 + max(1.2, len(values) * (0.14 + 0.13 * len(groups))))
    figure, places = plt.subplots(
        lines_high, columns, figsize=(1.6 + 2.7 * columns, height), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, place in itertools.zip_longest(panels, places.flat):
        if panel is None:
            place.set_visible(False)
            continue
        for row in rows:
            numbers = row.averages(tasks) if panel == AVERAGE else row.of_task(panel)
            group = groups.index(_rest(row, others))
            offset = (group - (len(groups) - 1) / 2) * 0.7 / len(groups)
            _point(place, numbers, values.index(row.labels[axis]) + offset, group)
        _references(place, summary, tasks if panel == AVERAGE else [panel])
        metric = "" if panel == AVERAGE else f" ({summary.metric(panel)} x 100)"
        place.set_title(panel + metric, fontsize=10, fontweight="bold" if panel == AVERAGE else "normal")
        place.grid(axis="x", color="#dddddd", linewidth=0.6)
        place.set_axisbelow(True)
        place.spines[["top", "right"]].set_visible(False)
    places[0, 0].set_yticks(range(len(values)), values)
    places[0, 0].set_ylim(len(values) - 0.4, -0.6)
    _legend(figure, groups, " / ".join(others))
    figure.suptitle(f"{title}: mean and sample standard deviation over seeds", fontsize=11)
    _save(figure, path)


def _rest(row: Row, others: Sequence[str]) -> str:
    return " ".join(row.labels[name] for name in others)


def _point(place: Any, numbers: Sequence[float], height: float, group: int) -> None:
    mean, deviation = mean_and_deviation(numbers)
    if math.isnan(mean):
        return
    bar = 0.0 if math.isnan(deviation) else deviation
    style: dict[str, Any] = {"color": COLOURS[group % len(COLOURS)], "marker": MARKERS[group % len(MARKERS)]}
    place.errorbar(mean, height, xerr=bar, markersize=5, elinewidth=1.4, capsize=2.5, linestyle="none", **style)


def _references(place: Any, summary: Summary, tasks: Sequence[str]) -> None:
    """Vertical lines: teacher dashed, majority baseline dotted, or named at the edge if it is far away."""
    teacher = _mean([mean_and_deviation(summary.teachers(task))[0] for task in tasks])
    if not math.isnan(teacher):
        place.axvline(teacher, color=GREY, linestyle="--", linewidth=1.2)
    baseline = _mean([summary.baseline(task) for task in tasks])
    left, right = place.get_xlim()
    if baseline > left - FAR * (right - left):
        place.axvline(baseline, color=GREY, linestyle=":", linewidth=1.2)
    elif not math.isnan(baseline):
        text = f"\N{LEFTWARDS ARROW} majority {baseline:.1f}"
        place.text(0.02, 0.01, text, transform=place.transAxes, color=GREY, fontsize=8)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _legend(figure: Any, groups: Sequence[str], title: str) -> None:
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], linestyle="none", label=group)
        for i, group in enumerate(groups)
        if title
    ]
    handles += [
        Line2D([], [], color=GREY, linestyle="--", label="teacher"),
        Line2D([], [], color=GREY, linestyle=":", label="majority class"),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(handles)), title=title or None, frameon=False
    )


def plot_speed(path: Path, title: str, summary: Summary, speeds: Mapping[str, Sequence[Timing]]) -> bool:
    """Average score against rows per second, a marker per value of the first axis, a colour per rest of the labels.

    Returns:
        Whether there was anything to plot: a speed and an average.
    """
    rows = summary.rows
    axis, *others = rows[0].labels
    values = list(dict.fromkeys(row.labels[axis] for row in rows))
    groups = list(dict.fromkeys(_rest(row, others) for row in rows))
    points = []
    for row in rows:
        timing = fastest(speeds.get(shape_name("student", row.lines[0]["student"]), ()))
        mean, deviation = mean_and_deviation(row.averages(summary.tasks))
        if timing is not None and not math.isnan(mean):
            points.append((row, timing, mean, 0.0 if math.isnan(deviation) else deviation))
    if not points:
        return False
    figure, place = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
    for number, (row, timing, mean, deviation) in enumerate(points):
        style: dict[str, Any] = {
            "color": COLOURS[groups.index(_rest(row, others)) % len(COLOURS)],
            "marker": MARKERS[values.index(row.labels[axis]) % len(MARKERS)],
        }
        aside = 1 + 0.24 * ((number + 0.5) / len(points) - 0.5)  # students of one shape are equally fast
        place.errorbar(
            timing.rows_per_s * aside, mean, yerr=deviation, linestyle="none", capsize=2, markersize=6, **style
        )
    _teacher_point(place, summary, speeds)
    timing = points[0][1]
    place.set_xlim(left=0)
    place.set_xlabel(
        f"rows per second ({timing.length} tokens each, batches of {timing.batch}, {timing.device}, {timing.dtype})\n"
        "(students of one shape are equally fast; they are drawn side by side)"
    )
    place.set_ylabel("average score over tasks")
    place.set_title(f"{title}: score against inference speed", fontsize=11)
    place.grid(color="#dddddd", linewidth=0.6)
    place.set_axisbelow(True)
    place.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color="#333333", marker=MARKERS[i % len(MARKERS)], linestyle="none", label=value)
        for i, value in enumerate(values)
    ]
    handles += [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=4, label=group)
        for i, group in enumerate(groups)
        if others
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    _save(figure, path)
    return True


def _teacher_point(place: Any, summary: Summary, speeds: Mapping[str, Sequence[Timing]]) -> None:
    timing = fastest(speeds.get(shape_name("teacher", summary.lines[0]["teacher"]), ()))
    average = summary.teacher_average()
    if timing is None or math.isnan(average):
        return
    place.plot(timing.rows_per_s, average, color=GREY, marker="*", markersize=13, linestyle="none")
    place.annotate("teacher", (timing.rows_per_s, average), xytext=(8, -3), textcoords="offset points", color=GREY)


def fastest(timings: Sequence[Timing]) -> Timing | None:
    """The setting with the highest throughput."""
    return max(timings, key=lambda timing: timing.rows_per_s, default=None)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
