"""CUDA graphs of the teacher's forward and of the student's forward and backward: one launch instead of a thousand.

A small student's kernels are over sooner than the host can launch them. Recorded once per kind of batch and replayed,
the GPU does the same work with nothing in between. Everything that DeepSpeed does stays outside: gradients reach it
through autograd as ever, so all of its stages but ZeRO 3, which moves weights, work unchanged.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dsdistill.core import Batch, Features, Losses
from dsdistill.training.distiller import Distiller

EAGER_CALLS = 2
"""Calls of a kind of batch before it is recorded: they compile, allocate, and train as any other."""

MOST_KINDS = 8
"""Kinds of batches that are recorded; more are run kernel by kernel."""

Recorded = TypeVar("Recorded")


class Kinds(Generic[Recorded]):
    """What has been recorded, by kind of batch."""

    def __init__(self):
        self.seen: Counter[Hashable] = Counter()
        self.recorded: dict[Hashable, Recorded] = {}

    def get(self, kind: Hashable, record: Callable[[], Recorded]) -> Recorded | None:
        """The recording for a kind of batch, made now if it is time, or None while it is not."""
        if kind not in self.recorded:
            self.seen[kind] += 1
            if self.seen[kind] <= EAGER_CALLS or len(self.recorded) == MOST_KINDS:
                return None
            self.recorded[kind] = record()
        return self.recorded[kind]


def kind_of(batch: Batch) -> tuple[Hashable, ...]:
    """What a recording depends on besides the numbers."""
    return tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in batch)


def is_regular(batch: Batch) -> bool:
    """Whether the next batch will look like this one; chosen positions and documents differ in number."""
    return batch.targets is None and batch.segments is None


class GraphedTeacher:
    """A teacher on this GPU whose forward is replayed; its answers are overwritten by the next call.

    Args:
        teacher: Asked kernel by kernel until a kind of batch has been seen often enough.
    """

    def __init__(self, teacher: Callable[[Batch], Features]):
        self.teacher = teacher
        self.kinds: Kinds[_GraphedForward] = Kinds()

    def __call__(self, batch: Batch) -> Features:
        """The signals of a batch of training rows."""
        if not is_regular(batch):
            return self.teacher(batch)
        recorded = self.kinds.get(kind_of(batch), lambda: _GraphedForward(self.teacher, batch))
        return self.teacher(batch) if recorded is None else recorded(batch)


class _GraphedForward:
    """One recording of a teacher's forward."""

    def __init__(self, teacher: Callable[[Batch], Features], batch: Batch):
        self.batch = batch._map(Tensor.clone)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()  # sync, once
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.features = teacher(self.batch)

    def __call__(self, batch: Batch) -> Features:
        copy_tensors(batch, self.batch)
        self.graph.replay()
        return self.features


class GraphedLosses:
    """The student's forward, the objectives and their backward, recorded and replayed.

    Args:
        distiller: In training mode; its parameters must stay where they are in memory, which ZeRO 0, 1 and 2 ensure.
    """

    def __init__(self, distiller: Distiller):
        self.distiller = distiller
        self.kinds: Kinds[_GraphedTraining] = Kinds()

    def __call__(self, batch: Batch, teacher: Features, step: int) -> Losses | None:
        """The losses, whose backward is replayed too, or None if this batch must run kernel by kernel."""
        constants = self._constants(step)
        if constants is None or not is_regular(batch):
            return None
        parameters = [p for p in self.distiller.parameters() if p.requires_grad]
        kind = (kind_of(batch), constants, tuple(p.data_ptr() for p in parameters))
        recorded = self.kinds.get(kind, lambda: _GraphedTraining(self.distiller, parameters, batch, teacher, step))
        return None if recorded is None else recorded(batch, teacher)

    def _constants(self, step: int) -> Hashable | None:
        """Weights and parameters of the terms at a step, which a recording holds; None while they change."""
        now, then = (
            [(term.weight_at(at), sorted(term.params_at(at).items())) for term in self.distiller.terms]
            for at in (step, step + 1)
        )
        return repr(now) if now == then else None


class _GraphedTraining:
    """One recording of forward and backward; they share their memory."""

    def __init__(
        self, distiller: Distiller, parameters: list[nn.Parameter], batch: Batch, teacher: Features, step: int
    ):
        # these very tensors are what the recording reads; a replayed teacher writes into the same ones again
        self.parameters, self.batch, self.teacher = parameters, batch, teacher
        # DeepSpeed keeps the parameters' ends of the autograd graph, which belong to the stream they were made on
        leaves = {id(p): nn.Parameter(p.detach()) for p in parameters}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()  # sync, once
        with torch.cuda.graph(self.forward, capture_error_mode="thread_local"), standing_in(distiller, leaves):
            losses = distiller.compute(batch, teacher, step)
        self.seed = torch.ones_like(losses.total)
        torch.cuda.synchronize()  # sync, once
        with torch.cuda.graph(self.backward, pool=self.forward.pool(), capture_error_mode="thread_local"):
            self.gradients = torch.autograd.grad(losses.total, list(leaves.values()), grad_outputs=self.seed)
        self.losses = losses._replace(total=losses.total.detach())

    def __call__(self, batch: Batch, teacher: Features) -> Losses:
        copy_tensors(batch, self.batch)
        for signal, layers in teacher.signals.items():
            copy_tensors(layers.values(), self.teacher.signals[signal].values())
        return self.losses._replace(total=_Replay.apply(self, *self.parameters))


class _Replay(torch.autograd.Function):
    """A recorded training step as one node: what autograd, and DeepSpeed's hooks, see."""

    @staticmethod
    def forward(ctx: Any, recorded: _GraphedTraining, *_parameters: Tensor) -> Tensor:
        ctx.recorded = recorded
        recorded.forward.replay()
        return recorded.losses.total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        recorded: _GraphedTraining = ctx.recorded
        recorded.seed.copy_(grad)
        recorded.backward.replay()
        # the next replay writes there again, and what leaves here may be kept and added to
        flat = torch.cat([gradient.reshape(-1) for gradient in recorded.gradients])
        parts = flat.split([gradient.numel() for gradient in recorded.gradients])
        return (None, *(part.view_as(p) for part, p in zip(parts, recorded.parameters, strict=True)))


@contextlib.contextmanager
def standing_in(model: nn.Module, leaves: Mapping[int, nn.Parameter]) -> Iterator[None]:
    """Let other parameters over the same memory take the place of a model's, given by the id of whom they stand for."""
    held = [(module._parameters, name, p) for module in model.modules() for name, p in module._parameters.items()]
    for parameters, name, parameter in held:
        parameters[name] = leaves.get(id(parameter), parameter)
    try:
        yield
    finally:
        for parameters, name, parameter in held:
            parameters[name] = parameter


def reason_against(distiller: Distiller) -> str | None:
    """Why a student cannot be recorded, or None."""
    for term in distiller.terms:
        if "gather" in term.objective.supplied:
            return f"{term.label} compares the rows of all ranks"
    if len({p.dtype for p in distiller.parameters() if p.requires_grad}) > 1:
        return "its parameters have several types"
    return None


def copy_tensors(source: Iterable[Any], target: Iterable[Any]) -> None:
    """Copy the tensors among `source` into those of `target`, in place."""
    for new, old in zip(source, target, strict=True):
        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)
