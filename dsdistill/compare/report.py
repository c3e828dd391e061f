"""Everything a grid writes beside its results file: the page, the pictures, TensorBoard's, the measured speeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from dsdistill.compare.grid import Grid
from dsdistill.compare.results import FILE, read
from dsdistill.compare.scores import summarize
from dsdistill.compare.table import page
from dsdistill.corpus.files import write_text
from dsdistill.speed import Timing

TABLE = "table.md"
SCORES_PNG, SPEED_PNG = "scores.png", "score_by_speed.png"
SPEEDS = "speed.json"


def write_report(grid: Grid) -> list[Path]:
    """Write the page, the pictures and what TensorBoard shows from the results file.

    Returns:
        What was written.
    """
    settings, output = grid.settings, grid.settings.output
    lines, speeds = read(output / FILE), read_speeds(output)
    known = {line["cell"] for line in lines}
    missing = sum(cell.id not in known for cell in grid.cells)
    write_text(output / TABLE, page(settings, lines, speeds, missing))
    from dsdistill.compare.hparams import write_hparams

    written = [output / TABLE, write_hparams(output, settings, lines)]
    summary = summarize(lines, settings.best_over, settings.teacher_row)
    if summary.rows and summary.rows[0].labels:
        from dsdistill.compare.plots import plot_scores, plot_speed

        plot_scores(output / SCORES_PNG, settings.name, summary)
        written.append(output / SCORES_PNG)
        if plot_speed(output / SPEED_PNG, settings.name, summary, speeds):
            written.append(output / SPEED_PNG)
    return written


def read_speeds(output: Path) -> dict[str, list[Timing]]:
    """Measured speeds by shape."""
    file = output / SPEEDS
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return {shape: [Timing(**timing) for timing in timings] for shape, timings in content.items()}


def write_speeds(output: Path, speeds: Mapping[str, Sequence[Timing]]) -> None:
    """Keep measured speeds."""
    content = {shape: [asdict(timing) for timing in timings] for shape, timings in speeds.items()}
    write_text(output / SPEEDS, json.dumps(content, indent=1) + "\n")
