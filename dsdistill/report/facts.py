"""The numbers of runs in words: one table of each, and one line of each beside the others."""

from __future__ import annotations

import shlex
import statistics
from typing import Any

import numpy as np

from dsdistill.models.card import loading_code
from dsdistill.models.sentences import MODULES
from dsdistill.report.collect import EXPORT, Curve, Run

UNKNOWN = "-"


def facts(run: Run) -> list[tuple[str, str]]:
    """What was distilled into what, on what, how, and what came out; names and values."""
    optimization = run.setting("optimization") or {}
    precision = next((name for name in ("fp16", "bf16") if (run.ds_config.get(name) or {}).get("enabled")), "float32")
    zero = (run.ds_config.get("zero_optimization") or {}).get("stage", 0)
    told = [
        ("teacher", _text(run.setting("teacher", "model"))),
        ("student", shape(run)),
        ("starts from", _start(run)),
        ("data", _text(run.setting("task") or run.setting("corpus", "directory"))),
        ("objectives", objectives(run)),
    ]
    if optimization:
        rows = f"{optimization.get('global_batch', UNKNOWN)} rows, learning rate {optimization.get('learning_rate')}"
        told.append(("training", f"{optimization.get('steps', UNKNOWN)} steps of {rows}"))
    device, processes = (run.circumstances.get(key) for key in ("device", "processes"))
    if device:
        told.append(("on", f"{processes} x {device}" + (f", ZeRO {zero}, {precision}" if run.ds_config else "")))
    for curve in run.curves:
        stage = f" of {curve.stage}" if curve.stage else ""
        told += [(f"{name}{stage}", value) for name, value in _of_curve(curve)]
    told += _scores(run)
    if run.summary is not None and run.summary.cosine is not None:
        before, after = run.summary.cosine
        shown = UNKNOWN if before is None else f"{before:.4f}"
        told.append(("cosine with the teacher", f"{shown} before, {after:.4f} after"))
    versions = run.circumstances.get("versions") or {}
    if versions:
        told.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    if run.circumstances.get("git_commit"):
        told.append(("commit", str(run.circumstances["git_commit"])[:12]))
    if run.checkpoints:
        told.append(("checkpoints kept", ", ".join(map(str, run.checkpoints))))
    return told


def shape(run: Run) -> str:
    """Layers, width and size of the student, as far as they are known."""
    layers, width = (
        next((run.student[name] for name in names if name in run.student), None)
        for names in (("num_hidden_layers", "n_layers"), ("hidden_size", "dim"))
    )
    known = f"{layers} layers x {width}" if layers and width else f"{run.setting('student', 'num_layers')} layers"
    return known + (f", {run.parameters / 1e6:.1f} M parameters" if run.parameters else "")


def objectives(run: Run) -> str:
    """Names and layers of the terms, by stage."""
    stages = run.setting("stages")
    lists = [run.setting("objectives")] if not stages else [s.get("objectives") for s in stages if isinstance(s, dict)]
    told = []
    for terms in lists:
        names = [
            f"{term.get('name') or term.get('objective')} ({term.get('layers', 'last')})"
            for term in terms or ()
            if isinstance(term, dict)
        ]
        told.append(" + ".join(names))
    return ", then ".join(filter(None, told)) or UNKNOWN


def _start(run: Run) -> str:
    init, other = run.setting("student", "init"), run.setting("student", "init_from")
    return _text(other or (f"teacher layers: {init}" if init not in (None, "random") else init))


def _of_curve(curve: Curve) -> list[tuple[str, str]]:
    told = []
    _, values = curve.series("held_out/total")
    if values:
        told.append(("held-out objective", f"{values[0]:.4f} before, {values[-1]:.4f} after"))
    _, rates = curve.series("throughput/tokens_per_s")
    if rates:
        told.append(("throughput", f"{statistics.median(rates):,.0f} tokens/s (median)"))
    steps, times = curve.series("time/step_time_s")
    if steps:
        seconds = float(np.diff([0, *steps]) @ times)
        told.append(("time in steps", f"{seconds / 3600:.2f} h" if seconds > 600 else f"{seconds:.0f} s"))
    for tag in ("memory/max_allocated_gib", "memory/max_resident_gib"):
        _, sizes = curve.series(tag)
        if sizes:
            told.append(("peak memory per process", f"{max(sizes):.2f} GiB"))
            break
    return told


