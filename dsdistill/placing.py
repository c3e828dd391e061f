"""Decides where the teacher lives, and says what stands in the way of where the recipe wants it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dsdistill.config.sections import TeacherSettings
from dsdistill.memory import GIB, Memory
from dsdistill.training.dist import Place
from dsdistill.training.placement import Kind, Placement
from dsdistill.training.sharded_teacher import nvme_problem

RESERVE = 0.12
"""Share of a GPU's memory that `auto` leaves: the context, fragments, and what the prediction misses."""


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


def choose_placement(
    settings: TeacherSettings,
    place: Place,
    forecast: Callable[[Kind], Memory],
    *,
    size: Callable[[], int],
    fixed: bool,
) -> Placement:
    """Where the teacher lives; problems are told by `placement_problems`.

    `auto` is a copy on the device where the predicted peak leaves a reserve, else host memory where that has room,
    else spread over the processes.

    Args:
        settings: The recipe's section.
        place: This process.
        forecast: Predicts memory for a placement.
        size: Tells the bytes of the teacher's weights.
        fixed: Whether its forward becomes a graph, which wants its weights in place.
    """
    if settings.placement != "auto":
        return Placement(kind=settings.placement, nvme=settings.nvme_path)
    if place.device.type != "cuda":
        return Placement(kind="resident")
    room = torch.cuda.get_device_properties(place.device).total_memory * (1 - RESERVE)
    peaks: dict[Kind, int] = {}

    def told(kind: Kind, why: str) -> Placement:
        shown = ", ".join(f"{name} {peak / GIB:.1f}" for name, peak in peaks.items())
        return Placement(kind=kind, why=f"{why}; predicted peaks in GiB: {shown}; room for {room / GIB:.1f}")

    peaks["resident"] = forecast("resident").peak
    if peaks["resident"] <= room:
        return told("resident", "a copy fits")
    if fixed:
        return told("resident", "a copy may not fit, but torch_compile wants one")
    peaks["cpu"] = forecast("cpu").peak
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if place.world_size == 1 or size() * torch.cuda.device_count() < host / 2:
        return told("cpu", "a copy may not fit")
    peaks["zero3"] = forecast("zero3").peak
    return told("zero3", "a copy may not fit, and host memory has no room for one per process")
