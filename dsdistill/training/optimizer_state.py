"""What the optimizer holds of each parameter, by the parameter's name, whatever the ZeRO stage and the processes.

DeepSpeed keeps float32 copies and Adam's moments in flat tensors of its own: whole ones without ZeRO, a part per
process with it, on the GPU, on the host or on NVMe. `flats` goes through them on this process and says which stretch of
which parameter lies where, so that the same few lines gather weights, write a checkpoint and read one into any engine.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements `start`, ..., `start + size - 1` of a flattened parameter, kept from `offset` on in a flat tensor."""

    parameter: nn.Parameter
    start: int
    offset: int
    size: int

    def of(self, flat: Tensor) -> Tensor:
        """The view of these elements in the flat tensor or in one like it."""
        return flat.view(-1)[self.offset : self.offset + self.size]


@dataclass(frozen=True, slots=True)
class Flat:
    """A tensor that the optimizer steps: float32 values of stretches of parameters, and Adam's state of them."""

    values: Tensor
    state: dict[str, Any]
    stretches: tuple[Stretch, ...]


def is_sharded(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether each process holds other parts of the optimizer's state; else all hold all of it."""
    return isinstance(engine.optimizer, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer))


def flats(engine: deepspeed.DeepSpeedEngine, *, writes: bool = False) -> Iterator[Flat]:
    """What this process holds, one flat tensor after the other; views are good until the next is asked for.

    Adam's state is made where there is none yet, as its first step would make it.

    Args:
        engine: Any that `start_engine` makes.
        writes: Whether what is changed in the tensors must last, which costs a write if they lie on NVMe.
    """
    optimizer: Any = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    for number, (values, stretches) in enumerate(layout(optimizer)):
        with _swapped_in(optimizer, number, writes=writes):
            yield Flat(values, _adam_state(inner, values), tuple(stretches))


def layout(optimizer: Any) -> Iterator[tuple[Tensor, list[Stretch]]]:
    """The tensors that an engine's optimizer steps on this process, wherever they lie, and what each is made of."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for values, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            yield values, [s for s in (_third_stage_stretch(optimizer, p) for p in group) if s.size > 0]
    elif isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        halves = "bf16_groups" if isinstance(optimizer, BF16_Optimizer) else "bit16_groups"
        floats = "fp32_groups_flat_partition" if halves == "bf16_groups" else "single_partition_of_fp32_groups"
        for values, group in zip(getattr(optimizer, floats), getattr(optimizer, halves), strict=True):
            linked = ((p, p._hp_mapping) for p in group if p._hp_mapping is not None)
            yield (
                values,
                [
                    Stretch(p, m.lp_fragment_address.start, m.hp_fragment_address.start, m.hp_fragment_address.numel)
                    for p, m in linked
                ],
            )
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for halves, floats in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for half, values in zip(halves, floats, strict=True):
                yield values, [Stretch(half, 0, 0, half.numel())]
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, [Stretch(parameter, 0, 0, parameter.numel())]


def _third_stage_stretch(optimizer: Any, parameter: Any) -> Stretch:
    """ZeRO-3 cuts each parameter into equal parts; the last ranks' may reach beyond its end."""
    _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * optimizer._get_param_partition_rank(parameter)
    return Stretch(parameter, start, offset, min(size, parameter.ds_numel - start))


def _adam_state(inner: torch.optim.Optimizer, values: Tensor) -> dict[str, Any]:
    state = inner.state[values]
    if not state:
        state[STEP] = torch.zeros((), dtype=torch.float32, device=values.device)
        state.update((name, torch.zeros_like(values)) for name in MOMENTS)
    return state


@contextlib.contextmanager
def _swapped_in(optimizer: Any, number: int, *, writes: bool) -> Iterator[None]:
    """Read a flat tensor from NVMe, if it lies there, and write it back if it changes."""
    if not (isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and optimizer._swappable_optimizer_subgroup(number)):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(number)
    yield
    if writes:
        optimizer._optimizer_states_and_gradient_swap_out(number)
    else:
        optimizer._release_swap_buffers(number)


