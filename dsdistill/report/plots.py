"""Pictures of runs as SVG: told apart by the colour-blind, readable on a phone, no fonts inside."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from dsdistill.compare.plots import COLOURS
from dsdistill.report.collect import Curve
from dsdistill.training.telemetry import PARTS

STYLES = ("-", "--", ":", "-.")
MOST_POINTS, MOST_BARS = 400, 24
PANEL = (6.4, 3.2)
"""Inches; a page is one panel wide."""


def losses(curves: Sequence[Curve], prefix: str) -> str | None:
    """Every term under a prefix (`loss/`, `held_out/`, `score/`) by step, a panel per stage; None if none was told."""
    shown = [(curve, curve.tags(prefix)) for curve in curves]
    shown = [(curve, tags) for curve, tags in shown if tags]
    if not shown:
        return None
    figure, places = _panels(len(shown))
    for place, (curve, tags) in zip(places, shown, strict=True):
        values: list[float] = []
        for number, tag in enumerate(sorted(tags, key=lambda tag: not tag.endswith("/total"))):
            steps, told = thinned(*curve.series(tag))
            values += told
            total = tag.endswith("/total")
            place.plot(
                steps,
                told,
                STYLES[number // len(COLOURS) % len(STYLES)],
                color="#000000" if total else COLOURS[number % len(COLOURS)],
                linewidth=2.2 if total else 1.4,
                marker="o" if len(steps) < 12 else None,
                markersize=3,
                label=tag.removeprefix(prefix),
            )
        if prefix != "score/" and values and min(values) > 0 and max(values) > 5 * min(values):
            place.set_yscale("log")
            place.yaxis.set_major_formatter(LogFormatter())  # 20, not 2 x 10^1
            place.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        _finish(place, curve.stage)
    return svg(figure)


def parts(curves: Sequence[Curve]) -> str | None:
    """Milliseconds of a step by part, stacked, as training went on."""
    shown = [curve for curve in curves if curve.tags("time/")]
    if not shown:
        return None
    figure, places = _panels(len(shown))
    for place, curve in zip(places, shown, strict=True):
        entries = [e for e in curve.train if all(isinstance(e.get(f"time/{part}_s"), int | float) for part in PARTS)]
        groups = [entries[i : i + math.ceil(len(entries) / MOST_BARS)] for i in _starts(len(entries), MOST_BARS)]
        bottom = [0.0] * len(groups)
        for number, part in enumerate(PARTS):
            tall = [1e3 * sum(e[f"time/{part}_s"] for e in group) / len(group) for group in groups]
            place.bar(range(len(groups)), tall, 0.85, bottom=bottom, color=COLOURS[number], label=part)
            bottom = [low + high for low, high in zip(bottom, tall, strict=True)]
        marks = list(range(0, len(groups), max(1, len(groups) // 6)))
        place.set_xticks(marks, [str(groups[i][-1]["step"]) for i in marks])
        place.set_ylabel("ms per step")
        _finish(place, curve.stage)
    return svg(figure)


SCALE = "optimization/loss_scale"
GAUGES = {
    "throughput/tokens_per_s": "tokens/s",
    "optimization/learning_rate": "learning rate",
    "optimization/grad_norm": "gradient norm",
    SCALE: "loss scale",
    "memory/max_allocated_gib": "peak memory, GiB",
    "memory/max_resident_gib": "peak memory, GiB",
}


def gauges(curves: Sequence[Curve]) -> str | None:
    """Throughput, learning rate, gradient norm, loss scale and memory, small, stages one after the other."""
    told = [tag for tag in GAUGES if any(curve.series(tag)[0] for curve in curves)]
    if all(set(curve.series(SCALE)[1]) <= {1.0} for curve in curves):  # nothing is scaled
        told = [tag for tag in told if tag != SCALE]
    if not told:
        return None
    rows = math.ceil(len(told) / 2)
    figure, places = plt.subplots(rows, 2, figsize=(PANEL[0], 1.9 * rows), squeeze=False, layout="constrained")
    for place in places.flat[len(told) :]:
        place.set_visible(False)
    for place, tag in zip(places.flat, told, strict=False):
        for number, curve in enumerate(curves):
            place.plot(*thinned(*curve.series(tag)), color=COLOURS[number], linewidth=1.3, label=curve.stage)
        place.set_title(GAUGES[tag], fontsize=9, loc="left")
        place.tick_params(labelsize=8)
        place.grid(alpha=0.25)
        if tag.startswith(("throughput", "memory")):
            place.set_ylim(bottom=0)
    if len(curves) > 1:
        places.flat[0].legend(fontsize=7, frameon=False)
    return svg(figure)


def overlaid(named: dict[str, tuple[list[int], list[float]]], what: str) -> str | None:
    """One line per run of the same number."""
    named = {name: series for name, series in named.items() if series[0]}
    if not named:
        return None
    figure, (place,) = _panels(1)
    for number, (name, series) in enumerate(named.items()):
        style = STYLES[number // len(COLOURS) % len(STYLES)]
        place.plot(*thinned(*series), style, color=COLOURS[number % len(COLOURS)], linewidth=1.6, label=name)
    place.set_ylabel(what)
    _finish(place, "")
    return svg(figure)


def bars(named: dict[str, tuple[float, float | None]], what: str) -> str | None:
    """Means with their deviations over seeds, one bar each."""
    if not named:
        return None
    figure, place = plt.subplots(figsize=(PANEL[0], 1.0 + 0.42 * len(named)), layout="constrained")
    for number, (mean, deviation) in enumerate(named.values()):
        place.barh(number, mean, 0.7, xerr=deviation, color=COLOURS[number % len(COLOURS)], capsize=3)
        place.text(mean, number, f" {mean:.4g}", va="center", fontsize=8)
    place.set_yticks(range(len(named)), list(named))
    place.invert_yaxis()
    place.set_xlabel(what)
    place.margins(x=0.15)
    place.grid(alpha=0.25, axis="x")
    return svg(figure)


def scatter(points: dict[str, tuple[float, float]], x: str, y: str) -> str | None:
    """A score against a speed; fewer than two points say nothing."""
    if len(points) < 2:
        return None
    figure, (place,) = _panels(1)
    for number, (name, (speed, score)) in enumerate(points.items()):
        place.plot(speed, score, "osD^vP*"[number % 7], color=COLOURS[number % len(COLOURS)], markersize=8, label=name)
    place.set_xlabel(x)
    place.set_ylabel(textwrap.fill(y, 40))
    _finish(place, "", steps=False)
    return svg(figure)


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Few enough points to draw, the last one among them."""
    stride = max(1, math.ceil(len(steps) / MOST_POINTS))
    kept = sorted({*range(0, len(steps), stride), len(steps) - 1}) if steps else []
    return [steps[i] for i in kept], [values[i] for i in kept]


def _starts(count: int, most: int) -> range:
    return range(0, count, max(1, math.ceil(count / most)))


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure, places = plt.subplots(count, 1, figsize=(PANEL[0], PANEL[1] * count), squeeze=False, layout="constrained")
    return figure, list(places.flat)


def _finish(place: Axes, title: str, *, steps: bool = True) -> None:
    if steps:
        place.set_xlabel("step")
    if title:
        place.set_title(title, fontsize=10, loc="left")
    place.grid(alpha=0.25)
    # below the axes, where it covers nothing
    place.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def embedded(png: bytes) -> str:
    """A PNG within an SVG element that takes the width of its place."""
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    content = base64.b64encode(png).decode()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><image width="{width}" '
        f'height="{height}" href="data:image/png;base64,{content}"/></svg>'
    )


def svg(figure: Figure) -> str:
    """A figure as an SVG element that takes the width of its place; the figure is closed."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dsdistill"}):
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    plt.close(figure)
    return written.getvalue().partition("<svg")[1] + written.getvalue().partition("<svg")[2]
