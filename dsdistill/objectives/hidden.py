"""Objectives on hidden states position by position, with a learned projection where widths differ.

Shapes: B rows, L length, E width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dsdistill.core import Batch, Features, LayerPairs, ModelShape
from dsdistill.objectives.numerics import (
    Reduction,
    check_same_shape,
    counted,
    masked_mean,
    over_pairs,
    promote,
    unit_length,
    zero_outside,
)
from dsdistill.objectives.registry import objective

Projection = Literal["auto", "always", "never"]


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean squared difference of hidden states.

    Jiao et al. 2020, TinyBERT (arXiv:1909.10351), equation 8, after any projection. Half types are promoted to
    float32, float64 is kept.

    Args:
        student: (B, L, E), any float dtype; gradients flow.
        teacher: (B, L, E); treated as constant.
        mask: bool (B, L), True = real.
        reduction: `mean`, or `study`: padded positions count.

    Returns:
        Scalar, mean over real positions and width; 0 if there are none.

    Raises:
        ValueError: If the shapes differ.
    """
    check_same_shape("hidden states", student, teacher, instead="use a projection")
    real = counted(mask, reduction)[..., None]
    difference = zero_outside(promote(student) - promote(teacher.detach()), real)
    return difference.square().sum() / (real.sum() * student.shape[-1]).clamp(min=1)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """One minus the cosine of hidden states.

    Sanh et al. 2019, DistilBERT (arXiv:1910.01108), section 3 (L_cos). Half types are promoted to float32.

    Args:
        student: (B, L, E), any float dtype; gradients flow.
        teacher: (B, L, E); treated as constant.
        mask: bool (B, L), True = real.

    Returns:
        Scalar, mean over real positions; 0 if there are none.

    Raises:
        ValueError: If the shapes differ.
    """
    check_same_shape("hidden states", student, teacher, instead="use a projection")
    ours = unit_length(zero_outside(student, mask[..., None]))
    theirs = unit_length(zero_outside(teacher.detach(), mask[..., None]))
    return masked_mean(1 - (ours * theirs).sum(-1), mask)


def projections(
    student: ModelShape, teacher: ModelShape, pairs: LayerPairs, *, projection: Projection = "auto", **_: object
) -> nn.ModuleList | None:
    """One linear map without bias from the student's width to the teacher's for each layer pair, or None.

    Without bias as in the papers' equations (TinyBERT's code has one bias, and one map for all layers).
    Combined layers get one map from all of the student's to all of the teacher's.

    Raises:
        ValueError: If widths differ and `projection` is `never`.
    """
    copies = (len(pairs.student), len(pairs.teacher)) if pairs.combine else (1, 1)
    widths = (student.width * copies[0], teacher.width * copies[1])
    if projection == "never" and widths[0] != widths[1]:
        raise ValueError(
            f"projection='never', but widths are {widths[0]} (student) and {widths[1]} (teacher); use 'auto'"
        )
    if projection == "never" or (projection == "auto" and widths[0] == widths[1]):
        return None
    return nn.ModuleList(nn.Linear(*widths, bias=False) for _ in range(1 if pairs.combine else len(pairs)))


def hidden_pairs(
    student: Features,
    teacher: Features,
    pairs: LayerPairs,
    real: Tensor,
    head: nn.Module | None,
    *,
    positions: slice = slice(None),
) -> list[tuple[Tensor, Tensor]]:
    """Hidden states of each layer pair, the student's projected; one pair if layers are combined.

    Args:
        student: Has hidden states (B, L, E).
        teacher: Has hidden states (B, L, E').
        pairs: Which to compare.
        real: bool (B, L); the student's states elsewhere are set to 0, lest a projection's gradient meets a NaN there.
        head: From `projections`.
        positions: Which positions of the rows to take; `real` is cut too.
    """
    if pairs.combine:
        ours = [torch.cat([student.at("hidden", s) for s in pairs.student], dim=-1)]
        theirs = [torch.cat([teacher.at("hidden", t) for t in pairs.teacher], dim=-1)]
    else:
        ours = [student.at("hidden", s) for s, _ in pairs]
        theirs = [teacher.at("hidden", t) for _, t in pairs]
    ours, theirs = [hidden[:, positions] for hidden in ours], [hidden[:, positions] for hidden in theirs]
    if isinstance(head, nn.ModuleList):
        keep = real[:, positions, None]
        ours = [project(zero_outside(hidden, keep)) for project, hidden in zip(head, ours, strict=True)]
    return list(zip(ours, theirs, strict=True))


@objective(
    "hid_seq",
    student={"hidden"},
    teacher={"hidden"},
    head=projections,
    equation="mean_{real i, width} (H^S_i W - H^T_i)^2",
    paper="TinyBERT, arXiv:1909.10351, eq. 8 and 9; study arXiv:2305.15032, Hid-Seq",
)
def hid_seq(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    projection: Projection = "auto",
    reduction: Reduction = "mean",
    head: nn.Module | None = None,
) -> dict[str, Tensor]:
    """`hidden_mse` over layer pairs, embedding outputs (layer 0) included where the pairs name them.

    With combined layers, all of the student's side by side are projected onto all of the teacher's; the study's code
    projects the teacher instead, which both sides can satisfy by being zero.
    """
    states = hidden_pairs(student, teacher, pairs, counted(batch.mask, reduction), head)
    losses = [hidden_mse(ours, theirs, batch.mask, reduction=reduction) for ours, theirs in states]
    return {"hid_seq": over_pairs(losses, reduction)}


@objective(
    "hid_cls",
    student={"hidden"},
    teacher={"hidden"},
    head=projections,
    equation="mean_{rows, width} (H^S_1 W - H^T_1)^2, first position of each row",
    paper="PKD, arXiv:1908.09355 (without its normalisation); study arXiv:2305.15032, Hid-CLS",
)
def hid_cls(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    projection: Projection = "auto",
    reduction: Reduction = "mean",
    head: nn.Module | None = None,
) -> dict[str, Tensor]:
    """`hidden_mse` at the first position ([CLS]) of every row, over layer pairs.

    `reduction: study` adds the layer pairs up as its task-specific code does. Its task-agnostic code takes all
    positions of the first row by mistake; that is not reproduced.
    """
    first = slice(0, 1)
    states = hidden_pairs(student, teacher, pairs, counted(batch.mask, reduction), head, positions=first)
    losses = [hidden_mse(ours, theirs, batch.mask[:, first], reduction=reduction) for ours, theirs in states]
    return {"hid_cls": over_pairs(losses, reduction)}


@objective(
    "hid_cos",
    student={"hidden"},
    teacher={"hidden"},
    head=projections,
    equation="mean_{real i} 1 - cos(H^S_i W, H^T_i)",
    paper="DistilBERT, arXiv:1910.01108, sec. 3, L_cos",
)
def hid_cos(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    projection: Projection = "auto",
    head: nn.Module | None = None,
) -> dict[str, Tensor]:
    """`hidden_cosine` averaged over layer pairs."""
    states = hidden_pairs(student, teacher, pairs, batch.mask, head)
    return {"hid_cos": over_pairs([hidden_cosine(ours, theirs, batch.mask) for ours, theirs in states], "mean")}
