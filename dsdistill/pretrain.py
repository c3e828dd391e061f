"""Task-agnostic distillation, from recipe and DeepSpeed JSON to an exported student."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from deepspeed import DeepSpeedEngine
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dsdistill.config.recipe import Recipe
from dsdistill.core import Batch
from dsdistill.corpus.files import sha256_of
from dsdistill.corpus.loader import held_out_batches, train_batches
from dsdistill.corpus.manifest import MANIFEST_NAME
from dsdistill.corpus.masking import Masker
from dsdistill.corpus.prepare import prepare
from dsdistill.corpus.store import Corpus
from dsdistill.models.export import save_skeleton
from dsdistill.models.families import encoder_of, shape_of
from dsdistill.models.loading import head_of, load_encoder, load_tokenizer, load_with_new_head
from dsdistill.models.sentences import SentenceModules, read_sentence_modules, text_length
from dsdistill.models.student import build_student
from dsdistill.models.vocabulary import change_vocabulary
from dsdistill.plan import Plan, make_plan
from dsdistill.plan_objectives import missing_head
from dsdistill.plan_page import describe_plan
from dsdistill.preflight import preflight
from dsdistill.progress import note
from dsdistill.sentence_scores import EncoderSizes, in_training
from dsdistill.summary import summarize
from dsdistill.training import run_directory, signals
from dsdistill.training.dist import Place, find_place
from dsdistill.training.engine import half_precision, processes
from dsdistill.training.loop import Stage, Teacher
from dsdistill.training.pictures import MOST_ROWS, Pictures, ask_teacher, make_probes
from dsdistill.training.placement import Placed, ahead, at_once, lines
from dsdistill.training.stage import capture_student, run_stage
from dsdistill.training.teacher_ranks import TeacherLine, serve
from dsdistill.training.watchdog import Watchdog
from dsdistill.utilisation import tokens_at_peak


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
    place = find_place().with_teachers(recipe.teacher.ranks or 0)
    plan = make_plan(recipe, ds_json, place)
    if place.is_first:
        print(describe_plan(plan, place), file=None if dry_run else sys.stderr, flush=True)
    if dry_run:
        if place.is_first:
            print(preflight(plan, place), flush=True)
        return
    timeout_s = recipe.faults.hang_timeout_s
    if place.is_teacher:
        with processes(place, timeout_s), signals.deferred():
            serve(load_encoder, place, timeout_s)
        return
    corpus, held_out, tokenizer = open_corpus(recipe, plan, place)
    with processes(place, timeout_s):
        with signals.deferred(), lines(place, 2 * timeout_s) as line:
            distil(plan, corpus, held_out, tokenizer, place, resume, line)
        if place.is_first:
            print(summarize(recipe.output), flush=True)


def open_corpus(recipe: Recipe, plan: Plan[Recipe], place: Place) -> tuple[Corpus, Corpus, PreTrainedTokenizerFast]:
    """The two splits, prepared first if the recipe says how, and the teacher's tokenizer, which must be theirs.

    Raises:
        ValueError: If the corpus is missing, damaged, or was made for another tokenizer.
    """
    if recipe.corpus.prepare is not None:
        prepare(recipe.corpus.prepare)
    corpus, held_out = (Corpus.open(recipe.corpus.directory, split) for split in ("train", "held_out"))
    tokenizer = load_tokenizer(recipe.student.tokenizer_source(plan.source))
    corpus.check_tokenizer(tokenizer)
    corpus.check_vocabulary(plan.student_config.vocab_size, model=plan.source.model)
    return corpus, held_out, tokenizer


def distil(
    plan: Plan[Recipe],
    corpus: Corpus,
    held_out: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    place: Place,
    resume: Literal["auto", "never"] | Path,
    line: TeacherLine | None = None,
) -> None:
    """Build both models, train from the start or from where `resume` says, and save; nothing if that is done."""
    with Watchdog(place, plan.recipe.faults.hang_timeout_s) as watchdog:
        distil_watched(plan, corpus, held_out, tokenizer, place, resume, line, watchdog)


def distil_watched(
    plan: Plan[Recipe],
    corpus: Corpus,
    held_out: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    place: Place,
    resume: Literal["auto", "never"] | Path,
    line: TeacherLine | None,
    watchdog: Watchdog,
) -> None:
    """`distil`, telling the watchdog what is being done."""
    recipe, (stage,) = plan.recipe, plan.stages
    config, pace = stage.engine_config, stage.pace
    watchdog.at("run directory and checkpoints")
    checkpoint = run_directory.enter(
        recipe.output, recipe, config, place, resume, data_sha256=sha256_of(recipe.corpus.directory / MANIFEST_NAME)
    )
    if checkpoint is not None and run_directory.step_of(checkpoint) == pace.optimization.steps:
        return
    masker = Masker.from_tokenizer(
        tokenizer, probability=recipe.masking.probability, whole_word=recipe.masking.whole_word
    )
    data = {"masker": masker, "with_labels": "logits" in stage.student_wants}
    data |= {"all_targets": recipe.masking.targets == "all", "isolate": recipe.corpus.isolate}
    batching = {"micro_batch": config["train_micro_batch_size_per_gpu"], "rank": place.rank}
    batching["world_size"] = place.world_size

    def batches(first_step: int) -> Iterable[Batch]:
        rows = train_batches(
            corpus,
            **data,
            **batching,
            seed=recipe.seed,
            global_batch=pace.optimization.global_batch,
            first_step=first_step,
            last_step=pace.optimization.steps,
            pin_memory=place.device.type == "cuda",
        )
        return ahead(teacher, rows)

    watchdog.at("models")
    student, teacher = build_models(plan, place, line)
    if place.is_first:
        save_skeleton(student, tokenizer, recipe.output / run_directory.SKELETON)
    run_stage(
        Stage(
            recipe=recipe,
            pace=pace,
            engine_config=config,
            directory=recipe.output,
            checkpoint=checkpoint,
            student=capture_student(
                student,
                stage.student_wants,
                activation_checkpointing=recipe.student.activation_checkpointing,
            ),
            student_shape=shape_of(plan.student_config),
            teacher_shape=shape_of(plan.teacher_config),
            terms=stage.terms,
            teacher=teacher,
            held_out_teacher=at_once(teacher),
            batches=batches,
            held_out=lambda: held_out_batches(held_out, **data, **batching, rows=recipe.evaluation.rows),
            num_held_out=min(recipe.evaluation.rows, held_out.num_rows),
            probe=next(iter(held_out_batches(held_out, **data, rows=2, micro_batch=2, rank=0, world_size=1))),
            num_examples=corpus.num_rows,
            pictures=pictures_of(plan, held_out, data, tokenizer, teacher, place),
            tokens_at_peak=tokens_at_peak(plan, stage, place),
            score=sentence_score(plan, held_out, tokenizer, at_once(teacher), place),
        ),
        place,
        watchdog,
    )


def pictures_of(
    plan: Plan[Recipe],
    held_out: Corpus,
    data: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    teacher: Placed | None,
    place: Place,
) -> Pictures | None:
    """What the run's pictures are made of, or None if nobody wants any."""
    settings, layers = plan.recipe.logging, shape_of(plan.teacher_config).num_layers
    if settings.pictures == "never":
        return None
    rows = next(iter(held_out_batches(held_out, **data, rows=MOST_ROWS, micro_batch=MOST_ROWS, rank=0, world_size=1)))
    probes = make_probes(tokenizer, settings.sentences, rows)
    ask = None if teacher is None else partial(ask_teacher, teacher, probes, layers, place.device)
    return Pictures(probes=probes, every=settings.pictures_every, teacher=ask)


