"""The gradient's norm by layer of the student, at every ZeRO stage, offloaded or not.

Taken where the optimizer's own step begins: there, and nowhere else in DeepSpeed, the gradients of all stages look
alike, reduced over the ranks, free of the loss scale, in float32, each rank holding the stretches that it steps.
"""

from __future__ import annotations

import math
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsdistill.models.families import encoder_of, layer_class, layer_list
from dsdistill.training.distiller import Distiller
from dsdistill.training.gradient_checks import norms
from dsdistill.training.optimizer_state import Stretch, is_sharded, layout


class LayerNorms:
    """Says the norms of a step's gradient by layer; costs something only in the steps that ask.

    Args:
        engine: Holds the `Distiller`. Every process must make its own.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        groups = parts_of(cast(Distiller, engine.module))
        trained = {groups[id(p)] for p in engine.parameters() if p.requires_grad}
        self.names = tuple(name for name in dict.fromkeys(groups.values()) if name in trained)
        number = {name: i for i, name in enumerate(self.names)}
        self.sharded = is_sharded(engine) and dist.get_world_size() > 1
        self.asked = False
        self.squares = torch.zeros(len(self.names), device=engine.device)
        self.stretches: dict[int, tuple[list[Stretch], Tensor]] = {}
        for flat, stretches in layout(engine.optimizer):
            found = [s for s in stretches if s.size]
            where = torch.tensor([number[groups[id(s.parameter)]] for s in found], dtype=torch.long)
            self.stretches[id(flat)] = found, where.to(engine.device)
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        cast(torch.optim.Optimizer, inner).register_step_pre_hook(self._note)

    def ask(self) -> None:
        """Take the norms of the step that follows."""
        self.asked = True

    def _note(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """ZeRO steps one flat tensor after the other: add up what is there now."""
        if not self.asked:
            return
        for flat in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            stretches, where = self.stretches[id(flat)]
            if stretches:
                found = torch.stack(norms([s.of(flat.grad) for s in stretches], 2, dtype=torch.float32))
                self.squares.index_add_(0, where, found.square().to(self.squares.device))

    def read(self, norm: float) -> dict[str, float]:
        """The norms since `ask`; every process must call this.

        Args:
            norm: Of the whole gradient before clipping, which the optimizer has done by then: layers are scaled so
                that their squares add up to its square.

        Returns:
            By tag; nothing if the step was skipped.
        """
        self.asked = False
        if self.sharded:
            dist.all_reduce(self.squares)
        squares = self.squares.double().cpu()  # sync
        self.squares.zero_()
        total = float(squares.sum())
        if not (total > 0 and math.isfinite(total) and math.isfinite(norm)):
            return {}
        layers = squares.sqrt() * (norm / math.sqrt(total))
        return {f"grad_norm/{name}": value for name, value in zip(self.names, layers.tolist(), strict=True)}


def parts_of(distiller: Distiller) -> dict[int, str]:
    """Which part of the student a parameter belongs to, by its id: `embeddings`, `layer_1`, ..., `head`, `projections`.

    Layers that share their weights are one, `layers`. What an encoder has beside its layers, such as a last norm,
    counts as `embeddings`; tied weights too.
    """
    model = distiller.student.model
    encoder, layers = encoder_of(model), layer_list(model)
    if layers is not None:
        parts: list[tuple[str, nn.Module]] = [(f"layer_{number}", layer) for number, layer in enumerate(layers, 1)]
    else:
        kind = layer_class(model)
        parts = [("layers", module) for module in encoder.modules() if isinstance(module, kind)]
    found: dict[int, str] = {}
    for name, module in (*parts, ("embeddings", encoder), ("head", model), ("projections", distiller)):
        for parameter in module.parameters():
            found.setdefault(id(parameter), name)
    return found
