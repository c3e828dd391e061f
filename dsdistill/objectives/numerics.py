"""Precision, masked softmax and masked means: padding and half types are handled here, once for all objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "study"]
"""`mean`: over real positions, averaged over layer pairs. `study`: as the code of "How to Distill your BERT" divides
(padding counts, layer pairs are added up); for comparison with its numbers only."""

FILL = -1e30
"""Stands in for minus infinity where nothing may attend: finite, so that no difference of two of them is NaN."""


def promote(tensor: Tensor) -> Tensor:
    """Half types to float32; float32 and float64 stay (a plain `.float()` would spoil gradcheck)."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def inner_products(left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """Scaled inner products, (..., I, D) x (..., J, D) -> (..., I, J), in float32 or better, also under autocast."""
    device = "cpu" if left.is_meta else left.device.type  # autocast knows no meta tensors
    with torch.autocast(device, enabled=False):
        return (promote(left) * scaling) @ promote(right).transpose(-1, -2)


def zero_outside(tensor: Tensor, mask: Tensor) -> Tensor:
    """Zeros where `mask` is False, whatever stood there (NaN included); no gradient reaches those places."""
    return torch.where(mask, tensor, 0.0)


def masked_log_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Log-softmax over the last axis among the allowed places; finite everywhere, meaningless at the others."""
    return torch.log_softmax(scores.masked_fill(~allowed, FILL), dim=-1)


def divergence_rows(student: Tensor, teacher: Tensor, allowed: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) over the allowed places of the last axis, in nats; 0 without any.

    Args:
        student: Scores in float32 or better; gradients flow.
        teacher: Scores of the same shape; detached by the caller.
        allowed: bool, broadcastable to that shape; other places have probability 0 on both sides, exactly.

    Returns:
        The shape without its last axis.
    """
    student_log = masked_log_softmax(student, allowed)
    teacher_log = masked_log_softmax(teacher, allowed)
    return (teacher_log.exp() * (teacher_log - student_log)).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the places where `mask` (same shape) is True; 0 if there are none."""
    return zero_outside(values, mask).sum() / mask.sum().clamp(min=1)


def counted(mask: Tensor, reduction: Reduction) -> Tensor:
    """The positions that a reduction counts: the real ones, or all of them as in the study's code."""
    return torch.ones_like(mask) if reduction == "study" else mask


def over_pairs(losses: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """One scalar from one loss for each layer pair: their mean, or their sum as in the study's code."""
    total = torch.stack(list(losses)).sum()
    return total if reduction == "study" else total / len(losses)


def check_same_shape(what: str, student: Tensor, teacher: Tensor, *, instead: str) -> None:
    """Refuse tensors of two shapes.

    Raises:
        ValueError: Names both shapes and what to do `instead`.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"{what}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ; {instead}")


def unit_length(vectors: Tensor) -> Tensor:
    """Vectors along the last axis divided by their length (at least 1e-3), in float32 or better."""
    promoted = promote(vectors)
    return promoted * promoted.square().sum(-1, keepdim=True).clamp(min=1e-6).rsqrt()
