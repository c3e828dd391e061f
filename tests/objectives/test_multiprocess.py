"""Terms that compare rows with each other: two processes equal one on the same global batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dsdistill.core import Batch
from tests.objectives.worlds import World, identity, make_head, make_world, map_features, terms

MEMORY = {"negatives": "memory", "num_negatives": 6, "width": 5, "other_labels": True}
PARAMS = [
    ("hid_contrast", {"width": 5}),
    ("hid_contrast", {"width": 5, "contrast": "crd", "other_labels": True}),
    ("hid_contrast", MEMORY),
    ("hid_contrast", MEMORY | {"contrast": "crd", "pooling": "mean"}),
    ("pooled", {"compare": "similarity"}),
    ("pooled", {"compare": "similarity", "diagonal": False}),
]
WORLD, ROWS, STEPS = 2, 4, 3


class Gather(torch.autograd.Function):
    """All ranks' rows, with the gradient that each rank's use of them gives."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def part(world: World, rank: int) -> World:
    """One rank's rows."""
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    batch = Batch(**{n: getattr(world.batch, n)[rows] for n in ("input_ids", "mask", "labels", "sample_ids")})
    student, teacher = (map_features(f, lambda _, t: t[rows].clone()) for f in (world.student, world.teacher))
    return replace(world, batch=batch, student=student, teacher=teacher)


def train(name: str, params: dict, gather, rank: int | None) -> dict[str, list[Tensor] | dict[str, Tensor]]:
    """Losses, gradients and the head's state over some steps of plain SGD on the head; ranks average as DDP does."""
    world = make_world(lengths=(4, 2, 5, 1, 3, 3, 2, 5), task=True)
    head = world.head = make_head(world, name, params)
    losses, gradients = [], []
    for step in range(STEPS):
        here = make_world(lengths=(4, 2, 5, 1, 3, 3, 2, 5), task=True, seed=step)
        here = replace(here if rank is None else part(here, rank), head=head)
        hidden = here.student.at("hidden", 2).requires_grad_()
        loss = sum(terms(here, name, params, gather=gather).values())
        parameters = list(head.parameters()) if head is not None else []
        of_hidden, *of_head = torch.autograd.grad(loss, [hidden, *parameters])
        value = loss.detach()
        if rank is not None:
            for tensor in (value, *of_head):
                dist.all_reduce(tensor)
                tensor /= WORLD
            of_hidden = Gather.apply(of_hidden) / WORLD
        with torch.no_grad():
            for parameter, gradient in zip(parameters, of_head, strict=True):
                parameter -= 0.1 * gradient
        losses.append(value)
        gradients += [of_hidden, *of_head]
    state = dict(head.state_dict()) if head is not None else {}
    return {"losses": losses, "gradients": gradients, "state": state}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.manual_seed(rank)
    torch.save([train(name, params, Gather.apply, rank) for name, params in PARAMS], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_two_processes_equal_one_on_the_same_global_batch(tmp_path):
    mp.spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for index, (name, params) in enumerate(PARAMS):
        expected = train(name, params, identity, None)
        assert all(loss > 0 for loss in expected["losses"])
        for rank in ranks:
            torch.testing.assert_close(
                rank[index], expected, rtol=1e-9, atol=1e-12, msg=lambda m, p=params: f"{p}: {m}"
            )
        torch.testing.assert_close(ranks[0][index]["state"], ranks[1][index]["state"], rtol=0, atol=0)
