"""A run on one page, or several beside each other: `python launch/report.py runs/mine`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsdistill.command import exit_code, make_parser, quiet_libraries

WHAT = """\
Write report.html (one file, no network) and report.md with its pictures.

Runs that differ in their seed only are averaged. What is missing or broken in a run directory is told and left out."""
EXAMPLES = r"""
python launch/report.py runs/quickstart
python launch/report.py runs/minilm runs/att_mse-0 runs/att_mse-1 --output reports/both
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = make_parser(WHAT, EXAMPLES, fault="a fault: a disk that is full")
    source = found.add_argument_group("what is told")
    source.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="output directories of runs")
    target = found.add_argument_group("where to")
    target.add_argument("--output", type=Path, help="directory; `report` in the first run directory if not given")
    return found


def main() -> int:
    """Parse, collect, write, and print where."""
    arguments = parser().parse_args()
    return exit_code(lambda: write(arguments.runs, arguments.output or arguments.runs[0] / "report"))


def write(directories: list[Path], output: Path) -> None:
    """The report of these runs; says which files.

    Raises:
        ValueError: If a directory holds no run.
    """
    quiet_libraries()
    from dsdistill.report.collect import collect
    from dsdistill.report.write import all_problems, write_report

    runs = [collect(directory) for directory in directories]
    for problem in all_problems(runs):
        print(f"WARNING    {problem}", file=sys.stderr)
    for path in write_report(runs, output):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
