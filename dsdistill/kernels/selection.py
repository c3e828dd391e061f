"""Whether the fused comparison of two models' pairwise scores can be used; `pairwise` itself needs triton.

Nothing is imported here, so that a machine without triton has the plain objectives.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["auto", "plain", "fused"]
"""Which of the two implementations of an objective computes: `auto` is the fused one wherever it can be used."""

MAX_WIDTH = 128
HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def use_fused(kernel: Kernel, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> bool:
    """Whether the fused implementation is to be used.

    Args:
        kernel: What was asked for. `auto` stays plain on other devices than a GPU.
        student: The two factors of the student's scores, (B, H, L, D).
        teacher: Those of the teacher.

    Raises:
        ValueError: If `fused` was asked for and cannot be, with the reason.
    """
    if kernel == "plain" or (kernel == "auto" and student[0].device.type != "cuda"):
        return False
    reason = reason_against(student, teacher)
    if reason is not None and kernel == "fused":
        raise ValueError(f"kernel: fused cannot be used: {reason}; use auto or plain")
    return reason is None


def reason_against(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> str | None:
    """Why the fused implementation cannot compare these, or None if it can; arguments as for `use_fused`."""
    for factors in (student, teacher):
        for factor in factors:
            if factor.shape[-1] > MAX_WIDTH:
                return f"heads of width {factor.shape[-1]} are wider than {MAX_WIDTH}"
            if factor.dtype not in DTYPES:
                return f"{factor.dtype} is none of float16, bfloat16 and float32"
        if len({factor.dtype for factor in factors}) > 1:
            return f"the factors of one model have the types {' and '.join(str(f.dtype) for f in factors)}"
    device = student[0].device
    if device.type == "meta":  # shapes without numbers, as on a GPU
        return None if HAS_TRITON else "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"the tensors are on {device.type}, not on an NVIDIA GPU"
    if not HAS_TRITON:
        return "triton is not installed"
    if device.type == "cuda" and is_old(device):
        return "the GPU is older than compute capability 8.0"
    return None


@torch.compiler.assume_constant_result
def is_old(device: torch.device) -> bool:
    """Whether a GPU is older than Ampere."""
    return torch.cuda.get_device_capability(device) < (8, 0)


def interpreted() -> bool:
    """Whether Triton runs programs on the CPU through its interpreter, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
