"""Decides where the teacher lives, and says what stands in the way of where the recipe wants it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsdistill.config.sections import TeacherSettings
from dsdistill.training.dist import Place
from dsdistill.training.placement import Placement
from dsdistill.training.sharded_teacher import nvme_problem


def placement_problems(
    settings: TeacherSettings, ds_json: Mapping[str, Any], place: Place, *, needs_teacher: bool
) -> list[str]:
    """Why the teacher cannot live where the recipe wants it; empty if it can.

    Args:
        settings: The recipe's section.
        ds_json: DeepSpeed JSON.
        place: This process, after `Place.with_teachers`.
        needs_teacher: Whether any objective asks it.
    """
    kind = settings.placement
    if kind in ("auto", "resident"):
        return []
    problems = []
    if kind in ("zero3", "cpu", "nvme") and ds_json.get("torch_compile"):
        problems.append(
            f"teacher.placement={kind} brings weights while the forward runs, which a graph of the whole forward "
            "cannot wait for; use placement resident or ranks, or drop torch_compile"
        )
    if kind == "ranks":
        number = settings.ranks or 0
        if not place.teachers:
            problems.append(
                f"teacher.ranks={number} of {place.world_size} process(es) would leave none to train the student; "
                "start more, or use another placement"
            )
        elif number > place.world_size:
            problems.append(
                f"teacher.ranks={number} for {place.world_size} process(es) that train: each of those asks one, the "
                "others would idle; use fewer"
            )
        if not needs_teacher:
            problems.append("teacher.placement=ranks: no objective asks a teacher, those processes would idle")
    if kind == "nvme" and settings.nvme_path is not None:
        problem = nvme_problem(settings.nvme_path)
        problems += [problem] if problem else []
    return problems


def choose_placement(settings: TeacherSettings) -> Placement:
    """Where the teacher lives; problems are told by `placement_problems`."""
    if settings.placement != "auto":
        return Placement(kind=settings.placement, nvme=settings.nvme_path)
    return Placement(kind="resident")
