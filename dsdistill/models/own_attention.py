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
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder, DisentangledSelfAttention
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


class RecordedDebertaAttention(DisentangledSelfAttention):
    """DeBERTa's attention: products of content and position, scaled as those of content, are added to the scores.

    He et al. 2021 (arXiv:2006.03654), equation 4; versions 2 and 3.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        query = self._heads(self.query_proj(hidden_states if query_states is None else query_states))
        key, value = self._heads(self.key_proj(hidden_states)), self._heads(self.value_proj(hidden_states))
        kinds = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
        scaling = (query.shape[-1] * kinds) ** -0.5
        bias = None
        if self.relative_attention:
            assert rel_embeddings is not None
            assert relative_pos is not None  # the encoder gives both
            bias = self._position_scores(query, key, relative_pos, self.pos_dropout(rel_embeddings)) * scaling
        context = biased_attention(
            query,
            key,
            value,
            bias=bias,
            # a padded query may attend like any other: a row of scores without a single key has no softmax
            mask=attention_mask.bool().diagonal(dim1=-2, dim2=-1)[:, :, None, :],
            scaling=scaling,
            dropout=self.dropout.p if self.training else 0.0,
        )
        return context, None

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

    def _position_scores(self, query: Tensor, key: Tensor, distance: Tensor, embeddings: Tensor) -> Tensor:
        """What positions add to the unscaled scores, (B, H, L, L); `distance` is int64 (1, L, L), query minus key."""
        span = self.pos_ebd_size
        embeddings = embeddings[None, : 2 * span]
        scores = query.new_zeros(())
        if "c2p" in self.pos_att_type:
            project = self.key_proj if self.share_att_key else self.pos_key_proj
            of_positions = query @ self._heads(project(embeddings)).transpose(-1, -2)
            place = (distance + span).clamp(0, 2 * span - 1)
            scores = scores + of_positions.gather(-1, place.expand(*of_positions.shape[:3], -1))
        if "p2c" in self.pos_att_type:
            project = self.query_proj if self.share_att_key else self.pos_query_proj
            of_positions = key @ self._heads(project(embeddings)).transpose(-1, -2)
            place = (span - distance).clamp(0, 2 * span - 1)
            scores = scores + of_positions.gather(-1, place.expand(*of_positions.shape[:3], -1)).transpose(-1, -2)
        return scores


class RecordedDebertaEncoder(DebertaV2Encoder):
    """DeBERTa's layers with distances computed on the device."""

    def get_rel_embedding(self) -> Tensor | None:
        """Looked up rather than taken: ZeRO-3 has the weights of a module only while that is called."""
        if not self.relative_attention:
            return None
        table = self.rel_embeddings
        embeddings = table(torch.arange(table.num_embeddings, device=table.weight.device))
        return self.LayerNorm(embeddings) if "layer_norm" in self.norm_rel_ebd else embeddings

    def get_rel_pos(
        self, hidden_states: Tensor, query_states: Tensor | None = None, relative_pos: Tensor | None = None
    ) -> Tensor | None:
        if not self.relative_attention or relative_pos is not None:
            return relative_pos
        position = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        distance = position[:, None] - position[None, :]
        return deberta_distance(distance, self.position_buckets, self.max_relative_positions)[None]


def deberta_distance(distance: Tensor, buckets: int, furthest: int) -> Tensor:
    """Distances (query minus key) as DeBERTa counts them, int64: small ones as they are, larger ones by logarithms.

    Args:
        distance: int64, any shape.
        buckets: Twice the distance up to which each counts; below 1, all do.
        furthest: The distance at which the logarithm reaches `buckets`.
    """
    if buckets < 1 or furthest < 1:
        return distance
    half = buckets // 2
    far = distance.abs().clamp(min=half - 1)
    whole = torch.log(torch.full((), (furthest - 1) / half, dtype=torch.float32, device=distance.device))
    grown = torch.ceil(torch.log(far / half) / whole * (half - 1)) + half
    return torch.where(far <= half, distance, (grown * distance.sign()).to(torch.int64))


RECORDED: dict[type[nn.Module], type[nn.Module]] = {
    MPNetSelfAttention: RecordedMPNetAttention,
    MPNetEncoder: RecordedMPNetEncoder,
    DisentangledSelfAttention: RecordedDebertaAttention,
    DebertaV2Encoder: RecordedDebertaEncoder,
}
"""Modules of transformers, and what stands for them."""


def use_recorded_attention(model: nn.Module) -> None:
    """Give the modules of a model that keep attention code of their own the classes of this file, in place."""
    for module in model.modules():
        if type(module) in RECORDED:
            module.__class__ = RECORDED[type(module)]
