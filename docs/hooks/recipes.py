"""Reference of the shipped recipes: each file with its own first comment and source."""

from __future__ import annotations

import itertools
from pathlib import Path

import yaml

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


def page() -> str:
    """A table per folder of recipes; each name leads to the file."""
    folders: dict[Path, list[Path]] = {}
    for path in sorted(RECIPES.rglob("*.yaml")):
        folders.setdefault(path.parent, []).append(path)
    lines = ["# Shipped recipes", "", "Each names its source, and every number that differs from it."]
    for folder, paths in folders.items():
        name = "" if folder == RECIPES else f"{folder.name}/"
        lines += ["", f"## `launch/recipes/{name}`", "", "| recipe | what | source |", "| --- | --- | --- |"]
        for path in paths:
            text = path.read_text(encoding="utf-8")
            what = first_comment(text).replace("|", "\\|")
            source = " ".join(str(yaml.safe_load(text).get("source") or "").split()).replace("|", "\\|")
            link = f"../../launch/recipes/{path.relative_to(RECIPES)}"
            lines.append(f"| [`{path.stem}`]({link}) | {what} | {source} |")
    return "\n".join(lines) + "\n"


def first_comment(text: str) -> str:
    """What stands between the line for editors and the first key."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()[1:])
    return " ".join(line.removeprefix("#").strip() for line in lines)
