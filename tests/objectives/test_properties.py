"""What must hold for every objective: its oracle's numbers, right gradients, and indifference to what is no data."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsdistill.core import Batch
from tests.objectives.cases import CASES, Case
from tests.objectives.worlds import TEACHER, World, make_head, make_world, map_features, only_needed, terms, total

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def build(case: Case, **changes) -> World:
    """The case's world with its head (frozen in eval mode: memory banks do not move)."""
    world = only_needed(make_world(**(case.world | changes)), case.name, case.params)
    head = make_head(world, case.name, case.params)
    return replace(world, head=head.eval() if head is not None else None)


def value_and_gradients(case: Case, world: World) -> tuple[Tensor, list[Tensor]]:
    value = total(world, case.name, case.params)
    inputs = world.leaves() + (list(world.head.parameters()) if world.head is not None else [])
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    return value.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@every_case
@pytest.mark.parametrize("lengths", [(4, 2, 5, 1), (1,), (5, 5), (3, 0)], ids=str)
def test_terms_agree_with_the_oracle(case: Case, lengths):
    if case.task and 0 in lengths:
        pytest.skip("a row without tokens is no example of a task")
    world = build(case, lengths=lengths)
    got, expected = terms(world, case.name, case.params), case.oracle(world)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.shape == ()
        close(tensor.detach(), torch.tensor(expected[name], dtype=torch.float64))


@every_case
def test_gradient_is_that_of_finite_differences(case: Case):
    world = build(case, lengths=(3, 2), length=4)
    inputs = world.leaves() + (list(world.head.parameters()) if world.head is not None else [])
    assert torch.autograd.gradcheck(
        lambda *_: total(world, case.name, case.params), inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True
    )


@every_case
def test_nothing_is_left_to_learn_at_equality(case: Case):
    if not case.vanishes:
        pytest.skip("does not vanish at equality")
    pairs = case.world.get("pairs")
    if pairs is not None and pairs.combine:
        pytest.skip("combined layers go through a projection")
    world = build(case, student=TEACHER, teacher=TEACHER, same=True)
    value, gradients = value_and_gradients(case, world)
    close(value, torch.zeros_like(value), atol=1e-12)
    for gradient in gradients:
        close(gradient, torch.zeros_like(gradient), atol=1e-12)


def with_garbage(world: World, extra: int, garbage: float) -> World:
    """More padding at the end, and `garbage` in all of it."""
    mask = F.pad(world.batch.mask, (0, extra))

    def spoil(signal: str, tensor: Tensor) -> Tensor:
        if signal == "logits":
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)
        padded = F.pad(tensor.detach(), (0, extra if signal == "bias" else 0, 0, extra))
        real = mask[..., None] if signal == "hidden" else mask[:, None, :, None]
        if signal == "bias":
            real = real & mask[:, None, None, :]
        return torch.where(real, padded, garbage).requires_grad_(tensor.requires_grad)

    labels = world.batch.labels
    changes: dict = {"mask": mask, "input_ids": F.pad(world.batch.input_ids, (0, extra))}
    if world.batch.targets is not None:
        labels = F.pad(labels, (0, extra), value=-100)
        changes |= {"labels": labels, "targets": (labels.flatten() != -100).nonzero().flatten()}
    return replace(
        world,
        batch=world.batch._replace(**changes),
        student=map_features(world.student, spoil),
        teacher=map_features(world.teacher, spoil),
    )


@every_case
@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_padding_changes_neither_value_nor_gradient(case: Case, garbage):
    world = build(case)
    spoiled = with_garbage(world, extra=3, garbage=garbage)
    value, gradients = value_and_gradients(case, world)
    other_value, other_gradients = value_and_gradients(case, spoiled)
    close(other_value, value)
    length = world.batch.mask.shape[1]
    for gradient, other in zip(gradients, other_gradients, strict=True):
        if gradient.shape == other.shape:
            close(other, gradient)
        else:
            kept = (..., slice(length), slice(gradient.shape[-1]))
            close(other[kept], gradient)
            other[kept] = 0
            close(other, torch.zeros_like(other))


