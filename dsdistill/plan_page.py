"""The plan as a page for people: what `--dry_run` prints first."""

from __future__ import annotations

from typing import Any

from dsdistill.core import ModelShape
from dsdistill.models.families import shape_of
from dsdistill.plan import Plan, StagePlan
from dsdistill.training.dist import Place
from dsdistill.training.engine import half_precision, zero_stage


def describe_plan(plan: Plan[Any], place: Place) -> str:
    """The plan as a page for people."""
    teacher, student = shape_of(plan.teacher_config), shape_of(plan.student_config)
    lines = [
        f"run        {plan.recipe.name} -> {plan.recipe.output}",
        f"teacher    {plan.source.model}: {teacher.num_layers} layers x {teacher.width}"
        + ("" if plan.recipe.asks_teacher else ", no objective asks it"),
        *(["code       comes with the teacher and is run (trust_remote_code)"] * plan.source.trust_remote_code),
        f"student    {other_family(plan)}{student.num_layers} layers x {student.width}, starting from "
        f"{describe_start(plan)}",
    ]
    for stage in plan.stages:
        lines += describe_stage(stage, teacher, place)
    notes = dict.fromkeys(note for stage in plan.stages for note in stage.notes)
    return "\n".join([*lines, *(f"note       {note}" for note in notes)])


def describe_stage(stage: StagePlan, teacher: ModelShape, place: Place) -> list[str]:
    """What one stage trains, for people."""
    optimization, config = stage.pace.optimization, stage.engine_config
    deepest = (
        teacher.num_layers
        if "logits" in stage.teacher_wants
        else max((layer for layers in stage.teacher_wants.values() for layer in layers), default=0)
    )
    return [
        *([f"stage      {stage.name}"] if stage.name else []),
        *(
            f"objective  {term.label} (weight {term.weight}): student layers {list(term.pairs.student)} "
            f"{'together ' if term.pairs.combine else ''}with teacher layers {list(term.pairs.teacher)}"
            for term in stage.terms
        ),
        f"training   {optimization.steps} steps of {optimization.global_batch} rows on {place.world_size} "
        f"process(es), {place.device.type}, ZeRO {zero_stage(config)}, "
        f"{str(half_precision(config)).removeprefix('torch.')}, {deepest} layers of the teacher run",
    ]


def other_family(plan: Plan[Any]) -> str:
    """The student's family, if it is not the teacher's."""
    theirs, ours = plan.teacher_config.model_type, plan.student_config.model_type
    return "" if ours == theirs else f"{ours}, "


def describe_start(plan: Plan[Any]) -> str:
    """What the student's weights are before training."""
    settings = plan.recipe.student
    if settings.init_from is not None:
        return str(settings.init_from)
    if plan.layers is None:
        return "random weights"
    return f"teacher layers {list(plan.layers)}" + (f", made narrower by {settings.resize}" if settings.resize else "")
