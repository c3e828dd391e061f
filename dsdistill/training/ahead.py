"""Micro-batches with the teacher's signals, the next one's computed while the optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from dsdistill.core import NOTHING, Batch, Features

Part = Callable[[str], AbstractContextManager[None]]


class Asked:
    """Micro-batches on the device with what the teacher says of them.

    An optimizer's step is mostly host work, for which the GPU waits; a teacher that is one launch (a CUDA graph) fills
    that time from a stream of its own.

    Args:
        batches: Micro-batches in memory.
        ask: The teacher, or None if nobody asks one.
        device: Where they go.
        ahead: Whether `prepare` does anything.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        ask: Callable[[Batch], Features] | None,
        device: torch.device,
        *,
        ahead: bool,
    ):
        self.batches = batches
        self.ask = ask
        self.device = device
        self.stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        self.prepared: tuple[Batch, Features] | None = None

    def take(self, part: Part) -> tuple[Batch, Features]:
        """The next micro-batch and the teacher's signals for it.

        Args:
            part: Times a part of the step by its name.
        """
        if self.prepared is None:
            return self._ask(part)
        taken, self.prepared = self.prepared, None
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        return taken

    def prepare(self, part: Part) -> None:
        """Begin the next micro-batch after what the device has been told so far, beside what it will be told next."""
        if self.stream is None:
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.prepared = self._ask(part)
        for tensor in self.prepared[0]:
            if isinstance(tensor, torch.Tensor):
                tensor.record_stream(torch.cuda.current_stream())

    def _ask(self, part: Part) -> tuple[Batch, Features]:
        with part("data"):
            batch = next(self.batches).to(self.device)
        with part("teacher"):
            return batch, self.ask(batch) if self.ask is not None else NOTHING
