"""Draws what `pictures.py` has found, as PNG; told apart by the colour-blind, and quick: training waits meanwhile."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

COLOURS = "cividis"
"""Grows evenly lighter, and looks the same to the colour-blind."""

SMALL, DPI = 8, 90
MOST_WRITTEN = 120
"""Cells of a map that have their numbers written in."""


def draw_attention(
    tokens: Sequence[str],
    maps: Sequence[tuple[str, Sequence[np.ndarray]]],
    titles: Sequence[Sequence[str]],
    heading: str,
) -> bytes:
    """Attention maps of one sentence: a model a row, a layer pair a column.

    All lie in one image, whose axes have the tokens: a set of axes for each would take several times as long.

    Args:
        tokens: N labels.
        maps: Of each model its name and its maps (N, N), query by key, probabilities.
        titles: Of each model one for each of its maps.
        heading: Above all.
    """
    N, gap, top = len(tokens), 1, 2
    rows, columns = len(maps), len(titles[0])
    image = np.full((rows * (N + top), columns * (N + gap)), np.nan)
    for row, (_, layers) in enumerate(maps):
        for column, map_NN in enumerate(layers):
            y, x = row * (N + top) + top, column * (N + gap)
            image[y : y + N, x : x + N] = map_NN
    scale = max(0.13, 2.2 / N)
    figure = Figure(figsize=(1.6 + scale * image.shape[1], 1.3 + scale * image.shape[0]), dpi=DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    width, height = figure.get_size_inches()
    axes.set_position((1.0 / width, 0.9 / height, scale * image.shape[1] / width, scale * image.shape[0] / height))
    # most probabilities are small: their square roots are what the colours follow
    norm = PowerNorm(0.5, vmin=0, vmax=max(float(np.nanmax(image)), 1e-6))
    shown = axes.imshow(image, cmap=COLOURS, norm=norm, interpolation="nearest", aspect="auto")
    for row, (name, _) in enumerate(maps):
        for column, title in enumerate(titles[row]):
            place = (column * (N + gap) + N / 2 - 0.5, row * (N + top) + top - 0.8)
            axes.text(*place, f"{name}, {title}", ha="center", fontsize=SMALL + 1)
    _label(
        axes.set_xticks, [c * (N + gap) + i for c in range(columns) for i in range(N)], [*tokens] * columns, rotation=90
    )
    _label(axes.set_yticks, [r * (N + top) + top + i for r in range(rows) for i in range(N)], [*tokens] * rows)
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)
    bar = figure.add_axes(((width - 0.5) / width, 0.9 / height, 0.12 / width, scale * N / height))
    figure.colorbar(shown, cax=bar)
    bar.tick_params(labelsize=SMALL)
    figure.text(0.5, 1 - 0.08 / height, heading, ha="center", va="top", fontsize=SMALL + 2)
    return _png(figure)


def draw_likeness(
    panels: Sequence[tuple[str, np.ndarray, int, tuple[float, float]]], pairs: Sequence[tuple[int, int]], heading: str
) -> bytes:
    """Maps of every layer of the student by every layer of the teacher.

    Args:
        panels: Of each its title, its numbers (S, T), the number of its first layer, and the ends of its colours.
        pairs: Layers of student and teacher that the run compares; framed.
        heading: Above all.
    """
    sizes = [values.shape for _, values, *_ in panels]
    cell = 0.42
    width = 0.9 + sum(cell * T + 1.3 for _, T in sizes)
    height = 1.5 + cell * max(S for S, _ in sizes)
    figure, left = Figure(figsize=(max(width, 6.0), height), dpi=DPI), 0.7
    for title, values, first, limits in panels:
        S, T = values.shape
        size = figure.get_size_inches()
        axes = figure.add_axes((left / size[0], 0.55 / size[1], cell * T / size[0], cell * S / size[1]))
        _panel(axes, title, values, first, limits, pairs)
        bar = figure.add_axes(((left + cell * T + 0.1) / size[0], 0.55 / size[1], 0.12 / size[0], cell * S / size[1]))
        figure.colorbar(axes.images[0], cax=bar)
        bar.tick_params(labelsize=SMALL - 1)
        left += cell * T + 1.3
    figure.text(0.02, 1 - 0.1 / height, heading, va="top", fontsize=SMALL + 1)
    return _png(figure)


def _panel(
    axes: Axes,
    title: str,
    values: np.ndarray,
    first: int,
    limits: tuple[float, float],
    pairs: Sequence[tuple[int, int]],
) -> None:
    S, T = values.shape
    axes.imshow(
        values, cmap=COLOURS, vmin=limits[0], vmax=limits[1], interpolation="nearest", aspect="auto", origin="lower"
    )
    _label(axes.set_xticks, list(range(T)), [str(first + i) for i in range(T)])
    _label(axes.set_yticks, list(range(S)), [str(first + i) for i in range(S)])
    axes.set_xlabel("layer of the teacher", fontsize=SMALL)
    axes.set_ylabel("layer of the student", fontsize=SMALL)
    axes.set_title(title, fontsize=SMALL + 1)
    middle = sum(limits) / 2
    for s in range(S) if S * T <= MOST_WRITTEN else ():
        for t in range(T):
            colour = "white" if values[s, t] < middle else "black"
            axes.text(t, s, f"{values[s, t]:.2f}", ha="center", va="center", fontsize=SMALL - 1, color=colour)
    for s, t in pairs:
        if s >= first and t >= first and t - first < T:
            corner = (t - first - 0.5, s - first - 0.5)
            axes.plot(*_frame(*corner), color="#D55E00", linewidth=2)


def _frame(x: float, y: float) -> tuple[list[float], list[float]]:
    return [x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y]


def _label(set_ticks: Any, places: Sequence[int], labels: Sequence[str], **style: Any) -> None:
    set_ticks(places, labels, fontsize=SMALL, parse_math=False, **style)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # tokens of scripts that the font lacks: boxes
        figure.savefig(file, format="png")
    return file.getvalue()
