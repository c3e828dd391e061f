"""A run on one page, or several beside each other: `python launch/report.py runs/mine`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsdistill.command import BAD_INPUT, quiet_libraries

EXAMPLES = """examples:
  python launch/report.py runs/mine
  python launch/report.py runs/minilm runs/att_mse-0 runs/att_mse-1 --output reports/both

Runs that differ in their seed only are averaged. What is missing or broken in a run directory is told and left out.
Exit codes: 0 done, 2 a directory that holds no run."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Write report.html (one file, no network) and report.md with its pictures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="output directories of runs")
    parser.add_argument("--output", type=Path, help="directory (default: `report` in the first run directory)")
    return parser.parse_args()


def main() -> int:
    """Parse, collect, write, and print where."""
    arguments = parse_arguments()
    from dsdistill.report.collect import collect
    from dsdistill.report.write import all_problems, write_report

    quiet_libraries()
    try:
        runs = [collect(directory) for directory in arguments.runs]
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return BAD_INPUT
    for problem in all_problems(runs):
        print(f"WARNING    {problem}", file=sys.stderr)
    for path in write_report(runs, arguments.output or arguments.runs[0] / "report"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
