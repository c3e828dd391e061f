"""The one loop of all stages: read a batch, ask the teacher, train the student, report, save."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from dsdistill.config.recipe import Pace, RunSettings
from dsdistill.core import NOTHING, Batch, Features, ModelShape, Problem
from dsdistill.models.capture import Captured
from dsdistill.progress import each, waiting
from dsdistill.training import signals
from dsdistill.training.ahead import Asked
from dsdistill.training.dist import Place, Vote, gather_rows
from dsdistill.training.distiller import BoundTerm
from dsdistill.training.engine import backward, optimizer_of
from dsdistill.training.gradient_norms import LayerNorms
from dsdistill.training.graphs import GraphedTeacher
from dsdistill.training.health import check_gradients, skips_in_a_row
from dsdistill.training.pictures import Gallery, Pictures
from dsdistill.training.schedule import learning_rate
from dsdistill.training.telemetry import LossSums, Telemetry
from dsdistill.training.watchdog import Watchdog

Teacher = Callable[[Batch], Features]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What is trained in one stage, and on what.

    Attributes:
        recipe: Kept in the stage's directory; a checkpoint belongs to it.
        pace: Steps, learning rate, and when to look, tell and save.
        engine_config: DeepSpeed JSON, filled.
        directory: Where checkpoints, metrics and TensorBoard go.
        checkpoint: Verified, to go on from, or None.
        student: Wired for capture, with the weights that the stage starts from.
        student_shape: Its sizes.
        teacher_shape: Sizes of the complete teacher.
        terms: Summands of the loss.
        problem: What a task's labels are.
        teacher: Gives signals for a batch of training rows, or None if no term needs a teacher.
        held_out_teacher: The same for held-out rows.
        batches: Micro-batches of this rank from a step on, without end before `pace.optimization.steps`.
        held_out: A fresh pass over this rank's held-out micro-batches, equally many on each rank.
        probe: A few held-out rows, to find which parameters the loss reaches.
        num_held_out: Rows that `held_out` gives, over all ranks.
        num_examples: Training rows.
        score: Numbers of a task from the student's answers, or None; every rank calls it.
        pictures: What pictures are made of; None for none.
        tokens_at_peak: Tokens per second that the job's devices could compute at best, or why that is not known.
        notes: Lines for people, told at the start.
    """

    recipe: RunSettings
    pace: Pace
    engine_config: dict[str, Any]
    directory: Path
    checkpoint: Path | None
    student: Captured
    student_shape: ModelShape
    teacher_shape: ModelShape
    terms: Sequence[BoundTerm]
    problem: Problem = "classification"
    teacher: Teacher | None
    held_out_teacher: Teacher | None
    batches: Callable[[int], Iterable[Batch]]
    held_out: Callable[[], Iterable[Batch]]
    num_held_out: int
    probe: Batch
    num_examples: int
    score: Callable[[DeepSpeedEngine], Mapping[str, float]] | None = None
    pictures: Pictures | None = None
    tokens_at_peak: float | str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A stage in training on this process.

    Attributes:
        stage: What is trained.
        engine: Holds the `Distiller`.
        save: Writes a checkpoint after so many steps and says whether it could; every rank calls it.
        place: This process.
        telemetry: Where numbers go.
        watchdog: Is told what this rank is doing.
        first_step: Steps done before.
        gallery: Draws pictures; None if nobody wants any.
    """

    stage: Stage
    engine: DeepSpeedEngine
    save: Callable[[int], bool]
    place: Place
    telemetry: Telemetry
    watchdog: Watchdog
    first_step: int
    gallery: Gallery | None = None


def train(attempt: Attempt) -> None:
    """Run a stage from `first_step` to its last step.

    Raises:
        StoppedError: On all ranks alike, if a signal asked any of them to stop; what was done is saved.
        FloatingPointError: On all ranks alike, if losses or gradients are not finite, or fp16 overflows on and on.
    """
    pace, engine, telemetry = attempt.stage.pace, attempt.engine, attempt.telemetry
    last_step = pace.optimization.steps
    vote = Vote(attempt.place)
    vote.cast(signals.received() is not None)
    saved = attempt.first_step
    if attempt.first_step == 0 and not vote.count():
        evaluate_now(attempt, 0)
        if attempt.gallery is not None:
            attempt.watchdog.at("step 0, pictures")
            attempt.gallery.at_start()
    layer_norms = LayerNorms(engine)
    ask = attempt.stage.teacher
    ahead = isinstance(ask, GraphedTeacher)
    batches = Asked(iter(attempt.stage.batches(attempt.first_step)), ask, attempt.place.device, ahead=ahead)
    logged, tokens, skips = attempt.first_step, 0, 0
    telemetry.pause()
    for step in range(attempt.first_step, last_step):
        done = step + 1
        stopping = vote.count()
        if stopping and saved == step:
            raise signals.StoppedError(f"stopped; {step} of {last_step} steps are done and saved")
        saves = stopping or done % pace.checkpoint.every_steps == 0 or done == last_step
        evaluates = done % pace.evaluation_every == 0 or done == last_step
        # a checkpoint is never written of a step whose losses nobody has looked at
        logs = saves or evaluates or done % pace.logging_every == 0
        skipped_before = engine.skipped_steps
        if logs:
            layer_norms.ask()
        read, norm = train_step(attempt, batches, step, vote, measure=logs)
        skipped = engine.skipped_steps > skipped_before
        # ZeRO skips steps in other types too; there no loss scale can be blamed, and one is too many
        overflowed = skipped and engine.fp16_enabled()
        scale = loss_scale(engine)
        skips = skips_in_a_row(skips, overflowed, limit=pace.skipped_steps, step=done, loss_scale=scale)
        tokens += read
        if logs or (skipped and not overflowed):
            scalars = engine_scalars(engine, pace, step) | {"optimization/grad_norm": norm} | layer_norms.read(norm)
            told = telemetry.training(done, tokens * attempt.place.world_size, done - logged, scalars)
            if not overflowed:
                check_gradients(math.nan if skipped else norm, told, step=done)
            logged, tokens = done, 0
        else:
            telemetry.step(done)
        if evaluates:
            evaluate_now(attempt, done)
        draws = draw_now(attempt, done, evaluated=evaluates)
        attempt.watchdog.at(f"step {done}, checkpoint")
        if saves and attempt.save(done):
            saved = done
        if saves or evaluates or draws:
            telemetry.pause()
        if stopping and done < last_step:
            unsaved = f", those after {saved} not saved" if saved < done else " and saved"
            raise signals.StoppedError(f"stopped; {done} of {last_step} steps are done{unsaved}")


def train_step(attempt: Attempt, batches: Asked, step: int, vote: Vote, *, measure: bool) -> tuple[int, float]:
    """One optimizer step, with the vote about the next.

    Returns:
        Tokens that this rank read, and with `measure` the gradient's norm (else 0).
    """
    engine, pace = attempt.engine, attempt.stage.pace
    part = partial(step_part, attempt, step + 1)
    tokens, norm = 0, 0.0
    for group in optimizer_of(engine).param_groups:
        group["lr"] = learning_rate(step, pace.optimization)
    for micro_step in range(engine.gradient_accumulation_steps()):
        batch, teacher = batches.take(part)
        with part("student"):
            seed_dropout(pace.seed, step, micro_step, attempt.place.rank)
            losses = engine(batch, teacher, step)
            attempt.telemetry.sums.add(losses, step + 1)
        with part("backward"):
            backward(engine, losses.total)
        if measure and engine.is_gradient_accumulation_boundary():
            norm = plain_gradient_norm(engine)
        if engine.is_gradient_accumulation_boundary():
            vote.cast(signals.received() is not None)
            if step + 1 < pace.optimization.steps:
                batches.prepare(part)
        with part("step"):
            engine.step()
        tokens += batch.input_ids.numel()
    if measure and norm is None:
        norm = float(engine.get_global_grad_norm() or 0.0)  # sync
        norm = norm if norm >= 0 else math.nan  # ZeRO says -1 for what is not finite
    return tokens, norm or 0.0


@contextlib.contextmanager
def step_part(attempt: Attempt, step: int, name: str) -> Iterator[None]:
    """Time a part of a step, and note it in case it never ends."""
    attempt.watchdog.at(f"step {step}, {name}")
    with attempt.telemetry.stopwatch.part(name):
        yield


def plain_gradient_norm(engine: DeepSpeedEngine) -> float | None:
    """Norm of the reduced gradients before the step, in float32 without ZeRO; other optimizers tell it themselves."""
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        return None
    gradients = [p.grad for p in engine.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))  # sync


def seed_dropout(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Make this micro-batch's dropout a function of where it stands, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, micro_step, rank)).generate_state(1, np.uint64)[0] >> 1))


def engine_scalars(engine: DeepSpeedEngine, pace: Pace, step: int) -> dict[str, float]:
    """Scalars that only the engine knows."""
    return {
        "optimization/learning_rate": learning_rate(step, pace.optimization),
        "optimization/loss_scale": loss_scale(engine),
        "optimization/skipped_steps": float(engine.skipped_steps),
    }


def loss_scale(engine: DeepSpeedEngine) -> float:
    """What the loss is multiplied with in fp16, else 1."""
    return float(getattr(engine.optimizer, "cur_scale", getattr(engine.optimizer, "loss_scale", 1.0)))


def evaluate_now(attempt: Attempt, step: int) -> None:
    """Measure and report the objectives on held-out rows, and the task's scores if there are any."""
    stage = attempt.stage

    def batches() -> Iterator[Batch]:
        told = tell_rows(stage.held_out(), "held-out objective", stage.num_held_out, attempt.place)
        for number, batch in enumerate(told):
            attempt.watchdog.at(f"step {step}, held-out batch {number}")
            yield batch

    losses = evaluate(attempt.engine, stage.held_out_teacher, batches(), attempt.place, step)
    attempt.watchdog.at(f"step {step}, scores")
    attempt.telemetry.evaluation(step, losses, stage.score(attempt.engine) if stage.score is not None else {})


