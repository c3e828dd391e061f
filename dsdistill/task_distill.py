"""Distillation on a task, from recipe and DeepSpeed JSON to an exported, scored classifier."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed import DeepSpeedEngine
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dsdistill.config.recipe import TaskRecipe
from dsdistill.core import Batch, Features
from dsdistill.locate import Source
from dsdistill.models.export import rebuild, save_skeleton
from dsdistill.models.families import shape_of
from dsdistill.models.loading import load_tokenizer
from dsdistill.models.student import build_student
from dsdistill.plan import Plan, StagePlan, make_task_plan
from dsdistill.plan_page import describe_plan
from dsdistill.plan_problems import Problems
from dsdistill.preflight import preflight
from dsdistill.task_summary import finish_run, is_finished, stage_directory, summarize_task
from dsdistill.task_teacher import (
    EVALUATION_ROWS,
    Signals,
    TaskRun,
    augment,
    label_by_teacher,
    labels_of,
    load_task_teacher,
    prepare_signals,
    teacher_recipe,
    teachers_of,
)
from dsdistill.tasks.metrics import scores
from dsdistill.tasks.rows import Rows, evaluation_batches, in_row_order, train_batches
from dsdistill.tasks.task import Task, open_task, task_spec
from dsdistill.training import run_directory, signals
from dsdistill.training.checkpoint import STUDENT, checkpoint_name
from dsdistill.training.dist import Place, find_place
from dsdistill.training.engine import half_precision, processes
from dsdistill.training.loop import Stage, Teacher, answers, tell_rows
from dsdistill.training.one_job import one_job
from dsdistill.training.pictures import MOST_ROWS, Pictures, Probes, ask_teacher, every_layer, make_probes, moved
from dsdistill.training.placement import Placed, ahead, lines
from dsdistill.training.run_directory import CHECKPOINTS, EXPORT, SKELETON
from dsdistill.training.stage import capture_student, run_stage
from dsdistill.training.teacher_ranks import serve
from dsdistill.training.watchdog import Watchdog
from dsdistill.utilisation import tokens_at_peak


def run(
    recipe: TaskRecipe,
    ds_json: dict[str, Any],
    *,
    resume: Literal["auto", "never"] | Path = "auto",
    dry_run: bool = False,
) -> None:
    """The whole run on this process; every process of the job calls it. A run that is done is only told again.

    Args:
        recipe: What to learn.
        ds_json: From `read_deepspeed_json`.
        resume: `auto` goes on from the newest whole checkpoint of the same recipe, `never` moves an earlier run
            aside (not the teacher's).
        dry_run: Check and describe, write nothing.

    Raises:
        ValueError: On bad input, with every problem found.
        FloatingPointError: If a loss term was not finite.
        StoppedError: If a signal asked the run to stop.
        LostRankError: If another process hangs or is gone.
    """
    if isinstance(resume, Path):
        raise ValueError(f"--resume {resume}: a task goes on from its own newest checkpoints; use auto or never")
    place = find_place().with_teachers(recipe.teacher.ranks or 0)
    task, tokenizer, plan = prepare(recipe, ds_json, place)
    tuning = teacher_recipe(recipe)
    tuning_plan = make_task_plan(tuning, task.spec, task.train.num_rows, ds_json, place) if tuning else None
    if place.is_first:
        to = None if dry_run else sys.stderr  # a plan is a result where nothing else is asked for
        for one in filter(None, (tuning_plan, plan)):
            print(describe_plan(one, place), file=to, flush=True)
        for line in task.notes:
            print(f"note       {line}", file=to, flush=True)
    if dry_run:
        for one in filter(None, (tuning_plan, plan) if place.is_first else ()):
            print(preflight(one, place), flush=True)
        return
    timeout_s = recipe.faults.hang_timeout_s
    if place.is_teacher:
        with processes(place, timeout_s), signals.deferred():
            serve(partial(load_task_teacher, spec=task.spec, seed=recipe.seed), place, timeout_s)
        return
    with processes(place, timeout_s):
        with signals.deferred(), lines(place, 2 * timeout_s) as line, Watchdog(place, timeout_s) as watchdog:
            shared = {"task": task, "tokenizer": tokenizer, "place": place, "watchdog": watchdog, "line": line}
            source = recipe.teacher.source
            if tuning_plan is not None:
                directory = tuning_plan.recipe.output
                with one_job(directory, place, watchdog):
                    distil(TaskRun(plan=tuning_plan, source=source, **shared), "auto")
                source = Source(model=str(directory / EXPORT), trust_remote_code=source.trust_remote_code)
            distil(TaskRun(plan=plan, source=source, **shared), resume)
        if place.is_first:
            print(summarize_task(recipe.output), flush=True)


def prepare(
    recipe: TaskRecipe, ds_json: dict[str, Any], place: Place
) -> tuple[Task, PreTrainedTokenizerFast, Plan[TaskRecipe]]:
    """The task's rows, the tokenizer and the plan.

    Raises:
        ValueError: With every problem of data, models, recipe and JSON.
    """
    problems = Problems()
    tokenizer = problems.of(lambda: load_tokenizer(recipe.teacher.source))
    task = problems.of(lambda: open_task(recipe.task, recipe.data, tokenizer)) if tokenizer is not None else None
    spec = task.spec if task is not None else problems.of(lambda: task_spec(recipe.task, recipe.data))
    rows = num_training_rows(recipe, task) if task is not None else 1
    plan = problems.of(lambda: make_task_plan(recipe, spec, rows, ds_json, place)) if spec is not None else None
    if task is None or tokenizer is None or plan is None:
        raise problems.error()
    return task, tokenizer, plan


def num_training_rows(recipe: TaskRecipe, task: Task) -> int:
    """Training rows, those that augmentation will make included."""
    copies = recipe.data.augment.copies if recipe.data.augment is not None else 0
    return task.train.num_rows * (1 + copies)


def distil(run: TaskRun, resume: Literal["auto", "never"]) -> None:
    """Train all stages from the start or from where they stopped, export and score; nothing if that is done."""
    recipe = run.recipe
    data = run.task.train.fingerprint()
    if resume == "auto" and is_finished(recipe, data):
        return
    run.watchdog.at("run directory and checkpoints")
    checkpoints = enter(run, data, resume)
    run.watchdog.at("models")
    teacher = run.load_teacher()
    run = augment(run, teacher)
    kept = prepare_signals(run, teacher)
    run = label_by_teacher(run, kept)
    student = build_student(
        teacher,
        run.plan.student_config,
        run.plan.layers,
        seed=recipe.seed,
        resize=recipe.student.resize,
        init_from=recipe.student.init_from,
        random_head=recipe.student.head == "random",
    )
    seen = look_early(run, teacher, kept)
    del teacher
    skeleton = recipe.output / SKELETON
    run.watchdog.first_alone("skeleton", lambda: save_skeleton(student, run.tokenizer, skeleton))
    for index, stage in enumerate(run.plan.stages):
        done = checkpoints[index]
        if done is None or run_directory.step_of(done) < stage.pace.optimization.steps:
            train_stage(run, index, student, done, kept, seen)
            gc.collect()  # an engine holds itself in cycles, with all its memory
        student = rebuild(skeleton, weights_after(run, index))
    run.watchdog.first_alone("export and scores", lambda: finish_run(run, kept, data))


def enter(run: TaskRun, data: str, resume: Literal["auto", "never"]) -> list[Path | None]:
    """Prepare the directories of the run and of its stages; the checkpoint of each stage to go on from."""
    recipe, place, stages = run.recipe, run.place, run.plan.stages
    config = stages[0].engine_config
    if resume == "never":
        run_directory.enter(recipe.output, recipe, config, place, "never", data_sha256=data)
    checkpoints = [
        run_directory.enter(
            stage_directory(recipe, index),
            recipe,
            stage.engine_config,
            place,
            "auto",
            data_sha256=data,
            may_start_again=True,
        )
        for index, stage in enumerate(stages)
    ]
    run_directory.enter(recipe.output, recipe, config, place, "auto", data_sha256=data)
    return checkpoints


def weights_after(run: TaskRun, index: int) -> dict[str, torch.Tensor]:
    """The student's weights after a stage."""
    name = checkpoint_name(run.plan.stages[index].pace.optimization.steps)
    return load_file(stage_directory(run.recipe, index) / CHECKPOINTS / name / STUDENT)


def train_stage(
    run: TaskRun,
    index: int,
    student: PreTrainedModel,
    checkpoint: Path | None,
    kept: Signals | None,
    seen: tuple[Features, Features] | None,
) -> None:
    """Train one stage to its end."""
    recipe, task, stage = run.recipe, run.task, run.plan.stages[index]
    optimization, held_out = stage.pace.optimization, run.held_out[1]
    teacher, held_out_teacher = teachers_of(run, stage, kept)
    looking = run.batching(stage, at_least=EVALUATION_ROWS)
    run_stage(
        Stage(
            recipe=recipe,
            pace=stage.pace,
            engine_config=stage.engine_config,
            directory=stage_directory(recipe, index),
            checkpoint=checkpoint,
            student=capture_student(
                student,
                stage.student_wants,
                activation_checkpointing=recipe.student.activation_checkpointing,
            ),
            student_shape=shape_of(run.plan.student_config),
            teacher_shape=shape_of(run.plan.teacher_config),
            terms=stage.terms,
            problem=task.spec.problem,
            teacher=teacher,
            held_out_teacher=held_out_teacher,
            batches=lambda first_step: ahead(
                teacher,
                train_batches(
                    task.train,
                    **run.batching(stage),
                    seed=stage.pace.seed,
                    global_batch=optimization.global_batch,
                    first_step=first_step,
                    last_step=optimization.steps,
                ),
            ),
            held_out=lambda: evaluation_batches(held_out, **looking),
            num_held_out=held_out.num_rows,
            probe=probe_of(run),
            num_examples=task.train.num_rows,
            pictures=pictures_of(run, teacher, seen),
            tokens_at_peak=tokens_at_peak(run.plan, stage, run.place, asks_teacher=isinstance(teacher, Placed)),
            score=(lambda engine: score(run, stage, engine)) if "logits" in stage.student_wants else None,
            notes=(f"stage {stage.name}",),
        ),
        run.place,
        run.watchdog,
    )


def pictures_of(run: TaskRun, teacher: Teacher | None, seen: tuple[Features, Features] | None) -> Pictures | None:
    """What a stage's pictures are made of, or None if nobody wants any.

    Args:
        run: The run.
        teacher: Who answers in training.
        seen: What the teacher says of the probes, if it is not there in training.
    """
    probes, every = probes_of(run), run.recipe.logging.pictures_every
    if probes is None or teacher is None:
        return None if probes is None else Pictures(probes=probes, every=every, teacher=None)
    if isinstance(teacher, Placed):
        layers = shape_of(run.plan.teacher_config).num_layers
        return Pictures(
            probes=probes, every=every, teacher=partial(ask_teacher, teacher, probes, layers, run.place.device)
        )
    assert seen is not None
    return Pictures(probes=probes, every=every, teacher=lambda: seen)


def probes_of(run: TaskRun) -> Probes | None:
    """What models are asked about for pictures; None if nobody wants any."""
    settings, rows = run.recipe.logging, run.held_out[1]
    if settings.pictures == "never":
        return None
    some = next(evaluation_batches(rows, micro_batch=min(MOST_ROWS, rows.num_rows), rank=0, world_size=1))
    return make_probes(run.tokenizer, settings.sentences, some)


def look_early(run: TaskRun, complete: PreTrainedModel, kept: Signals | None) -> tuple[Features, Features] | None:
    """What the teacher says of the probes, where a stage will read its signals from disk; every process calls this.

    Args:
        run: The run.
        complete: The teacher; of no use afterwards.
        kept: Signals on disk.
    """
    probes, stages = probes_of(run), run.plan.stages
    if kept is None or probes is None or not any(s.teacher_wants and kept.cover(s.teacher_wants) for s in stages):
        return None
    run.watchdog.at("what the teacher says of the probes")
    layers = shape_of(run.plan.teacher_config).num_layers
    placement, dtype = replace(run.plan.placement, line=run.line), half_precision(stages[0].engine_config)
    placed = placement.place(run.source, lambda: complete, every_layer(layers), place=run.place, dtype=dtype)
    sentences, rows = ask_teacher(placed, probes, layers, run.place.device)
    return moved(sentences, "cpu"), moved(rows, "cpu")


def probe_of(run: TaskRun) -> Batch:
    """Two held-out rows."""
    rows = run.held_out[1]
    return next(evaluation_batches(rows, micro_batch=min(2, rows.num_rows), rank=0, world_size=1))


def score(run: TaskRun, stage: StagePlan, engine: DeepSpeedEngine) -> Mapping[str, float]:
    """Scores of the student in training on every development split; every process must call this."""
    looking, told = run.batching(stage, at_least=EVALUATION_ROWS), {}

    def batches(split: str, rows: Rows) -> Iterator[Batch]:
        told = tell_rows(evaluation_batches(rows, **looking), f"scores of {split}", rows.num_rows, run.place)
        for number, batch in enumerate(told):
            run.watchdog.at(f"scores of {split}, batch {number}")
            yield batch

    for split, rows in run.task.dev.items():
        ids, outputs = answers(engine, batches(split, rows), run.place)
        found = scores(run.task.spec, labels_of(rows), in_row_order(ids, outputs, num_rows=rows.num_rows))
        told |= {f"{split}/{metric}": value for metric, value in found.items()}
    return told
