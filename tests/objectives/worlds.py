"""Small made-up worlds for the tests: a batch and what two models of different sizes said about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dsdistill.core import Batch, Features, LayerPairs, ModelShape
from dsdistill.objectives import find_objective
from dsdistill.objectives.contrastive import ContrastHead

PAIRS = LayerPairs((1, 2), (2, 3))
VOCAB = 7
EXAMPLES = 32
"""Rows of the made-up data set."""


def shape(
    num_heads: int, head_width: int, width: int, num_layers: int = 3, num_key_heads: int | None = None
) -> ModelShape:
    heads = {"num_heads": num_heads, "num_key_heads": num_key_heads or num_heads, "head_width": head_width}
    return ModelShape(num_layers=num_layers, width=width, vocab_size=VOCAB, **heads)


STUDENT, TEACHER = shape(2, 3, 6), shape(2, 4, 8)
OTHER_HEADS = shape(4, 3, 6)


@dataclass
class World:
    """A batch, two models' features and the term's own module."""

    batch: Batch
    student: Features
    teacher: Features
    pairs: LayerPairs
    student_shape: ModelShape
    teacher_shape: ModelShape
    head: nn.Module | None = None
    params: dict[str, Any] = field(default_factory=dict)
    problem: str = "classification"

    def leaves(self) -> list[Tensor]:
        """Every student tensor, to be differentiated."""
        return [tensor for layers in self.student.signals.values() for tensor in layers.values()]


def features(
    sizes: ModelShape,
    B: int,
    L: int,
    outputs: int,
    generator: torch.Generator,
    *,
    rows: int | None,
    size: float,
    bias: bool,
) -> Features:
    def random(*dims: int) -> Tensor:
        return torch.randn(*dims, dtype=torch.float64, generator=generator) * size

    layers = range(1, sizes.num_layers + 1)
    signals = {
        name: {i: random(B, sizes.num_heads, L, sizes.head_width) for i in layers} for name in ("query", "key", "value")
    }
    if bias:
        signals["bias"] = {i: random(B, sizes.num_heads, L, L) for i in layers}
    signals["hidden"] = {i: random(B, L, sizes.width) for i in [0, *layers]}
    signals["logits"] = {-1: random(B if rows is None else rows, outputs)}
    return Features(signals=signals, scaling=dict.fromkeys(layers, sizes.head_width**-0.5))


def make_world(
    *,
    lengths: tuple[int, ...] = (4, 2, 5, 1),
    length: int = 5,
    student: ModelShape = STUDENT,
    teacher: ModelShape = TEACHER,
    pairs: LayerPairs = PAIRS,
    task: bool = False,
    outputs: int = VOCAB,
    labels: str = "classes",
    same: bool = False,
    size: float = 1.0,
    bias: bool = False,
    seed: int = 0,
) -> World:
    """Random features for rows of these real lengths.

    Args:
        lengths: Real tokens of each row; the rest up to `length` is padding.
        length: L.
        student: Sizes of the student.
        teacher: Sizes of the teacher.
        pairs: Layer pairs.
        task: Logits and labels for each row instead of chosen positions.
        outputs: Logits for each position or row.
        labels: Of a task: `classes`, `real` numbers, or `multi`, a 0 or 1 for each class.
        same: The student says exactly what the teacher says, in every layer pair.
        size: Standard deviation of all signals.
        bias: Both models add something to their attention scores.
        seed: Of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    B = len(lengths)
    mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    tokens = torch.randint(0, VOCAB, (B, length), generator=generator).masked_fill(~mask, -100)
    tokens[:, 1::2] = -100
    targets = (tokens.flatten() != -100).nonzero().flatten()
    of_rows = {
        "classes": torch.arange(B) % 3,
        "real": torch.randn(B, dtype=torch.float64, generator=generator),
        "multi": torch.randint(0, 2, (B, outputs), generator=generator),
    }
    batch = Batch(
        input_ids=torch.randint(0, VOCAB, (B, length), generator=generator),
        mask=mask,
        sample_ids=torch.arange(B) * 3 + 1,
        labels=of_rows[labels] if task else tokens,
        targets=None if task else targets,
    )
    rows = None if task else len(targets)
    theirs = features(teacher, B, length, outputs, generator, rows=rows, size=size, bias=bias)
    ours = features(student, B, length, outputs, generator, rows=rows, size=size, bias=bias)
    if same:
        ours = equal(ours, theirs, pairs)
    problem = {"classes": "classification", "real": "regression", "multi": "multi_label"}[labels]
    return World(batch, ours, theirs, pairs, student, teacher, problem=problem)


def equal(student: Features, teacher: Features, pairs: LayerPairs) -> Features:
    """Student features whose paired layers are copies of the teacher's."""
    signals = {
        name: {
            s: teacher.at(name, t).clone()
            for s, t in [*zip(pairs.student, pairs.teacher, strict=True), (-1, -1)]
            if t in teacher.signals[name]
        }
        for name in student.signals
    }
    return student._replace(signals=signals, scaling=dict(teacher.scaling))


def map_features(values: Features, function: Callable[[str, Tensor], Tensor]) -> Features:
    """Each tensor changed by `function(signal, tensor)`."""
    signals = {
        name: {layer: function(name, tensor) for layer, tensor in layers.items()}
        for name, layers in values.signals.items()
    }
    return values._replace(signals=signals)


def only_needed(world: World, name: str, params: Mapping[str, Any]) -> World:
    """A world with only the signals and layers that the objective asks for; the student's are leaves with gradients."""
    needs = find_objective(name).needs(params)

    def keep(values: Features, signals: frozenset[str], layers: tuple[int, ...]) -> Features:
        kept = {
            signal: {
                layer: tensor.detach().clone()
                for layer, tensor in values.signals[signal].items()
                if signal == "logits" or layer in layers
            }
            for signal in sorted(signals)
            if signal in values.signals
        }
        return values._replace(signals=kept)

    student = keep(world.student, needs[0], world.pairs.student)
    teacher = keep(world.teacher, needs[1], world.pairs.teacher)
    for layers in student.signals.values():
        for tensor in layers.values():
            tensor.requires_grad_()
    return replace(world, student=student, teacher=teacher)


def make_head(world: World, name: str, params: Mapping[str, Any], *, seed: int = 1) -> nn.Module | None:
    """The term's own module in float64, with weights that depend on the seed only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = find_objective(name).make_head(
            world.student_shape,
            world.teacher_shape,
            world.pairs,
            params,
            num_examples=EXAMPLES,
            problem=world.problem,
        )
    if head is None:
        return None
    head = head.double()
    if isinstance(head, ContrastHead):  # of length 1 in float64 too, as the oracle's cosines have it
        head.bank /= head.bank.norm(dim=1, keepdim=True)
    return head


def identity(tensor: Tensor) -> Tensor:
    return tensor


def terms(world: World, name: str, params: Mapping[str, Any], gather=identity) -> dict[str, Tensor]:
    """What the objective returns in this world."""
    return find_objective(name)(
        world.student,
        world.teacher,
        world.batch,
        world.pairs,
        params,
        head=world.head,
        gather=gather,
        num_examples=EXAMPLES,
        problem=world.problem,
    )


def total(world: World, name: str, params: Mapping[str, Any]) -> Tensor:
    return torch.stack(list(terms(world, name, params).values())).sum()
