"""The one loop of all stages: read a batch, ask the teacher, train the student, report, save."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from deepspeed import DeepSpeedEngine

from dsdistill.config.recipe import Recipe
from dsdistill.core import NOTHING, Batch, Features
from dsdistill.training import signals
from dsdistill.training.dist import Place, Vote
from dsdistill.training.engine import backward, optimizer_of
from dsdistill.training.health import check_gradients, skips_in_a_row
from dsdistill.training.schedule import learning_rate
from dsdistill.training.telemetry import LossSums, Telemetry
from dsdistill.training.watchdog import Watchdog

Teacher = Callable[[Batch], Features]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one stage of training needs.

    Attributes:
        recipe: What is learned.
        engine: Holds the `Distiller`.
        teacher: Gives signals for a batch, or None if no term needs a teacher.
        batches: Micro-batches of this rank from `first_step` on, without end before `recipe.optimization.steps`.
        held_out: A fresh pass over this rank's held-out micro-batches, equally many on each rank.
        save: Writes a checkpoint after so many steps and says whether it could; every rank calls it.
        place: This process.
        telemetry: Where numbers go.
        watchdog: Is told what this rank is doing.
        first_step: Steps done before.
    """

    recipe: Recipe
    engine: DeepSpeedEngine
    teacher: Teacher | None
    batches: Iterable[Batch]
    held_out: Callable[[], Iterable[Batch]]
    save: Callable[[int], bool]
    place: Place
    telemetry: Telemetry
    watchdog: Watchdog
    first_step: int


def train(stage: Stage) -> None:
    """Run a stage from `first_step` to its last step.

    Raises:
        StoppedError: On all ranks alike, if a signal asked any of them to stop; what was done is saved.
        FloatingPointError: On all ranks alike, if losses or gradients are not finite, or fp16 overflows on and on.
    """
    recipe, engine, telemetry = stage.recipe, stage.engine, stage.telemetry
    last_step = recipe.optimization.steps
    vote = Vote(stage.place)
    vote.cast(signals.received() is not None)
    saved = stage.first_step
    if stage.first_step == 0 and not vote.count():
        evaluate_now(stage, 0)
    batches = iter(stage.batches)
    logged, tokens, skips = stage.first_step, 0, 0
    telemetry.pause()
    for step in range(stage.first_step, last_step):
        done = step + 1
        stopping = vote.count()
        if stopping and saved == step:
            raise signals.StoppedError(f"stopped; {step} of {last_step} steps are done and saved")
        saves = stopping or done % recipe.checkpoint.every_steps == 0 or done == last_step
        evaluates = done % recipe.evaluation.every_steps == 0 or done == last_step
        # a checkpoint is never written of a step whose losses nobody has looked at
        logs = saves or evaluates or done % recipe.logging.every_steps == 0
        skipped_before = engine.skipped_steps
        read, norm = train_step(stage, batches, step, vote, measure=logs)
        skipped = engine.skipped_steps > skipped_before
        # ZeRO skips steps in other types too; there no loss scale can be blamed, and one is too many
        overflowed = skipped and engine.fp16_enabled()
        scale, limit = loss_scale(engine), recipe.faults.skipped_steps
        skips = skips_in_a_row(skips, overflowed, limit=limit, step=done, loss_scale=scale)
        tokens += read
        if logs or (skipped and not overflowed):
            scalars = engine_scalars(engine, recipe, step) | {"optimization/grad_norm": norm}
            told = telemetry.training(done, tokens * stage.place.world_size, done - logged, scalars)
            if not overflowed:
                check_gradients(math.nan if skipped else norm, told, step=done)
            logged, tokens = done, 0
        if evaluates:
            evaluate_now(stage, done)
        stage.watchdog.at(f"step {done}, checkpoint")
        if saves and stage.save(done):
            saved = done
        if saves or evaluates:
            telemetry.pause()
        if stopping and done < last_step:
            unsaved = f", those after {saved} not saved" if saved < done else " and saved"
            raise signals.StoppedError(f"stopped; {done} of {last_step} steps are done{unsaved}")


def train_step(stage: Stage, batches: Iterator[Batch], step: int, vote: Vote, *, measure: bool) -> tuple[int, float]:
    """One optimizer step, with the vote about the next.

    Returns:
        Tokens that this rank read, and with `measure` the gradient's norm (else 0).
    """
    engine, part = stage.engine, partial(step_part, stage, step + 1)
    tokens, norm = 0, 0.0
    for group in optimizer_of(engine).param_groups:
        group["lr"] = learning_rate(step, stage.recipe.optimization)
    for micro_step in range(engine.gradient_accumulation_steps()):
        with part("data"):
            batch = next(batches).to(stage.place.device)
        with part("teacher"):
            teacher = stage.teacher(batch) if stage.teacher is not None else NOTHING
        with part("student"):
            seed_dropout(stage.recipe.seed, step, micro_step, stage.place.rank)
            losses = engine(batch, teacher, step)
            stage.telemetry.sums.add(losses, step + 1)
        with part("backward"):
            backward(engine, losses.total)
        if measure and engine.is_gradient_accumulation_boundary():
            norm = plain_gradient_norm(engine)
        if engine.is_gradient_accumulation_boundary():
            vote.cast(signals.received() is not None)
        with part("step"):
            engine.step()
        tokens += batch.input_ids.numel()
    if measure and norm is None:
        norm = float(engine.get_global_grad_norm() or 0.0)  # sync
        norm = norm if norm >= 0 else math.nan  # ZeRO says -1 for what is not finite
    return tokens, norm or 0.0


@contextlib.contextmanager
def step_part(stage: Stage, step: int, name: str) -> Iterator[None]:
    """Time a part of a step, and note it in case it never ends."""
    stage.watchdog.at(f"step {step}, {name}")
    with stage.telemetry.stopwatch.part(name):
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


def engine_scalars(engine: DeepSpeedEngine, recipe: Recipe, step: int) -> dict[str, float]:
    """Scalars that only the engine knows."""
    return {
        "optimization/learning_rate": learning_rate(step, recipe.optimization),
        "optimization/loss_scale": loss_scale(engine),
        "optimization/skipped_steps": float(engine.skipped_steps),
    }


def loss_scale(engine: DeepSpeedEngine) -> float:
    """What the loss is multiplied with in fp16, else 1."""
    return float(getattr(engine.optimizer, "cur_scale", getattr(engine.optimizer, "loss_scale", 1.0)))


def evaluate_now(stage: Stage, step: int) -> None:
    """Measure and report the objectives on held-out text."""

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(stage.held_out()):
            stage.watchdog.at(f"step {step}, held-out batch {number}")
            yield batch

    stage.telemetry.evaluation(step, evaluate(stage.engine, stage.teacher, batches(), stage.place, step))


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
