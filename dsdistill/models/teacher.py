"""The frozen teacher: truncated below its deepest wanted layer, in eval mode, never in an optimizer or a checkpoint."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import PreTrainedModel

from dsdistill.core import Batch, Features
from dsdistill.models.capture import Captured, Wanted
from dsdistill.models.families import drop_pooler, encoder_of, truncate
from dsdistill.models.joined import join_projections


class ResidentTeacher:
    """A complete copy of the teacher on this process's device.

    Other placements keep this interface: `__call__(batch) -> Features` and `checksum()`.

    Args:
        model: The loaded teacher; truncated in place.
        wanted: Signals to record.
        device: Where it runs.
        dtype: Precision it runs in.
    """

    def __init__(self, model: PreTrainedModel, wanted: Wanted, *, device: torch.device, dtype: torch.dtype):
        full_depth = encoder_of(model).config.num_hidden_layers
        if "logits" not in wanted:
            model = encoder_of(model)
            drop_pooler(model)
            truncate(model, max((layer for layers in wanted.values() for layer in layers), default=1))
        join_projections(model)
        model.requires_grad_(False)
        self.captured = Captured(model, wanted, full_depth=full_depth).to(device=device, dtype=dtype).eval()

    @property
    def num_layers(self) -> int:
        """Layers that run."""
        return self.captured.num_layers

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        """The wanted signals of a batch; constants for autograd."""
        return self.captured(batch)

    def checksum(self) -> str:
        """SHA-256 of all weights and buffers, to show that training left the teacher alone."""
        return weights_checksum(self.captured)


def weights_checksum(module: nn.Module) -> str:
    """SHA-256 of all weights and buffers with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
