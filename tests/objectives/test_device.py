"""What a GPU asks for: no value of a tensor is ever looked at, and fp16 with loss scaling keeps its scale."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.objectives.cases import CASES, Case
from tests.objectives.worlds import make_head, make_world, map_features, only_needed, total


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_no_step_waits_for_a_value_from_the_device(case: Case):
    """Tensors without values refuse `.item()`, `bool()`, `nonzero` and boolean indexing."""
    real = only_needed(make_world(**case.world), case.name, case.params)
    head = make_head(real, case.name, case.params)
    hollow = FakeTensorMode()
    names = ("input_ids", "mask", "labels", "targets", "sample_ids")
    tensors = {name: getattr(real.batch, name) for name in names}
    if head is not None:
        for module in head.modules():
            for table in (module._parameters, module._buffers):
                table.update({name: hollow.from_tensor(value) for name, value in table.items() if value is not None})
    world = replace(
        real,
        batch=real.batch._replace(**{n: hollow.from_tensor(t) for n, t in tensors.items() if t is not None}),
        student=map_features(real.student, lambda _, tensor: hollow.from_tensor(tensor)),
        teacher=map_features(real.teacher, lambda _, tensor: hollow.from_tensor(tensor)),
        head=head,
    )
    with hollow:
        total(world, case.name, case.params).backward()
    assert all(leaf.grad is not None for leaf in world.leaves())


NAMES = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_fp16_training_does_not_walk_the_loss_scale_down(name):
    """200 steps on fp16 copies of the student's signals, dynamic scaling from 2^16, as DeepSpeed does it."""
    case = NAMES[name]
    world = only_needed(make_world(**case.world, size=3.0), case.name, case.params)
    head = make_head(world, case.name, case.params)
    world.head = head.half() if head is not None else None
    world.teacher = map_features(world.teacher, lambda _, tensor: tensor.half())
    masters = map_features(world.student, lambda _, tensor: tensor.detach().float().requires_grad_())
    leaves = [tensor for layers in masters.signals.values() for tensor in layers.values()]
    optimizer = torch.optim.Adam(leaves, lr=1e-2)
    scale, first, skipped = 2.0**16, None, 0
    for _ in range(200):
        world.student = map_features(masters, lambda _, tensor: tensor.half())
        loss = total(world, case.name, case.params)
        assert loss.isfinite()
        first = loss.detach() if first is None else first
        gradients = torch.autograd.grad(loss * scale, leaves)
        if not all(gradient.isfinite().all() for gradient in gradients):
            scale, skipped = scale / 2, skipped + 1
            continue
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient / scale
        optimizer.step()
    assert scale >= 1
    assert skipped <= 16
    assert loss.detach() < first
