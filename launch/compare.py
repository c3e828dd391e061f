"""A grid of runs and its table: `python launch/compare.py --grid launch/recipes/grids/study_task_specific.yaml`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsdistill.command import FAULT, exit_code, make_parser, quiet_libraries
from dsdistill.training import signals

DS_CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero0.json"
WHAT = """\
Run a grid of recipes and compare them.

A grid file names axes (objectives, initialisations, tasks, seeds, or any recipe key); every combination is a cell. What
is done is skipped, what failed is told and left (see --retry_failed), and the same command goes on after a kill.
Written into the grid's output: results.jsonl (a line per cell), table.md, scores.png, score_by_speed.png, logs/."""
EXAMPLES = r"""
python launch/compare.py --grid launch/recipes/grids/default_teacher.yaml --dry_run
python launch/compare.py --grid launch/recipes/grids/default_teacher.yaml --axis task cola mrpc --axis seed 7 8 \
    --set 'stages.*.optimization.epochs=1'
"""
ARRAY = "One task of a SLURM array runs one cell: the head of launch/slurm/task_array.sbatch says how to start it."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = make_parser(
        WHAT,
        EXAMPLES,
        fault="some cells failed (results.jsonl says why), or a fault",
        stopped="stopped by Ctrl-C, SIGTERM or SIGUSR1: running cells saved their last step, and the same command goes "
        "on from there; a second Ctrl-C stops at once",
        more=ARRAY,
    )
    cells = found.add_argument_group("what is compared")
    cells.add_argument("--grid", required=True, type=Path, help="YAML")
    cells.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a recipe value in all cells; may be repeated",
    )
    cells.add_argument(
        "--axis",
        action="append",
        default=[],
        nargs="+",
        metavar="AXIS VALUE",
        help="other values for an axis, or only some of its labels; may be repeated",
    )
    cells.add_argument("--output", type=Path, help="directory to write to instead of the grid's")
    how = found.add_argument_group("how it runs")
    how.add_argument("--ds_config", type=Path, help=f"DeepSpeed JSON; by default the grid's, or {DS_CONFIG.name}")
    how.add_argument("--jobs", type=int, help="runs at a time; by default one per two cores, one to four per GPU")
    how.add_argument("--retry_failed", action="store_true", help="run cells again that failed before")
    part = found.add_argument_group("instead of running all").add_mutually_exclusive_group()
    part.add_argument("--dry_run", "--list", action="store_true", help="check everything, list the cells, run nothing")
    part.add_argument("--cell", type=int, metavar="I", help="only this cell and what it needs (an array task)")
    part.add_argument("--prerequisites", action="store_true", help="only what cells need first, such as teachers")
    part.add_argument("--report", action="store_true", help="only write table and plots from the results file")
    found.add_argument("--kinds", default="dsdistill.compare.kinds:KINDS", help=argparse.SUPPRESS)  # for tests
    return found


def main() -> int:
    """Parse, check, run."""
    arguments = parser().parse_args()
    return exit_code(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """What the arguments ask for; the exit code."""
    quiet_libraries()
    from dsdistill.compare import results
    from dsdistill.compare.grid import make_grid, read_grid
    from dsdistill.compare.kinds import find_object
    from dsdistill.compare.report import write_report
    from dsdistill.compare.run import describe, measure_speeds, run_cell, run_first, run_grid
    from dsdistill.compare.workers import find_machine
    from dsdistill.config.deepspeed import read_deepspeed_json

    settings = read_grid(arguments.grid, output=arguments.output, axes=arguments.axis)
    grid = make_grid(settings, arguments.set, find_object(arguments.kinds))
    ds_json = read_deepspeed_json(arguments.ds_config or settings.ds_config or DS_CONFIG)
    if arguments.dry_run:
        print(describe(grid))
        return 0
    if arguments.report:
        results.add_missing(settings.output / results.FILE, grid)
        measure_speeds(grid)
        print("\n".join(map(str, write_report(grid))))
        return 0
    machine = find_machine(1 if arguments.cell is not None else arguments.jobs)
    if arguments.cell is not None:
        failed = run_cell(grid, arguments.cell, ds_json, machine, retry_failed=arguments.retry_failed)
    elif arguments.prerequisites:
        failed = run_first(grid, ds_json, machine)
    else:
        failed = run_grid(grid, ds_json, machine, retry_failed=arguments.retry_failed)
    return FAULT if failed else 0


if __name__ == "__main__":
    signals.install()
    sys.exit(main())
