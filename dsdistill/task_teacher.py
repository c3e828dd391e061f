"""The teacher of a task: fine-tuned first where it has no head, its signals for all rows kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dsdistill.config.recipe import TaskRecipe, check_task_recipe
from dsdistill.config.sections import EpochOptimizationSettings
from dsdistill.core import Batch, Signal
from dsdistill.locate import Source
from dsdistill.models.capture import Wanted
from dsdistill.models.loading import (
    has_task_architecture,
    load_classifier,
    load_config,
    load_masked_lm,
    load_tokenizer,
    task_config,
    word_embeddings,
)
from dsdistill.models.teacher import weights_checksum
from dsdistill.plan import Plan, StagePlan, teacher_outputs
from dsdistill.progress import Progress
from dsdistill.tasks.augment import MaskedLM, augment_rows
from dsdistill.tasks.metrics import predict
from dsdistill.tasks.rows import Rows, evaluation_batches
from dsdistill.tasks.spec import TaskSpec
from dsdistill.tasks.task import Task
from dsdistill.tasks.vectors import model_vectors, read_vectors
from dsdistill.training.dist import Place, Vote, wait_for_all
from dsdistill.training.engine import half_precision
from dsdistill.training.loop import Teacher, tell_rows
from dsdistill.training.one_job import one_job
from dsdistill.training.placement import Placed, at_once
from dsdistill.training.signal_cache import SignalCache
from dsdistill.training.signals import StoppedError, received
from dsdistill.training.teacher_ranks import TeacherLine
from dsdistill.training.watchdog import Watchdog

EVALUATION_ROWS = 64
"""Rows in a batch that needs no gradient, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRun:
    """What one run on a task needs, made once.

    Attributes:
        plan: What will be done.
        task: Its rows.
        tokenizer: The teacher's and the student's.
        source: The model that gives signals and first weights: fine-tuned, where the recipe's teacher had no head.
        place: This process.
        watchdog: Is told what this rank is doing.
        line: To the teacher's process, if it has its own.
    """

    plan: Plan[TaskRecipe]
    task: Task
    tokenizer: PreTrainedTokenizerFast
    source: Source
    place: Place
    watchdog: Watchdog
    line: TeacherLine | None = None

    @property
    def recipe(self) -> TaskRecipe:
        """What is learned."""
        return self.plan.recipe

    @property
    def held_out(self) -> tuple[str, Rows]:
        """The rows on which objectives are measured: the first of the development splits."""
        return next(iter(self.task.dev.items()))

    def load_teacher(self) -> PreTrainedModel:
        """The complete teacher in float32, outputs in the task's order; without a head of its own, a random one."""
        return load_task_teacher(self.source, self.task.spec, seed=self.recipe.seed)

    def placed(self, wanted: Wanted, dtype: torch.dtype) -> Placed:
        """The teacher where the plan wants it; every process must call this."""
        placement = replace(self.plan.placement, line=self.line)
        return placement.place(self.source, self.load_teacher, wanted, place=self.place, dtype=dtype)

    def batching(self, stage: StagePlan, *, at_least: int = 1) -> dict[str, int]:
        """How rows are spread over the ranks in a stage."""
        micro_batch = max(stage.engine_config["train_micro_batch_size_per_gpu"], at_least)
        return {"micro_batch": micro_batch, "rank": self.place.rank, "world_size": self.place.world_size}


def load_task_teacher(source: Source, spec: TaskSpec, *, seed: int) -> PreTrainedModel:
    """A complete teacher in float32, outputs in the task's order; without a head of its own, a random one."""
    config = task_config(load_config(source), spec.labels, spec.problem)
    return load_classifier(source, config, seed=seed, columns=teacher_outputs(source, spec))


def labels_of(rows: Rows) -> np.ndarray:
    """The labels of training or development rows, which have some."""
    assert rows.labels is not None  # `open_task` refuses such files without
    return rows.labels


