"""A masked-LM head for a teacher that has none: trained on the frozen encoder first, kept for later runs, bound to it.

The fit is an ordinary run (engine, loop, checkpoints) whose student is the whole teacher with `frozen_encoder`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from dsdistill.config.recipe import Recipe, check_recipe
from dsdistill.config.sections import OptimizationSettings
from dsdistill.corpus.files import read_json, write_text
from dsdistill.locate import Source
from dsdistill.models.loading import encoder_checksum, load_config, load_encoder
from dsdistill.plan import make_plan
from dsdistill.plan_page import describe_plan
from dsdistill.pretrain import run as distil
from dsdistill.training import signals
from dsdistill.training.dist import Place, find_place, wait_for_all
from dsdistill.training.engine import processes
from dsdistill.training.one_job import one_job
from dsdistill.training.run_directory import EXPORT
from dsdistill.training.watchdog import Watchdog

BINDING = "mlm_head.json"
"""Beside the fitted model: the checksum of the encoder that the head was trained on."""


def run(recipe: Recipe, ds_json: dict[str, Any], *, resume: Literal["auto", "never"] | Path, dry_run: bool) -> None:
    """Fit the head unless that is done, then the run itself with that teacher; every process calls this.

    Args:
        recipe: What to learn; `teacher.mlm_head` says how the head is trained.
        ds_json: As for `dsdistill.pretrain.run`.
        resume: The same, for the run itself; the fit goes on from where it stopped in any case.
        dry_run: The same; the run itself can only be planned once the head is there.

    Raises:
        ValueError: As `dsdistill.pretrain.run`, and if the fitted head belongs to another encoder.
    """
    if recipe.student.tokenizer is not None:
        raise ValueError(
            "--fit_mlm_head has no effect with student.tokenizer: where the teacher has no head, the student gets a "
            "new one for its own tokens; leave it out"
        )
    place, fit = find_place(), head_recipe(recipe)
    directory = fit.output / EXPORT
    if not (directory / BINDING).is_file():
        if dry_run:
            told = describe_plan(make_plan(fit, ds_json, place), place)
            if place.is_first:
                print(told, flush=True)
            return
        if recipe.teacher.ranks is not None:
            raise ValueError(
                "--fit_mlm_head trains on all processes, but teacher.placement=ranks keeps some apart: fit the head in "
                "a run with another placement; it is kept, and this command then finds it"
            )
    with contextlib.nullcontext() if recipe.teacher.ranks else processes(place, recipe.faults.hang_timeout_s):
        ours = encoder_checksum(load_encoder(recipe.teacher.source))
        if recipe.teacher.ranks is None:
            fit_head(fit, ds_json, place, ours)
        check_binding(directory, ours, recipe)
        teacher = recipe.teacher.model_copy(update={"model": str(directory), "revision": None})
        distil(recipe.model_copy(update={"teacher": teacher}), ds_json, resume=resume, dry_run=dry_run)


def head_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the fit; recipes that agree on teacher, text and `teacher.mlm_head` share it.

    Raises:
        ValueError: If the teacher cannot be read.
    """
    settings = recipe.teacher.mlm_head
    depth = load_config(recipe.teacher.source).num_hidden_layers
    content: dict[str, Any] = {
        "name": "mlm-head",
        "seed": settings.seed,
        "teacher": recipe.teacher.model_dump(mode="json", include={"model", "revision", "trust_remote_code"}),
        "student": {"num_layers": depth, "init": list(range(1, depth + 1)), "dropout": 0.0, "frozen_encoder": True},
        "corpus": recipe.corpus.model_dump(mode="json"),
        "masking": {"probability": recipe.masking.probability or 0.15, "whole_word": recipe.masking.whole_word},
        "objectives": [{"objective": "mlm"}],
        "optimization": settings.model_dump(mode="json", include=set(OptimizationSettings.model_fields)),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    name = recipe.teacher.model.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    content["output"] = str(settings.directory / f"mlm-head-{name}-{digest}")
    every = max(1, settings.steps // 4)
    content |= {"evaluation": {"every_steps": every, "rows": recipe.evaluation.rows}}
    content |= {"checkpoint": {"every_steps": every, "keep": 1}}
    content |= {name: getattr(recipe, name).model_dump() for name in ("logging", "faults")}
    return check_recipe(content, "the recipe of the masked-LM head")


def fit_head(fit: Recipe, ds_json: dict[str, Any], place: Place, encoder_sha256: str) -> None:
    """Fit the head unless that is done; every process calls this. Jobs that want the same head wait for each other.

    Raises:
        StoppedError: If a signal asked to stop, also while another job was waited for.
    """
    binding = fit.output / EXPORT / BINDING
    with contextlib.ExitStack() as held:
        with signals.deferred(), Watchdog(place, fit.faults.hang_timeout_s) as watchdog:
            held.enter_context(one_job(fit.output, place, watchdog))
        if binding.is_file():
            return
        distil(fit, ds_json, resume="auto", dry_run=False)
        if place.is_first:
            content = {"encoder_sha256": encoder_sha256, "teacher": fit.teacher.model}
            write_text(binding, json.dumps(content) + "\n")
        wait_for_all(place)


def check_binding(directory: Path, encoder_sha256: str, recipe: Recipe) -> None:
    """Refuse a fitted model whose encoder is not the teacher's.

    Raises:
        ValueError: Says where it lies.
    """
    found = encoder_checksum(load_encoder(Source(model=str(directory))))
    if not encoder_sha256 == found == read_json(directory / BINDING).get("encoder_sha256"):
        raise ValueError(
            f"the masked-LM head in {directory} was fitted to another encoder than {recipe.teacher.model}: delete "
            f"{directory.parent}, or set teacher.mlm_head.directory to another place"
        )
