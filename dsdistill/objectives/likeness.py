"""How alike the layers of two models are, every layer with every other: for pictures, not for training.

Shapes: B rows, L length, H heads, E width, N real tokens, S and T layers of the student and of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsdistill.core import Batch, Features
from dsdistill.objectives.attention import allowed_pairs, attention_scores
from dsdistill.objectives.numerics import masked_log_softmax, promote, zero_outside

FEWEST_TOKENS = 4
"""The estimate of CKA divides by N - 3."""


def centred_gram(states_NE: Tensor) -> Tensor:
    """The likeness of every two tokens as a direction, (N, N): of length 1, centred, with a zero diagonal.

    The product of two of them, summed up, is linear CKA (Kornblith et al. 2019, arXiv:1905.00414, section 3) with the
    unbiased estimate of HSIC (Song et al. 2012, equation 5; in CKA since Nguyen et al. 2021, arXiv:2010.15327): the
    biased one calls two random models alike as soon as there are not many more tokens than units. Centred as Szekely
    and Rizzo 2014 (arXiv:1310.2926), definition 2, do, whose inner product is that estimate.

    Args:
        states_NE: Hidden states of N tokens, N >= 4, any float dtype.

    Raises:
        ValueError: If there are too few tokens.
    """
    N = states_NE.shape[0]
    if N < FEWEST_TOKENS:
        raise ValueError(f"CKA needs {FEWEST_TOKENS} tokens or more, got {N}")
    states = promote(states_NE)
    states = states - states.mean(0)
    gram = states @ states.T
    gram.fill_diagonal_(0.0)
    rows = gram.sum(1) / (N - 2)
    gram = gram - rows[:, None] - rows[None, :] + gram.sum() / ((N - 1) * (N - 2))
    gram.fill_diagonal_(0.0)
    return gram / gram.norm().clamp(min=torch.finfo(gram.dtype).tiny)


def attention_log(features: Features, layer: int, batch: Batch) -> tuple[Tensor, Tensor]:
    """A layer's attention as the model computes it.

    Args:
        features: With query and key of the layer, and its bias where the family adds one.
        layer: Which.
        batch: Says what is real.

    Returns:
        Log-probabilities (B, H, L, L) in float32 or better, finite, meaningless where nothing attends; and where
        something does, bool (B, 1, L, L).
    """
    query, key = features.at("query", layer), features.at("key", layer)
    scores = attention_scores(query, key, batch.mask, batch.mask, features.scaling[layer], features.bias(layer))
    allowed = allowed_pairs(batch.mask, batch.mask, batch.segments, features.windows.get(layer))
    return masked_log_softmax(scores, allowed), allowed


def attention_maps(features: Features, layer: int, batch: Batch) -> Tensor:
    """A layer's attention probabilities, mean over heads, (B, L, L); zero where nothing attends."""
    log, allowed = attention_log(features, layer, batch)
    return zero_outside(log.exp(), allowed).mean(1)


def likeness_map(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Linear CKA of every layer of the student with every layer of the teacher.

    Args:
        student: S Gram matrices from `centred_gram`.
        teacher: T of them, of the same tokens.

    Returns:
        (S, T), at most 1; about 0 for layers that have nothing in common.
    """
    return torch.stack([g.flatten() for g in student]) @ torch.stack([g.flatten() for g in teacher]).T


def divergence_map(student: Features, teacher: Features, batch: Batch, layers: tuple[int, int]) -> Tensor:
    """KL(teacher || student) of the attention of every two layers, in nats, mean over real queries and heads.

    Where the models differ in their numbers of heads, the means over heads are compared. What only one of two layers
    may attend to (local attention) is left out of both: it would be infinite.

    Args:
        student: With query and key of layers 1..S.
        teacher: The same of layers 1..T, for the same batch.
        batch: Says what is real.
        layers: S and T.

    Returns:
        (S, T) in float32 or better.
    """
    ours = [attention_log(student, layer, batch)[0] for layer in range(1, layers[0] + 1)]
    theirs = [attention_log(teacher, layer, batch)[0] for layer in range(1, layers[1] + 1)]
    if ours[0].shape[1] != theirs[0].shape[1]:
        ours, theirs = ([_mean_of_heads(log) for log in side] for side in (ours, theirs))
    found = ours[0].new_zeros(layers)
    for s_window, s_layers in _by_window(student, layers[0]):
        for t_window, t_layers in _by_window(teacher, layers[1]):
            narrower = min((w for w in (s_window, t_window) if w is not None), default=None)
            allowed = allowed_pairs(batch.mask, batch.mask, batch.segments, narrower)
            ours_SK = _flat([ours[layer - 1] for layer in s_layers], allowed)
            theirs_TK = _flat([theirs[layer - 1] for layer in t_layers], allowed)
            chances_TK = theirs_TK.exp() * allowed.expand_as(ours[0]).flatten()
            sums_ST = (chances_TK * theirs_TK).sum(1) - ours_SK @ chances_TK.T
            rows = batch.mask.sum() * ours[0].shape[1]
            at = torch.tensor(s_layers)[:, None] - 1, torch.tensor(t_layers)[None, :] - 1
            found[at] = (sums_ST / rows.clamp(min=1)).to(found.dtype)
    return found


def _by_window(features: Features, layers: int) -> list[tuple[int | None, list[int]]]:
    """Layers 1..N by how far they attend."""
    found: dict[int | None, list[int]] = {}
    for layer in range(1, layers + 1):
        found.setdefault(features.windows.get(layer), []).append(layer)
    return list(found.items())


def _mean_of_heads(log: Tensor) -> Tensor:
    return log.exp().mean(1, keepdim=True).clamp(min=torch.finfo(log.dtype).tiny).log()


def _flat(logs: Sequence[Tensor], allowed: Tensor) -> Tensor:
    """Log-probabilities among the allowed places, a row a layer, in float64: sums over them are subtracted."""
    return torch.stack([zero_outside(masked_log_softmax(log, allowed), allowed).double().flatten() for log in logs])
