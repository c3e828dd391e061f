"""What a run will do, decided before weights are read; refused with every problem if it cannot be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple

from transformers import PreTrainedConfig

from dsdistill.config.deepspeed import fill_auto
from dsdistill.config.offload import check_machine
from dsdistill.config.recipe import AnyRecipe, Pace, Recipe, TaskRecipe
from dsdistill.config.sections import StudentSettings, Term
from dsdistill.core import Problem
from dsdistill.forecast import forecast_memory, trace_stage
from dsdistill.locate import Source
from dsdistill.memory import Memory
from dsdistill.models.families import Wanted, available, family_of, max_length, shape_of
from dsdistill.models.loading import (
    Head,
    check_family,
    has_task_architecture,
    heads_of,
    load_config,
    load_tokenizer,
    task_config,
)
from dsdistill.models.student import check_recomputes, check_start, student_config
from dsdistill.models.vocabulary import set_vocabulary, tokens_problem
from dsdistill.models.weight_names import has_masked_lm_head
from dsdistill.objectives.mapping import initial_layers
from dsdistill.placing import choose_placement, placement_problems
from dsdistill.plan_objectives import bias_notes, kernel_problems, logit_problems, output_note
from dsdistill.plan_problems import Problems
from dsdistill.plan_rows import row_problems, rows_of
from dsdistill.plan_sentences import follow_pooling, packing_problem, scoring_problem
from dsdistill.sentence_scores import pairs_file
from dsdistill.tasks.spec import TaskSpec, output_columns
from dsdistill.tracing import Trace
from dsdistill.training.dist import Place
from dsdistill.training.distiller import BoundTerm, bind_terms, wanted_signals
from dsdistill.training.engine import half_precision
from dsdistill.training.placement import Kind, Placement


class Ends(NamedTuple):
    """What comes out of the models.

    Attributes:
        head: What both end in.
        problem: What a task's labels are.
        targets: Positions per row whose logits may be wanted; None in a task, whose rows have one label each.
    """

    head: Head
    problem: Problem
    targets: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What one stage trains.

    Attributes:
        name: Of a task's stage; empty for task-agnostic distillation, which has one.
        pace: What the loop follows.
        engine_config: DeepSpeed JSON, filled.
        notes: What was decided for it, for people.
        terms: Summands of the loss, bound to layers.
        student_wants: Signals captured in the student.
        teacher_wants: Signals captured in the teacher; empty if no term needs one.
        row_length: Tokens per row.
    """

    name: str
    pace: Pace
    engine_config: dict[str, Any]
    notes: tuple[str, ...]
    terms: list[BoundTerm]
    student_wants: Wanted
    teacher_wants: Wanted
    row_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Generic[AnyRecipe]):
    """Everything decided before weights are read: what `--dry_run` checks and prints.

    Attributes:
        recipe: What is learned.
        source: The teacher.
        teacher_config: Config of the complete teacher.
        student_config: Config of the student.
        layers: Teacher layers the student starts from, or None for random weights.
        stages: What is trained, one after the other.
        placement: Where the teacher lives.
        ends: What both models end in, and what its labels are.
        traces: What `trace` has found.
    """

    recipe: AnyRecipe
    source: Source
    teacher_config: PreTrainedConfig
    student_config: PreTrainedConfig
    layers: tuple[int, ...] | None
    stages: tuple[StagePlan, ...]
    placement: Placement
    ends: Ends
    traces: dict[tuple[Any, ...], Trace] = field(default_factory=dict, compare=False, repr=False)

    def trace(self, stage: StagePlan, *, on_gpu: bool, recomputing: bool = True) -> Trace:
        """What one micro-batch of a stage holds and computes; it takes seconds the first time.

        Args:
            stage: One of the plan's.
            on_gpu: Whether a GPU will run it.
            recomputing: Whether layers are computed again in backward, if the recipe says so.
        """
        recomputing = recomputing and self.recipe.student.activation_checkpointing
        key = (stage.name, on_gpu, recomputing)
        if key not in self.traces:
            self.traces[key] = trace_stage(
                (self.student_config, self.teacher_config),
                self.ends.head,
                stage.terms,
                (stage.student_wants, stage.teacher_wants),
                stage.engine_config,
                row_length=stage.row_length,
                targets=self.ends.targets,
                on_gpu=on_gpu,
                activation_checkpointing=recomputing,
                problem=self.ends.problem,
            )
        return self.traces[key]


