"""What a run will do, decided and checked before weights are read: what `--dry_run` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from dsdistill.config.deepspeed import fill_auto
from dsdistill.config.recipe import Recipe
from dsdistill.corpus.store import Corpus
from dsdistill.models.capture import Wanted
from dsdistill.models.families import shape_of
from dsdistill.models.loading import (
    Source,
    has_masked_lm_architecture,
    load_config,
)
from dsdistill.models.student import check_start, student_config
from dsdistill.objectives.mapping import initial_layers
from dsdistill.training.dist import Place
from dsdistill.training.distiller import BoundTerm, bind_terms, wanted_signals
from dsdistill.training.engine import half_precision, zero_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything decided before weights are read: what `--dry_run` checks and prints.

    Attributes:
        recipe: What is learned.
        engine_config: DeepSpeed JSON, filled.
        notes: What was decided on the way, for people.
        source: The teacher.
        teacher_config: Config of the complete teacher.
        student_config: Config of the student.
        layers: Teacher layers the student starts from, or None for random weights.
        terms: Summands of the loss, bound to layers.
        student_wants: Signals captured in the student.
        teacher_wants: Signals captured in the teacher; empty if no term needs one.
    """

    recipe: Recipe
    engine_config: dict[str, Any]
    notes: list[str]
    source: Source
    teacher_config: PreTrainedConfig
    student_config: PreTrainedConfig
    layers: tuple[int, ...] | None
    terms: list[BoundTerm]
    student_wants: Wanted
    teacher_wants: Wanted


def make_plan(recipe: Recipe, ds_json: dict[str, Any], place: Place) -> Plan:
    """Check that recipe, JSON, models and text fit together.

    Raises:
        ValueError: With every problem found.
    """
    problems: list[str] = []

    def attempt(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except ValueError as error:
            problems.append(str(error))
        except StrictDataclassError as error:  # how transformers refuses a value in a config
            problems.append(f"student.overrides: {' '.join(str(error).split())}")

    source = Source(
        model=recipe.teacher.model,
        revision=recipe.teacher.revision,
        trust_remote_code=recipe.teacher.trust_remote_code,
    )
    row_length = attempt(lambda: row_length_of(recipe)) or 1
    teacher = attempt(lambda: load_config(source))
    if teacher is None:
        raise ValueError("\n".join(problems))
    settings = recipe.student
    shape = shape_of(teacher)
    layers = attempt(lambda: initial_layers(settings.init, settings.num_layers, shape.num_layers))
    student = attempt(
        lambda: student_config(
            teacher, settings.num_layers, layers, dropout=settings.dropout, overrides=settings.overrides
        )
    )
    terms = attempt(lambda: bind_terms(recipe, shape_of(student), shape)) if student is not None else None
    if student is not None:
        attempt(lambda: check_start(teacher, student, resize=settings.resize, init_from=settings.init_from))
    filled = attempt(
        lambda: fill_auto(
            ds_json,
            recipe.optimization,
            world_size=place.world_size,
            device_type=place.device.type,
            row_length=row_length,
        )
    )
    student_wants, teacher_wants = wanted_signals(terms or ())
    if "logits" in student_wants:
        problems += logit_problems(recipe, source, teacher, terms or ())
    if problems or student is None or terms is None:
        raise ValueError("\n".join(problems))
    return Plan(
        recipe=recipe,
        engine_config=filled[0],
        notes=filled[1],
        source=source,
        teacher_config=teacher,
        student_config=student,
        layers=layers,
        terms=terms,
        student_wants=student_wants,
        teacher_wants=teacher_wants,
    )


def logit_problems(recipe: Recipe, source: Source, teacher: PreTrainedConfig, terms: Iterable[BoundTerm]) -> list[str]:
    """What stands in the way of objectives that read logits, as far as configs tell."""
    problems = []
    if not has_masked_lm_architecture(teacher):
        problems.append(missing_head(source))
    reads_labels = any(term.objective.name == "mlm" for term in terms)
    if recipe.masking.probability == 0 and (reads_labels or recipe.masking.targets == "masked"):
        problems.append("masking.probability is 0, but an objective reads logits at masked positions; use 0.15")
    return problems


def describe_plan(plan: Plan, place: Place) -> str:
    """The plan as a page for people."""
    teacher, student = shape_of(plan.teacher_config), shape_of(plan.student_config)
    optimization = plan.recipe.optimization
    deepest = (
        teacher.num_layers
        if "logits" in plan.teacher_wants
        else max((layer for layers in plan.teacher_wants.values() for layer in layers), default=0)
    )
    lines = [
        f"run        {plan.recipe.name} -> {plan.recipe.output}",
        f"teacher    {plan.source.model}: {teacher.num_layers} layers x {teacher.width}, {deepest} of them run",
        *(["code       comes with the teacher and is run (trust_remote_code)"] * plan.source.trust_remote_code),
        f"student    {student.num_layers} layers x {student.width}, starting from {describe_start(plan)}",
        *(
            f"objective  {term.label} (weight {term.weight}): student layers {list(term.pairs.student)} "
            f"{'together ' if term.pairs.combine else ''}with teacher layers {list(term.pairs.teacher)}"
            for term in plan.terms
        ),
        f"training   {optimization.steps} steps of {optimization.global_batch} rows on {place.world_size} "
        f"process(es), {place.device.type}, ZeRO {zero_stage(plan.engine_config)}, "
        f"{str(half_precision(plan.engine_config)).removeprefix('torch.')}",
        *(f"note       {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def describe_start(plan: Plan) -> str:
    """What the student's weights are before training."""
    settings = plan.recipe.student
    if settings.init_from is not None:
        return str(settings.init_from)
    if plan.layers is None:
        return "random weights"
    return f"teacher layers {list(plan.layers)}" + (f", made narrower by {settings.resize}" if settings.resize else "")


def row_length_of(recipe: Recipe) -> int:
    """Tokens per row, from the prepared corpus or from how it will be prepared.

    Raises:
        ValueError: If there is neither.
    """
    if recipe.corpus.prepare is not None:
        return recipe.corpus.prepare.length
    return min(Corpus.open(recipe.corpus.directory, split).length for split in ("train", "held_out"))


def missing_head(source: Source) -> str:
    """Why a recipe with logits cannot run on this teacher, and what can."""
    return (
        f"{source.model} has no masked-LM head, but an objective reads logits (kd, mlm): use a teacher saved with its "
        "head, such as google-bert/bert-base-uncased, or objectives on relations, attention or hidden states"
    )
