"""DeepSpeed's looks at all gradients before a step, with a few launches instead of thousands.

ZeRO 1 and 2 (0.19.8) ask each gradient for overflow and then for its norm, some sixteen small kernels for each of a
student's hundred tensors, while the GPU waits for the host. Asked of all tensors at once the answers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import MethodType

import torch
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

norms = torch._foreach_norm  # type: ignore[reportPrivateImportUsage] (torch has no public form that takes a dtype)


def check_gradients_at_once(optimizer: object) -> None:
    """Let an optimizer of ZeRO 1 or 2 look at all its gradients at once; others are left as they are."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and not (optimizer.cpu_offload or optimizer.has_moe_layers):
        optimizer.has_overflow_partitioned_grads_serial = MethodType(_has_overflow, optimizer)
        optimizer.get_grad_norm_direct = MethodType(_norm, optimizer)


def _has_overflow(optimizer: DeepSpeedZeroOptimizer) -> Tensor:
    """Whether a gradient is infinite or NaN, bool (1,)."""
    found = [g for group in optimizer.averaged_gradients.values() for g in group or () if g is not None and g.numel()]
    largest = [norm.float() for norm in norms(found, math.inf)] if found else [torch.zeros((), device=optimizer.device)]
    return torch.stack(largest).isfinite().all().logical_not().reshape(1)


def _norm(optimizer: DeepSpeedZeroOptimizer, gradients: Iterable[Tensor], params: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm over all ranks' parts of a group, accumulated in float32; -1 if it is not finite."""
    real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
    own = [gradient.data for gradient, _ in zip(real, params, strict=False)]
    if own:
        squared = torch.stack(norms(own, 2, dtype=torch.float32)).square().sum()
    else:
        squared = torch.zeros((), device=optimizer.device)
    torch.distributed.all_reduce(squared, group=optimizer.dp_process_group)
    norm = squared.sqrt()
    mask_nan_or_inf_with_val_inplace(norm, device=optimizer.device)
    return norm
