"""Objectives on sentence embeddings: one vector for each row, compared with the teacher's or with the batch's others.

Shapes: B rows, L length, E width, G rows of all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from dsdistill.core import Batch, Features, LayerPairs, ModelShape
from dsdistill.objectives.hidden import Projection, projections
from dsdistill.objectives.numerics import (
    check_same_shape,
    divergence_rows,
    inner_products,
    masked_mean,
    over_pairs,
    promote,
    unit_length,
    zero_outside,
)
from dsdistill.objectives.registry import objective

Pooling = Literal["mean", "first", "max", "mean_sqrt_length", "weighted_mean", "last"]
"""How the states of a row become one vector; sentence-transformers calls the others of `mean` and `max` cls,
mean_sqrt_len_tokens, weightedmean and lasttoken."""
Comparison = Literal["cosine", "mse", "similarity"]
Gather = Callable[[Tensor], Tensor]


def pool(hidden_BLE: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector for each row, (B, E), in float32 or better.

    Args:
        hidden_BLE: (B, L, E), any float dtype.
        mask: bool (B, L), True = real; rows without real positions yield 0.
        pooling: `mean` of real positions, their sum over the root of their number (`mean_sqrt_length`), or their mean
            weighted by 1, 2, ... L (`weighted_mean`, Muennighoff, arXiv:2202.08904); the largest number of
            real positions in each dimension (`max`); the row's `first` position, or its `last` real one.
    """
    real = mask[..., None]
    if pooling == "first":
        return promote(zero_outside(hidden_BLE[:, 0], real[:, 0]))
    if pooling == "max":
        largest = promote(torch.where(real, hidden_BLE, torch.finfo(hidden_BLE.dtype).min)).amax(1)
        return zero_outside(largest, real.any(1))
    hidden = promote(zero_outside(hidden_BLE, real))
    place = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    if pooling == "last":
        last = torch.where(mask, place, 0).argmax(1)
        return hidden[torch.arange(len(hidden), device=mask.device), last]
    if pooling == "weighted_mean":
        weights = torch.where(mask, place, 0)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    number = real.sum(1).clamp(min=1)
    return hidden.sum(1) / (number if pooling == "mean" else number.to(hidden.dtype).sqrt())


def similarity_kl(
    student: Tensor,
    teacher: Tensor,
    columns: tuple[Tensor, Tensor],
    allowed: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """KL of the teacher's similarities of each row to the batch from the student's, of unit vectors, without T^2.

    Args:
        student: (B, E) of length 1; gradients flow.
        teacher: (B, E') of length 1; treated as constant.
        columns: Both models' vectors of the whole batch, (G, E) and (G, E').
        allowed: bool (B, G), which columns a row is compared with; rows without any do not count.
        temperature: Divides cosines before the softmax.

    Returns:
        Scalar in nats, mean over rows; 0 if there are none.
    """
    ours = inner_products(student, columns[0], 1 / temperature)
    theirs = inner_products(teacher, columns[1], 1 / temperature).detach()
    return masked_mean(divergence_rows(ours, theirs, allowed), allowed.any(-1))


def _check(
    student: ModelShape, teacher: ModelShape, pairs: LayerPairs, *, compare: Comparison, **params: object
) -> nn.Module | None:
    """The projection, where embeddings of two widths meet; refuses parameters that would have no effect."""
    without_effect: dict[Comparison, dict[str, object]] = {
        "similarity": {"projection": "auto", "normalise": True},
        "cosine": {"temperature": 0.05, "diagonal": True, "normalise": True},
        "mse": {"temperature": 0.05, "diagonal": True},
    }
    unused = without_effect[compare]
    changed = [name for name, default in unused.items() if params[name] != default]
    if changed:
        raise ValueError(f"{', '.join(changed)} has no effect on compare={compare!r}; drop it")
    list(pairs)  # refuses combined layers
    if compare == "similarity":
        return None
    return projections(student, teacher, pairs, **params)  # pyright: ignore[reportArgumentType]  # checked with the recipe


@objective(
    "pooled",
    student={"hidden"},
    teacher={"hidden"},
    head=_check,
    equation="mean 1 - e^S e^T', e = pool(H) at length 1; or mean (e^S - e^T)^2, at that length or their own; "
    "or mean_i KL(softmax(e^T_i E^T'/T) || softmax(e^S_i E^S'/T)), E the batch's e",
    paper="mse: Reimers and others, arXiv:2004.09813; similarity: after SEED, arXiv:2101.04731, within the batch",
)
def pooled(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    pooling: Pooling | None = None,
    compare: Comparison = "cosine",
    normalise: bool = True,
    temperature: float = 0.05,
    diagonal: bool = True,
    projection: Projection = "auto",
    head: nn.Module | None = None,
    gather: Gather,
) -> dict[str, Tensor]:
    """Sentence embeddings, averaged over layer pairs.

    `pooling` is the teacher's own unless given: a run looks into the teacher's directory; `mean` where it says nothing.
    `normalise: false` lets `mse` compare lengths too, for teachers whose embeddings are not brought to length 1.
    `similarity` compares each row with all rows of all ranks, itself included unless `diagonal` is off: the value
    depends on how the data is cut into batches. It needs no projection; the others project the student's embedding
    where widths differ.
    """
    losses = []
    pooling = pooling or "mean"
    real = batch.mask.any(1)
    for index, (s, t) in enumerate(pairs):
        ours = pool(student.at("hidden", s), batch.mask, pooling)
        theirs = pool(teacher.at("hidden", t).detach(), batch.mask, pooling)
        theirs = unit_length(theirs) if normalise else theirs
        if compare == "similarity":
            ours = unit_length(ours)
            allowed = real[:, None] & gather(real.long()).bool()
            if not diagonal:
                allowed = allowed & (batch.sample_ids[:, None] != gather(batch.sample_ids))
            columns = (gather(ours), gather(theirs))
            losses.append(similarity_kl(ours, theirs, columns, allowed, temperature=temperature))
            continue
        if isinstance(head, nn.ModuleList):
            ours = head[index](ours.to(student.at("hidden", s).dtype))
        ours = unit_length(ours) if normalise else promote(ours)
        check_same_shape("sentence embeddings", ours, theirs, instead="use a projection")
        apart = 1 - (ours * theirs).sum(-1) if compare == "cosine" else (ours - theirs).square().mean(-1)
        losses.append(masked_mean(apart, real))
    return {"pooled": over_pairs(losses, "mean")}
