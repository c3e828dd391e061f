"""Attention of families that do not use transformers' attention interface, written anew: recorded, and through SDPA.

`use_recorded_attention` gives the modules of a model these classes in place of their own; weights and numbers stay.
What such a family adds to its scores because of positions is handed to SDPA as a bias, and recorded with queries and
keys: together they are the scores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

from dsdistill.models.recorder import biased_attention


class RecordedMPNetAttention(MPNetSelfAttention):
    """MPNet's attention: one learned number per head and distance is added to the scores."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (attention maps are never built)
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, **_: Any
    ) -> tuple[Tensor]:
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v))
        context = biased_attention(
            query,
            key,
            value,
            bias=position_bias,
            mask=attention_mask,
            scaling=self.attention_head_size**-0.5,
            dropout=self.dropout.p if self.training else 0.0,
        )
        return (self.o(context),)


class RecordedMPNetEncoder(MPNetEncoder):
    """MPNet's layers with one position bias for all rows of a batch, computed on the device."""

    def compute_position_bias(self, x: Tensor, position_ids: Tensor | None = None, num_buckets: int = 32) -> Tensor:
        if position_ids is not None:
            return super().compute_position_bias(x, position_ids, num_buckets)
        position = torch.arange(x.shape[1], device=x.device)
        bucket = mpnet_bucket(position[None, :] - position[:, None], num_buckets)
        return self.relative_attention_bias(bucket).permute(2, 0, 1)[None]


def mpnet_bucket(distance: Tensor, num_buckets: int, max_distance: int = 128) -> Tensor:
    """Which of MPNet's position biases belongs to a distance (key minus query), int64.

    Half of the buckets are for keys behind the query. Of each half, half are for single small distances, the others
    grow logarithmically up to `max_distance` (T5, arXiv:1910.10683).
    """
    behind = num_buckets // 2
    single = behind // 2
    far = distance.abs()
    growth = torch.log(far.float() / single) / math.log(max_distance / single) * (behind - single)
    grown = (single + growth.to(torch.int64)).clamp(max=behind - 1)
    return torch.where(far < single, far, grown) + torch.where(distance > 0, behind, 0)


RECORDED: dict[type[nn.Module], type[nn.Module]] = {
    MPNetSelfAttention: RecordedMPNetAttention,
    MPNetEncoder: RecordedMPNetEncoder,
}
"""Modules of transformers, and what stands for them."""


def use_recorded_attention(model: nn.Module) -> None:
    """Give the modules of a model that keep attention code of their own the classes of this file, in place."""
    for module in model.modules():
        if type(module) in RECORDED:
            module.__class__ = RECORDED[type(module)]