def draw_now(attempt: Attempt, step: int, *, evaluated: bool) -> bool:
    """Draw pictures if they are due after a step; whether they were."""
    gallery = attempt.gallery
    if gallery is None:
        return False
    attempt.watchdog.at(f"step {step}, pictures")
    due = gallery.is_due(step, evaluated=evaluated, last=step == attempt.stage.pace.optimization.steps)
    if due:
        with waiting(f"pictures of step {step}"):
            gallery.show(step)
    return due


def tell_rows(batches: Iterable[Batch], what: str, num_rows: int, place: Place) -> Iterator[Batch]:
    """The same batches of this rank, and how many of all ranks' rows they are so far."""
    return each(batches, what, num_rows, unit="row", size=lambda batch: len(batch.input_ids) * place.world_size)


@torch.no_grad()
def evaluate(
    engine: DeepSpeedEngine, teacher: Teacher | None, batches: Iterable[Batch], place: Place, step: int
) -> dict[str, float]:
    """Means of the total and of every term over held-out micro-batches of all ranks; every rank must call this."""
    sums = LossSums(place.device)
    engine.eval()
    for batch in batches:
        batch = batch.to(place.device)
        sums.add(engine(batch, teacher(batch) if teacher is not None else NOTHING, step), step)
    engine.train()
    return sums.read()


