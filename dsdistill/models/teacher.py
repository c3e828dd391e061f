"""The frozen teacher: truncated below its deepest wanted layer, in eval mode, never in an optimizer or a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsdistill.core import Batch, Features
from dsdistill.models.capture import Captured, Wanted
from dsdistill.models.families import drop_pooler, encoder_of, truncate
from dsdistill.models.joined import join_projections
from dsdistill.progress import each


def frozen(model: PreTrainedModel, wanted: Wanted, *, dtype: torch.dtype) -> Captured:
    """The teacher as every placement runs it, still where it was loaded.

    Args:
        model: The loaded teacher; truncated in place.
        wanted: Signals to record.
        dtype: Precision it runs in.
    """
    full_depth = encoder_of(model).config.num_hidden_layers
    if "logits" not in wanted:
        model = encoder_of(model)
        drop_pooler(model)
        truncate(model, max((layer for layers in wanted.values() for layer in layers), default=1))
    join_projections(model)
    model.requires_grad_(False)
    return Captured(model, wanted, full_depth=full_depth).to(dtype=dtype).eval()


class ResidentTeacher:
    """A complete copy of the teacher on this process's device.

    Other placements keep this interface: `__call__(batch) -> Features`, `look(batch, wanted)` and `checksum()`.

    Args:
        model: The loaded teacher; truncated in place.
        wanted: Signals to record.
        device: Where it runs.
        dtype: Precision it runs in.
    """

    def __init__(self, model: PreTrainedModel, wanted: Wanted, *, device: torch.device, dtype: torch.dtype):
        self.captured = frozen(model, wanted, dtype=dtype).to(device=device)

    @property
    def num_layers(self) -> int:
        """Layers that run."""
        return self.captured.num_layers

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        """The wanted signals of a batch; constants for autograd."""
        return self.captured(batch)

    @torch.no_grad()
    def look(self, batch: Batch, wanted: Wanted) -> Features:
        """Other signals of a batch, of the layers that run."""
        with self.captured.recording(wanted):
            return self.captured(batch)

    def compile_forward(self) -> None:
        """Compile the forward; see `Captured.compile_forward`."""
        self.captured.compile_forward()

    def checksum(self) -> str:
        """SHA-256 of all weights and buffers, to show that training left the teacher alone."""
        return weights_checksum(self.captured)


def weights_checksum(module: nn.Module) -> str:
    """SHA-256 of all weights and buffers with their names."""
    return checksum_of(module.state_dict())


def checksum_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors."""
    digest = hashlib.sha256()
    for name, tensor in each(sorted(state.items()), "checksum of weights", len(state), unit="tensor"):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
