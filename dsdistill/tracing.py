"""Counts what a step holds and computes, without doing it: on meta tensors, which have shapes but no numbers.

A dispatch mode sees every operation of forward and backward, knows when each result is let go, and so finds the largest
sum of what is alive at a time, which is what torch's allocator would be asked for. Attention counts as flash attention
has it (its inputs, its output, one float32 a row), whatever the length.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from dsdistill.core import NOTHING, Batch, Features, ModelShape, Problem
from dsdistill.models.capture import Captured, Wanted
from dsdistill.models.families import layer_class
from dsdistill.models.teacher import frozen
from dsdistill.training.distiller import BoundTerm, Distiller, freeze_unreached

BLOCK = 512
"""Bytes; torch's allocator on GPUs rounds up to it."""


class LiveBytes(TorchDispatchMode):
    """Within, bytes of the tensors that operations made and that are still there.

    Args:
        device: Type of the device whose tensors count.
        known: Tensors that do not count, such as weights.
    """

    def __init__(self, device: str, known: Iterable[Tensor] = ()):
        super().__init__()
        self.device = device
        self.now, self.peak = 0, 0
        self.sizes: dict[int, int] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device:
                self._note(leaf)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes or key in self.known:
            return
        self.sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class _Flash(torch.autograd.Function):
    """Attention as the fused programs keep it: no scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        B, H, L, _ = query.shape
        out = query.new_empty(B, L, H, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(B, H, L, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


class _AttentionCounted(TorchFunctionMode):
    """Within, attention holds what flash attention holds, and its products are counted here."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        B, H, L, D = query.shape
        self.flops += 4 * B * H * L * key.shape[2] * D
        group = H // key.shape[1]
        return _Flash.apply(query, *((x.repeat_interleave(group, 1) if group > 1 else x) for x in (key, value)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One model in one micro-batch.

    Attributes:
        trained: Weights that an objective reaches (of a teacher none).
        frozen: The others.
        layer: Weights in the largest layer.
        beside_layers: Weights outside of layers.
        layers: Layers that run.
        largest: Weights in the largest parameter.
        work_bytes: The most that its operations hold at a time, weights and their gradients left out; of a student
            with the objectives, of a teacher with the signals.
        flops: Of matrix products and attention, of a student forward and backward.
        recomputed_flops: Those among them that flash attention's backward does a second time.
    """

    trained: int
    frozen: int
    layer: int
    beside_layers: int
    layers: int
    largest: int
    work_bytes: int
    flops: int
    recomputed_flops: int = 0

    @property
    def model_flops(self) -> int:
        """Products that the mathematics needs."""
        return self.flops - self.recomputed_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One micro-batch on one device.

    Attributes:
        student: With projections.
        teacher: As far as it runs; None if nobody asks it.
        signal_bytes: What the teacher says.
        projections: Names of trained modules beside the student, with their weights.
        frozen_names: Parameters of the student that no objective reaches.
    """

    student: Side
    teacher: Side | None
    signal_bytes: int
    projections: dict[str, int]
    frozen_names: tuple[str, ...]


def trace_step(
    student: Callable[[], PreTrainedModel],
    teacher: Callable[[], PreTrainedModel],
    wants: tuple[Wanted, Wanted],
    terms: Iterable[BoundTerm],
    shapes: tuple[ModelShape, ModelShape],
    batch: Batch,
    *,
    dtype: torch.dtype,
    fused: bool,
    activation_checkpointing: bool = False,
    num_examples: int = 1,
    problem: Problem = "classification",
) -> Trace:
    """What one micro-batch holds and computes.

    Args:
        student: Makes the student; called where new tensors are meta tensors.
        teacher: The same for the complete teacher.
        wants: Signals captured in the student and in the teacher.
        terms: Summands of the loss.
        shapes: Sizes of both models.
        batch: On the meta device, without padding.
        dtype: Precision that both compute in.
        fused: Whether a GPU will compute attention maps and relations tile by tile, where the recipe leaves that open.
        activation_checkpointing: Whether the student's layers are computed again in backward.
        num_examples: Training rows, for memory banks.
        problem: What a task's labels are.
    """
    features, told = NOTHING, None
    if wants[1]:
        told, features = _trace_teacher(teacher, wants[1], batch, dtype)
    with torch.device("meta"):
        captured = Captured(student(), wants[0])
        if activation_checkpointing:
            captured.model.gradient_checkpointing_enable()
            captured.exempt_from_checkpointing()
        if fused:
            terms = [
                replace(t, params={**t.params, "kernel": "fused"}) if t.params.get("kernel") == "auto" else t
                for t in terms
            ]
        distiller = Distiller(
            captured.train(),
            terms,
            shape=shapes[0],
            teacher=shapes[1],
            num_examples=num_examples,
            gather=lambda tensor: tensor,
            seed=0,
            problem=problem,
        ).to(device="meta", dtype=dtype)
    attention = _AttentionCounted()
    with attention:
        names = freeze_unreached(distiller, batch, features)
    for parameter in distiller.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    signals = [t for layers in features.signals.values() for t in layers.values()]
    known = [*distiller.parameters(), *distiller.buffers(), *signals, *(t for t in batch if isinstance(t, Tensor))]
    attention, flops = _AttentionCounted(), FlopCounterMode(display=False)
    with attention, flops, LiveBytes("meta", known) as live:
        distiller(batch, features, 0).total.backward()
    projections = {name: _weights(head) for name, head in distiller.heads.items() if list(head.parameters())}
    return Trace(
        student=replace(
            _side(distiller, captured.model, live, flops.get_total_flops() + 7 * attention.flops // 2),
            recomputed_flops=attention.flops // 2,
        ),
        teacher=told,
        signal_bytes=sum(tensor.nbytes for tensor in signals),
        projections=projections,
        frozen_names=tuple(names),
    )


def _trace_teacher(
    make: Callable[[], PreTrainedModel], wanted: Wanted, batch: Batch, dtype: torch.dtype
) -> tuple[Side, Features]:
    with torch.device("meta"):
        captured = frozen(make(), wanted, dtype=dtype)
    known = [*captured.parameters(), *captured.buffers(), *(t for t in batch if isinstance(t, Tensor))]
    attention, flops = _AttentionCounted(), FlopCounterMode(display=False)
    with torch.no_grad(), attention, flops, LiveBytes("meta", known) as live:
        features = captured(batch)
    return _side(captured, captured.model, live, flops.get_total_flops() + attention.flops), features


def _side(module: nn.Module, model: PreTrainedModel, live: LiveBytes, flops: int) -> Side:
    layers = [_weights(m) for m in model.modules() if isinstance(m, layer_class(model))]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Side(
        trained=trained,
        frozen=_weights(module) - trained,
        layer=max(layers),
        beside_layers=_weights(module) - sum(layers),
        layers=len(layers),
        largest=max(p.numel() for p in module.parameters()),
        work_bytes=live.peak,
        flops=flops,
    )


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _drop_gradient(parameter: Tensor) -> None:
    """Gradients are the engine's, which has its own places for them."""
    parameter.grad = None