@torch.no_grad()
def answers(
    engine: DeepSpeedEngine,
    batches: Iterable[Batch],
    place: Place,
    read: Callable[[Features, Batch], Tensor] = lambda features, _: features.logits,
) -> tuple[np.ndarray, np.ndarray]:
    """What the student says about rows; every rank must call this with equally many batches of equal size.

    Args:
        engine: Holds the `Distiller`, whose student captures what `read` wants.
        batches: This rank's rows.
        place: This process.
        read: (B, C) from a batch's signals; the logits of a task unless given.

    Returns:
        int64 (M,) row numbers and float32 (M, C) answers over all ranks, in any order, repetitions included.
    """

    def ask(batch: Batch) -> Tensor:
        answer = engine(batch, None, 0).answer
        assert answer is not None
        return read(answer, batch)

    engine.eval()
    found = over_all_ranks(ask, batches, place)
    engine.train()
    return found


@torch.no_grad()
def over_all_ranks(
    ask: Callable[[Batch], Tensor], batches: Iterable[Batch], place: Place
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and what `ask` says about them, from the batches of all ranks, as `answers`."""
    ids, values = [], []
    for batch in batches:
        batch = batch.to(place.device)
        ids.append(batch.sample_ids)
        values.append(ask(batch).float())
    numbers, table = (gather_rows(torch.cat(parts)).cpu().numpy() for parts in (ids, values))  # sync
    return numbers, table
