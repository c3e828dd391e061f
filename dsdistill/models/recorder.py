"""What one forward has recorded, and the attention function that notes queries, keys and values and runs SDPA.

The recorder is a global that the forward sets: `torch.compile(fullgraph=True)` traces that, and a recomputed forward
(activation checkpointing) finds no recorder and records nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dsdistill.core import Signal
from dsdistill.models.documents import attend_within, same_document
from dsdistill.models.families import Wanted, family_of

ATTENTION = "dsdistill"
"""Name of the attention implementation to load models with."""


class Enough(Exception):  # noqa: N818 (no error)
    """Leaves a forward whose remaining results nobody wants."""


class Recorder:
    """What one forward has recorded so far."""

    def __init__(self, wanted: Wanted, targets: Tensor | None, last_layer: int | None, end: tuple[str, int] | None):
        self.wanted = {signal: frozenset(layers) for signal, layers in wanted.items()}
        self.targets = targets
        self.last_layer = last_layer
        self.end = end
        self.attention_calls = 0
        self.layer_calls = 0
        self.signals: dict[Signal, dict[int, Tensor]] = {signal: {} for signal in wanted}
        self.scaling: dict[int, float] = {}
        self.windows: dict[int, int] = {}

    def put(self, signal: Signal, layer: int, tensor: Tensor) -> None:
        """Keep a tensor if it is wanted."""
        if layer in self.wanted.get(signal, ()):
            self.signals[signal][layer] = tensor

    def put_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Keep what the next layer's attention is computed from.

        Raises:
            Enough: If nothing more is wanted.
        """
        self.attention_calls += 1
        layer = self.attention_calls
        self.put("query", layer, query)
        self.put("key", layer, key)
        self.put("value", layer, value)
        if bias is not None:
            self.signals.setdefault("bias", {})  # says, where nobody wants it, that there is one
            self.put("bias", layer, bias)
        self.scaling[layer] = query.shape[-1] ** -0.5 if scaling is None else scaling
        if window is not None:
            self.windows[layer] = window
        if self.end == ("attention", layer):
            raise Enough


_recorder: Recorder | None = None


def recorder() -> Recorder | None:
    """Of the forward that runs now, or None if nobody captures."""
    return _recorder


def record_with(recorder: Recorder | None) -> None:
    """Let the forward that follows be recorded, or no longer."""
    global _recorder
    _recorder = recorder


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    # transformers hands flash attention's exclusive bound down: a query sees keys at |i - j| <= sliding_window - 1
    window = kwargs.get("sliding_window")
    window = None if window is None else window - 1
    if _recorder is not None:
        _recorder.put_attention(query, key, value, scaling=kwargs.get("scaling"), window=window)
    if attention_mask is not None and attention_mask.ndim == 1:
        options = {"scaling": kwargs.get("scaling"), "dropout": kwargs.get("dropout", 0.0), "window": window}
        return attend_within(query, key, value, attention_mask, **options), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Attention whose scores are `scaling * query @ key.T + bias`, recorded.

    Args:
        query: (B, H, L, D).
        key: The same.
        value: The same.
        bias: (B or 1, H, L, L), or None.
        mask: (B, 1, 1 or L, L), True where a query may attend, or added to the scores: 0 or the type's minimum; or the
            borders of documents, as in `core.Batch.borders`; None hides nothing.
        scaling: Factor on the products.
        dropout: Rate for the attention's probabilities.

    Returns:
        (B, L, H * D).
    """
    if _recorder is not None:
        _recorder.put_attention(query, key, value, scaling=scaling, bias=bias)
    if mask is not None and mask.ndim == 1:
        mask = same_document(mask, query.shape[0], query.shape[2], None)
    if mask is not None and mask.dtype is torch.bool and bias is not None:
        mask = additive(mask, bias.dtype)
    added = mask if bias is None else bias if mask is None else bias + mask.to(bias.dtype)
    context = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=added, dropout_p=dropout, scale=scaling
    )
    return context.transpose(1, 2).flatten(2)


def _attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """SDPA's mask, without asking the device whether a mask that we were given hides anything.

    Where nothing is to be hidden there is none, also under `torch.compile`, which would otherwise be handed a mask of
    True everywhere and leave flash attention for it. Borders of documents, which stand in a mask's place, stay. Models
    with attention code of their own add their mask.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 1:
        return mask
    if mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
    elif kwargs.get("allow_is_bidirectional_skip"):
        window = kwargs.get("local_size")
        if window is None or kwargs["kv_length"] < window:
            return None
    mask = sdpa_mask(*args, **kwargs)
    if mask is None or not family_of(kwargs["config"]).own_attention:
        return mask
    return additive(mask, kwargs["dtype"])


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores: 0 where True stood, elsewhere the type's minimum."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _attention_mask)
