"""Objectives on logits: soft targets of the teacher (`kd`), masked-language-model labels (`mlm`), task labels (`task`).

Shapes: N chosen positions or rows, V vocabulary, C classes. Over a vocabulary everything is computed in chunks of rows
and computed again in backward, so that no float32 tensor of N x V exists, for either model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdistill.core import IGNORED_LABEL, Batch, Features, LayerPairs, ModelShape, Problem
from dsdistill.objectives.chunks import sum_over_rows
from dsdistill.objectives.numerics import check_same_shape, promote
from dsdistill.objectives.registry import objective

Divergence = Literal["forward", "reverse", "jsd", "mse"]


def soft_cross_entropy(student_NC: Tensor, teacher_NC: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the student against the teacher's softened distribution.

    Hinton et al. 2015 (arXiv:1503.02531), section 2: scaled by temperature squared so that gradients keep their size.
    Half types are promoted to float32, float64 is kept.

    Args:
        student_NC: Student logits, (N, C), any float dtype; gradients flow.
        teacher_NC: Teacher logits, (N, C); treated as constant.
        temperature: Softening, > 0.

    Returns:
        Scalar in nats, mean over N; 0 if N is 0.

    Raises:
        ValueError: If shapes differ or temperature is not positive.
    """
    return _soft(_cross_entropy_rows, student_NC, teacher_NC, temperature)


