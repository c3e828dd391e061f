"""Objectives on attention maps: scores before the softmax (`att_mse`) and distributions after it (`att_kl`).

Shapes: B rows, L length, H heads, D width per head. Maps are compared head by head, so both models need equally many;
`relations.py` holds what works without that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdistill.core import Batch, Features, LayerPairs, ModelShape
from dsdistill.kernels.selection import Kernel, use_fused
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


def attention_kl(
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
    reduction: Reduction = "mean",
    padded: bool = True,
    kernel: Kernel = "auto",
) -> Tensor:
    """KL of the teacher's attention distributions from the student's.

    Wang et al. 2020, MiniLM (arXiv:2002.10957), section 3.1: 1/(H |x|) sum_h sum_i KL(A^T_hi || A^S_hi). Half types are
    promoted to float32, float64 is kept; finite at any finite score.

    Args:
        student_query: (B, H, L, D), any float dtype; gradients flow.
        student_key: (B, H, L, D), or fewer heads that divide H (grouped queries); gradients flow.
        teacher_query: (B, H, L, D'), same H; treated as constant.
        teacher_key: Like `student_key`, of the teacher; treated as constant.
        mask: bool (B, L), True = real. Padded keys have probability 0 on both sides, padded queries do not count.
        student_scaling: Factor on the student's products of query and key.
        teacher_scaling: The same for the teacher.
        student_bias: Added to the student's scores, (B or 1, H, L, L), plain only; gradients flow.
        teacher_bias: The same for the teacher; treated as constant.
        segments: int (B, L), document numbers; if given, attention never crosses documents.
        window: Largest |i - j| that attends, in both models; None for all.
        reduction: `mean`, or `study`: padded queries count, both in the sum and in the division.
        padded: False promises that everything in `mask` is real, so that nothing has to be hidden.
        kernel: Which implementation; `auto` is the fused one on a GPU wherever it can be used.

    Returns:
        Scalar in nats, mean over real queries and heads; 0 if there are none.

    Raises:
        ValueError: If the numbers of heads differ, or `kernel: fused` cannot be used.
    """
    scalings, biases = (student_scaling, teacher_scaling), (student_bias, teacher_bias)
    maps = Maps(student_query, student_key, teacher_query, teacher_key, *scalings, *biases)
    queries = counted(mask, reduction)
    total = divergence_sum(maps, Limits(queries, mask, segments, window, padded), kernel)
    return total / (queries.sum() * student_query.shape[1]).clamp(min=1)


def attention_mse(
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
    reduction: Reduction = "mean",
    padded: bool = True,
    kernel: Kernel = "auto",
) -> Tensor:
    """Mean squared difference of attention scores before the softmax.

    Jiao et al. 2020, TinyBERT (arXiv:1909.10351), equation 7: 1/H sum_h MSE(A^S_h, A^T_h), unnormalised scores.
    Departure: its code sets scores <= -100 to 0 in order to drop padding; here padding is dropped by the mask and
    every genuine score counts.

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
        reduction: `mean`, or `study`: padded queries count, and the division is by all B * H * L * L.
        padded: As in `attention_kl`.
        kernel: As in `attention_kl`.

    Returns:
        Scalar, mean over heads and real (query, key) pairs that may attend; 0 if there are none.

    Raises:
        ValueError: As in `attention_kl`.
    """
    scalings, biases = (student_scaling, teacher_scaling), (student_bias, teacher_bias)
    maps = Maps(student_query, student_key, teacher_query, teacher_key, *scalings, *biases)
    limits = Limits(counted(mask, reduction), mask, segments, window, padded)
    total = squares_sum(maps, limits, kernel)
    places = mask.numel() * mask.shape[1] if reduction == "study" else count_pairs(limits).clamp(min=1)
    return total / (places * student_query.shape[1])


BIASED = "a model adds a bias to its attention scores, which the fused kernel does not know"


class Maps(NamedTuple):
    """What the scores of both models are: factor * query @ key.T + bias, heads split; the teacher's are constants."""

    student_query: Tensor
    student_key: Tensor
    teacher_query: Tensor
    teacher_key: Tensor
    student_scaling: float
    teacher_scaling: float
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None

    def fused(self, kernel: Kernel) -> bool:
        """Whether the fused implementation compares them.

        Raises:
            ValueError: If nothing can compare them, or `fused` cannot.
        """
        check_head_counts(self.student_query.shape[1], self.teacher_query.shape[1])
        if self.student_bias is not None or self.teacher_bias is not None:
            if kernel == "fused":
                raise ValueError(f"kernel: fused cannot be used: {BIASED}; use auto or plain")
            return False
        return use_fused(kernel, (self.student_query, self.student_key), (self.teacher_query, self.teacher_key))


class Limits(NamedTuple):
    """Who may attend to whom: (B, L) queries that count, keys that have probability, documents, and a window."""

    queries: Tensor
    keys: Tensor
    segments: Tensor | None = None
    window: int | None = None
    padded: bool = True


def divergence_sum(maps: Maps, limits: Limits, kernel: Kernel) -> Tensor:
    """Sum over rows, heads and queries of KL(softmax(teacher) || softmax(student))."""

    def summed(student: Tensor, teacher: Tensor, allowed: Tensor) -> Tensor:
        return divergence_rows(student, teacher, allowed).sum()

    return _fused_sum("kl", maps, limits) if maps.fused(kernel) else _sum_over_maps(summed, maps, limits)


def squares_sum(maps: Maps, limits: Limits, kernel: Kernel) -> Tensor:
    """Sum over rows, heads and pairs that may attend of the squared difference of scores."""

    def summed(student: Tensor, teacher: Tensor, allowed: Tensor) -> Tensor:
        return zero_outside(student - teacher, allowed).square().sum()

    return _fused_sum("mse", maps, limits) if maps.fused(kernel) else _sum_over_maps(summed, maps, limits)


def _fused_sum(measure: Literal["kl", "mse"], maps: Maps, limits: Limits) -> Tensor:
    """The sum over the batch in one pass over tiles of scores, none of which is kept."""
    from dsdistill.kernels.pairwise import pairwise_sum  # needs triton

    for query, key in (maps[:2], maps[2:4]):
        check_groups(query.shape[1], key.shape[1])
    return pairwise_sum(
        measure,
        *maps[:4],
        student_scaling=maps.student_scaling,
        teacher_scaling=maps.teacher_scaling,
        queries=limits.queries if limits.padded else None,
        keys=limits.keys if limits.padded else None,
        segments=limits.segments,
        window=limits.window,
    )


def _sum_over_maps(compare: Callable[[Tensor, Tensor, Tensor], Tensor], maps: Maps, limits: Limits) -> Tensor:
    """Sum of `compare(student scores, teacher scores, allowed)` over the batch, a few rows at a time."""
    B, H, L, _ = maps.student_query.shape

    def rows_of(bias: Tensor | None) -> Tensor:
        """A bias with as many rows as the batch; without one, rows of nothing."""
        return maps.student_query.new_empty(B, 0) if bias is None else bias.expand(B, -1, -1, -1)

    def chunk(
        sq: Tensor,
        sk: Tensor,
        sb: Tensor,
        tq: Tensor,
        tk: Tensor,
        tb: Tensor,
        queries: Tensor,
        keys: Tensor,
        ok: Tensor,
    ) -> Tensor:
        student = attention_scores(sq, sk, queries, keys, maps.student_scaling, sb if sb.numel() else None)
        teacher = attention_scores(tq, tk, queries, keys, maps.teacher_scaling, tb if tb.numel() else None)
        return compare(student, teacher, ok)

    allowed = allowed_pairs(limits.queries, limits.keys, limits.segments, limits.window)
    student = (maps.student_query, maps.student_key, rows_of(maps.student_bias))
    teacher = (maps.teacher_query.detach(), maps.teacher_key.detach(), rows_of(maps.teacher_bias).detach())
    return sum_over_rows(chunk, *student, *teacher, limits.queries, limits.keys, allowed, elements_per_row=H * L * L)


def equal_heads(student: ModelShape, teacher: ModelShape, pairs: LayerPairs, **_: object) -> None:
    """Refuse, before anything runs, models or layers whose attention maps cannot be compared.

    Raises:
        ValueError: If the numbers of heads differ, or a pair has no attention.
    """
    check_attention_layers(pairs)
    check_head_counts(student.num_heads, teacher.num_heads)


@objective(
    "att_kl",
    student={"query", "key", "bias"},
    teacher={"query", "key", "bias"},
    head=equal_heads,
    equation="mean_{real i, heads} KL(softmax(A^T_i) || softmax(A^S_i)), A = scaling * Q K^T",
    paper="MiniLM, arXiv:2002.10957, sec. 3.1; study arXiv:2305.15032, Att-KL",
)
def att_kl(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    reduction: Reduction = "mean",
    kernel: Kernel = "auto",
) -> dict[str, Tensor]:
    """`attention_kl` over layer pairs."""
    options = {"reduction": reduction, "padded": batch.padded, "kernel": kernel}
    losses = [compare_maps(attention_kl, student, teacher, batch, s, t, **options) for s, t in pairs]
    return {"att_kl": over_pairs(losses, reduction)}


@objective(
    "att_mse",
    student={"query", "key", "bias"},
    teacher={"query", "key", "bias"},
    head=equal_heads,
    equation="mean_{real i, j, heads} (A^S_ij - A^T_ij)^2, A = scaling * Q K^T before softmax",
    paper="TinyBERT, arXiv:1909.10351, eq. 7; study arXiv:2305.15032, Att-MSE",
)
def att_mse(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    reduction: Reduction = "mean",
    kernel: Kernel = "auto",
) -> dict[str, Tensor]:
    """`attention_mse` over layer pairs."""
    options = {"reduction": reduction, "padded": batch.padded, "kernel": kernel}
    losses = [compare_maps(attention_mse, student, teacher, batch, s, t, **options) for s, t in pairs]
    return {"att_mse": over_pairs(losses, reduction)}


def compare_maps(
    function: Callable[..., Any],
    student: Features,
    teacher: Features,
    batch: Batch,
    s: int,
    t: int,
    **options: object,
) -> Any:
    """A function such as `attention_kl` on one layer pair, within documents where the batch tells them apart."""
    return function(
        student.at("query", s),
        student.at("key", s),
        teacher.at("query", t),
        teacher.at("key", t),
        batch.mask,
        student_scaling=student.scaling[s],
        teacher_scaling=teacher.scaling[t],
        segments=batch.segments,
        student_bias=student.bias(s),
        teacher_bias=teacher.bias(t),
        window=shared_window(student, teacher, s, t),
        **options,
    )


def shared_window(student: Features, teacher: Features, s: int, t: int) -> int | None:
    """The attention window of a layer pair.

    Raises:
        ValueError: If the two layers attend over different windows.
    """
    ours, theirs = student.windows.get(s), teacher.windows.get(t)
    if ours != theirs:
        raise ValueError(
            f"student layer {s} attends over window {ours or 'all'}, teacher layer {t} over {theirs or 'all'}; "
            "their attention maps cannot be compared: pair layers of one kind, or use relations (minilmv2)"
        )
    return ours


def attention_scores(
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    queries_BL: Tensor,
    keys_BL: Tensor,
    scaling: float,
    bias_BHLL: Tensor | None = None,
) -> Tensor:
    """Attention scores (B, H, L, L) without anything from padding; keys of grouped queries are repeated."""
    check_groups(query_BHLD.shape[1], key_BHLD.shape[1])
    group = query_BHLD.shape[1] // key_BHLD.shape[1]
    query = zero_outside(query_BHLD, queries_BL[:, None, :, None])
    key = zero_outside(key_BHLD, keys_BL[:, None, :, None])
    scores = inner_products(query, key.repeat_interleave(group, dim=1) if group > 1 else key, scaling)
    if bias_BHLL is None:
        return scores
    return scores + zero_outside(bias_BHLL, (queries_BL[:, :, None] & keys_BL[:, None, :])[:, None])


def allowed_pairs(
    queries_BL: Tensor,
    keys_BL: Tensor,
    segments: Tensor | None,
    window: int | None,
    rows: slice = slice(None),
) -> Tensor:
    """Who may attend to whom, bool (B, 1, L, L), or for some rows of queries."""
    allowed = queries_BL[:, rows, None] & keys_BL[:, None, :]
    if segments is not None:
        allowed = allowed & (segments[:, rows, None] == segments[:, None, :])
    if window is not None:
        position = torch.arange(queries_BL.shape[1], device=queries_BL.device)
        allowed = allowed & ((position[rows, None] - position[None, :]).abs() <= window)
    return allowed[:, None]


def count_pairs(limits: Limits) -> Tensor:
    """How many pairs may attend, int64 scalar; memory grows with the length, not with its square."""
    queries, keys, segments, window, _ = limits
    L = queries.shape[1]
    if segments is not None:
        blocks = (
            allowed_pairs(queries, keys, segments, window, slice(i, i + COUNTED_AT_ONCE)).sum()
            for i in range(0, L, COUNTED_AT_ONCE)
        )
        return torch.stack(list(blocks)).sum()
    if window is None:
        return (queries.sum(1) * keys.sum(1)).sum()
    before = F.pad(keys.cumsum(1), (1, 0))
    position = torch.arange(L, device=queries.device)
    seen = before[:, (position + window + 1).clamp(max=L)] - before[:, (position - window).clamp(min=0)]
    return (seen * queries).sum()


COUNTED_AT_ONCE = 512
"""Queries whose pairs are counted at once where documents must be compared one by one."""


def check_groups(queries: int, keys: int) -> None:
    """Refuse grouped queries that do not share keys evenly.

    Raises:
        ValueError: Names both numbers of heads.
    """
    if queries % keys:
        raise ValueError(f"{keys} key heads do not divide {queries} query heads")


def check_head_counts(student: int, teacher: int) -> None:
    """Refuse maps of unequally many heads.

    Raises:
        ValueError: Points to relations.
    """
    if student != teacher:
        raise ValueError(
            f"attention maps of {student} student heads and {teacher} teacher heads cannot be compared; "
            "use relations (minilmv2), which split the width anew"
        )
