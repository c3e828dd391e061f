"""Records queries, keys, values, hidden states and logits of the wanted layers in one ordinary forward.

Attention goes through transformers' attention interface: the function registered here notes q, k and v, then calls
SDPA as usual, so the model runs at full speed and no attention map is built. Layers are counted in the order of
their calls, which is why one hook serves all families, shared layers included. The recorder is a global that the
forward sets: `torch.compile(fullgraph=True)` traces that, and a recomputed forward (activation checkpointing) finds
no recorder and records nothing. When nothing more is wanted the forward is left by an exception, so that neither the
layers above nor the rest of the last layer run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dsdistill.core import Batch, Features, Signal
from dsdistill.models.documents import attend_within, borders_of, positions_of
from dsdistill.models.families import encoder_of, layer_class, layer_list

ATTENTION = "dsdistill"
"""Name of the attention implementation to load models with."""

Wanted = Mapping[Signal, Collection[int]]
"""Layers by signal; logits under layer -1."""


class _Enough(Exception):  # noqa: N818 (no error)
    """Leaves a forward whose remaining results nobody wants."""


class _Recorder:
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
        if layer in self.wanted.get(signal, ()):
            self.signals[signal][layer] = tensor

    def put_attention(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> None:
        self.attention_calls += 1
        layer = self.attention_calls
        self.put("query", layer, query)
        self.put("key", layer, key)
        self.put("value", layer, value)
        self.scaling[layer] = query.shape[-1] ** -0.5 if scaling is None else scaling
        if window is not None:
            self.windows[layer] = window
        if self.end == ("attention", layer):
            raise _Enough


_recorder: _Recorder | None = None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    # transformers hands flash attention's exclusive bound down: a query sees keys at |i - j| <= sliding_window - 1
    window = kwargs.get("sliding_window")
    window = None if window is None else window - 1
    if _recorder is not None:
        _recorder.put_attention(query, key, value, kwargs.get("scaling"), window)
    if attention_mask is not None and attention_mask.ndim == 1:
        options = {"scaling": kwargs.get("scaling"), "dropout": kwargs.get("dropout", 0.0), "window": window}
        return attend_within(query, key, value, attention_mask, **options), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """SDPA's mask, without asking the device whether a mask that we were given hides anything.

    Where nothing is to be hidden there is none, also under `torch.compile`, which would otherwise be handed a mask of
    True everywhere and leave flash attention for it. Borders of documents, which stand in a mask's place, stay.
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
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _attention_mask)


