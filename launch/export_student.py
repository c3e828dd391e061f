"""Export the student of a run: `python launch/export_student.py runs/quickstart`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar


def main() -> int:
    """Parse, export, say where."""
    parser = argparse.ArgumentParser(
        description="Write the student of a run as a plain Hugging Face directory, reloaded and compared.",
        epilog="example: python launch/export_student.py runs/quickstart --output models/mine",
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--checkpoint", type=Path, help="one of its checkpoints; the newest whole one if not given")
    parser.add_argument("--output", type=Path, help="where to write; `model` in the run directory if not given")
    arguments = parser.parse_args()
    disable_progress_bar()
    from dsdistill.config.recipe import read_settings
    from dsdistill.summary import export_run
    from dsdistill.task_summary import export_task_run

    try:
        export = export_task_run if "task" in read_settings(arguments.run) else export_run
        print(export(arguments.run, arguments.checkpoint, arguments.output))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
