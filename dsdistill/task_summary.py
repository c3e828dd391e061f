"""What a run on a task leaves: the exported classifier, its predictions and scores, and a page for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, model_validator
from safetensors.torch import load_file
from transformers import PreTrainedModel

from dsdistill.config.recipe import TaskRecipe, read_task_recipe
from dsdistill.corpus.files import read_json, write_text
from dsdistill.locate import Source
from dsdistill.models.capture import Captured
from dsdistill.models.card import model_card
from dsdistill.models.export import export_student, rebuild
from dsdistill.models.families import encoder_of
from dsdistill.models.loading import head_of, load_config, load_tokenizer
from dsdistill.models.student import restore_dropout
from dsdistill.progress import each
from dsdistill.summary import size_of
from dsdistill.task_teacher import EVALUATION_ROWS, Signals, TaskRun, labels_of
from dsdistill.tasks.metrics import majority_baseline, predict, scores
from dsdistill.tasks.predictions import submission_name, write_predictions, write_submission
from dsdistill.tasks.rows import Rows, evaluation_batches, in_row_order
from dsdistill.training.checkpoint import STUDENT, verify, whole_checkpoints
from dsdistill.training.run_directory import (
    CHECKPOINTS,
    CIRCUMSTANCES,
    EXPORT,
    SKELETON,
    fingerprint,
)
from dsdistill.training.telemetry import read_metrics

RESULTS = "results.json"


def stage_directory(recipe: TaskRecipe, index: int) -> Path:
    """Where a stage keeps its checkpoints, metrics and TensorBoard."""
    return recipe.output / f"{index + 1}-{recipe.stages[index].name}"


class _Size(BaseModel):
    parameters: int


class _Training(BaseModel):
    steps: int
    rows: int
    seconds: float


class _SignalCosts(BaseModel):
    bytes: int
    seconds: float
    rows_read: int
    seconds_without: float


class _Results(BaseModel):
    """What those who read results.json count on; there is more in it."""

    recipe: str
    data_sha256: str
    scores: dict[str, dict[str, float]]
    baseline: dict[str, dict[str, float]]
    teacher_scores: dict[str, dict[str, float]] | None
    student: _Size
    teacher: _Size
    training: _Training
    teacher_signals: _SignalCosts | None

    @model_validator(mode="after")
    def _scores_match(self) -> _Results:
        for other in filter(None, (self.baseline, self.teacher_scores)):
            if {k: v.keys() for k, v in other.items()} != {k: v.keys() for k, v in self.scores.items()}:
                raise ValueError("scores of other splits or metrics than the student's")
        return self


def finished_results(directory: Path) -> dict[str, Any] | None:
    """What a finished run has written, or None if it is not finished; a file that no run writes is told and ignored."""
    path = directory / RESULTS
    if not path.exists():
        return None
    try:
        told = read_json(path)
        _Results.model_validate(told)
    except ValueError as error:
        problem = " ".join(str(error).split())[:300]
        print(f"WARNING    {path} is not what a run writes and is not used: {problem}", file=sys.stderr, flush=True)
        return None
    return told


def is_finished(recipe: TaskRecipe, data_sha256: str) -> bool:
    """Whether the run of just this recipe on just this data is done."""
    told = finished_results(recipe.output) or {}
    return (told.get("recipe"), told.get("data_sha256")) == (fingerprint(recipe), data_sha256)


@torch.no_grad()
def outputs_of(run: TaskRun, model: PreTrainedModel, rows: Rows) -> np.ndarray:
    """What a classifier says about all rows in float32, (N, C), on this process alone.

    Args:
        run: Names the device, and the watchdog that is told of every batch.
        model: Wired for capture, in eval mode; moved to the device.
        rows: N rows.
    """
    device = run.place.device
    captured = Captured(model, {"logits": (-1,)}).to(device).eval()
    ids, outputs = [], []
    batches = evaluation_batches(rows, micro_batch=EVALUATION_ROWS, rank=0, world_size=1)
    told = each(batches, "scoring", rows.num_rows, unit="row", size=lambda batch: len(batch.input_ids))
    for number, batch in enumerate(told):
        run.watchdog.at(f"scores, batch {number}")
        ids.append(batch.sample_ids)
        outputs.append(captured(batch.to(device)).logits.float())
    return in_row_order(torch.cat(ids).numpy(), torch.cat(outputs).cpu().numpy(), num_rows=rows.num_rows)


def finish_run(run: TaskRun, signals: Signals | None, data_sha256: str) -> None:
    """Export the student, score what was exported, and write predictions and results; on one process."""
    recipe, task = run.recipe, run.task
    directory = export_task_run(recipe.output)
    student = load_export(recipe)
    outputs = {split: outputs_of(run, student, rows) for split, rows in {**task.dev, **task.test}.items()}
    for split, rows in {**task.dev, **task.test}.items():
        numbers = np.arange(rows.num_rows)
        path = recipe.output / "predictions" / f"{split}.tsv"
        write_predictions(path, task.spec, numbers, rows.labels, outputs[split])
        if split in task.test:
            path = recipe.output / "submission" / submission_name(task.spec, split)
            write_submission(path, task.spec, predict(task.spec, outputs[split]))
    teacher_scores, teacher_facts = scores_and_facts_of_teacher(run)
    told = {
        "name": recipe.name,
        "task": recipe.task,
        "seed": recipe.seed,
        "problem": task.spec.problem,
        "primary": task.spec.primary,
        "labels": list(task.spec.labels),
        "scores": {split: scores(task.spec, labels_of(rows), outputs[split]) for split, rows in task.dev.items()},
        "baseline": {
            split: majority_baseline(task.spec, labels_of(task.train), labels_of(rows))
            for split, rows in task.dev.items()
        },
        "teacher_scores": teacher_scores,
        "student": {**size_of(student), "bytes": weight_bytes(directory)},
        "teacher": teacher_facts,
        "training": training_costs(run),
        "teacher_signals": None if signals is None else signal_costs(run, signals),
        "recipe": fingerprint(recipe),
        "data_sha256": data_sha256,
        **circumstances_of(recipe.output),
    }
    write_text(recipe.output / RESULTS, json.dumps(told, indent=2) + "\n")
    write_card(recipe, directory)


def load_export(recipe: TaskRecipe) -> PreTrainedModel:
    """The exported student, wired for capture."""
    skeleton = recipe.output / SKELETON
    return rebuild(skeleton, load_file(newest_student(recipe) / STUDENT))


def newest_student(recipe: TaskRecipe) -> Path:
    """The newest checkpoint of the last stage.

    Raises:
        ValueError: If the last stage has no whole checkpoint.
    """
    directory = stage_directory(recipe, len(recipe.stages) - 1) / CHECKPOINTS
    found = whole_checkpoints(directory)
    if not found:
        raise ValueError(f"{directory} has no finished checkpoint to export")
    return found[-1]


def export_task_run(directory: Path, checkpoint: Path | None = None, output: Path | None = None) -> Path:
    """Export the student of a run on a task.

    Args:
        directory: Run directory.
        checkpoint: Of any of its stages; the newest of the last stage unless given.
        output: Where to; `model` in the run directory unless given.

    Raises:
        ValueError: If there is no whole checkpoint.
    """
    recipe = read_task_recipe(directory)
    checkpoint = checkpoint or newest_student(recipe.model_copy(update={"output": directory}))
    verify(checkpoint)
    student = rebuild(directory / SKELETON, load_file(checkpoint / STUDENT))
    restore_dropout(encoder_of(student).config, load_config(recipe.teacher.source))
    output = output or directory / EXPORT
    tokenizer = load_tokenizer(Source(model=str(directory / SKELETON)))
    export_student(student, tokenizer, output, card=card_of(directory, recipe, student), teacher=None)
    return output


def card_of(directory: Path, recipe: TaskRecipe, student: PreTrainedModel) -> str:
    """README.md of the export, with the scores if they are known."""
    told = finished_results(directory) or {}
    facts = {
        "name": recipe.name,
        "task": recipe.task,
        "teacher": Path(recipe.teacher.model).name,
        **{key: f"{value:,}" for key, value in size_of(student).items()},
        "head": head_of(student),
        **{
            f"{split} {metric} (majority class {told['baseline'][split][metric]:.4f})": f"{value:.4f}"
            for split, values in told.get("scores", {}).items()
            for metric, value in values.items()
        },
    }
    return model_card(facts, recipe.to_yaml(), teacher=recipe.teacher.source, is_sentence_encoder=False)


def write_card(recipe: TaskRecipe, directory: Path) -> None:
    """Put the scores into the card of the export."""
    write_text(directory / "README.md", card_of(recipe.output, recipe, load_export(recipe)))


def scores_and_facts_of_teacher(run: TaskRun) -> tuple[dict[str, dict[str, float]] | None, dict[str, Any]]:
    """The teacher's scores on the development rows, and its size and what its fine-tuning cost.

    Scores are those of its own run, or measured now, or None if no objective asks it.
    """
    was_tuned = run.source.model != run.recipe.teacher.model
    tuning = finished_results(Path(run.source.model).parent) if was_tuned else None
    teacher = run.load_teacher()
    facts: dict[str, Any] = {"model": run.recipe.teacher.model, **size_of(teacher)}
    facts["bytes"] = sum(p.numel() * p.element_size() for p in teacher.parameters())
    if tuning is not None:
        facts["training"] = tuning["training"]
    if not run.recipe.asks_teacher:
        return None, facts
    if tuning is not None:
        return tuning["scores"], facts
    return {
        split: scores(run.task.spec, labels_of(rows), outputs_of(run, teacher, rows))
        for split, rows in run.task.dev.items()
    }, facts


def weight_bytes(directory: Path) -> int:
    """Bytes of the weights in an export."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def training_costs(run: TaskRun) -> dict[str, Any]:
    """Steps, rows and seconds of training, from the metrics, so that resumed runs are counted whole."""
    stages = []
    for index, stage in enumerate(run.plan.stages):
        optimization = stage.pace.optimization
        seconds, before = {"step_time": 0.0, "teacher": 0.0}, 0
        for entry in read_metrics(stage_directory(run.recipe, index) / "metrics.jsonl"):
            if entry["kind"] == "train":
                for name in seconds:
                    seconds[name] += entry[f"time/{name}_s"] * (entry["step"] - before)
                before = entry["step"]
        stages.append(
            {
                "name": stage.name,
                "steps": optimization.steps,
                "rows": optimization.steps * optimization.global_batch,
                "seconds": seconds["step_time"],
                "teacher_seconds": seconds["teacher"],
            }
        )
    sums = {key: sum(stage[key] for stage in stages) for key in ("steps", "rows", "seconds", "teacher_seconds")}
    return {**sums, "stages": stages}


