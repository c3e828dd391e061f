"""A teacher in host memory whose layers come to the device one after the other, the next one while one computes.

Each layer's weights lie together in one pinned buffer, so that a layer is one copy. The device holds two such buffers:
one is read by the layer that runs, the other is filled with the layer that comes next, after the last one the first of
the next batch. On a CPU the same copies are made, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsdistill.core import Batch, Features
from dsdistill.models.capture import Wanted
from dsdistill.models.families import layer_class
from dsdistill.models.teacher import checksum_of, frozen

ALIGNMENT = 512
"""Bytes, as torch's own allocator aligns, so that products run the same programs as with a resident teacher."""


class _Layer:
    """The weights of one layer in host memory, in one piece."""

    def __init__(self, module: nn.Module, *, pinned: bool):
        self.parameters = list(module.parameters())
        self.starts, self.num_bytes = [], 0
        for parameter in self.parameters:
            self.starts.append(self.num_bytes)
            self.num_bytes += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        self.home = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.at_home = self.views(self.home)
        for parameter, view in zip(self.parameters, self.at_home, strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self.bound: Tensor | None = None

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The weights as they lie in a buffer of bytes."""
        return [
            buffer[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            for start, parameter in zip(self.starts, self.parameters, strict=True)
        ]

    def bind(self, buffer: Tensor) -> None:
        """Let the module compute with what is in `buffer`."""
        if self.bound is not buffer:
            for parameter, view in zip(self.parameters, self.views(buffer), strict=True):
                parameter.data = view
            self.bound = buffer


class LayerStream:
    """Brings the weights of each layer to the device just before its forward; at most two layers are there.

    Which layer follows is what followed last time, at first the next in order: a wrong guess costs a wait, no more.

    Args:
        layers: Modules on the CPU whose forwards run one after the other.
        device: Where they run.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device):
        on_gpu = device.type == "cuda"
        self.layers = [_Layer(module, pinned=on_gpu) for module in layers]
        size = max(layer.num_bytes for layer in self.layers)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]
        self.in_use, self.last = 0, None
        self.follows = {index: (index + 1) % len(layers) for index in range(len(layers))}
        self.side = torch.cuda.Stream(device) if on_gpu else None
        self.arrived = [torch.cuda.Event() for _ in self.slots] if on_gpu else []
        if self.side is not None:
            for slot in self.slots:
                slot.record_stream(self.side)
        for index, module in enumerate(layers):
            module.register_forward_pre_hook(lambda *_, index=index: self._before(index))

    @property
    def device_bytes(self) -> int:
        """What it takes on the device."""
        return sum(slot.nbytes for slot in self.slots)

    def _before(self, index: int) -> None:
        if self.last is not None:
            self.follows[self.last] = index
        self.last = index
        if self.holds[self.in_use] != index:
            self.in_use = 1 - self.in_use
        self._fetch(index, self.in_use)
        if self.side is not None:
            torch.cuda.current_stream().wait_event(self.arrived[self.in_use])
        self.layers[index].bind(self.slots[self.in_use])
        if self.follows[index] != index:
            self._fetch(self.follows[index], 1 - self.in_use)

    def _fetch(self, index: int, number: int) -> None:
        """Copy a layer into a slot, once all that has been asked for so far has read what is in there."""
        if self.holds[number] == index:
            return
        home = self.layers[index].home
        target = self.slots[number][: home.numel()]
        self.holds[number] = index
        if self.side is None:
            target.copy_(home)
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            target.copy_(home, non_blocking=True)
            self.arrived[number].record(self.side)


class StreamedTeacher:
    """A teacher of which two layers, the embeddings and the head are on the device.

    Args:
        model: The loaded teacher on the CPU; truncated in place.
        wanted: Signals to record.
        device: Where it runs.
        dtype: Precision it runs in.
    """

    def __init__(self, model: PreTrainedModel, wanted: Wanted, *, device: torch.device, dtype: torch.dtype):
        kind = layer_class(model)
        captured = frozen(model, wanted, dtype=dtype)
        layers = [module for module in captured.modules() if isinstance(module, kind)]
        streamed = {id(parameter) for layer in layers for parameter in layer.parameters()}
        for module in captured.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in streamed:
                    parameter.data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._forward = captured
        self.stream = LayerStream(layers, device)

    @property
    def num_layers(self) -> int:
        """Layers that run."""
        return self._forward.num_layers

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        """The wanted signals of a batch; constants for autograd."""
        return self._forward(batch)

    @torch.no_grad()
    def look(self, batch: Batch, wanted: Wanted) -> Features:
        """Other signals of a batch, of the layers that run."""
        with self._forward.recording(wanted):
            return self._forward(batch)

    def checksum(self) -> str:
        """SHA-256 of all weights and buffers, as a resident teacher tells it."""
        at_home: dict[int, Tensor] = {
            id(parameter): view
            for layer in self.stream.layers
            for parameter, view in zip(layer.parameters, layer.at_home, strict=True)
        }
        state: dict[str, Any] = self._forward.state_dict(keep_vars=True)
        for name, tensor in state.items():
            if id(tensor) in at_home:
                state[name] = at_home[id(tensor)]
        return checksum_of(state)
