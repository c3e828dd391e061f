"""The one module given to DeepSpeed: student, projections and memory banks, with the weighted sum of the objectives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsdistill.config.sections import Ramp, Term
from dsdistill.core import Batch, Features, LayerPairs, Losses, ModelShape, Problem, Signal
from dsdistill.models.capture import Captured
from dsdistill.objectives.mapping import layer_pairs
from dsdistill.objectives.registry import Objective, find_objective

Gather = Callable[[Tensor], Tensor]
Replay = Callable[[Batch, Features, int], Losses | None]
"""Losses from a recording of the same computation, or None where there is none for this batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundTerm:
    """One summand of the loss, bound to the layers of these two models."""

    label: str
    objective: Objective
    pairs: LayerPairs
    weight: float | Ramp
    params: Mapping[str, Any]

    def weight_at(self, step: int) -> float:
        """Its factor at an optimizer step."""
        return value_at(self.weight, step)

    def params_at(self, step: int) -> dict[str, Any]:
        """Its parameters at an optimizer step, schedules evaluated."""
        return {name: value_at(value, step) for name, value in self.params.items()}


def value_at(value: Any, step: int) -> Any:
    """A scheduled number at a step; anything else as it is."""
    return value.at(step) if isinstance(value, Ramp) else value


def bind_terms(
    terms: Sequence[Term],
    student: ModelShape,
    teacher: ModelShape,
    *,
    initial: Sequence[int] | None,
    problem: Problem = "classification",
) -> list[BoundTerm]:
    """Resolve every term's layers.

    Args:
        terms: From the recipe.
        student: Sizes of the student.
        teacher: Sizes of the complete teacher.
        initial: Teacher layers that the student starts from, or None.
        problem: What a task's labels are.

    Raises:
        ValueError: With every problem found.
    """
    problems: list[str] = []
    found = [_bind(term, i, student, teacher, initial, problem, problems) for i, term in enumerate(terms)]
    if problems:
        raise ValueError("the recipe does not fit these models:\n" + "\n".join(f"  {p}" for p in problems))
    return [term for term in found if term is not None]


def _bind(
    term: Term,
    index: int,
    student: ModelShape,
    teacher: ModelShape,
    initial: Sequence[int] | None,
    problem: Problem,
    problems: list[str],
) -> BoundTerm | None:
    try:
        pairs = layer_pairs(
            term.layers,
            student.num_layers,
            teacher.num_layers,
            embeddings=term.embeddings,
            initial=initial,
        )
        bound = BoundTerm(
            label=term.label,
            objective=find_objective(term.objective),
            pairs=pairs,
            weight=term.weight,
            params=term.params,
        )
        bound.objective.make_head(student, teacher, pairs, bound.params_at(0), problem=problem)
    except ValueError as error:
        problems.append(f"objectives[{index}] ({term.label}): {error}")
        return None
    return bound


def wanted_signals(terms: Iterable[BoundTerm]) -> tuple[dict[Signal, set[int]], dict[Signal, set[int]]]:
    """The union of what the terms read: layers by signal, for (student, teacher); logits under layer -1."""
    wanted: tuple[dict[Signal, set[int]], dict[Signal, set[int]]] = ({}, {})
    for term in terms:
        layers = (term.pairs.student, term.pairs.teacher)
        for side, signals in enumerate(term.objective.needs(term.params)):
            for signal in signals:
                wanted[side].setdefault(signal, set()).update({-1} if signal == "logits" else layers[side])
    return wanted


class Distiller(nn.Module):
    """Everything trainable, and the loss.

    Args:
        student: The model to train, wired for capture.
        terms: Summands of the loss.
        teacher: Shape of the complete teacher.
        shape: Shape of the student.
        num_examples: Rows of the training data, for memory banks.
        gather: Collects a tensor's rows from all ranks, with gradient; identity in one process.
        seed: Of the weights that start random.
        problem: What a task's labels are.
    """

    def __init__(
        self,
        student: Captured,
        terms: Iterable[BoundTerm],
        *,
        shape: ModelShape,
        teacher: ModelShape,
        num_examples: int,
        gather: Gather,
        seed: int,
        problem: Problem = "classification",
    ):
        super().__init__()
        self.student = student
        self.terms = tuple(terms)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = {
                t.label: t.objective.make_head(
                    shape, teacher, t.pairs, t.params_at(0), num_examples=num_examples, problem=problem
                )
                for t in self.terms
            }
        self.heads = nn.ModuleDict({_key(label): head for label, head in heads.items() if head is not None})
        self.num_examples = num_examples
        self.gather = gather
        self.problem: Problem = problem
        self.replay: Replay | None = None

    def forward(self, batch: Batch, teacher: Features | None, step: int) -> Losses:
        """The student's forward and the objectives.

        Args:
            batch: Rows of this micro-batch.
            teacher: The teacher's signals for the same rows; `NOTHING` if no term needs a teacher; None to ask the
                student for its own only, without objectives.
            step: Optimizer step, for schedules.
        """
        if teacher is None:
            return Losses(torch.zeros((), device=batch.input_ids.device), {}, self.student(batch))
        replayed = None
        if self.replay is not None and self.training and torch.is_grad_enabled():
            replayed = self.replay(batch, teacher, step)
        return self.compute(batch, teacher, step) if replayed is None else replayed

    def compute(self, batch: Batch, teacher: Features, step: int) -> Losses:
        """The student's forward and the objectives, kernel by kernel."""
        return self.losses(self.student(batch), batch, teacher, step)

    def losses(self, student: Features, batch: Batch, teacher: Features, step: int) -> Losses:
        """The objectives on recorded signals."""
        heads = dict(self.heads.items())
        total = torch.zeros((), device=batch.input_ids.device)
        terms: dict[str, Tensor] = {}
        for term in self.terms:
            found = term.objective(
                student,
                teacher,
                batch,
                term.pairs,
                term.params_at(step),
                head=heads.get(_key(term.label)),
                gather=self.gather,
                num_examples=self.num_examples,
                problem=self.problem,
            )
            for name, value in found.items():
                label = term.label if name == term.objective.name else f"{term.label}.{name}"
                terms[label] = value.detach()
                total = total + term.weight_at(step) * value
        return Losses(total, terms)


def _key(label: str) -> str:
    """Module names hold no dots."""
    return label.replace(".", "_")


def freeze_unreached(distiller: Distiller, batch: Batch, teacher: Features) -> list[str]:
    """Freeze every parameter that the loss does not reach, found by one backward on a small batch.

    Without gradient they would still be decayed by AdamW, and hold optimizer state.

    Args:
        distiller: On the device of `batch`; its gradients are cleared.
        batch: A few rows.
        teacher: The teacher's signals for them.

    Returns:
        Names of the frozen parameters.
    """
    training = distiller.training
    distiller.eval()
    distiller(batch, teacher, 0).total.backward()
    distiller.train(training)
    unreached = [name for name, p in distiller.named_parameters() if p.grad is None]
    for name, parameter in distiller.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(parameter.requires_grad and name not in set(unreached))
    return unreached
