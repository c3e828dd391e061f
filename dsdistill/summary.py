"""What a person wants to know of a finished run: exports the student, measures both models, prints a page."""

from __future__ import annotations

import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from dsdistill.config.recipe import Recipe, read_recipe
from dsdistill.core import Batch
from dsdistill.corpus.loader import held_out_batches
from dsdistill.corpus.masking import Masker
from dsdistill.corpus.store import Corpus
from dsdistill.models.card import model_card
from dsdistill.models.export import export_student, rebuild
from dsdistill.models.families import encoder_of, shape_of
from dsdistill.models.loading import head_of, load_config, load_encoder, load_tokenizer
from dsdistill.models.sentences import read_sentence_modules, sentence_problem
from dsdistill.models.student import build_student, restore_dropout
from dsdistill.objectives.mapping import initial_layers
from dsdistill.speed import seconds_of_calls
from dsdistill.training.checkpoint import STUDENT, read_state, verify, whole_checkpoints
from dsdistill.training.run_directory import CHECKPOINTS, EXPORT, SKELETON
from dsdistill.training.telemetry import read_metrics

SPEED_ROWS = 8
COSINE_ROWS = 64


def export_run(directory: Path, checkpoint: Path | None = None, output: Path | None = None) -> Path:
    """Export the student of a run directory.

    Args:
        directory: Run directory.
        checkpoint: One of its checkpoints; the newest whole one unless given.
        output: Where to; `model` in the run directory unless given.

    Raises:
        ValueError: If there is no whole checkpoint.
    """
    recipe = read_recipe(directory)
    found = whole_checkpoints(directory / CHECKPOINTS)
    if checkpoint is None and not found:
        raise ValueError(f"{directory} has no finished checkpoint to export")
    checkpoint = checkpoint or found[-1]
    verify(checkpoint)
    source = recipe.teacher.source
    student = rebuild(directory / SKELETON, load_file(checkpoint / STUDENT))
    restore_dropout(encoder_of(student).config, load_config(source))
    output = output or directory / EXPORT
    step = read_state(checkpoint)["step"]
    facts = {
        "name": recipe.name,
        "teacher": Path(recipe.teacher.model).name,
        **{key: f"{value:,}" for key, value in size_of(student).items()},
        "head": head_of(student),
        "data": recipe.corpus.directory.name,
        "optimizer steps": step,
        **{f"held-out {name}": f"{value:.4f}" for name, value in held_out_at(directory, -1, last_step=step).items()},
        **{name: f"{value:.4f}" for name, value in scores_at(directory, -1, last_step=step).items()},
    }
    problem = sentence_problem(source)
    if problem is not None:
        facts["sentence-transformers"] = f"not written as such a model: {problem}"
    modules = read_sentence_modules(source)
    card = model_card(
        facts, recipe.to_yaml(), teacher=source, is_sentence_encoder=modules is not None and problem is None
    )
    export_student(student, load_tokenizer(recipe.student.tokenizer_source(source)), output, card=card, teacher=source)
    return output


def held_out_at(directory: Path, index: int, *, last_step: float = math.inf) -> dict[str, float]:
    """The held-out objective of the first (0) or last (-1) evaluation up to a step; empty if there was none."""
    return _evaluated(directory, index, last_step, "held_out/")


def _evaluated(directory: Path, index: int, last_step: float, prefix: str) -> dict[str, float]:
    told = read_metrics(directory / "metrics.jsonl")
    entries = [entry for entry in told if entry["kind"] == "held_out" and entry["step"] <= last_step]
    return {k.removeprefix(prefix): v for k, v in entries[index].items() if k.startswith(prefix)} if entries else {}


def scores_at(directory: Path, index: int, *, last_step: float = math.inf) -> dict[str, float]:
    """The scores of the first (0) or last (-1) evaluation up to a step, as `held_out_at`; empty if there were none."""
    return _evaluated(directory, index, last_step, "score/")


def size_of(model: PreTrainedModel) -> dict[str, int]:
    """Layers, width and parameters."""
    shape = shape_of(encoder_of(model).config)
    parameters = sum(p.numel() for p in model.parameters())
    return {"layers": shape.num_layers, "width": shape.width, "parameters": parameters}


