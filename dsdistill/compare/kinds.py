"""The kinds of recipe that a grid may hold: how each is checked, run, and known to be done."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = "results.json"


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


def is_done(kind: Kind, directory: Path) -> bool:
    """Whether a run directory holds a finished run."""
    return (directory / kind.last_file).is_file()
