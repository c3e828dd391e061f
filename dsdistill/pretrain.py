"""Task-agnostic distillation, from recipe and DeepSpeed JSON to an exported student."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dsdistill.config.recipe import Recipe
from dsdistill.core import NOTHING, Batch
from dsdistill.corpus.loader import held_out_batches, train_batches
from dsdistill.corpus.masking import Masker
from dsdistill.corpus.prepare import prepare
from dsdistill.corpus.store import Corpus
from dsdistill.models.capture import Captured
from dsdistill.models.export import save_skeleton
from dsdistill.models.families import max_length, shape_of
from dsdistill.models.loading import (
    has_head,
    load_encoder,
    load_tokenizer,
)
from dsdistill.models.student import build_student
from dsdistill.models.teacher import ResidentTeacher
from dsdistill.plan import Plan, describe_plan, make_plan, missing_head
from dsdistill.summary import summarize
from dsdistill.training import run_directory, signals
from dsdistill.training.checkpoint import SaveError, load_checkpoint, save_checkpoint
from dsdistill.training.dist import Place, find_place, gather_rows
from dsdistill.training.distiller import Distiller, freeze_unreached
from dsdistill.training.engine import half_precision, start_engine, start_processes, stop_processes
from dsdistill.training.loop import Stage, train
from dsdistill.training.telemetry import Telemetry
from dsdistill.training.watchdog import Watchdog


def run(recipe: Recipe, ds_json: dict[str, Any], *, resume: Literal["auto", "never"] | Path, dry_run: bool) -> None:
    """The whole run on this process; every process of the job calls it.

    Args:
        recipe: What to learn.
        ds_json: From `read_deepspeed_json`.
        resume: `auto` goes on from the newest whole checkpoint of the same recipe, `never` moves an earlier run
            aside, a path goes on from that checkpoint.
        dry_run: Check and describe, write nothing.

    Raises:
        ValueError: On bad input, with every problem found.
        FloatingPointError: If a loss term was not finite.
        StoppedError: If a signal asked the run to stop.
        LostRankError: If another process hangs or is gone.
    """
    place = find_place()
    plan = make_plan(recipe, ds_json, place)
    if place.is_first:
        print(describe_plan(plan, place), flush=True)
    if dry_run:
        return
    corpus, held_out, tokenizer = open_corpus(recipe, plan, place)
    start_processes(place, recipe.faults.hang_timeout_s)
    try:
        with signals.deferred():
            distil(plan, corpus, held_out, tokenizer, place, resume)
    except signals.StoppedError:
        stop_processes()  # all ranks are at the same step; after other errors nobody may wait for anybody
        raise
    if place.is_first:
        print(summarize(recipe.output), flush=True)
    stop_processes()


def open_corpus(recipe: Recipe, plan: Plan, place: Place) -> tuple[Corpus, Corpus, PreTrainedTokenizerFast]:
    """The two splits, prepared first if the recipe says how, and the teacher's tokenizer, which must be theirs.

    Raises:
        ValueError: If the corpus is missing, damaged, or was made for another tokenizer or longer rows.
    """
    if recipe.corpus.prepare is not None:
        prepare(recipe.corpus.prepare, progress=place.is_first)
    corpus, held_out = (Corpus.open(recipe.corpus.directory, split) for split in ("train", "held_out"))
    tokenizer = load_tokenizer(plan.source)
    corpus.check_tokenizer(tokenizer)
    corpus.check_vocabulary(plan.teacher_config.vocab_size, model=plan.source.model)
    longest = max_length(plan.teacher_config)
    if longest is not None and corpus.length > longest:
        raise ValueError(
            f"rows of {recipe.corpus.directory} have {corpus.length} tokens, but {plan.source.model} takes {longest}; "
            "prepare the corpus with a smaller length"
        )
    return corpus, held_out, tokenizer


def distil(
    plan: Plan,
    corpus: Corpus,
    held_out: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    place: Place,
    resume: Literal["auto", "never"] | Path,
) -> None:
    """Build both models, train from the start or from where `resume` says, and save; nothing if that is done."""
    with Watchdog(place, plan.recipe.faults.hang_timeout_s) as watchdog:
        distil_watched(plan, corpus, held_out, tokenizer, place, resume, watchdog)


def distil_watched(
    plan: Plan,
    corpus: Corpus,
    held_out: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    place: Place,
    resume: Literal["auto", "never"] | Path,
    watchdog: Watchdog,
) -> None:
    """`distil`, telling the watchdog what is being done."""
    recipe, config = plan.recipe, plan.engine_config
    watchdog.at("run directory and checkpoints")
    checkpoint = run_directory.enter(recipe.output, recipe, config, place, resume)
    if checkpoint is not None and run_directory.step_of(checkpoint) == recipe.optimization.steps:
        return
    masker = Masker.from_tokenizer(
        tokenizer, probability=recipe.masking.probability, whole_word=recipe.masking.whole_word
    )
    data = {"masker": masker, "with_labels": "logits" in plan.student_wants}
    data["all_targets"] = recipe.masking.targets == "all"
    batching = {"micro_batch": config["train_micro_batch_size_per_gpu"], "rank": place.rank}
    batching["world_size"] = place.world_size

    def batches(first_step: int) -> Iterable[Batch]:
        return train_batches(
            corpus,
            **data,
            **batching,
            seed=recipe.seed,
            global_batch=recipe.optimization.global_batch,
            first_step=first_step,
            last_step=recipe.optimization.steps,
            pin_memory=place.device.type == "cuda",
        )

    watchdog.at("models")
    student, teacher = build_models(plan, place)
    if place.is_first:
        save_skeleton(student, tokenizer, recipe.output / run_directory.SKELETON)
    captured = capture_student(student, plan)
    distiller = Distiller(
        captured,
        plan.terms,
        shape=shape_of(plan.student_config),
        teacher=shape_of(plan.teacher_config),
        num_examples=corpus.num_rows,
        gather=gather_rows,
        seed=recipe.seed,
    ).to(place.device)
    probe = next(iter(held_out_batches(held_out, **data, rows=2, micro_batch=2, rank=0, world_size=1)))
    probe = probe.to(place.device)
    frozen = freeze_unreached(distiller, probe, teacher(probe) if teacher is not None else NOTHING)
    watchdog.at("start of the engine")
    engine = start_engine(distiller, recipe.optimization, config, place)
    first_step = 0
    if checkpoint is not None:
        load_checkpoint(engine, checkpoint)
        first_step = run_directory.step_of(checkpoint)
    telemetry = Telemetry(recipe.output, place, first_step=first_step, last_step=recipe.optimization.steps)
    telemetry.text("recipe", recipe.to_yaml())
    if frozen:
        telemetry.note(f"{len(frozen)} parameters that no objective reaches are frozen, such as {frozen[0]}")
    if checkpoint is not None:
        telemetry.note(f"resumed at step {first_step} from {checkpoint}")

    def save(step: int) -> bool:
        state = run_directory.state_of(step, recipe, config, place)
        directory = recipe.output / run_directory.CHECKPOINTS
        try:
            save_checkpoint(engine, captured.model, directory, state, keep=recipe.checkpoint.keep)
        except SaveError as error:
            if recipe.checkpoint.on_failure == "stop" or step == recipe.optimization.steps:
                raise
            telemetry.note(f"WARNING: {error}; training goes on, the checkpoints before are kept")
            return False
        return True

    try:
        train(
            Stage(
                recipe=recipe,
                engine=engine,
                teacher=teacher,
                batches=batches(first_step),
                held_out=lambda: held_out_batches(held_out, **data, **batching, rows=recipe.evaluation.rows),
                save=save,
                place=place,
                telemetry=telemetry,
                watchdog=watchdog,
                first_step=first_step,
            )
        )
    finally:
        telemetry.close()


def build_models(plan: Plan, place: Place) -> tuple[PreTrainedModel, ResidentTeacher | None]:
    """The student in float32 with its first weights, and the frozen teacher, or None if nothing asks for one.

    Raises:
        ValueError: If the recipe wants logits of a model without a head.
    """
    recipe = plan.recipe
    complete = load_encoder(plan.source)
    if "logits" in {*plan.student_wants, *plan.teacher_wants} and not has_head(complete):
        raise ValueError(missing_head(plan.source))
    settings = recipe.student
    student = build_student(
        complete,
        plan.student_config,
        plan.layers,
        seed=recipe.seed,
        resize=settings.resize,
        init_from=settings.init_from,
    )
    if not plan.teacher_wants:
        return student, None
    dtype = half_precision(plan.engine_config)
    return student, ResidentTeacher(complete, plan.teacher_wants, device=place.device, dtype=dtype)


def capture_student(student: PreTrainedModel, plan: Plan) -> Captured:
    """The student wired for capture, in training mode."""
    captured = Captured(student, plan.student_wants)
    if plan.recipe.student.activation_checkpointing:
        student.gradient_checkpointing_enable()
        captured.exempt_from_checkpointing()
    return captured.train()