def _before_layer(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if _recorder is not None and _recorder.layer_calls == 0:
        _recorder.put("hidden", 0, args[0] if args else kwargs["hidden_states"])


def _after_layer(_module: nn.Module, _args: tuple, output: Any) -> None:
    if _recorder is not None:
        _recorder.layer_calls += 1
        _recorder.put("hidden", _recorder.layer_calls, output[0] if isinstance(output, tuple) else output)
        if _recorder.end == ("layer", _recorder.layer_calls):
            raise _Enough


def _after_encoder(_module: nn.Module, _args: tuple, output: Any) -> Any:
    """Between encoder and head: the head sees the chosen positions only, as one row of N."""
    if _recorder is None:
        return output
    if _recorder.last_layer is not None:
        _recorder.put("hidden", _recorder.last_layer, output.last_hidden_state)
    if _recorder.targets is None:
        return output
    chosen = output.last_hidden_state.flatten(0, 1).index_select(0, _recorder.targets)
    return type(output)(last_hidden_state=chosen.unsqueeze(0))


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned the weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


class Captured(nn.Module):
    """A transformers encoder whose forward returns `Features`.

    Hidden states are the outputs of the layers. At the model's own last layer it is `last_hidden_state`, which in
    pre-norm models (ModernBERT) has passed the final norm.

    Args:
        model: Loaded with `attn_implementation=ATTENTION`.
        wanted: What to record; the head runs only if logits are wanted, and then at `Batch.targets`.
        full_depth: Layers of the complete model, if `model` has been truncated.
    """

    def __init__(self, model: PreTrainedModel, wanted: Wanted, *, full_depth: int | None = None):
        super().__init__()
        if encoder_of(model).config._attn_implementation != ATTENTION:
            raise ValueError(f"{type(model).__name__} must be loaded with attn_implementation={ATTENTION!r}")
        self.model = model
        self.wanted: Wanted = {signal: tuple(sorted(layers)) for signal, layers in wanted.items() if layers}
        self.num_layers = encoder_of(model).config.num_hidden_layers
        self.last_layer = self.num_layers if full_depth in (None, self.num_layers) else None
        self.takes_token_types = getattr(model.config, "type_vocab_size", 0) > 1
        if any(layer > self.num_layers for layers in self.wanted.values() for layer in layers):
            raise ValueError(f"wanted layers {self.wanted} exceed the model's {self.num_layers}")
        self.end = self._end()
        target = layer_class(model)
        for module in model.modules():
            if isinstance(module, target):
                module.register_forward_pre_hook(_before_layer, with_kwargs=True)
                module.register_forward_hook(_after_layer)
        encoder_of(model).register_forward_hook(_after_encoder)

    def compile_forward(self) -> None:
        """Compile the forward, capture included, into one graph; each new shape of a batch costs minutes once.

        Dropout draws as it does without compilation: the compiler's own draws cost more than they save.
        """
        self.compile(fullgraph=True, dynamic=False, options={"fallback_random": True})

    def _end(self) -> tuple[str, int] | None:
        """Where a forward has everything: in the attention of a layer, after a layer, or None for the very end."""
        attention = max((max(self.wanted[s]) for s in ("query", "key", "value") if s in self.wanted), default=0)
        hidden = max(self.wanted.get("hidden", (0,)))
        if "logits" in self.wanted or hidden == self.num_layers or attention == hidden == 0:
            return None
        return ("attention", attention) if attention > hidden else ("layer", hidden)

    def exempt_from_checkpointing(self) -> None:
        """Run captured layers without activation checkpointing; ZeRO-3 cannot recompute a captured layer."""
        captured = {layer for signal, layers in self.wanted.items() if signal != "logits" for layer in layers}
        layers = layer_list(self.model)
        if layers is None:
            raise ValueError(f"{type(self.model).__name__} shares its layers and cannot exempt some from checkpointing")
        for layer in captured - {0}:
            setattr(layers[layer - 1], "gradient_checkpointing", False)  # noqa: B010 (no tensor, whatever the type says)

    def forward(self, batch: Batch) -> Features:
        """Run the model on a batch.

        Returns:
            The wanted signals, in the model's dtype.

        Raises:
            RuntimeError: If the model's attention did not pass through the interface once per layer.
        """
        global _recorder
        wants_logits = "logits" in self.wanted
        inputs: dict[str, Tensor] = {"input_ids": batch.input_ids}
        if batch.segments is not None:
            inputs["attention_mask"] = borders_of(batch)
            inputs["position_ids"] = positions_of(batch.segments, encoder_of(self.model).config)
        elif batch.padded:
            inputs["attention_mask"] = batch.mask
        if self.takes_token_types and batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        # ZeRO-3 releases a module's weights after its forward, which therefore has to end
        end = None if is_sharded(self.model) else self.end
        targets = batch.targets if wants_logits else None
        recorder = _recorder = _Recorder(self.wanted, targets, self.last_layer, end)
        output: Any = None
        try:
            output = (self.model if wants_logits else encoder_of(self.model))(**inputs)
        except _Enough:
            pass
        finally:
            _recorder = None
        expected = self.num_layers if end is None else end[1]
        if recorder.attention_calls != expected:
            raise RuntimeError(
                f"{type(self.model).__name__} made {recorder.attention_calls} calls of the attention interface in "
                f"{expected} layers; this family keeps attention code of its own and cannot be captured"
            )
        if wants_logits:
            logits = output.logits
            recorder.put("logits", -1, logits.squeeze(0) if batch.targets is not None else logits)
        return Features(signals=recorder.signals, scaling=recorder.scaling, windows=recorder.windows)
