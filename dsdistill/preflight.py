"""What `--dry_run` adds to the plan: weights, memory, work and hours of every stage, predicted on this machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from dsdistill.forecast import COMPILED_UTILISATION, UTILISATION, forecast_memory, step_seconds
from dsdistill.memory import GIB, Memory
from dsdistill.models.families import Wanted
from dsdistill.plan import Plan, StagePlan
from dsdistill.tracing import Trace
from dsdistill.training.dist import Place
from dsdistill.training.engine import half_precision

TOLERANCE = 1.15
"""How far beyond a GPU's memory a predicted peak must be to be a problem: predictions may be wrong by 15 %."""


def preflight(plan: Plan[Any], place: Place) -> str:
    """The page that follows the plan.

    Raises:
        ValueError: If a stage cannot fit.
    """
    rates = {stage.name: half_precision(stage.engine_config) for stage in plan.stages}
    measured = {dtype: matmul_rate(place.device, dtype) for dtype in set(rates.values())}
    lines, problems, hours = [], [], 0.0
    for stage in plan.stages:
        trace = plan.trace(stage, on_gpu=place.device.type == "cuda")
        memory = forecast_memory(trace, stage.engine_config, place.world_size, plan.placement.kind)
        seconds = seconds_of(stage, trace, place, measured[rates[stage.name]])
        hours += seconds / 3600
        lines += [
            *([f"stage      {stage.name}"] if stage.name else []),
            *describe_weights(trace),
            f"signals    student: {describe_wanted(stage.student_wants)}",
            f"           teacher: {describe_wanted(stage.teacher_wants)}",
            describe_memory(memory, place),
            describe_work(stage, trace, seconds, place, measured[rates[stage.name]]),
        ]
        if place.device.type == "cuda" and memory.peak > TOLERANCE * gpu_bytes(place):
            problems.append(too_large(stage, memory, place))
    if problems:
        raise ValueError("\n".join(problems))
    where = plan.placement.kind + (f" ({plan.placement.why})" if plan.placement.why else "")
    return "\n".join([f"placement  of the teacher: {where}", *lines, f"in all     {shown_hours(hours)}"])


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of a few."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # sync
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def seconds_of(stage: StagePlan, trace: Trace, place: Place, rate: float) -> float:
    """Training time of a stage, evaluation and checkpoints left out."""
    share = place.teachers / place.world_size
    return stage.pace.optimization.steps * step_seconds(
        trace, stage.engine_config, rate, utilisation(stage, place), share
    )


def utilisation(stage: StagePlan, place: Place) -> float:
    """Share of the products' speed that is assumed."""
    compiled = place.device.type == "cuda" and stage.engine_config.get("torch_compile")
    return COMPILED_UTILISATION if compiled else UTILISATION[place.device.type]


def describe_weights(trace: Trace) -> list[str]:
    """What is trained, what is not, and how much of the teacher runs."""
    heads = ", ".join(f"{name} {number:,}" for name, number in trace.projections.items()) or "none"
    frozen = f", {trace.student.frozen:,} frozen"
    if trace.frozen_names:
        frozen += f" ({len(trace.frozen_names)} parameters that no objective reaches, such as {trace.frozen_names[0]})"
    lines = [f"weights    {trace.student.trained:,} trained{frozen}; projections: {heads}"]
    if trace.teacher is not None:
        lines.append(f"           {trace.teacher.frozen:,} of the teacher run, in {trace.teacher.layers} layers")
    return lines


def describe_wanted(wanted: Wanted) -> str:
    """Signals and their layers."""
    told = [s if s == "logits" else f"{s} {', '.join(map(str, sorted(layers)))}" for s, layers in wanted.items()]
    return "; ".join(told) or "none"


def describe_memory(memory: Memory, place: Place) -> str:
    """The predicted peak and its parts."""
    on_gpu = place.device.type == "cuda"
    room = f", of {gpu_bytes(place) / GIB:.1f} on each GPU" if on_gpu else " (a GPU's; there is none here)"
    always = {name: getattr(memory, name) / GIB for name in ALWAYS}
    largest = ", ".join(f"{what} {getattr(memory, name) / GIB:.2f}" for name, what in PHASES.items())
    return (
        f"memory     {memory.peak / GIB:.2f} GiB at the peak{room}: "
        + ", ".join(f"{name} {value:.2f}" for name, value in always.items())
        + f"; and the {'sum' if memory.graphs else 'largest'} of {largest}"
    )


ALWAYS = ("weights", "optimizer", "gradients", "buffers", "teacher", "signals")
PHASES = {"activations": "activations", "teacher_work": "teacher's forward", "step_work": "optimizer's step"}


def describe_work(stage: StagePlan, trace: Trace, seconds: float, place: Place, rate: float) -> str:
    """Tokens, operations and hours."""
    optimization = stage.pace.optimization
    rows = optimization.steps * optimization.global_batch
    micro_batches = rows // stage.engine_config["train_micro_batch_size_per_gpu"]
    flops = micro_batches * (trace.student.flops + (trace.teacher.flops if trace.teacher is not None else 0))
    return (
        f"work       {optimization.steps:,} steps, {rows * stage.row_length:,} tokens at most, {flops:.2e} FLOP, "
        f"{shown_hours(seconds / 3600)} on {place.num_processes} like this one, assuming "
        f"{utilisation(stage, place):.0%} of the {rate:.1e} FLOP/s that a matrix product reaches here"
    )


def shown_hours(hours: float) -> str:
    """A duration for people."""
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def gpu_bytes(place: Place) -> int:
    """Memory of this process's GPU."""
    return torch.cuda.get_device_properties(place.device).total_memory


def too_large(stage: StagePlan, memory: Memory, place: Place) -> str:
    """Why a stage cannot run, and what can."""
    name = f"stage {stage.name}: " if stage.name else ""
    rows = stage.engine_config["train_micro_batch_size_per_gpu"]
    return (
        f"{name}the predicted peak of {memory.peak / GIB:.1f} GiB is more than the GPU's {gpu_bytes(place) / GIB:.1f}; "
        f"use a smaller train_micro_batch_size_per_gpu (now {rows}), a "
        "higher ZeRO stage, student.activation_checkpointing, or another teacher.placement"
    )
