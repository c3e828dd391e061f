"""Write the JSON schemas that editors complete and check recipes with.

Every shipped recipe names its schema in its first line (`# yaml-language-server: $schema=...`), which the YAML
extensions of VS Code, Neovim, Emacs and JetBrains follow. Put such a line into a recipe of your own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dsdistill.command import exit_code, make_parser

HOME = Path(__file__).parent / "recipes" / "schema"
EXAMPLES = r"""
python launch/recipe_schema.py
python launch/recipe_schema.py --output schemas
"""


def schemas() -> dict[str, str]:
    """File names and contents."""
    from dsdistill.compare.grid import GridSettings
    from dsdistill.config.schema import recipe_schema, schema_of, task_recipe_schema

    found = {"pretrain": recipe_schema(), "task": task_recipe_schema(), "grid": schema_of(GridSettings)}
    return {f"{name}.json": json.dumps(schema, indent=1) + "\n" for name, schema in found.items()}


def write(output: Path) -> None:
    """All schemas into a directory; says which."""
    output.mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        (output / name).write_text(text, encoding="utf-8")
        print(output / name)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = make_parser(str(__doc__), EXAMPLES, fault="a fault: a disk that is full")
    target = found.add_argument_group("where to")
    target.add_argument("--output", type=Path, default=HOME, help="directory")
    return found


def main() -> int:
    """Parse and write."""
    output = parser().parse_args().output
    return exit_code(lambda: write(output))


if __name__ == "__main__":
    sys.exit(main())