@torch.no_grad()
def rows_per_second(model: PreTrainedModel, batch: Batch) -> float:
    """Median speed of the encoder on the CPU in float32."""
    encoder = encoder_of(model).cpu().float().eval()
    ids = batch.input_ids % encoder.config.vocab_size  # a teacher may know fewer tokens
    call = partial(encoder, input_ids=ids, attention_mask=batch.mask.long())
    return len(batch.input_ids) / statistics.median(seconds_of_calls(call, torch.device("cpu"), budget_s=0.0))


@torch.no_grad()
def sentence_embeddings(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean of the last hidden states over real positions, (B, E)."""
    hidden = encoder_of(model)(input_ids=batch.input_ids, attention_mask=batch.mask.long()).last_hidden_state
    real = batch.mask[..., None].to(hidden.dtype)
    return (hidden * real).sum(1) / real.sum(1)


def mean_cosine(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> float:
    """Mean cosine between both models' sentence embeddings of the same rows."""
    return F.cosine_similarity(sentence_embeddings(teacher, batch), sentence_embeddings(student, batch)).mean().item()


def held_out_text(recipe: Recipe, tokenizer: Any, rows: int) -> Batch:
    """Some held-out rows without masks."""
    corpus = Corpus.open(recipe.corpus.directory, "held_out")
    rows = min(rows, corpus.num_rows)
    masker = Masker.from_tokenizer(tokenizer, probability=0.0)
    return next(iter(held_out_batches(corpus, masker, rows=rows, micro_batch=rows, rank=0, world_size=1)))


def summarize(directory: Path) -> str:
    """Export the student and describe the run.

    Returns:
        A page for people.
    """
    recipe = read_recipe(directory)
    source = recipe.teacher.source
    model_directory = export_run(directory)
    teacher = load_encoder(source)
    checkpoint = whole_checkpoints(directory / CHECKPOINTS)[-1]
    student = rebuild(directory / SKELETON, load_file(checkpoint / STUDENT))
    layers = initial_layers(recipe.student.init, recipe.student.num_layers, size_of(teacher)["layers"])
    tokenizer = load_tokenizer(recipe.student.tokenizer_source(source))
    before, after = held_out_at(directory, 0), held_out_at(directory, -1)
    lines = ["", "objective on held-out text        before      after"]
    lines += [f"  {name:<28} {before.get(name, float('nan')):>10.4f} {value:>10.4f}" for name, value in after.items()]
    before, after = scores_at(directory, 0), scores_at(directory, -1)
    lines += [f"  {name:<28} {before.get(name, float('nan')):>10.4f} {value:>10.4f}" for name, value in after.items()]
    if size_of(teacher)["width"] == size_of(student)["width"] and recipe.student.tokenizer is None:
        batch = held_out_text(recipe, tokenizer, COSINE_ROWS)
        settings = recipe.student
        untrained = build_student(
            teacher,
            student.config,
            layers,
            seed=recipe.seed,
            resize=settings.resize,
            init_from=settings.init_from,
        ).eval()
        cosines = [mean_cosine(teacher, model, batch) for model in (untrained, student)]
        lines.append(f"  {'cosine with the teacher':<28} {cosines[0]:>10.4f} {cosines[1]:>10.4f}")
    lines += ["", "                                 teacher    student"]
    for name, value in size_of(teacher).items():
        lines.append(f"  {name:<28} {value:>10,} {size_of(student)[name]:>10,}")
    sizes = [4 * size_of(model)["parameters"] / 2**20 for model in (teacher, student)]
    lines.append(f"  {'size in float32, MiB':<28} {sizes[0]:>10.1f} {sizes[1]:>10.1f}")
    batch = held_out_text(recipe, tokenizer, SPEED_ROWS)
    speeds = [rows_per_second(model, batch) for model in (teacher, student)]
    what = f"rows of {batch.input_ids.shape[1]} tokens/s, CPU"
    lines.append(f"  {what:<28} {speeds[0]:>10.1f} {speeds[1]:>10.1f}")
    lines += [
        "",
        f"model        {model_directory}  (AutoModel.from_pretrained loads it)",
        f"TensorBoard  tensorboard --logdir {directory / 'tensorboard'}",
        f"recipe       {directory / 'recipe.yaml'}",
        "next         your own text: python launch/prepare_corpus.py --help",
    ]
    return "\n".join(lines)