def _scores(run: Run) -> list[tuple[str, str]]:
    told = []
    for split, scores in (run.results.get("scores") or {}).items():
        for name, value in scores.items():
            beside = [
                f"{who} {100 * others[split][name]:.1f}"
                for who, key in (("teacher", "teacher_scores"), ("majority class", "baseline"))
                if isinstance(others := run.results.get(key), dict) and name in others.get(split, {})
            ]
            told.append((f"{name}, {split}", f"{100 * value:.1f}" + (f" ({', '.join(beside)})" if beside else "")))
    return told


def score(run: Run) -> tuple[str, float] | None:
    """The number that runs are compared by: the task's primary score, or the last held-out objective."""
    primary = run.results.get("primary")
    for split, scores in (run.results.get("scores") or {}).items():
        if primary in scores:
            return f"{run.results.get('task')}, {primary} on {split} (higher is better)", 100 * scores[primary]
    for curve in reversed(run.curves):
        _, values = curve.series("held_out/total")
        if values:
            return "held-out objective (lower is better; compare equal objectives only)", values[-1]
    return None


def sizes_and_speeds(run: Run) -> list[tuple[str, str, str]]:
    """What is known of both models: of what, teacher's and student's."""
    rows = {
        "layers": {who: str(model.layers or UNKNOWN) for who, model in run.models.items()},
        "width": {who: str(model.width or UNKNOWN) for who, model in run.models.items()},
        "parameters": {who: f"{model.parameters:,}" for who, model in run.models.items()},
        "weights, MiB": {who: f"{model.bytes / 2**20:,.1f}" for who, model in run.models.items()},
    }
    for who, model in run.models.items():
        for timing in model.timings:
            where = f"rows/s, {timing.batch} x {timing.length} tokens, {timing.device}, {timing.dtype}"
            rows.setdefault(where, {})[who] = f"{timing.rows_per_s:,.1f}"
    return [(what, told.get("teacher", UNKNOWN), told.get("student", UNKNOWN)) for what, told in rows.items() if told]


def fastest(run: Run) -> float | None:
    """Rows per second of the student where it was measured fastest."""
    student = run.models.get("student")
    return max((timing.rows_per_s for timing in student.timings), default=None) if student is not None else None


def repeat_command(run: Run) -> str:
    """What to type to have the run once more."""
    script = "task_distill.py" if run.setting("task") else "pretrain_distill.py"
    typed = run.circumstances.get("command")
    config = "ds_configs/zero2.json"
    if isinstance(typed, list) and "--ds_config" in typed[:-1]:
        config = typed[typed.index("--ds_config") + 1]
    words = ["deepspeed", f"launch/{script}", "--ds_config", config, "--recipe", str(run.directory)]
    return shlex.join([*words, "--set", f"output={run.directory}-again"])


def how_to_load(run: Run) -> str:
    """Python that loads the exported student, by what was exported."""
    architecture = str((run.student.get("architectures") or [""])[0])
    heads = {"ForMaskedLM": "masked LM", "ForSequenceClassification": "task"}
    head = next((head for ending, head in heads.items() if architecture.endswith(ending)), "none")
    is_sentence_encoder = (run.directory / EXPORT / MODULES).is_file()
    return loading_code(head, is_sentence_encoder, str(run.directory / EXPORT))


def groups(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that differ in seed and output only, under the name of the first; names are made different."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.recipe.items() if key not in ("seed", "output")}
        found.setdefault(repr(settings) if run.recipe else str(run.directory), []).append(run)
    named: dict[str, list[Run]] = {}
    for members in found.values():
        name = members[0].name
        if name in named or sum(other[0].name == name for other in found.values()) > 1:
            name = f"{name} ({members[0].directory.name})"
        named[name] = members
    return named


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean, and the sample's standard deviation if there are several."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _text(value: Any) -> str:
    return UNKNOWN if value is None else str(value)
