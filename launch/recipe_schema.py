"""Write the JSON schemas that editors complete and check recipes with.

Every shipped recipe names its schema in its first line (`# yaml-language-server: $schema=...`), which the YAML
extensions of VS Code, Neovim, Emacs and JetBrains follow. Put such a line into a recipe of your own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dsdistill.compare.grid import GridSettings
from dsdistill.config.schema import recipe_schema, schema_of, task_recipe_schema

HOME = Path(__file__).parent / "recipes" / "schema"


def schemas() -> dict[str, str]:
    """File names and contents."""
    found = {"pretrain": recipe_schema(), "task": task_recipe_schema(), "grid": schema_of(GridSettings)}
    return {f"{name}.json": json.dumps(schema, indent=1) + "\n" for name, schema in found.items()}


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HOME, help="directory (default: %(default)s)")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        (output / name).write_text(text, encoding="utf-8")
        print(output / name)


if __name__ == "__main__":
    main()
