"""What one stage will hold and take on one GPU, from configs and settings only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dsdistill.core import Batch, Problem
from dsdistill.memory import Engine, Memory, predict_memory
from dsdistill.models.capture import ATTENTION, Wanted
from dsdistill.models.families import shape_of
from dsdistill.models.loading import Head, auto_class
from dsdistill.tracing import Trace, trace_step
from dsdistill.training.distiller import BoundTerm
from dsdistill.training.engine import half_precision
from dsdistill.training.placement import Kind

Configs = tuple[PreTrainedConfig, PreTrainedConfig]
"""Of student and teacher."""

UTILISATION = {"cuda": 0.32, "cpu": 0.5}
"""Share of a large matrix product's speed that whole steps reach: measured on one H100 (benchmarks/speed.md) for 12 x
768 into 6 x 768 in eager mode; on a CPU a guess."""

COMPILED_UTILISATION = 0.44
"""The same with `torch_compile`."""


def trace_stage(
    configs: Configs,
    head: Head,
    terms: Iterable[BoundTerm],
    wants: tuple[Wanted, Wanted],
    engine_config: Mapping[str, Any],
    *,
    row_length: int,
    targets: int | None,
    on_gpu: bool,
    activation_checkpointing: bool,
    problem: Problem,
) -> Trace:
    """What one micro-batch of a stage holds and computes.

    Args:
        configs: Of both models.
        head: What both end in.
        terms: Summands of the loss.
        wants: Signals captured in both.
        engine_config: DeepSpeed JSON, filled.
        row_length: Tokens per row.
        targets: Positions per row whose logits are wanted; None in a task, whose rows have one label each.
        on_gpu: Whether a GPU will run it.
        activation_checkpointing: Whether the student's layers are computed again in backward.
        problem: What a task's labels are.
    """
    student, teacher = (_maker(config, head) for config in configs)
    rows = engine_config["train_micro_batch_size_per_gpu"]
    classes = 1 if problem == "regression" else configs[0].num_labels or 1
    return trace_step(
        student,
        teacher,
        wants,
        terms,
        (shape_of(configs[0]), shape_of(configs[1])),
        meta_batch(rows, row_length, targets=targets, problem=problem, classes=classes),
        dtype=half_precision(dict(engine_config)),
        fused=on_gpu,
        activation_checkpointing=activation_checkpointing,
        problem=problem,
    )


def _maker(config: PreTrainedConfig, head: Head) -> Callable[[], PreTrainedModel]:
    make: Any = auto_class(head)
    return lambda: make.from_config(copy.deepcopy(config), attn_implementation=ATTENTION)


def meta_batch(rows: int, length: int, *, targets: int | None, problem: Problem, classes: int) -> Batch:
    """Rows without numbers and without padding."""

    def empty(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if targets is not None:
        labels, chosen = empty(rows, length), empty(rows * targets)
    elif problem == "multi_label":
        labels, chosen = empty(rows, classes, dtype=torch.float32), None
    else:
        labels, chosen = empty(rows, dtype=torch.float32 if problem == "regression" else torch.long), None
    return Batch(
        input_ids=empty(rows, length),
        mask=empty(rows, length, dtype=torch.bool),
        sample_ids=empty(rows),
        token_type_ids=empty(rows, length),
        labels=labels,
        targets=chosen,
        padded=False,
    )


def forecast_memory(trace: Trace, engine_config: Mapping[str, Any], processes: int, placement: Kind) -> Memory:
    """The peak of a GPU that trains."""
    half = half_precision(dict(engine_config)) != torch.float32
    engine = Engine.of(engine_config, processes=processes, weight_bytes=2 if half else 4)
    return predict_memory(trace, engine, placement)


def step_seconds(
    trace: Trace, engine_config: Mapping[str, Any], rate: float, utilisation: float, teachers_share: float
) -> float:
    """Seconds of one optimizer step.

    Args:
        trace: One micro-batch.
        engine_config: DeepSpeed JSON, filled.
        rate: FLOP/s of a large matrix product.
        utilisation: Share of it that is reached.
        teachers_share: Teachers per process that trains, where they run beside it; 0 where it runs its own.
    """
    teacher = trace.teacher.flops if trace.teacher is not None else 0
    busiest = max(trace.student.flops, teacher / teachers_share) if teachers_share else trace.student.flops + teacher
    return engine_config["gradient_accumulation_steps"] * busiest / (rate * utilisation)