def make_plan(recipe: Recipe, ds_json: dict[str, Any], place: Place) -> Plan[Recipe]:
    """Check that recipe, JSON, models and text of a task-agnostic run fit together.

    Raises:
        ValueError: With every problem found.
    """
    problems = Problems()
    rows = problems.of(lambda: rows_of(recipe))
    row_length = rows.length if rows is not None else 1
    source = recipe.teacher.source
    models = plan_models(source, problems.of(lambda: load_config(source)), recipe.student, problems)
    stage = plan_stage(recipe.objectives, recipe.pace, models, problems, ds_json, place, row_length=row_length)
    has_head = problems.of(lambda: has_masked_lm_head(source, models.teacher))
    gets_head = recipe.student.makes_head and "masked LM" in heads_of(models.teacher)
    if stage is not None and "logits" in stage.student_wants and has_head is not None:
        problems.found += logit_problems(recipe, source, has_head or gets_head, stage.terms)
    if stage is not None and gets_head and not has_head and recipe.student.init_from is None:
        stage = replace(stage, notes=(*stage.notes, "the teacher has no masked-LM head: the student's starts random"))
    if stage is not None and (note := output_note(stage.student_wants, recipe.student.num_layers)):
        stage = replace(stage, notes=(*stage.notes, note))
    if models.student is not None:
        problems.found += tokenizer_problems(recipe, source, models.student)
    if stage is not None and "logits" not in stage.student_wants and recipe.student.frozen_encoder:
        problems.found.append("student.frozen_encoder trains a masked-LM head, but no objective reads logits; use mlm")
    if rows is not None:
        problems.found += row_problems(recipe, rows, models.teacher, models.student)
        if rows.packed and stage is not None:
            problems.note(packing_problem(stage.terms, source))
    if recipe.evaluation.sentences is not None and stage is not None:
        sts, read = recipe.evaluation.sentences.sts, stage.student_wants.get("hidden", ())
        if sts is not None:
            problems.of(lambda: pairs_file(sts))
        problems.note(problems.of(lambda: scoring_problem(read, recipe.student.num_layers, source)))
        last = shape_of(models.teacher).num_layers
        wanted = {*stage.teacher_wants.get("hidden", ()), last}
        stage = replace(stage, teacher_wants={**stage.teacher_wants, "hidden": wanted})
    masking = recipe.masking
    targets = row_length if masking.targets == "all" else round(masking.probability * row_length)
    ends = Ends("masked LM" if has_head or gets_head else "none", "classification", targets)
    return finish_plan(recipe, models, [stage], problems, ds_json, place, ends)


def tokenizer_problems(recipe: Recipe, source: Source, student: PreTrainedConfig) -> list[str]:
    """What does not go with the student's tokens; its config then has the vocabulary of its own tokenizer, if any."""
    settings, problems = recipe.student, Problems()
    ours = settings.tokenizer_source(source)
    problems.note(problems.of(lambda: tokens_problem(settings.init_from, ours)))
    if settings.tokenizer is None:
        return problems.found
    problems.of(lambda: set_vocabulary(student, load_tokenizer(ours)))
    others = [term.objective for term in recipe.objectives if term.objective != "mlm"]
    if others:
        problems.found.append(
            f"objectives: {', '.join(others)} cannot be used with student.tokenizer: what the teacher says of its "
            "tokens does not line up with other tokens of the student; use mlm only"
        )
    if recipe.evaluation.sentences is not None:
        problems.found.append(
            "evaluation.sentences: the teacher cannot read rows of other tokens (student.tokenizer); drop it, and "
            "score the exported student by launch/evaluate.py, which gives each model its own"
        )
    return problems.found


def make_task_plan(
    recipe: TaskRecipe, spec: TaskSpec, num_rows: int, ds_json: dict[str, Any], place: Place
) -> Plan[TaskRecipe]:
    """Check that recipe, JSON and models of a task fit together.

    Args:
        recipe: What is learned; `teacher.model` is the model that gives signals and first weights.
        spec: The task.
        num_rows: Training rows.
        ds_json: From `read_deepspeed_json`.
        place: This process.

    Raises:
        ValueError: With every problem found.
    """
    problems = Problems()
    source = recipe.teacher.source
    config = problems.of(lambda: task_config(load_config(source), spec.labels, spec.problem))
    problems.of(lambda: teacher_outputs(source, spec))
    models = plan_models(source, config, recipe.student, problems)
    problems.note(problems.of(lambda: tokens_problem(recipe.student.init_from, source)))
    longest, length = max_length(models.teacher), recipe.data.max_length
    if longest is not None and length > longest:
        problems.found.append(f"data.max_length={length}, but {source.model} takes {longest} tokens; use fewer")
    if recipe.data.augment is not None and not recipe.asks_teacher:
        problems.found.append("data.augment: the labels of new rows come from the teacher, but no objective asks one")
    stages = []
    for index, settings in enumerate(recipe.stages):
        stage = plan_stage(
            settings.objectives,
            recipe.pace(index, num_rows),
            models,
            problems,
            ds_json,
            place,
            row_length=length,
            name=settings.name,
            problem=spec.problem,
        )
        if stage is not None and any(term.objective.name == "mlm" for term in stage.terms):
            problems.found.append(f"stage {stage.name}: mlm needs masked text, which a task has not; drop it")
        if stage is not None and "bias" in stage.teacher_wants and recipe.teacher.cache == "all":
            problems.found.append(
                f"stage {stage.name}: teacher.cache: all cannot keep what {family_of(models.teacher).title} adds to "
                "its attention scores; use teacher.cache: logits"
            )
        stages.append(stage)
    return finish_plan(recipe, models, stages, problems, ds_json, place, Ends("task", spec.problem, None))


