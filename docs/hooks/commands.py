"""Reference of the command line: what `--help` of every launch script says."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

LAUNCH = Path(__file__).parents[2] / "launch"
COLUMNS = "100"


def page() -> str:
    """The help of every script, in one page."""
    lines = [
        "# Command line",
        "",
        "What `--help` says. Exit codes: [when something goes wrong](../resume.md#exit-codes).",
    ]
    for script in scripts():
        lines += ["", f"## `{script.name}`", "", "```text", help_of(script).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def scripts() -> list[Path]:
    """The commands."""
    return sorted(LAUNCH.glob("*.py"))


def help_of(script: Path) -> str:
    """What a script prints for `--help`."""
    module = importlib.import_module(f"launch.{script.stem}")
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": COLUMNS}),
        mock.patch.object(sys, "argv", [f"launch/{script.name}", "--help"]),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        module.main()
    return printed.getvalue()
