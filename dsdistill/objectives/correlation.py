"""Objectives on correlations: Pearson's between the two models' probabilities, of logits or of attention maps.

Shapes: B rows, L length, H heads, N chosen positions or rows, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dsdistill.core import Batch, Features, LayerPairs, ModelShape, Problem, Signal
from dsdistill.objectives.attention import (
    allowed_pairs,
    attention_scores,
    check_head_counts,
    compare_maps,
    equal_heads,
)
from dsdistill.objectives.numerics import (
    check_same_shape,
    masked_log_softmax,
    masked_mean,
    over_pairs,
    promote,
    zero_outside,
)
from dsdistill.objectives.registry import objective

Source = Literal["logits", "attention"]


def pearson_distance(student: Tensor, teacher: Tensor, allowed: Tensor, dim: int) -> Tensor:
    """One minus Pearson's correlation along one axis.

    Huang et al. 2022, DIST (arXiv:2205.10536). Groups that do not vary in one of the models (relative
    spread below 1e-5, or no value above 1e-20) have no correlation and are left out; the paper's code counts them as
    uncorrelated, without gradient.

    Args:
        student: Non-negative values such as probabilities, any shape, float32 or better; gradients flow.
        teacher: The same shape; treated as constant.
        allowed: bool, the same shape; only these places count.
        dim: The axis along which values are correlated.

    Returns:
        Scalar, mean over groups; 0 if there are none.
    """
    ours, our_size = _centred(student, allowed, dim)
    theirs, their_size = _centred(teacher.detach(), allowed, dim)
    varies = (our_size > 1e-10) & (their_size > 1e-10)
    lengths = [torch.where(varies, size, torch.ones_like(size)).rsqrt() for size in (our_size, their_size)]
    return masked_mean(1 - (ours * theirs).sum(dim) * lengths[0] * lengths[1], varies)


def _centred(values: Tensor, allowed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Values minus their group's mean, zero where not allowed, in units of the largest; and their sum of squares."""
    values = zero_outside(values, allowed)
    values = values / values.detach().amax(dim, keepdim=True).clamp(min=1e-20)
    mean = values.sum(dim, keepdim=True) / allowed.sum(dim, keepdim=True).clamp(min=1)
    centred = zero_outside(values - mean, allowed)
    return centred, centred.square().sum(dim)


def logit_pearson(student_NC: Tensor, teacher_NC: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Distances between class probabilities, along each row's classes and along each class's rows.

    Huang et al. 2022, DIST (arXiv:2205.10536), inter- and intra-class relations, times temperature squared as in
    its code. The second compares the batch's rows with each other, so splitting a batch changes it.

    Args:
        student_NC: Student logits (N, C), any float dtype; gradients flow.
        teacher_NC: Teacher logits (N, C); treated as constant.
        temperature: Softening, > 0.

    Returns:
        (inter-class, intra-class), scalars.

    Raises:
        ValueError: If shapes differ or temperature is not positive.
    """
    check_same_shape("logits", student_NC, teacher_NC, instead="both models need the same vocabulary or classes")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} is not positive; 1 leaves the logits as they are")
    if not student_NC.numel():
        nothing = promote(student_NC).sum()
        return nothing, nothing
    student = torch.softmax(promote(student_NC) / temperature, dim=-1)
    teacher = torch.softmax(promote(teacher_NC.detach()) / temperature, dim=-1)
    everywhere = torch.ones_like(student, dtype=torch.bool)
    inter, intra = (pearson_distance(student, teacher, everywhere, dim) for dim in (1, 0))
    return inter * temperature**2, intra * temperature**2


def attention_pearson(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    mask: Tensor,
    *,
    student_scaling: float,
    teacher_scaling: float,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    segments: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances between attention distributions along keys, along queries, and along heads.

    The study's code (`pear_col`), which carries DIST over to attention maps; its fourth axis, along the rows of the
    batch, compares unrelated tokens and is left out.

    Args:
        student_query: As in `attention_kl`.
        student_key: As in `attention_kl`.
        teacher_query: As in `attention_kl`.
        teacher_key: As in `attention_kl`.
        mask: bool (B, L), True = real.
        student_scaling: As in `attention_kl`.
        teacher_scaling: As in `attention_kl`.
        student_bias: As in `attention_kl`.
        teacher_bias: As in `attention_kl`.
        segments: As in `attention_kl`.
        window: As in `attention_kl`.

    Returns:
        (keys, queries, heads), scalars; see `pearson_distance`.

    Raises:
        ValueError: If the numbers of heads differ.
    """
    check_head_counts(student_query.shape[1], teacher_query.shape[1])
    allowed = allowed_pairs(mask, mask, segments, window)
    student_scores = attention_scores(student_query, student_key, mask, mask, student_scaling, student_bias)
    teacher_scores = attention_scores(
        teacher_query.detach(),
        teacher_key.detach(),
        mask,
        mask,
        teacher_scaling,
        None if teacher_bias is None else teacher_bias.detach(),
    )
    student, teacher = (masked_log_softmax(scores, allowed).exp() for scores in (student_scores, teacher_scores))
    places = allowed.expand_as(student)
    keys, queries, heads = (pearson_distance(student, teacher, places, dim) for dim in (3, 2, 1))
    return keys, queries, heads


def _signals(*, of: Source, **_: object) -> frozenset[Signal]:
    return frozenset({"logits"}) if of == "logits" else frozenset({"query", "key", "bias"})


def _check(
    student: ModelShape, teacher: ModelShape, pairs: LayerPairs, *, of: Source, problem: Problem, **params: object
) -> None:
    """Refuse, before anything runs, what cannot be compared and parameters that would have no effect."""
    if of == "logits":
        if problem != "classification":
            raise ValueError(
                f"pearson of logits compares distributions over classes, but the task is {problem}; use kd"
            )
        return
    equal_heads(student, teacher, pairs)
    changed = [name for name in ("temperature", "inter", "intra") if params[name] != 1]
    if changed:
        raise ValueError(f"{', '.join(changed)} has no effect with of='attention'; drop it")


@objective(
    "pearson",
    student=_signals,
    teacher=_signals,
    head=_check,
    equation="logits: T^2 mean_rows (1 - r(P, Q)) + T^2 mean_classes (1 - r(P', Q')), r Pearson's; "
    "attention: mean 1 - r along keys + along queries + along heads",
    paper="DIST, arXiv:2205.10536; attention: code of the study, arXiv:2305.15032",
)
def pearson(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    of: Source = "logits",
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
) -> dict[str, Tensor]:
    """`logit_pearson` weighted by `inter` and `intra`, or `attention_pearson` averaged over layer pairs, all weights 1.

    Over a vocabulary the logits take N x V in float32; `intra` compares rows with each other.
    """
    if of == "logits":
        rows, classes = logit_pearson(student.logits, teacher.logits, temperature=temperature)
        return {"inter_class": inter * rows, "intra_class": intra * classes}
    parts = [compare_maps(attention_pearson, student, teacher, batch, s, t) for s, t in pairs]
    names = ("along_keys", "along_queries", "along_heads")
    return {name: over_pairs(losses, "mean") for name, losses in zip(names, zip(*parts, strict=True), strict=True)}
