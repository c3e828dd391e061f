"""Objectives on self-attention relations: any two of query, key and value of one model, heads regrouped as wanted.

Shapes: B rows, L length, H heads, D width per head, E = H * D, R relation heads.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dsdistill.core import Batch, Features, LayerPairs, ModelShape, Signal
from dsdistill.objectives.attention import att_kl, equal_heads
from dsdistill.objectives.chunks import sum_over_rows
from dsdistill.objectives.mapping import check_attention_layers
from dsdistill.objectives.numerics import (
    Reduction,
    counted,
    divergence_rows,
    inner_products,
    over_pairs,
    zero_outside,
)
from dsdistill.objectives.registry import objective

Projected = Literal["query", "key", "value"]
Relations = tuple[tuple[Projected, Projected], ...]
SELF_RELATIONS: Relations = (("query", "query"), ("key", "key"), ("value", "value"))


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    relation_heads: int,
    student_other: Tensor | None = None,
    teacher_other: Tensor | None = None,
    segments: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL of the teacher's relations among positions from the student's.

    Wang et al. 2021, MiniLMv2 (arXiv:2012.15828), section 3.1: R = softmax(A A^T / sqrt(E / R)) for each
    relation head. Heads are merged to the full width before it is split into relation heads, so head counts and widths
    of the two models may differ. Every real position relates to every real position, also where a model's own attention
    is local. Half types are promoted to float32, float64 is kept.

    Args:
        student: Query, key or value, (B, H, L, D), any float dtype; gradients flow.
        teacher: The same of the teacher, (B, H', L, D'); treated as constant.
        mask: bool (B, L), True = real; padding has probability 0 as a key and does not count as a query.
        relation_heads: R, divides both H * D and H' * D'.
        student_other: Second factor of the relation; `student` itself by default.
        teacher_other: The same for the teacher; give both or none.
        segments: int (B, L), document numbers; if given, relations never cross documents.
        reduction: `mean`, or `study`: padding counts as query and as key.

    Returns:
        Scalar in nats, mean over real positions and relation heads; 0 if there are none.

    Raises:
        ValueError: If `relation_heads` does not divide a width, or only one second factor is given.
    """
    if (student_other is None) != (teacher_other is None):
        raise ValueError("relation_kl got the second factor of one model only; give student_other and teacher_other")
    real = counted(mask, reduction)
    allowed = real[:, :, None] & real[:, None, :]
    if segments is not None:
        allowed = allowed & (segments[:, :, None] == segments[:, None, :])
    check_divides(relation_heads, student.shape[1] * student.shape[3])
    check_divides(relation_heads, teacher.shape[1] * teacher.shape[3])

    def chunk(left: Tensor, right: Tensor, left_t: Tensor, right_t: Tensor, real: Tensor, allowed: Tensor) -> Tensor:
        ours = _relations(left, right, real, relation_heads)
        return divergence_rows(ours, _relations(left_t, right_t, real, relation_heads), allowed).sum()

    factors = (student, student if student_other is None else student_other)
    constants = (teacher.detach(), (teacher if teacher_other is None else teacher_other).detach())
    size = relation_heads * mask.shape[1] ** 2
    total = sum_over_rows(chunk, *factors, *constants, real, allowed[:, None], elements_per_row=size)
    return total / (real.sum() * relation_heads).clamp(min=1)


def _relations(left_BHLD: Tensor, right_BHLD: Tensor, real_BL: Tensor, relation_heads: int) -> Tensor:
    """Scaled products (B, R, L, L) with nothing from padding in them."""
    left_BRLD = _regroup(zero_outside(left_BHLD, real_BL[:, None, :, None]), relation_heads)
    right_BRLD = _regroup(zero_outside(right_BHLD, real_BL[:, None, :, None]), relation_heads)
    return inner_products(left_BRLD, right_BRLD, left_BRLD.shape[-1] ** -0.5)