def soft_divergence(
    student_NC: Tensor,
    teacher_NC: Tensor,
    *,
    kind: Literal["forward", "reverse", "jsd"] = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """Divergence between the two softened distributions, times temperature squared.

    With P the teacher and Q the student: `forward` KL(P||Q) (Hinton et al. 2015, the gradient of
    `soft_cross_entropy`), `reverse` KL(Q||P), `jsd` the generalised Jensen-Shannon divergence of Agarwal et al. 2024
    (arXiv:2306.13649): beta KL(P||M) + (1 - beta) KL(Q||M), M = beta P + (1 - beta) Q. At beta 0 and 1,
    where that is 0, stand its limits after division by beta and 1 - beta: forward and reverse KL.

    Args:
        student_NC: Student logits, (N, C), any float dtype; gradients flow.
        teacher_NC: Teacher logits, (N, C); treated as constant.
        kind: Which divergence.
        temperature: Softening, > 0.
        beta: Weight of the teacher in the mixture of `jsd`, 0 to 1.

    Returns:
        Scalar in nats, mean over N; 0 if N is 0.

    Raises:
        ValueError: If shapes differ, temperature is not positive, or beta is outside 0..1.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} is outside 0..1; 0.5 weighs both models alike")
    if kind == "jsd" and beta in (0, 1):
        kind = "forward" if beta == 0 else "reverse"
    rows = {"forward": _forward_rows, "reverse": _reverse_rows, "jsd": _jsd_rows(beta)}[kind]
    return _soft(rows, student_NC, teacher_NC, temperature)


def binary_divergence(student_NC: Tensor, teacher_NC: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(P||Q) between yes and no of each class by itself, times temperature squared.

    Hinton et al. 2015 (arXiv:1503.02531), section 2, with P and Q the sigmoids of each softened logit, as several
    labels can be true at once. Half types are promoted to float32, float64 is kept.

    Args:
        student_NC: Student logits, (N, C), any float dtype; gradients flow.
        teacher_NC: Teacher logits, (N, C); treated as constant.
        temperature: Softening, > 0.

    Returns:
        Scalar in nats, mean over N and C; 0 if there are none.

    Raises:
        ValueError: If shapes differ or temperature is not positive.
    """
    _check_soft(student_NC, teacher_NC, temperature)
    student, teacher = promote(student_NC) / temperature, promote(teacher_NC.detach()) / temperature
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (yes + no).sum() * (temperature**2 / max(student.numel(), 1))


def token_cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy against hard labels.

    Args:
        logits_NV: (N, V), any float dtype; gradients flow. Half types are promoted to float32.
        labels_N: int64 (N,); -100 is ignored.

    Returns:
        Scalar in nats, mean over the labels that count; 0 if there are none.
    """

    def rows(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(promote(logits), labels, ignore_index=IGNORED_LABEL, reduction="sum")

    total = sum_over_rows(rows, logits_NV, labels_N, elements_per_row=logits_NV.shape[1], recompute=True)
    return total / (labels_N != IGNORED_LABEL).sum().clamp(min=1)


def _soft(
    rows: Callable[[Tensor, Tensor], Tensor], student_NC: Tensor, teacher_NC: Tensor, temperature: float
) -> Tensor:
    """Mean over N of `rows(log Q, log P)` at this temperature, times its square."""
    _check_soft(student_NC, teacher_NC, temperature)

    def softened(student: Tensor, teacher: Tensor) -> Tensor:
        student_log = torch.log_softmax(promote(student) / temperature, dim=-1)
        return rows(student_log, torch.log_softmax(promote(teacher) / temperature, dim=-1)).sum()

    width = student_NC.shape[1]
    total = sum_over_rows(softened, student_NC, teacher_NC.detach(), elements_per_row=width, recompute=True)
    return total * (temperature**2 / max(len(student_NC), 1))


def _check_soft(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> None:
    check_same_shape("logits", student_NC, teacher_NC, instead="both models need the same vocabulary or classes")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} is not positive; 1 leaves the logits as they are")


def _cross_entropy_rows(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    return -(teacher_log.exp() * student_log).sum(-1)


def _forward_rows(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    return (teacher_log.exp() * (teacher_log - student_log)).sum(-1)


def _reverse_rows(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    return _forward_rows(teacher_log, student_log)


def _jsd_rows(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    def rows(student_log: Tensor, teacher_log: Tensor) -> Tensor:
        mixture_log = torch.logaddexp(teacher_log + math.log(beta), student_log + math.log1p(-beta))
        return beta * _forward_rows(mixture_log, teacher_log) + (1 - beta) * _forward_rows(mixture_log, student_log)

    return rows


def _check_kd(
    student: ModelShape,
    teacher: ModelShape,
    pairs: LayerPairs,
    *,
    divergence: Divergence,
    temperature: float,
    beta: float | None,
    problem: Problem,
    **_: object,
) -> None:
    """Refuse, before anything runs, parameters that would have no effect."""
    if problem != "classification" and divergence not in ("forward", "mse"):
        raise ValueError(f"divergence={divergence!r} is for classes, but the task is {problem}; drop it")
    if beta is not None and divergence != "jsd":
        raise ValueError(f"beta={beta} has no effect on divergence={divergence!r}; drop it or use 'jsd'")
    if divergence == "mse" and temperature != 1:
        raise ValueError(f"temperature={temperature} has no effect on divergence='mse'; drop it")


@objective(
    "kd",
    student={"logits"},
    teacher={"logits"},
    head=_check_kd,
    equation="T^2 mean_i KL(P_i || Q_i), P = softmax(z^T/T), Q = softmax(z^S/T); or KL(Q || P); "
    "or b KL(P || M) + (1-b) KL(Q || M), M = b P + (1-b) Q; or mean (z^T - z^S)^2 (always for regression); "
    "multi_label: T^2 mean_{i, C} KL of sigmoid(z^T/T), sigmoid(z^S/T)",
    paper="Hinton et al., arXiv:1503.02531, sec. 2; JSD: arXiv:2306.13649; study arXiv:2305.15032, Vanilla KD",
)
def kd(
    student: Features,
    teacher: Features,
    batch: Batch,
    pairs: LayerPairs,
    *,
    divergence: Divergence = "forward",
    temperature: float = 1.0,
    beta: float | None = None,
    problem: Problem = "classification",
) -> dict[str, Tensor]:
    """Soft targets at `Batch.targets`, or of the rows in a task; `mse` compares the logits themselves.

    `jsd` without beta takes 0.5. The logits of a regression are compared themselves (a temperature cancels out:
    T^2 (z^T/T - z^S/T)^2); those of several labels each with its own, as yes and no.
    """
    if divergence == "mse" or problem == "regression":
        check_same_shape("logits", student.logits, teacher.logits, instead="both models need the same outputs")
        squares = (promote(student.logits) - promote(teacher.logits.detach())).square()
        return {"kd": squares.sum() / max(squares.numel(), 1)}
    if problem == "multi_label":
        return {"kd": binary_divergence(student.logits, teacher.logits, temperature=temperature)}
    if student.logits.shape[-1] == 1:
        raise ValueError("kd of a single output is always 0; use divergence: mse for regression")
    weight = 0.5 if beta is None else beta
    return {
        "kd": soft_divergence(student.logits, teacher.logits, kind=divergence, temperature=temperature, beta=weight)
    }


@objective(
    "mlm",
    student={"logits"},
    equation="mean_{masked i} -log softmax(z^S_i)[label_i]",
    paper="BERT, arXiv:1810.04805, section 3.1",
)
def mlm(student: Features, teacher: Features | None, batch: Batch, pairs: LayerPairs) -> dict[str, Tensor]:
    """Masked language modelling at `Batch.targets`."""
    if batch.labels is None or batch.targets is None:
        raise ValueError("mlm needs token labels, but this batch has none; mask the corpus")
    return {"mlm": token_cross_entropy(student.logits, batch.labels.flatten()[batch.targets])}


@objective(
    "task",
    student={"logits"},
    equation="mean_rows -log softmax(z^S)[label]; or (z^S - label)^2; or -mean_C log sigmoid(+-z^S)",
    paper="BERT, arXiv:1810.04805, section 4",
)
def task(
    student: Features,
    teacher: Features | None,
    batch: Batch,
    pairs: LayerPairs,
    *,
    problem: Problem = "classification",
) -> dict[str, Tensor]:
    """Hard labels of a task: classes (B,), real numbers (B,), or for `multi_label` one 0 or 1 for each class (B, C)."""
    labels = batch.labels
    if labels is None:
        raise ValueError("task needs labels, but this batch has none")
    if problem == "classification":
        return {"task": token_cross_entropy(student.logits, labels)}
    logits = promote(student.logits)
    if problem == "regression":
        logits = logits.squeeze(-1)
    check_same_shape(f"task ({problem})", logits, labels, instead="the model's outputs must fit the labels")
    if problem == "regression":
        return {"task": F.mse_loss(logits, labels.to(logits.dtype))}
    return {"task": F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))}
