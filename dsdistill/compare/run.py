"""A grid from its file to its table: what is done is skipped, the rest is run, everything is written down."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsdistill.compare import results
from dsdistill.compare.grid import Grid, Run
from dsdistill.compare.keep import keep_shape, shape_config, tidy
from dsdistill.compare.kinds import is_done, plain
from dsdistill.compare.report import read_speeds, write_report, write_speeds
from dsdistill.compare.scores import primary, shape_name, shapes_of
from dsdistill.compare.workers import Machine, Outcome, Workers
from dsdistill.progress import Progress, note
from dsdistill.training import signals

SPEED_LENGTH, SPEED_BATCHES = 128, (1, 32)
"""Tokens per row (fewer if a model takes fewer), and rows per call."""


def run_grid(grid: Grid, ds_json: dict[str, Any], machine: Machine, *, retry_failed: bool) -> int:
    """Run what is not done, then write table and pictures.

    Returns:
        How many cells have failed, now or before.

    Raises:
        ValueError: If a run directory belongs to another recipe.
        StoppedError: If a signal asked to stop.
    """
    file = grid.settings.output / results.FILE
    todo = results.collect(file, grid, grid.cells, retry_failed=retry_failed)
    _do(grid, [*first_of(grid, todo), *todo], ds_json, machine)
    try:
        measure_speeds(grid)
    finally:  # a speed that cannot be measured is no reason to have no table
        written = write_report(grid)
    print("\n".join(["", *map(str, (file, *written))]), flush=True)
    return failures(grid, grid.cells)


def run_cell(grid: Grid, number: int, ds_json: dict[str, Any], machine: Machine, *, retry_failed: bool) -> int:
    """Run one cell and what it needs; other processes may be at other cells of the same grid.

    Returns:
        1 if it has failed, else 0.

    Raises:
        ValueError: If there is no such cell, or its run directory belongs to another recipe.
        StoppedError: If a signal asked to stop.
    """
    if not 0 <= number < len(grid.cells):
        raise ValueError(f"--cell {number}: the grid has cells 0 to {len(grid.cells) - 1}")
    cell = grid.cells[number]
    todo = results.collect(grid.settings.output / results.FILE, grid, [cell], retry_failed=retry_failed)
    _do(grid, [*first_of(grid, todo), *todo], ds_json, machine)
    return failures(grid, [cell])


def run_first(grid: Grid, ds_json: dict[str, Any], machine: Machine) -> int:
    """Run only what cells need.

    Returns:
        How many of these runs failed.

    Raises:
        ValueError: If a run directory belongs to another recipe.
        StoppedError: If a signal asked to stop.
    """
    todo = first_of(grid, grid.cells)
    return sum(outcome.error is not None for outcome in _do(grid, todo, ds_json, machine))


def first_of(grid: Grid, cells: Iterable[Run]) -> list[Run]:
    """What these cells need and is not done.

    Raises:
        ValueError: If a run directory belongs to another recipe.
    """
    needed = {need for cell in cells for need in cell.needs}
    runs = [run for run in grid.first if run.directory in needed]
    for run in runs:
        changed = results.conflict(run)
        if changed is not None:
            raise ValueError(f"{run.directory} has another recipe ({changed}); name another directory")
    return [run for run in runs if not is_done(run.kind, run.directory)]


def failures(grid: Grid, cells: Iterable[Run]) -> int:
    """How many of these cells have failed."""
    names = {cell.id for cell in cells}
    lines = results.read(grid.settings.output / results.FILE)
    return sum(line["status"] == results.FAILED and line["cell"] in names for line in lines)


def _do(grid: Grid, runs: Sequence[Run], ds_json: dict[str, Any], machine: Machine) -> list[Outcome]:
    """Run, tell and record."""
    settings, outcomes = grid.settings, list[Outcome]()
    print(f"{len(runs)} runs to do, {min(machine.jobs, len(runs))} at a time", file=sys.stderr, flush=True)

    def end(outcome: Outcome) -> None:
        outcomes.append(outcome)
        told = outcome.error
        if outcome.run.axes:
            line = results.record(settings.output / results.FILE, grid, outcome)
            if outcome.error is None:
                told = f"{line['primary']} {primary(line['scores'], line):.2f}"
                keep_shape(outcome.run.directory, settings.output, shape_name("student", line["student"]))
        if outcome.error is None:
            tidy(outcome.run.directory, settings.keep if outcome.run.axes else "models")
        note(
            f"[{len(outcomes)}/{len(runs)}] {outcome.run.id}: {'FAILED, ' * (outcome.error is not None)}"
            f"{told or 'done'}, {outcome.seconds:.0f} s"
        )
        progress.to(len(outcomes))

    if runs:
        with signals.deferred(), Progress("runs", len(runs), unit="run", beats=True) as progress:
            Workers(machine, ds_json, settings.output / "logs", settings.cell_timeout_s).do(runs, end)
    return outcomes


def measure_speeds(grid: Grid) -> None:
    """Measure models of the shapes in the results file that were not measured yet; their weights do not matter.

    A model whose config is not to be had (a teacher that was moved) is told and left out.
    """
    output = grid.settings.output
    speeds = read_speeds(output)
    lines = [line for line in results.read(output / results.FILE) if line["status"] == results.DONE]
    for shape, model in shapes_of(lines).items():
        source = str(shape_config(output, shape)) if shape.startswith("student") else model["model"]
        if shape in speeds or (shape.startswith("student") and not Path(source).is_file()):
            continue
        try:
            speeds[shape] = _speed_of(source)
        except (OSError, ValueError) as error:
            print(f"note: the speed of {shape} is not measured: {error}", file=sys.stderr)
        write_speeds(output, speeds)


def _speed_of(source: str) -> list[Any]:
    import torch
    from transformers import AutoConfig, AutoModel

    from dsdistill.locate import resolve_model
    from dsdistill.models.families import max_length
    from dsdistill.speed import measure

    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    config = AutoConfig.from_pretrained(resolve_model(source))
    length = min(SPEED_LENGTH, max_length(config) or SPEED_LENGTH)
    device = torch.device("cuda" if cuda else "cpu")
    return measure(AutoModel.from_config(config), device, lengths=(length,), batches=SPEED_BATCHES, budget_s=1.0)


def epochs_of(cell: Run) -> float:
    """Passes over the training rows in all stages."""
    return sum(stage["optimization"]["epochs"] for stage in plain(cell.recipe)["stages"])


def describe(grid: Grid) -> str:
    """The cells with their numbers and states, and what they need, for people."""
    file = grid.settings.output / results.FILE
    failed = {line["cell"] for line in results.read(file) if line["status"] == results.FAILED}
    width = len(str(len(grid.cells) - 1))
    states = [
        "done" if is_done(run.kind, run.directory) else "failed" if run.id in failed else "to do" for run in grid.runs
    ]
    first = [f"{'':>{width}}  {state:<6}  {run.id}" for run, state in zip(grid.first, states, strict=False)]
    cells = [
        f"{number:>{width}}  {state:<6}  {cell.id}"
        for number, (cell, state) in enumerate(zip(grid.cells, states[len(grid.first) :], strict=True))
    ]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    epochs = list(map(epochs_of, grid.cells))
    budgets = ", ".join(f"{number:g} ({epochs.count(number)} cells)" for number in dict.fromkeys(epochs))
    axes = " x ".join(f"{len(grid.settings.labels(name))} {name}" for name in grid.settings.axes)
    head = f"{grid.settings.name}: {axes}, {len(grid.cells)} cells in {grid.settings.output}; {counts}"
    return "\n".join(
        [
            head,
            f"epochs of a cell, all stages: {budgets}",
            *(["needed first:", *first] if first else []),
            "cells:",
            *cells,
        ]
    )
