"""Contrastive distillation of sentence representations (CoDIR, CRD), against the batch's other rows or a memory bank.

Shapes: B rows of this rank, G rows of all ranks together, M rows of the data set, K negatives, W width of the
representation.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsdistill.core import Batch, Features, LayerPairs, ModelShape
from dsdistill.objectives.numerics import FILL, inner_products, masked_mean, unit_length, zero_outside
from dsdistill.objectives.registry import objective
from dsdistill.objectives.sentences import Gather, Pooling, pool

Contrast = Literal["infonce", "crd"]
Negatives = Literal["batch", "memory"]


def info_nce(positive_B: Tensor, negatives_BK: Tensor, allowed: Tensor) -> Tensor:
    """Cross-entropy of picking the positive among itself and the negatives.

    Sun et al. 2020, CoDIR (arXiv:2009.14167): -log exp(pos) / (exp(pos) + sum_k exp(neg_k)).

    Args:
        positive_B: Similarity to the positive over temperature, (B,); gradients flow.
        negatives_BK: Similarities to the negatives over temperature, (B, K); gradients flow.
        allowed: bool (B, K), which negatives count; rows without any do not count.

    Returns:
        Scalar in nats, mean over rows; 0 if there are none.
    """
    candidates = torch.cat([positive_B[:, None], negatives_BK.masked_fill(~allowed, FILL)], dim=1)
    return masked_mean(torch.logsumexp(candidates, dim=1) - positive_B, allowed.any(1))


def crd(positive_B: Tensor, negatives_BK: Tensor, allowed: Tensor, *, num_examples: int) -> Tensor:
    """Log-loss of telling the positive from N negatives with the critic h = exp(x) / (exp(x) + N / M).

    Tian et al. 2020, CRD (arXiv:1910.10699), equation 18, one side (the student is the anchor):
    -log h(pos) - sum_n log(1 - h(neg_n)). Departures: no normalising constant estimated from the first batch, as in
    its code; the positive is the teacher's present representation, not the bank's.

    Args:
        positive_B: Similarity to the positive over temperature, (B,); gradients flow.
        negatives_BK: Similarities to the negatives over temperature, (B, K); gradients flow.
        allowed: bool (B, K), which negatives count (N of them); rows without any do not count.
        num_examples: M, rows of the data set.

    Returns:
        Scalar in nats, mean over rows; 0 if there are none.
    """
    threshold_B = (allowed.sum(1).clamp(min=1) / num_examples).to(positive_B.dtype).log()
    of_negatives = zero_outside(F.softplus(negatives_BK - threshold_B[:, None]), allowed).sum(1)
    return masked_mean(F.softplus(threshold_B - positive_B) + of_negatives, allowed.any(1))


class ContrastHead(nn.Module):
    """Linear maps of both models' sentence vectors into one space, and the memory bank if there is one.

    Attributes:
        bank: (M, W), moving averages of the teacher's representations; random unit vectors at first.
        labels: int64 (M,), task labels of the rows seen so far, -1 for the others.
        step: int64 scalar, updates so far; with `seed` and the row's number it decides which negatives are drawn.
    """

    bank: Tensor
    labels: Tensor
    step: Tensor

    def __init__(self, student_width: int, teacher_width: int, width: int, num_rows: int, seed: int):
        """Make the maps, and a bank of `num_rows` rows (0 for none)."""
        super().__init__()
        self.student = nn.Linear(student_width, width)
        self.teacher = nn.Linear(teacher_width, width)
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("bank", unit_length(torch.randn(num_rows, width, generator=generator)))
        self.register_buffer("labels", torch.full((num_rows,), -1))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Representations (B, W) of length 1 of both models' sentence vectors."""
        dtype = self.student.weight.dtype
        return unit_length(self.student(student.to(dtype))), unit_length(self.teacher(teacher.to(dtype)))

    def draw(self, sample_ids: Tensor, count: int) -> Tensor:
        """Rows of the bank (B, K) to stand against each row, never itself; a function of seed, step and row."""
        place = torch.arange(count, device=sample_ids.device)
        key = _mix(_mix(self.step + (self.seed * 0x632BE5AB & 0x7FFFFFFFFFFF)) + sample_ids)[:, None]
        others = _mix(key + place).remainder(len(self.bank) - 1)
        return (sample_ids[:, None] + 1 + others).remainder(len(self.bank))

    @torch.no_grad()
    def remember(self, sample_ids: Tensor, teacher: Tensor, labels: Tensor | None, momentum: float) -> None:
        """Move the bank towards these rows of all ranks (G, W); ids < 0 are skipped, of equal ids the first counts."""
        real = sample_ids >= 0
        rows = torch.where(real, sample_ids, sample_ids.max()).clamp(min=0)
        first = ((rows[:, None] == rows) & real).int().argmax(1)  # equal rows write equal values, in whatever order
        known = real[first]
        old = self.bank[rows]
        new = unit_length(momentum * old.to(teacher.dtype) + (1 - momentum) * teacher[first]).to(old.dtype)
        self.bank[rows] = torch.where(known[:, None], new, old)
        if labels is not None:
            self.labels[rows] = torch.where(known, labels[first], self.labels[rows])
        self.step += 1


