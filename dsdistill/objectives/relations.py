"""Objectives on self-attention relations: any two of query, key and value of one model, heads regrouped as wanted.

Shapes: B rows, L length, H heads, D width per head, E = H * D, R relation heads.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dsdistill.core import Batch, Features, LayerPairs, ModelShape, Signal
from dsdistill.kernels.selection import Kernel
from dsdistill.objectives.attention import Limits, Maps, att_kl, divergence_sum, equal_heads
from dsdistill.objectives.mapping import check_attention_layers
from dsdistill.objectives.numerics import Reduction, counted, over_pairs
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
    padded: bool = True,
    kernel: Kernel = "auto",
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
        padded: False promises that everything in `mask` is real, so that nothing has to be hidden.
        kernel: Which implementation; `auto` is the fused one on a GPU wherever it can be used.

    Returns:
        Scalar in nats, mean over real positions and relation heads; 0 if there are none.

    Raises:
        ValueError: If `relation_heads` does not divide a width, only one second factor is given, the factors differ in
            width, or `kernel: fused` cannot be used.
    """
    if (student_other is None) != (teacher_other is None):
        raise ValueError("relation_kl got the second factor of one model only; give student_other and teacher_other")
    for tensor in (student, teacher, student_other, teacher_other):
        if tensor is not None:
            check_divides(relation_heads, tensor.shape[1] * tensor.shape[3])
    real = counted(mask, reduction)
    ours = _regroup_both(student, student_other, relation_heads)
    theirs = _regroup_both(teacher, teacher_other, relation_heads)
    maps = Maps(*ours, *theirs, ours[0].shape[-1] ** -0.5, theirs[0].shape[-1] ** -0.5)
    limits = Limits(real, real, segments, None, padded and reduction == "mean")
    total = divergence_sum(maps, limits, kernel)
    return total / (real.sum() * relation_heads).clamp(min=1)


def _regroup_both(left: Tensor, right: Tensor | None, relation_heads: int) -> tuple[Tensor, Tensor]:
    """Both factors, regrouped; one object twice where a tensor relates to itself, as the fused kernel likes to know."""
    regrouped = _regroup(left, relation_heads)
    other = regrouped if right is None or right is left else _regroup(right, relation_heads)
    if other.shape[-1] != regrouped.shape[-1]:
        widths = tuple(relation_heads * factor.shape[-1] for factor in (regrouped, other))
        raise ValueError(f"relation_kl got factors of widths {widths}, which have no products; relate equal widths")
    return regrouped, other


def _regroup(tensor_BHLD: Tensor, relation_heads: int) -> Tensor:
    """Merge heads to the width, then split it into relation heads: (B, H, L, D) -> (B, R, L, E / R)."""
    B, H, L, D = tensor_BHLD.shape
    if relation_heads == H:
        return tensor_BHLD
    merged_BLE = tensor_BHLD.transpose(1, 2).reshape(B, L, H * D)
    return merged_BLE.view(B, L, relation_heads, -1).transpose(1, 2)


def check_divides(relation_heads: int, width: int, of: str = "") -> None:
    """Refuse a number of relation heads that does not divide the width.

    Raises:
        ValueError: Names both, and whose width it is if `of` says.
    """
    if relation_heads < 1 or width % relation_heads:
        raise ValueError(
            f"relation_heads={relation_heads} does not divide width {width}{of}; use a divisor of both models' widths"
        )


def relation_heads_fit(
    student: ModelShape,
    teacher: ModelShape,
    pairs: LayerPairs,
    *,
    relation_heads: int | None = None,
    relations: Relations = (("value", "value"),),
    **_: object,
) -> None:
    """Refuse, before anything runs, relation heads (by default the teacher's value heads) that do not fit the widths.

    Raises:
        ValueError: If they do not divide the width of a factor, the factors of a relation differ in width (grouped
            heads), or a pair has no attention.
    """
    check_attention_layers(pairs)
    heads = teacher.num_key_heads if relation_heads is None else relation_heads
    for whose, shape in (("student", student), ("teacher", teacher)):
        for left, right in relations:
            if shape.width_of(left) != shape.width_of(right):
                raise ValueError(
                    f"the {whose}'s {left} and {right} cannot be related: several of its queries share a key and a "
                    f"value, so that {left} has width {shape.width_of(left)} and {right} {shape.width_of(right)}; use "
                    "relations of query with query, key with key, value with value"
                )
            for signal in (left, right):
                check_divides(heads, shape.width_of(signal), f" of the {whose}'s {signal}")


def maps_and_values_fit(student: ModelShape, teacher: ModelShape, pairs: LayerPairs, **_: object) -> None:
    """Refuse, before anything runs, models whose attention maps or value relations cannot be compared.

    Raises:
        ValueError: As `equal_heads` and `relation_heads_fit`.
    """
    equal_heads(student, teacher, pairs)
    relation_heads_fit(student, teacher, pairs)


@objective(
    "val_kl",
    student={"value"},
    teacher={"value"},
    head=relation_heads_fit,
    equation="mean_{real i, heads} KL(softmax(V^T V^T' / sqrt(d)) || softmax(V^S V^S' / sqrt(d)))",
    paper="MiniLM, arXiv:2002.10957, sec. 3.2; study arXiv:2305.15032, Val-KL",
)
def val_kl(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    reduction: Reduction = "mean",
    kernel: Kernel = "auto",
) -> dict[str, Tensor]:
    """Value relations, one relation head for each of the teacher's heads; a student with other heads is regrouped."""
    losses = [
        relation_kl(
            student.at("value", s),
            teacher.at("value", t),
            batch.mask,
            relation_heads=teacher.at("value", t).shape[1],
            segments=batch.segments,
            reduction=reduction,
            padded=batch.padded,
            kernel=kernel,
        )
        for s, t in pairs
    ]
    return {"val_kl": over_pairs(losses, reduction)}


@objective(
    "minilm",
    student={"query", "key", "value", "bias"},
    teacher={"query", "key", "value", "bias"},
    head=maps_and_values_fit,
    equation="att_kl + val_kl",
    paper="MiniLM, arXiv:2002.10957, sec. 3.2; study arXiv:2305.15032, Att-KL + Val-KL",
)
def minilm(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    reduction: Reduction = "mean",
    kernel: Kernel = "auto",
) -> dict[str, Tensor]:
    """Attention distributions and value relations, both with weight 1."""
    return att_kl(student, teacher, batch, pairs, reduction=reduction, kernel=kernel) | val_kl(
        student, teacher, batch, pairs, reduction=reduction, kernel=kernel
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
    kernel: Kernel = "auto",
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
                segments=batch.segments,
                reduction=reduction,
                padded=batch.padded,
                kernel=kernel,
            )
            for s, t in pairs
        ]
        terms[f"{left}_{right}"] = over_pairs(losses, reduction)
    return terms