def take_rows(world: World, rows: Tensor) -> World:
    """The world of some rows of the batch, in this order."""
    batch = world.batch
    chosen = rows
    if batch.targets is not None:
        owner = batch.targets // batch.mask.shape[1]
        chosen = torch.cat([(owner == row).nonzero().flatten() for row in rows])
    taken = {
        name: None if getattr(batch, name) is None else getattr(batch, name)[rows]
        for name in ("input_ids", "mask", "labels", "sample_ids")
    }
    targets = None
    if batch.targets is not None:
        assert taken["labels"] is not None
        targets = (taken["labels"].flatten() != -100).nonzero().flatten()

    def take(signal: str, tensor: Tensor) -> Tensor:
        picked = tensor.detach()[chosen if signal == "logits" else rows]
        return picked.clone().requires_grad_(tensor.requires_grad)

    return replace(
        world,
        batch=Batch(**taken, targets=targets),
        student=map_features(world.student, take),
        teacher=map_features(world.teacher, take),
    )


@every_case
def test_order_of_rows_does_not_matter(case: Case):
    world = build(case)
    shuffled = take_rows(world, torch.tensor([2, 0, 3, 1]))
    close(total(shuffled, case.name, case.params), total(world, case.name, case.params))


@every_case
def test_mean_of_equal_parts_is_the_whole(case: Case):
    if not case.splits:
        pytest.skip("compares rows with each other")
    world = build(case, lengths=(4, 2, 2, 4))
    parts = [total(take_rows(world, torch.tensor(rows)), case.name, case.params) for rows in ([0, 1], [2, 3])]
    close(torch.stack(parts).mean(), total(world, case.name, case.params))


@every_case
def test_a_row_of_padding_alone_adds_nothing(case: Case):
    if case.task:
        pytest.skip("a row without tokens is no example of a task")
    world = build(case, lengths=(4, 2, 0, 3))
    value, gradients = value_and_gradients(case, world)
    close(total(take_rows(world, torch.tensor([0, 1, 3])), case.name, case.params).detach(), value)
    assert all(gradient.isfinite().all() for gradient in gradients)


@every_case
def test_a_mean_over_nothing_is_zero(case: Case):
    if case.task:
        pytest.skip("a row without tokens is no example of a task")
    value, gradients = value_and_gradients(case, build(case, lengths=(0, 0)))
    close(value, torch.zeros_like(value))
    assert all((gradient == 0).all() for gradient in gradients)


def cast(world: World, dtype: torch.dtype) -> World:
    def convert(_: str, tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

    return replace(
        world,
        student=map_features(world.student, convert),
        teacher=map_features(world.teacher, convert),
        head=copy.deepcopy(world.head).to(dtype) if world.head is not None else None,
    )


TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@every_case
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_half_types_come_close_and_get_gradients_of_their_type(case: Case, dtype, size):
    rounded = cast(build(case, size=size), dtype)
    expected, _ = value_and_gradients(case, cast(rounded, torch.float64))
    value, gradients = value_and_gradients(case, rounded)
    assert value.dtype == torch.float32
    close(value.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * 1e-2)
    for tensor, gradient in zip(rounded.leaves(), gradients, strict=False):
        assert gradient.dtype == tensor.dtype == dtype
        assert gradient.isfinite().all()


@every_case
def test_teacher_is_a_constant(case: Case):
    world = build(case)
    teacher = map_features(world.teacher, lambda _, tensor: tensor.detach().requires_grad_())
    value = total(replace(world, teacher=teacher), case.name, case.params)
    theirs = [tensor for layers in teacher.signals.values() for tensor in layers.values()]
    if theirs:
        gradients = torch.autograd.grad(value, theirs, allow_unused=True)
        assert all(gradient is None for gradient in gradients)
