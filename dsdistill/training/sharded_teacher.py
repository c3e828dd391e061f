"""A teacher under a DeepSpeed engine of its own: ZeRO 3 without an optimizer, on NVMe if wanted.

Its engine knows nothing of the student's. Weights are spread over the processes one by one, so that no device ever
holds all of them; a layer is gathered for its forward and let go after it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsdistill.config.offload import async_io_problem
from dsdistill.core import Batch, Features
from dsdistill.models.capture import Wanted
from dsdistill.models.families import layer_class
from dsdistill.models.teacher import checksum_of, frozen
from dsdistill.progress import waiting
from dsdistill.training.dist import Place
from dsdistill.training.engine import start_zero

LAYERS_AHEAD = 2
"""Layers whose weights may be gathered at a time: the one that runs, and the next."""


class ShardedTeacher:
    """A teacher whose weights are spread over all processes; every process must ask it at the same moment.

    Args:
        model: The loaded teacher on the CPU, the same on every process; truncated in place.
        wanted: Signals to record.
        place: This process.
        dtype: Precision it runs in.
        nvme: A directory on a local disk for this process's share, or None to keep it on the device.
    """

    def __init__(
        self, model: PreTrainedModel, wanted: Wanted, *, place: Place, dtype: torch.dtype, nvme: Path | None = None
    ):
        kind = layer_class(model)
        captured = frozen(model, wanted, dtype=dtype)
        sizes = [sum(p.numel() for p in m.parameters()) for m in captured.modules() if isinstance(m, kind)]
        largest = max(p.numel() for p in captured.parameters())
        # on disk in a directory of its own: DeepSpeed empties what it finds in the place it is given
        self.disk = tempfile.TemporaryDirectory(prefix="teacher-", dir=nvme) if nvme is not None else None
        config = zero3_config(dtype, layer=max(sizes), largest=largest, disk=self.disk.name if self.disk else None)
        for module in captured.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(place.device))
        offload = "nvme" if self.disk is not None else None
        # the precision comes from the JSON: given as an argument, DeepSpeed 0.19.8 takes bf16 on a CPU whatever it is
        with waiting(f"spreading the teacher's weights{f' to {nvme}' if nvme is not None else ''}"):
            deepspeed.zero.Init(
                module=captured, config_dict_or_path=config, remote_device=offload, pin_memory=offload is not None
            )
            self.engine = start_zero(captured, config)
        self.engine.eval()
        self._forward = captured

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
        """Other signals of a batch, of the layers that run; every process must ask at the same moment."""
        with self._forward.recording(wanted):
            return self._forward(batch)

    def checksum(self) -> str:
        """SHA-256 of all weights and buffers, as a resident teacher tells it; every process must call this."""
        state: dict[str, Tensor] = {}
        for name, tensor in self._forward.state_dict(keep_vars=True).items():
            if hasattr(tensor, "ds_id"):
                with deepspeed.zero.GatheredParameters([tensor]):
                    state[name] = tensor.detach().cpu().clone()
            else:
                state[name] = tensor
        return checksum_of(state)


def nvme_problem(directory: Path) -> str | None:
    """Why DeepSpeed cannot keep a teacher in this directory, or None if it can."""
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        return f"teacher.nvme_path={str(directory)!r} is no directory that can be written; make it, on a local disk"
    problem = async_io_problem()
    return None if problem is None else f"teacher.placement=nvme: {problem}, or use placement cpu"


def zero3_config(dtype: torch.dtype, *, layer: int, largest: int, disk: str | None) -> dict[str, Any]:
    """DeepSpeed's JSON for a teacher.

    Args:
        dtype: Precision it runs in.
        layer: Weights in its largest layer.
        largest: Weights in its largest parameter.
        disk: Where its share is kept, or None for the device.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        # DeepSpeed would keep everything that it has gathered once: its defaults are a billion weights
        "stage3_max_live_parameters": LAYERS_AHEAD * layer,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": layer,
        # replaces torch's linear for the whole process, the student's too
        "memory_efficient_linear": False,
    }
    if disk is not None:
        zero["offload_param"] = {
            "device": "nvme",
            "nvme_path": disk,
            "pin_memory": True,
            "buffer_count": 32,
            "buffer_size": largest,
        }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
    }
    if dtype != torch.float32:
        config["fp16" if dtype == torch.float16 else "bf16"] = {"enabled": True}
    return config
