"""The kinds of recipe that a grid may hold: how each is checked, run, and known to be done."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RESULTS = "results.json"
RECIPE = "recipe.yaml"
FREE_TO_CHANGE = ("name", "source", "output", "logging", "checkpoint", "faults")
"""Recipe keys that change neither what is learned nor how it is scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of recipe; functions are named as `module:function`, so that only who calls them imports them.

    Attributes:
        key: The recipe key by which it is told from others.
        check: `(content, where) -> recipe`, raises `ValueError` with every problem.
        run: `(recipe, ds_json, *, resume, dry_run) -> None`.
        teacher: `(recipe) -> recipe | None`, the run that makes the teacher; None if there never is one.
        last_file: What a run directory holds once the run is done, and never before.
    """

    key: str
    check: str
    run: str
    teacher: str | None
    last_file: str


KINDS = (
    Kind(
        key="task",
        check="dsdistill.config.recipe:check_task_recipe",
        run="dsdistill.task_distill:run",
        teacher="dsdistill.task_distill:teacher_recipe",
        last_file=RESULTS,
    ),
    Kind(
        key="corpus",
        check="dsdistill.config.recipe:check_recipe",
        run="dsdistill.pretrain:run",
        teacher=None,
        last_file="model/config.json",
    ),
)


def find_object(name: str) -> Any:
    """What `module:name` means."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def kind_of(content: dict[str, Any], kinds: tuple[Kind, ...], where: str) -> Kind:
    """The kind of a recipe.

    Raises:
        ValueError: If it is none of the kinds.
    """
    for kind in kinds:
        if kind.key in content:
            return kind
    raise ValueError(f"{where}: the recipe has none of the keys {', '.join(kind.key for kind in kinds)}")


def plain(recipe: Any) -> dict[str, Any]:
    """A checked recipe as JSON values that can be checked again."""
    return recipe.model_dump(mode="json", by_alias=True, serialize_as_any=True)


def fingerprint(recipe: Any) -> str:
    """SHA-256 of all that decides what is learned and how it is scored."""
    content = {key: value for key, value in plain(recipe).items() if key not in FREE_TO_CHANGE}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_done(kind: Kind, directory: Path) -> bool:
    """Whether a run directory holds a finished run."""
    return (directory / kind.last_file).is_file()


def conflict(kind: Kind, recipe: Any) -> str | None:
    """How the run that is in the recipe's directory differs from the recipe; None if it does not, or there is none.

    Raises:
        ValueError: If the directory holds a recipe that cannot be read.
    """
    file = recipe.output / RECIPE
    if not file.is_file():
        return None
    before = find_object(kind.check)(yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
    if fingerprint(before) == fingerprint(recipe):
        return None
    return _first_difference(plain(before), plain(recipe))


def _first_difference(before: Any, now: Any, path: str = "") -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if path or key not in FREE_TO_CHANGE]
        found = (_first_difference(before.get(key), now.get(key), f"{path}.{key}".strip(".")) for key in keys)
        return next((difference for difference in found if difference), None)
    return None if before == now else f"{path} was {before!r}, now {now!r}"