def sentence_score(
    plan: Plan[Recipe], held_out: Corpus, tokenizer: PreTrainedTokenizerFast, teacher: Teacher | None, place: Place
) -> Callable[[DeepSpeedEngine], Mapping[str, float]] | None:
    """What scores the student's sentence embeddings in training, or None if nobody wants to know."""
    settings, (stage,) = plan.recipe.evaluation.sentences, plan.stages
    if settings is None or teacher is None:
        return None
    modules = read_sentence_modules(plan.source) or SentenceModules()
    sizes = EncoderSizes(
        shape_of(plan.student_config).num_layers,
        shape_of(plan.teacher_config).num_layers,
        modules.pooling,
        text_length(modules, plan.teacher_config, tokenizer),
    )
    micro_batch = stage.engine_config["train_micro_batch_size_per_gpu"]
    return in_training(settings, held_out, tokenizer, teacher, sizes, place, micro_batch=micro_batch)


def build_models(
    plan: Plan[Recipe], place: Place, line: TeacherLine | None = None
) -> tuple[PreTrainedModel, Placed | None]:
    """The student in float32 with its first weights, and the frozen teacher, or None if nothing asks for one.

    Raises:
        ValueError: If the recipe wants logits of a model without a head.
    """
    recipe, (stage,) = plan.recipe, plan.stages
    settings, config = recipe.student, plan.student_config
    complete = load_with_new_head(plan.source, seed=recipe.seed) if settings.makes_head else load_encoder(plan.source)
    if "logits" in {*stage.student_wants, *stage.teacher_wants} and head_of(complete) == "none":
        raise ValueError(missing_head(plan.source))
    has_other_tokens = settings.tokenizer is not None and settings.init_from is None
    if has_other_tokens:
        config = copy.deepcopy(config)
        config.vocab_size = plan.teacher_config.vocab_size
    student = build_student(
        complete,
        config,
        plan.layers,
        seed=recipe.seed,
        resize=settings.resize,
        init_from=settings.init_from,
    )
    if has_other_tokens:
        ours, theirs = load_tokenizer(settings.tokenizer_source(plan.source)), load_tokenizer(plan.source)
        shared = change_vocabulary(student, ours, theirs, seed=recipe.seed)
        if place.is_first:
            note(f"tokenizer  {shared:,} of {len(ours):,} tokens start from the teacher's embeddings")
    if settings.frozen_encoder:
        encoder_of(student).requires_grad_(False)
    if not stage.teacher_wants:
        return student, None
    dtype = half_precision(stage.engine_config)
    return student, replace(plan.placement, line=line).place(
        plan.source, lambda: complete, stage.teacher_wants, place=place, dtype=dtype
    )