def elements(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where ZeRO-3 leaves a part of it here."""
    return getattr(parameter, "ds_numel", parameter.numel())


def full_weights(engine: deepspeed.DeepSpeedEngine, *modules: nn.Module) -> list[dict[str, Tensor]]:
    """Complete weights of modules in float32 on the CPU of rank 0; every process must call this.

    Trained parameters come from the optimizer's float32 copies, frozen ones and buffers from the module, sharded ones
    from all ranks. Tied weights appear once.

    Args:
        engine: The engine that holds the modules.
        modules: Parts of the engine's module.

    Returns:
        For each module its weights by name within it; empty on other ranks.
    """
    held: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    if engine.global_rank == 0 or is_sharded(engine):
        for flat in flats(engine):
            for s in flat.stretches:
                held[id(s.parameter)].append((s.start, s.of(flat.values.detach()).to("cpu", copy=True)))
    _check_whole(engine, sum(values.numel() for parts in held.values() for _, values in parts))
    return [_full_weights(engine, module, held) for module in modules]


def _full_weights(
    engine: deepspeed.DeepSpeedEngine, module: nn.Module, held: dict[int, list[tuple[int, Tensor]]]
) -> dict[str, Tensor]:
    first, collects = engine.global_rank == 0, is_sharded(engine) and dist.get_world_size() > 1
    weights: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            with _gathered(parameter):
                if first:
                    weights[name] = parameter.detach().float().cpu().clone()
        elif first or collects:
            full = torch.zeros(elements(parameter))
            for start, values in held[id(parameter)]:
                full[start : start + values.numel()] = values
            if collects:
                full = full.to(engine.device)
                dist.reduce(full, 0)  # of each element all ranks but one have a zero
            if first:
                weights[name] = full.cpu().view(getattr(parameter, "ds_shape", parameter.shape))
    if first:
        weights.update((name, buffer.detach().cpu().clone()) for name, buffer in persistent_buffers(module))
    return weights


def _check_whole(engine: deepspeed.DeepSpeedEngine, held: int) -> None:
    """Rather stop than take an element that nobody holds for a zero."""
    expected = sum(elements(p) for p in engine.parameters() if p.requires_grad)
    if is_sharded(engine) and dist.get_world_size() > 1:
        total = torch.tensor(held, device=engine.device)
        dist.all_reduce(total)
        held = int(total)
    if engine.global_rank == 0 and held != expected:
        raise RuntimeError(
            f"the optimizer holds {held} of {expected} trained elements: this DeepSpeed keeps others elsewhere"
        )


def persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to the state dict."""
    names = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in names]


def _gathered(parameter: nn.Parameter) -> contextlib.AbstractContextManager:
    return deepspeed.zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else contextlib.nullcontext()


_SCALER = {"scale": "cur_scale", "steps": "cur_iter", "last_overflow": "last_overflow_iter"}
"""What a dynamic loss scale consists of, and what DeepSpeed calls it with ZeRO and without."""


def loss_scaling(engine: deepspeed.DeepSpeedEngine) -> dict[str, float] | None:
    """The state of a dynamic loss scale; None if there is none."""
    scaler = _dynamic_scaler(engine)
    if scaler is None:
        return None
    state = {name: getattr(scaler, attribute) for name, attribute in _SCALER.items()}
    return state | ({"hysteresis": scaler.cur_hysteresis} if hasattr(scaler, "cur_hysteresis") else {})


def set_loss_scaling(engine: deepspeed.DeepSpeedEngine, state: dict[str, float] | None) -> None:
    """Go on with a loss scale; nothing if the engine has none, or if there was none before."""
    scaler = _dynamic_scaler(engine)
    if scaler is None or state is None:
        return
    for name, attribute in _SCALER.items():
        setattr(scaler, attribute, state[name])
    if hasattr(scaler, "cur_hysteresis") and "hysteresis" in state:
        scaler.cur_hysteresis = state["hysteresis"]


def _dynamic_scaler(engine: deepspeed.DeepSpeedEngine) -> Any:
    optimizer = engine.optimizer
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    return scaler if getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False) else None
