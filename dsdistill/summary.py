"""What a person wants to know of a finished run: exports the student, measures both models, prints a page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from dsdistill.config.recipe import Recipe, read_recipe
from dsdistill.core import Batch
from dsdistill.corpus.files import write_text
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
from dsdistill.plan_objectives import output_note
from dsdistill.progress import each, figure
from dsdistill.speed import Measured, measure
from dsdistill.training.checkpoint import STUDENT, read_state, verify, whole_checkpoints
from dsdistill.training.distiller import bind_terms, wanted_signals
from dsdistill.training.run_directory import CHECKPOINTS, EXPORT, SKELETON
from dsdistill.training.telemetry import read_metrics

SUMMARY = "summary.json"
SPEED_ROWS = 8
COSINE_ROWS = 64

Change = tuple[float | None, float]
"""A number before training, if it was measured then, and after."""


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
        **{f"held-out {name}": figure(value) for name, value in held_out_at(directory, -1, last_step=step).items()},
        **{name: figure(value) for name, value in scores_at(directory, -1, last_step=step).items()},
    }
    shapes = shape_of(encoder_of(student).config), shape_of(load_config(source))
    initial = initial_layers(recipe.student.init, recipe.student.num_layers, shapes[1].num_layers)
    wants, _ = wanted_signals(bind_terms(recipe.objectives, *shapes, initial=initial))
    if (note := output_note(wants, shapes[0].num_layers)) is not None:
        facts["note"] = note
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What is told of a finished run, for people and for reports.

    Attributes:
        objective: The held-out objective, total and terms, before and after training.
        scores: The same of scores.
        cosine: Mean cosine between both models' sentence embeddings of the same held-out rows, before and after; None
            where the models cannot be compared so.
        teacher: Size, and speed on this machine's CPU; bytes are those of float32.
        student: The same.
    """

    objective: dict[str, Change]
    scores: dict[str, Change]
    cosine: Change | None
    teacher: Measured
    student: Measured


def summarize(directory: Path) -> str:
    """Export the student, and describe the run in a file and in words.

    Returns:
        A page for people; `summary.json` in the run directory holds its numbers.
    """
    recipe = read_recipe(directory)
    model_directory = export_run(directory)
    told = measure_run(directory, recipe)
    write_text(directory / SUMMARY, json.dumps(asdict(told), indent=1) + "\n")
    return "\n".join(
        [
            *describe(told),
            "",
            f"model        {model_directory}  (AutoModel.from_pretrained loads it)",
            f"TensorBoard  tensorboard --logdir {directory / 'tensorboard'}",
            f"recipe       {directory / 'recipe.yaml'}",
            f"report       python launch/report.py {directory}",
            "next         your own text: python launch/prepare_corpus.py --help",
        ]
    )


def measure_run(directory: Path, recipe: Recipe) -> Summary:
    """The numbers of a finished run, both models measured now."""
    source = recipe.teacher.source
    teacher = load_encoder(source)
    checkpoint = whole_checkpoints(directory / CHECKPOINTS)[-1]
    student = rebuild(directory / SKELETON, load_file(checkpoint / STUDENT))
    tokenizer = load_tokenizer(recipe.student.tokenizer_source(source))
    cosine = None
    if size_of(teacher)["width"] == size_of(student)["width"] and recipe.student.tokenizer is None:
        batch = held_out_text(recipe, tokenizer, COSINE_ROWS)
        models = each((untrained_student(recipe, teacher, student), student), "comparing embeddings", 2, unit="model")
        before, after = (mean_cosine(teacher, model, batch) for model in models)
        cosine = (before, after)
    length = held_out_text(recipe, tokenizer, SPEED_ROWS).input_ids.shape[1]
    return Summary(
        objective=changes(held_out_at, directory),
        scores=changes(scores_at, directory),
        cosine=cosine,
        teacher=measured(source.model, teacher, length),
        student=measured(str(directory / EXPORT), student, length),
    )


def changes(read: Callable[[Path, int], dict[str, float]], directory: Path) -> dict[str, Change]:
    """Numbers of the first and the last evaluation."""
    before, after = read(directory, 0), read(directory, -1)
    return {name: (before.get(name), value) for name, value in after.items()}


def untrained_student(recipe: Recipe, teacher: PreTrainedModel, student: PreTrainedModel) -> PreTrainedModel:
    """The student as it was before training."""
    settings = recipe.student
    layers = initial_layers(settings.init, settings.num_layers, size_of(teacher)["layers"])
    return build_student(
        teacher, student.config, layers, seed=recipe.seed, resize=settings.resize, init_from=settings.init_from
    ).eval()


def measured(name: str, model: PreTrainedModel, length: int) -> Measured:
    """Size, and speed of the encoder on the CPU in float32."""
    timings = measure(encoder_of(model), torch.device("cpu"), lengths=(length,), batches=(SPEED_ROWS,), budget_s=0.0)
    size = size_of(model)
    return Measured(name=name, **size, bytes=4 * size["parameters"], timings=timings)


def describe(told: Summary) -> list[str]:
    """The numbers as lines for people."""
    lines = ["", "objective on held-out text        before      after"]
    rows = {**told.objective, **told.scores} | ({"cosine with the teacher": told.cosine} if told.cosine else {})
    for name, (before, after) in rows.items():
        lines.append(f"  {name:<28} {figure(math.nan if before is None else before):>10} {figure(after):>10}")
    lines += ["", "                                 teacher    student"]
    models = (told.teacher, told.student)
    for name in ("layers", "width", "parameters"):
        lines.append(f"  {name:<28} " + " ".join(f"{getattr(model, name):>10,}" for model in models))
    lines.append(f"  {'size in float32, MiB':<28} " + " ".join(f"{model.bytes / 2**20:>10.1f}" for model in models))
    what = f"rows of {told.student.timings[0].length} tokens/s, CPU"
    lines.append(f"  {what:<28} " + " ".join(f"{model.timings[0].rows_per_s:>10.1f}" for model in models))
    return lines