def teacher_outputs(source: Source, spec: TaskSpec) -> tuple[int, ...] | None:
    """Which output of a teacher stands for each label of the task; None if it has no head for tasks.

    Raises:
        ValueError: If its head is for other labels.
    """
    config = load_config(source)
    if not has_task_architecture(config):
        return None
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    return output_columns(spec, names, f"model {source.model!r}")


class Models(NamedTuple):
    """Both models as far as they are known; the student is None if something is wrong with it."""

    source: Source
    teacher: PreTrainedConfig
    student: PreTrainedConfig | None
    layers: tuple[int, ...] | None


def plan_models(
    source: Source, teacher: PreTrainedConfig | None, settings: StudentSettings, problems: Problems
) -> Models:
    """The student's config, and the teacher layers it starts from.

    Raises:
        ValueError: Without a teacher, with every problem found so far: nothing else can be checked.
    """
    if teacher is None:
        raise problems.error()
    before = len(problems.found)
    layers = problems.of(lambda: initial_layers(settings.init, settings.num_layers, shape_of(teacher).num_layers))
    misplaced = len(problems.found) > before
    student = problems.of(
        lambda: student_config(
            teacher,
            settings.num_layers,
            layers,
            family=settings.family,
            dropout=settings.dropout,
            overrides=settings.overrides,
        )
    )
    if student is None or misplaced:  # objectives on layers that do not exist would only repeat it
        return Models(source, teacher, None, layers)
    problems.of(lambda: check_family(student))
    problems.of(
        lambda: check_start(teacher, student, layers=layers, resize=settings.resize, init_from=settings.init_from)
    )
    if settings.activation_checkpointing:
        problems.of(lambda: check_recomputes(student))
    return Models(source, teacher, student, layers)


def plan_stage(
    objectives: Sequence[Term],
    pace: Pace,
    models: Models,
    problems: Problems,
    ds_json: dict[str, Any],
    place: Place,
    *,
    row_length: int,
    name: str = "",
    problem: Problem = "classification",
) -> StagePlan | None:
    """One stage, or None if something is wrong."""
    machine = {"world_size": place.world_size, "device_type": place.device.type, "row_length": row_length}
    filled = problems.of(lambda: fill_auto(ds_json, pace.optimization, **machine))
    problems.of(lambda: check_machine(ds_json.get("zero_optimization", {})))
    if models.student is None:
        return None
    shapes = shape_of(models.student), shape_of(models.teacher)
    terms = problems.of(
        lambda: follow_pooling(
            bind_terms(objectives, *shapes, initial=models.layers, problem=problem),
            models.source,
            shapes[1].num_layers,
        )
    )
    if terms is None or filled is None:
        return None
    configs = (models.student, models.teacher)
    student_wants, teacher_wants = map(available, configs, wanted_signals(terms))
    problems.found += kernel_problems(terms, configs)
    return StagePlan(
        name=name,
        pace=pace,
        engine_config=filled[0],
        notes=(*filled[1], *bias_notes(student_wants, teacher_wants, configs)),
        terms=terms,
        student_wants=student_wants,
        teacher_wants=teacher_wants,
        row_length=row_length,
    )


def finish_plan(
    recipe: AnyRecipe,
    models: Models,
    stages: Sequence[StagePlan | None],
    problems: Problems,
    ds_json: dict[str, Any],
    place: Place,
    ends: Ends,
) -> Plan[AnyRecipe]:
    """The plan, if nothing is wrong.

    Raises:
        ValueError: With every problem found.
    """
    problems.found += placement_problems(recipe.teacher, ds_json, place, needs_teacher=recipe.asks_teacher)
    graphs = any(stage is not None and stage.engine_config.get("cuda_graphs") for stage in stages)
    if graphs and recipe.student.activation_checkpointing:
        problems.found.append(
            "cuda_graphs: cannot be used with student.activation_checkpointing, which runs layers again; choose one"
        )
    if problems.found or models.student is None:
        raise problems.error()
    plan = Plan(
        recipe=recipe,
        source=models.source,
        teacher_config=models.teacher,
        student_config=models.student,
        layers=models.layers,
        stages=tuple(stage for stage in stages if stage is not None),
        placement=Placement(),
        ends=ends,
    )
    return replace(plan, placement=place_teacher(plan, place)) if recipe.asks_teacher else plan


def place_teacher(plan: Plan[Any], place: Place) -> Placement:
    """Where the teacher lives: as the recipe says, or where the stage that asks for most has room."""
    stages = [stage for stage in plan.stages if stage.teacher_wants]
    configs = [stage.engine_config for stage in stages]

    def traces() -> list[Trace]:
        return [plan.trace(stage, on_gpu=True) for stage in stages]

    def forecast(kind: Kind) -> Memory:
        each = zip(traces(), configs, strict=True)
        return max((forecast_memory(t, c, place.world_size, kind) for t, c in each), key=lambda memory: memory.peak)

    def size() -> int:
        teacher = max(t.teacher.frozen for t in traces() if t.teacher is not None)
        return teacher * half_precision(configs[0]).itemsize

    fixed = any(config.get("torch_compile") for config in configs)
    return choose_placement(plan.recipe.teacher, place, forecast, size=size, fixed=fixed)