def _mix(value: Tensor) -> Tensor:
    """Scramble int64 (xor-shift and multiply, wrapping around); non-negative."""
    for shift, factor in ((33, -0x00AE502812AA7333), (29, -0x3B314601E57A13AD)):
        value = (value ^ ((value >> shift) & 0x7FFFFFFF)) * factor
    return (value ^ ((value >> 32) & 0xFFFFFFFF)) & 0x7FFFFFFFFFFFFFFF


def _make_head(
    student: ModelShape,
    teacher: ModelShape,
    pairs: LayerPairs,
    *,
    negatives: Negatives,
    num_negatives: int,
    momentum: float,
    width: int,
    seed: int,
    num_examples: int | None,
    **_: object,
) -> ContrastHead:
    """Maps and bank; refuses parameters that would have no effect."""
    if negatives == "batch" and (num_negatives != 100 or momentum != 0.5):
        raise ValueError("num_negatives and momentum have no effect on negatives='batch'; drop them or use 'memory'")
    if negatives == "memory" and num_examples is not None and num_examples < 2:
        raise ValueError(f"negatives='memory' needs at least 2 examples, got num_examples={num_examples}; use 'batch'")
    rows = (num_examples or 0) if negatives == "memory" else 0
    return ContrastHead(len(pairs.student) * student.width, len(pairs.teacher) * teacher.width, width, rows, seed)


@objective(
    "hid_contrast",
    student={"hidden"},
    teacher={"hidden"},
    head=_make_head,
    equation="-log e^(s't/T) / (e^(s't/T) + sum_n e^(s't_n/T)), s and t mapped to length 1; "
    "crd: -log h(s't) - sum_n log(1 - h(s't_n)), h(x) = e^(x/T) / (e^(x/T) + N/M)",
    paper="CoDIR, arXiv:2009.14167; CRD, arXiv:1910.10699, eq. 18; study arXiv:2305.15032, Hid-CLS-Contrast",
)
def hid_contrast(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    contrast: Contrast = "infonce",
    negatives: Negatives = "batch",
    other_labels: bool = False,
    num_negatives: int = 100,
    temperature: float = 0.07,
    momentum: float = 0.5,
    width: int = 128,
    pooling: Pooling = "first",
    seed: int = 0,
    head: nn.Module | None = None,
    gather: Gather,
    num_examples: int,
) -> dict[str, Tensor]:
    """The student's representation of a row against the teacher's of the same row and of other rows.

    Each model's chosen layers are pooled, laid side by side and mapped to `width`. Negatives are the other rows of all
    ranks, or `num_negatives` rows of a memory bank (numbered by `Batch.sample_ids`); with `other_labels` only rows of
    another label count. The bank moves after every micro-batch of training, by the rows of all ranks, and never in
    evaluation. The value depends on how the data is cut into micro-batches, not on how one is spread over ranks.
    """
    if not isinstance(head, ContrastHead):
        raise ValueError("hid_contrast needs its head; make it with Objective.make_head")
    layers = [
        torch.cat([pool(m.at("hidden", i), batch.mask, pooling) for i in chosen], dim=1)
        for m, chosen in ((student, pairs.student), (teacher, pairs.teacher))
    ]
    ours, theirs = head(layers[0], layers[1].detach())
    real = batch.mask.any(1)
    ids = gather(torch.where(real, batch.sample_ids, -1))
    labels = gather(_row_labels(batch)) if other_labels else None
    if negatives == "batch":
        against = inner_products(ours, gather(theirs))
        allowed = real[:, None] & (ids >= 0) & (ids != batch.sample_ids[:, None])
        their_labels = labels
    else:
        drawn = head.draw(batch.sample_ids, num_negatives)
        against = inner_products(ours[:, None], head.bank[drawn].to(ours.dtype))[:, 0]
        allowed = real[:, None].expand_as(drawn)
        their_labels = head.labels[drawn] if other_labels else None
    if their_labels is not None:
        allowed = allowed & (their_labels != _row_labels(batch)[:, None])
    positive, against = (ours * theirs).sum(1) / temperature, against / temperature
    if contrast == "infonce":
        loss = info_nce(positive, against, allowed)
    else:
        loss = crd(positive, against, allowed, num_examples=num_examples)
    if negatives == "memory" and head.training:
        head.remember(ids, gather(theirs.detach()), labels, momentum)
    return {"hid_contrast": loss}


def _row_labels(batch: Batch) -> Tensor:
    if batch.labels is None or batch.labels.dim() != 1:
        raise ValueError("other_labels needs one label for each row; switch it off outside of tasks")
    return batch.labels