def teacher_recipe(recipe: TaskRecipe) -> TaskRecipe | None:
    """The recipe by which the teacher is fine-tuned first, or None if that is not needed.

    It is not if no objective asks the teacher, or if the model has a head for tasks. Recipes that agree on teacher,
    data and `fine_tuning` share the run, which lies under `teacher.directory`.

    Raises:
        ValueError: If the teacher cannot be read.
    """
    if not recipe.asks_teacher:
        return None
    has_head, depth = _head_and_depth(recipe.teacher.source)
    if has_head:
        return None
    tuning = recipe.teacher.fine_tuning
    content: dict[str, Any] = {
        "name": "teacher",
        "seed": tuning.seed,
        "task": recipe.task,
        "data": recipe.data.model_dump(mode="json", exclude={"augment"}),
        "teacher": recipe.teacher.model_dump(mode="json", include={"model", "revision", "trust_remote_code"}),
        "student": {"num_layers": depth, "init": list(range(1, depth + 1))},
        "stages": [
            {
                "name": "fine-tuning",
                "objectives": [{"objective": "task"}],
                "optimization": {name: getattr(tuning, name) for name in EpochOptimizationSettings.model_fields},
            }
        ],
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    content["output"] = str(recipe.teacher.directory / f"{recipe.task}-{_short_name(recipe.teacher.model)}-{digest}")
    content |= {name: getattr(recipe, name).model_dump() for name in ("logging", "checkpoint", "faults")}
    return check_task_recipe(content, "the teacher's recipe")


@cache
def _head_and_depth(source: Source) -> tuple[bool, int]:
    """Whether a model has a head for tasks, and its layers; kept, since a grid asks for every cell."""
    config = load_config(source)
    return has_task_architecture(config), config.num_hidden_layers


def _short_name(model: str) -> str:
    """The last part of a model's name or path."""
    return model.rstrip("/").rpartition("/")[2].rpartition(":")[2]


class Signals(NamedTuple):
    """Teacher signals on disk.

    Attributes:
        names: What is there, layers by signal.
        train: Of the training rows.
        held_out: Of the rows on which objectives are measured.
    """

    names: Wanted
    train: SignalCache
    held_out: SignalCache

    def cover(self, wanted: Wanted) -> bool:
        """Whether everything that is wanted is there."""
        return all(set(layers) <= set(self.names.get(signal, ())) for signal, layers in wanted.items())


def augment(run: TaskRun, complete: PreTrainedModel) -> TaskRun:
    """The run with the training rows that the recipe wants made, which wait for labels; or as it was.

    Raises:
        ValueError: If the masked language model or the word vectors cannot be used.
        StoppedError: On all ranks alike, if a signal asked any of them to stop before the last row.
    """
    settings, place = run.recipe.data.augment, run.place
    if settings is None:
        return run
    run.watchdog.at("augmentation")
    if settings.embeddings is not None:
        vectors = read_vectors(settings.embeddings)
    else:
        vectors = model_vectors(word_embeddings(complete), run.tokenizer)
    masked_lm = None
    if settings.masked_lm is not None:
        source, length = Source(model=settings.masked_lm), run.recipe.data.max_length
        model = load_masked_lm(source, device=place.device)
        masked_lm = MaskedLM(model, load_tokenizer(source), max_length=length)
    vote = Vote(place)

    def at(row: int) -> None:
        progress.to(row)
        run.watchdog.at(f"augmentation from row {row}")
        if vote.count():
            raise StoppedError(f"stopped after augmentation of {row} rows, which are not kept")
        vote.cast(received() is not None)

    texts = {"seed": run.recipe.seed, "vectors": vectors, "masked_lm": masked_lm}
    with Progress("augmentation", len(run.task.texts), unit="row") as progress:
        more = augment_rows(run.task, run.tokenizer, settings, **texts, at=at)
        progress.to(len(run.task.texts))
    vote.count()  # the next who asks will know
    return replace(run, task=replace(run.task, train=run.task.train.extended(more)))


def label_by_teacher(run: TaskRun, signals: Signals | None) -> TaskRun:
    """The run with the teacher's answers as labels of the rows that augmentation made."""
    rows = run.task.train
    numbers = np.flatnonzero(rows.is_augmented)
    if signals is None or not numbers.size:
        return run
    outputs = signals.train.array("logits")[torch.from_numpy(numbers)].float().numpy()
    labels = predict(run.task.spec, outputs).astype(labels_of(rows).dtype)
    return replace(run, task=replace(run.task, train=rows.with_labels(numbers, labels)))


def cached_names(run: TaskRun) -> dict[Signal, set[int]]:
    """What the recipe wants on disk; augmented rows need the logits, which become their labels."""
    choice = run.recipe.teacher.cache
    names: dict[Signal, set[int]] = {}
    for stage in run.plan.stages:
        for signal, layers in stage.teacher_wants.items():
            if choice == "all" or (choice == "logits" and signal == "logits"):
                names.setdefault(signal, set()).update(layers)
    if run.recipe.data.augment is not None:
        names["logits"] = {-1}
    return names


def prepare_signals(run: TaskRun, complete: PreTrainedModel) -> Signals | None:
    """Let the teacher answer for all rows once, unless it has done so for an earlier run; every process calls this.

    Args:
        run: The run.
        complete: The teacher.

    Returns:
        The signals, or None if none are wanted on disk.

    Raises:
        ValueError: If what lies there belongs to another teacher, tokenizer, precision or to other rows.
    """
    names = cached_names(run)
    if not names:
        return None
    dtype = half_precision(run.plan.stages[0].engine_config)
    settings = {"teacher": run.source.model, "data": run.recipe.data.model_dump(mode="json"), "precision": str(dtype)}
    if run.recipe.data.augment is not None:
        settings["seed"] = run.recipe.seed
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    directory = (
        run.recipe.teacher.directory / "signals" / f"{run.recipe.task}-{_short_name(run.recipe.teacher.model)}-{key}"
    )
    identity = {
        "teacher": weights_checksum(complete),
        "tokenizer": hashlib.sha256(run.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "precision": str(dtype),
    }
    caches = []
    with one_job(directory, run.place, run.watchdog):
        for split, rows in (("train", run.task.train), run.held_out):
            cache = SignalCache(directory / split, {**identity, "rows": rows.fingerprint()}, np.diff(rows.offsets))
            missing = cache.missing(names)
            wait_for_all(run.place)
            if missing:
                fill(run, cache, missing, split, rows, dtype)
            caches.append(cache)
    return Signals(names, *caches)


def fill(
    run: TaskRun, cache: SignalCache, missing: Mapping[Signal, set[int]], split: str, rows: Rows, dtype: torch.dtype
) -> None:
    """Run the teacher over the rows of a split and write what it says."""
    teacher = at_once(run.placed(missing, dtype))
    assert teacher is not None
    spread = run.batching(run.plan.stages[0], at_least=EVALUATION_ROWS)
    what = f"teacher signals, {split}"
    batches = until_stopped(evaluation_batches(rows, **spread), run.place, what)
    told = tell_rows(batches, what, rows.num_rows, run.place)
    cache.fill(teacher, told, run.place, first_alone=run.watchdog.first_alone, at=run.watchdog.at)


def until_stopped(batches: Iterable[Batch], place: Place, doing: str) -> Iterator[Batch]:
    """The same batches, equally many on each rank.

    Raises:
        StoppedError: On all ranks alike, if a signal asked any of them to stop before the last batch.
    """
    vote = Vote(place)
    for number, batch in enumerate(batches):
        if vote.count():
            raise StoppedError(f"stopped after {number} batches of {doing}, which are not kept")
        vote.cast(received() is not None)
        yield batch
    vote.count()  # the next who asks will know


def teachers_of(run: TaskRun, stage: StagePlan, signals: Signals | None) -> tuple[Teacher | None, Teacher | None]:
    """Who answers in a stage, for training rows and for held-out rows: nobody, the disk, or the teacher itself."""
    wants = stage.teacher_wants
    if not wants:
        return None, None
    if signals is not None and signals.cover(wants):
        return signals.train.teacher(wants, run.place), signals.held_out.teacher(wants, run.place)
    dtype = half_precision(stage.engine_config)
    teacher = run.placed(wants, dtype)
    return teacher, at_once(teacher)
