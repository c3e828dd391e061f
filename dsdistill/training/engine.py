"""The DeepSpeed engine: processes, optimizer groups, start, backward."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from torch import Tensor, nn

from dsdistill.config.sections import OptimizationSettings
from dsdistill.models.capture import Captured
from dsdistill.training.dist import Place, rendezvous
from dsdistill.training.gradient_checks import check_gradients_at_once
from dsdistill.training.signals import StoppedError
from dsdistill.training.watchdog import LostRankError


def start_processes(place: Place, timeout_s: float = 600.0) -> None:
    """Join the other processes of the job.

    Args:
        place: This process.
        timeout_s: The watchdog's. The backends' own time-outs are longer: they do not know who is missing.

    Raises:
        LostRankError: If they do not all come.
    """
    os.environ.update(rendezvous(place))
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    else:
        # DeepSpeed would compile a shared-memory all-reduce at first use: a minute, a compiler, and gloo does it too
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if place.is_teacher:
        return  # it has no part in what the others do together
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(seconds=2 * timeout_s))
    except dist.DistError as error:
        first_line = str(error).splitlines()[0]
        raise LostRankError(
            f"rank {place.rank}: the {place.world_size} processes did not all come within {2 * timeout_s:.0f} s "
            f"({first_line})"
        ) from error


def stop_processes() -> None:
    """Leave the job in order."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def processes(place: Place, timeout_s: float) -> Iterator[None]:
    """Join the other processes and leave in order, also after a stop on request, when all are at the same step.

    After other errors nobody leaves in order, for nobody may wait for anybody. A process alone leaves when it ends: it
    may have more runs to do, and DeepSpeed cannot join twice. Where the processes have been joined before, nothing is
    done.

    Raises:
        LostRankError: If they do not all come.
    """
    leaves = not dist.is_initialized() and place.world_size > 1
    if not dist.is_initialized():
        start_processes(place, timeout_s)
        if not leaves:
            atexit.register(stop_processes)
    try:
        yield
    except StoppedError:
        if leaves:
            stop_processes()
        raise
    if leaves:
        stop_processes()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, biases and norms (one dimension) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def start_engine(
    model: nn.Module, settings: OptimizationSettings, config: dict[str, Any], place: Place
) -> deepspeed.DeepSpeedEngine:
    """Wrap the model; every process must call this.

    Args:
        model: All trainable parameters are in it.
        settings: The recipe's section; the loop sets the learning rate before every step.
        config: DeepSpeed JSON, filled.
        place: This process.
    """
    model.to(place.device)
    optimizer = torch.optim.AdamW(
        [group for group in parameter_groups(model, settings.weight_decay) if group["params"]],
        lr=0.0,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    engine = start_zero(model, config, optimizer)
    check_gradients_at_once(engine.optimizer)
    # DeepSpeed would raise a plain Exception at the smallest loss scale; the loop counts skipped steps in a row itself
    if hasattr(getattr(engine.optimizer, "loss_scaler", None), "raise_error_at_min_scale"):
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # type: ignore[union-attr]
    if zero_stage(config) == 0:
        if place.world_size == 1:
            engine.enable_backward_allreduce = False  # else gradients are copied together, summed over one, copied back
        # DeepSpeed launches two kernels per parameter
        engine.clip_fp32_gradients = partial(clip_gradients, engine)
    # ZeRO-3, and fp16 without ZeRO, have taken a step on zero gradients to allocate the optimizer's state. With a
    # learning rate of 0 it changed no weight; Adam's bias correction must not count it either.
    for state in optimizer.state.values():
        state["step"].zero_()
    return engine


def start_zero(
    model: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None = None
) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine around a model; ZeRO 3 gathers a layer at once wherever it can.

    Its hooks around every module of a layer are work of the host, more than a GPU needs for the layer.
    """
    captured = [module for module in model.modules() if isinstance(module, Captured)]
    if zero_stage(config) == 3:
        for layer in (layer for module in captured for layer in module.closed_layers()):
            set_z3_leaf_module(layer, True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for module in captured:
        module.hook_last()
    return engine


def clip_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Scale all gradients down to the norm that the recipe allows, in a few kernels and without a sync."""
    nn.utils.clip_grad_norm_(engine.parameters(), engine.gradient_clipping())


def backward(engine: deepspeed.DeepSpeedEngine, loss: Tensor) -> None:
    """Backward of one micro-batch, scaled by the loss scale.

    DeepSpeed 0.19.8 scales the loss for its ZeRO optimizers only; without ZeRO its fp16 optimizer divides gradients
    by a scale that nobody multiplied with (seen on two H200: the loss fell at a fraction of its speed).
    """
    scaling = getattr(engine.optimizer, "loss_scale_config", None)
    if scaling is not None and scaling.use_grad_scaling and not isinstance(engine.optimizer, ZeROOptimizer):
        loss = loss.float() * scaling.cur_scale
    engine.backward(loss)


def optimizer_of(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer, or DeepSpeed's wrapper around it, which has parameter groups too."""
    return cast(torch.optim.Optimizer, engine.optimizer)


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed JSON."""
    return config.get("zero_optimization", {}).get("stage", 0)


def half_precision(config: dict[str, Any]) -> torch.dtype:
    """The dtype that the student trains in and the teacher runs in."""
    for key, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        if config.get(key, {}).get("enabled"):
            return dtype
    return torch.float32