def signal_costs(run: TaskRun, signals: Signals) -> dict[str, Any]:
    """What keeping teacher signals cost and saved."""
    train = signals.train
    took, rows = train.seconds(signals.names), run.task.train.num_rows
    stages = [stage for stage in run.plan.stages if stage.teacher_wants and signals.cover(stage.teacher_wants)]
    read_rows = sum(stage.pace.optimization.steps * stage.pace.optimization.global_batch for stage in stages)
    return {
        "bytes": train.num_bytes(signals.names) + signals.held_out.num_bytes(signals.names),
        "rows": rows,
        "seconds": took,
        "rows_read": read_rows,
        "seconds_without": took * read_rows / rows,
    }


def circumstances_of(directory: Path) -> dict[str, Any]:
    """Device, processes and commit of the run, from its directory."""
    told = json.loads((directory / CIRCUMSTANCES).read_text(encoding="utf-8"))
    return {key: told[key] for key in ("device", "processes", "cpu_cores", "git_commit", "versions")}


def summarize_task(directory: Path) -> str:
    """A finished run as a page for people."""
    told = finished_results(directory)
    if told is None:
        raise RuntimeError(f"{directory} has no {RESULTS}")
    lines = ["", f"{'score':<32}{'student':>10}{'teacher':>10}{'majority':>10}"]
    for split, values in told["scores"].items():
        for metric, value in values.items():
            teacher = told["teacher_scores"] or {}
            theirs = f"{teacher[split][metric]:>10.4f}" if split in teacher else f"{'-':>10}"
            lines.append(f"  {split + ' ' + metric:<30}{value:>10.4f}{theirs}{told['baseline'][split][metric]:>10.4f}")
    lines += ["", f"{'parameters':<32}{told['student']['parameters']:>10,}{told['teacher']['parameters']:>12,}"]
    training = told["training"]
    lines.append(f"training        {training['steps']} steps, {training['rows']:,} rows, {training['seconds']:.1f} s")
    signals = told["teacher_signals"]
    if signals is not None:
        lines.append(
            f"teacher signals {signals['bytes'] / 2**20:.1f} MiB, computed once in {signals['seconds']:.2f} s; asking "
            f"the teacher for all {signals['rows_read']:,} rows: {signals['seconds_without']:.2f} s"
        )
    lines += [
        "",
        f"model        {directory / EXPORT}  (AutoModelForSequenceClassification.from_pretrained loads it)",
        f"predictions  {directory / 'predictions'}",
        f"TensorBoard  tensorboard --logdir {directory}",
    ]
    return "\n".join(lines)
