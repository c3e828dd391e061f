"""Export the student of a run: `python launch/export_student.py runs/quickstart`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsdistill.command import exit_code, make_parser, quiet_libraries

WHAT = "Write the student of a run as a plain Hugging Face directory, reloaded and compared."
EXAMPLES = r"""
python launch/export_student.py runs/quickstart
python launch/export_student.py runs/quickstart --checkpoint runs/quickstart/checkpoints/step-00000050 \
    --output models/halfway
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = make_parser(WHAT, EXAMPLES, fault="a fault: a disk that is full")
    source = found.add_argument_group("what is exported")
    source.add_argument("run", type=Path, help="run directory")
    source.add_argument("--checkpoint", type=Path, help="one of its checkpoints; the newest whole one if not given")
    target = found.add_argument_group("where to")
    target.add_argument("--output", type=Path, help="directory; `model` in the run directory if not given")
    return found


def main() -> int:
    """Parse, export, say where."""
    arguments = parser().parse_args()
    return exit_code(lambda: print(export(arguments)))


def export(arguments: argparse.Namespace) -> Path:
    """The directory of the exported student.

    Raises:
        ValueError: If there is no such run, or it has no whole checkpoint.
    """
    quiet_libraries()
    from dsdistill.config.recipe import read_settings
    from dsdistill.summary import export_run
    from dsdistill.task_summary import export_task_run

    write = export_task_run if "task" in read_settings(arguments.run) else export_run
    return write(arguments.run, arguments.checkpoint, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
