"""Documents packed into one row that do not see each other: borders, positions, and attention within them.

A model is handed the borders in place of its attention mask, and hands them down to the attention function as it
would a mask. On a GPU in half precision attention then runs over documents of any length one after the other (flash
attention), in memory that grows with the length of a row and not with its square, local windows included. Elsewhere
a mask is made anew in each layer: (B, 1, L, L) booleans, one layer's at a time. Padding counts as one more document.

Letters in shapes: B rows, L length, H heads, D width per head, M documents.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import MODEL_MAPPING, PreTrainedConfig

from dsdistill.core import Batch, document_borders
from dsdistill.models.families import family_of, first_position

FLASH_WIDTH = 256
"""The widest head of flash attention; widths are multiples of 8."""


def borders_of(batch: Batch) -> Tensor:
    """Where documents begin, as `core.Batch.borders`; found on the device if the batch does not say (one sync)."""
    assert batch.segments is not None
    return document_borders(batch.segments, batch.mask) if batch.borders is None else batch.borders


def positions_of(segments: Tensor, config: PreTrainedConfig) -> Tensor:
    """Position ids that begin anew in each document, as if it stood alone in its row; int64 (B, L)."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return index - torch.where(begins, index, 0).cummax(1).values + first_position(config)


def isolation_problem(config: PreTrainedConfig) -> str | None:
    """Why a family's documents cannot be kept apart in a packed row, or None if they can."""
    encoder = MODEL_MAPPING.get(type(config), None)
    encoder = encoder[0] if isinstance(encoder, tuple) else encoder
    if encoder is None:
        return None  # code that came with the model, which tells at its first forward
    family = family_of(config)
    if not family.isolates or not (encoder._supports_attention_backend or family.own_attention):
        reason = "keeps attention code of its own, which knows no documents"
    elif "position_ids" not in inspect.signature(encoder.forward).parameters:
        reason = "takes no position ids, which have to begin anew in each document"
    else:
        return None
    return (
        f"corpus.isolate: {config.model_type} {reason}; prepare the corpus with rows: document, or drop corpus.isolate"
    )


def attend_within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Attention in which no document sees another.

    Args:
        query: (B, H, L, D).
        key: The same, or fewer heads that divide H.
        value: As `key`.
        borders: int32 (M + 1,), see `core.Batch.borders`.
        scaling: Factor on products; D^-0.5 if None.
        dropout: Share of the attention weights that are dropped.
        window: Largest |i - j| that attends; None for all.

    Returns:
        (B, L, H, D).
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    if runs_flash(query, dropout):
        B, H, L, D = query.shape
        q, k, v = (tensor.transpose(1, 2).reshape(B * L, H, D) for tensor in (query, key, value))
        bounds = (-1, -1) if window is None else (window, window)
        output = varlen_attn(q, k, v, borders, borders, L, L, scale=scaling, window_size=bounds)
        assert isinstance(output, Tensor)  # nothing more was asked for
        return output.view(B, L, H, D)
    mask = same_document(borders, query.shape[0], query.shape[2], window)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    ).transpose(1, 2)


def runs_flash(query: Tensor, dropout: float) -> bool:
    """Whether attention runs without any mask: torch's public function has no dropout, and only half types."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and dropout == 0
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= FLASH_WIDTH
    )


def same_document(borders: Tensor, rows: int, length: int, window: int | None) -> Tensor:
    """Who may attend to whom, bool (B, 1, L, L)."""
    index = torch.arange(rows * length, device=borders.device, dtype=borders.dtype)
    document = torch.bucketize(index, borders, right=True).view(rows, 1, length)
    allowed = document[..., :, None] == document[..., None, :]
    if window is not None:
        place = index[:length]
        allowed = allowed & ((place[:, None] - place[None, :]).abs() <= window)
    return allowed