def _regroup(tensor_BHLD: Tensor, relation_heads: int) -> Tensor:
    """Merge heads to the width, then split it into relation heads: (B, H, L, D) -> (B, R, L, E / R)."""
    B, H, L, D = tensor_BHLD.shape
    merged_BLE = tensor_BHLD.transpose(1, 2).reshape(B, L, H * D)
    return merged_BLE.view(B, L, relation_heads, -1).transpose(1, 2)


def check_divides(relation_heads: int, width: int) -> None:
    """Refuse a number of relation heads that does not divide the width.

    Raises:
        ValueError: Names both.
    """
    if relation_heads < 1 or width % relation_heads:
        raise ValueError(f"relation_heads={relation_heads} does not divide width {width}; use a divisor of both widths")


def relation_heads_fit(
    student: ModelShape, teacher: ModelShape, pairs: LayerPairs, *, relation_heads: int | None = None, **_: object
) -> None:
    """Refuse, before anything runs, relation heads (by default the teacher's heads) that do not fit the widths.

    Raises:
        ValueError: If they do not divide the width of a model's queries, or a pair has no attention.
    """
    check_attention_layers(pairs)
    for shape in (student, teacher):
        check_divides(
            teacher.num_heads if relation_heads is None else relation_heads, shape.num_heads * shape.head_width
        )


@objective(
    "val_kl",
    student={"value"},
    teacher={"value"},
    head=relation_heads_fit,
    equation="mean_{real i, heads} KL(softmax(V^T V^T' / sqrt(d)) || softmax(V^S V^S' / sqrt(d)))",
    paper="MiniLM, arXiv:2002.10957, sec. 3.2; study arXiv:2305.15032, Val-KL",
)
def val_kl(
    student: Features, teacher: Features, batch: Batch, pairs: LayerPairs, *, reduction: Reduction = "mean"
) -> dict[str, Tensor]:
    """Value relations, one relation head for each of the teacher's heads; a student with other heads is regrouped."""
    losses = [
        relation_kl(
            student.at("value", s),
            teacher.at("value", t),
            batch.mask,
            relation_heads=teacher.at("value", t).shape[1],
            reduction=reduction,
        )
        for s, t in pairs
    ]
    return {"val_kl": over_pairs(losses, reduction)}


@objective(
    "minilm",
    student={"query", "key", "value"},
    teacher={"query", "key", "value"},
    head=equal_heads,
    equation="att_kl + val_kl",
    paper="MiniLM, arXiv:2002.10957, sec. 3.2; study arXiv:2305.15032, Att-KL + Val-KL",
)
def minilm(
    student: Features, teacher: Features, batch: Batch, pairs: LayerPairs, *, reduction: Reduction = "mean"
) -> dict[str, Tensor]:
    """Attention distributions and value relations, both with weight 1."""
    return att_kl(student, teacher, batch, pairs, reduction=reduction) | val_kl(
        student, teacher, batch, pairs, reduction=reduction
    )


def _named(*, relations: Relations = SELF_RELATIONS, **_: object) -> frozenset[Signal]:
    """The signals that these relations read."""
    return frozenset(signal for pair in relations for signal in pair)


@objective(
    "minilmv2",
    student=_named,
    teacher=_named,
    head=relation_heads_fit,
    equation="sum_{relations} mean_{real i, R} KL(softmax(A^T B^T' / sqrt(E_T/R)) || softmax(A^S B^S' / sqrt(E_S/R)))",
    paper="MiniLMv2, arXiv:2012.15828, sec. 3.1",
)
def minilmv2(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    relation_heads: int = 48,
    relations: Relations = SELF_RELATIONS,
    reduction: Reduction = "mean",
) -> dict[str, Tensor]:
    """Relations by name, one term each, such as `query_query`; 48 relation heads as for the paper's base models."""
    terms = {}
    for left, right in relations:
        losses = [
            relation_kl(
                student.at(left, s),
                teacher.at(left, t),
                batch.mask,
                relation_heads=relation_heads,
                student_other=student.at(right, s),
                teacher_other=teacher.at(right, t),
                reduction=reduction,
            )
            for s, t in pairs
        ]
        terms[f"{left}_{right}"] = over_pairs(losses, reduction)
    return terms
