"""Records queries, keys, values, hidden states and logits of the wanted layers in one ordinary forward.

Attention goes through transformers' attention interface: the function of `recorder.py` notes q, k and v, then calls
SDPA as usual, so the model runs at full speed and no attention map is built. Families with attention code of their own
get classes that do the same (`own_attention.py`). Layers are counted in the order of their calls, which is why one hook
serves all families, shared layers included. When nothing more is wanted the forward is left by an exception, so that
neither the layers above nor the rest of the last layer run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dsdistill.core import Batch, Features, Signal
from dsdistill.models.documents import borders_of, positions_of
from dsdistill.models.families import Wanted, available, encoder_of, family_of, hidden_state_modules, layer_list
from dsdistill.models.own_attention import use_recorded_attention
from dsdistill.models.recorder import ATTENTION, Enough, Recorder, record_with, recorder

__all__ = ["ATTENTION", "Captured", "Wanted", "is_sharded"]


INSIDE: tuple[Signal, ...] = ("query", "key", "value", "bias")
"""Signals that come from the inside of a layer."""


def _before_layer(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    found = recorder()
    if found is not None and found.layer_calls == 0:
        found.put("hidden", 0, args[0] if args else kwargs["hidden_states"])


def _after_layer(_module: nn.Module, _args: tuple, output: Any) -> None:
    found = recorder()
    if found is not None:
        found.layer_calls += 1
        found.put("hidden", found.layer_calls, output[0] if isinstance(output, tuple) else output)
        if found.end == ("layer", found.layer_calls):
            raise Enough


def _after_encoder(_module: nn.Module, _args: tuple, output: Any) -> Any:
    """Between encoder and head: the head sees the chosen positions only, as one row of N."""
    found = recorder()
    if found is None:
        return output
    if found.last_layer is not None:
        found.put("hidden", found.last_layer, output.last_hidden_state)
    if found.targets is None:
        return output
    chosen = output.last_hidden_state.flatten(0, 1).index_select(0, found.targets)
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
        use_recorded_attention(model)
        self.wanted: Wanted = available(encoder_of(model).config, wanted)
        self.num_layers = encoder_of(model).config.num_hidden_layers
        self.last_layer = self.num_layers if full_depth in (None, self.num_layers) else None
        self.takes_token_types = getattr(model.config, "type_vocab_size", 0) > 1
        if any(layer > self.num_layers for layers in self.wanted.values() for layer in layers):
            raise ValueError(f"wanted layers {self.wanted} exceed the model's {self.num_layers}")
        self.needs_mask = family_of(encoder_of(model).config).needs_mask
        self.end = self._end()
        self._hooks: list[RemovableHandle] = []
        self.hook_last()

    def hook_last(self) -> None:
        """Record what comes out of the hooks that modules have by now.

        ZeRO 3 hands a module's output on as another tensor, whose backward first gathers the module's weights.
        """
        for hook in self._hooks:
            hook.remove()
        inputs, outputs = hidden_state_modules(self.model)
        self._hooks = [module.register_forward_pre_hook(_before_layer, with_kwargs=True) for module in inputs]
        self._hooks += [module.register_forward_hook(_after_layer) for module in outputs]
        self._hooks.append(encoder_of(self.model).register_forward_hook(_after_encoder))

    def closed_layers(self) -> list[nn.Module]:
        """Layers that ZeRO 3 may gather whole: gradients enter them, if at all, through their output alone.

        Not those of whose inside something is recorded and trained; none where layers share weights.
        """
        trained = any(parameter.requires_grad for parameter in self.parameters())
        opened = {layer for signal in INSIDE for layer in self.wanted.get(signal, ())} if trained else set()
        return [m for i, m in enumerate(layer_list(self.model) or [], start=1) if i not in opened]

    def compile_forward(self) -> None:
        """Compile the forward, capture included, into one graph; each new shape of a batch costs minutes once.

        Dropout draws as it does without compilation: the compiler's own draws cost more than they save.
        """
        self.compile(fullgraph=True, dynamic=False, options={"fallback_random": True})

    @contextlib.contextmanager
    def recording(self, wanted: Wanted) -> Iterator[None]:
        """Within, record other signals, kernel by kernel, whether the forward has been compiled or not.

        Layers that do not run are left out. ZeRO-3 has seen which modules are called in which order: where it has
        partitioned the weights, logits that are wanted otherwise stay wanted.
        """
        before = self.wanted, self.end
        asked: dict[Signal, list[int]] = {
            signal: [layer for layer in layers if layer <= self.num_layers] for signal, layers in wanted.items()
        }
        if "logits" in self.wanted and is_sharded(self.model):
            asked["logits"] = [-1]
        self.wanted = available(encoder_of(self.model).config, asked)
        self.end = self._end()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.wanted, self.end = before

    def _end(self) -> tuple[str, int] | None:
        """Where a forward has everything: in the attention of a layer, after a layer, or None for the very end."""
        attention = max((max(self.wanted[s]) for s in INSIDE if s in self.wanted), default=0)
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
        wants_logits = "logits" in self.wanted
        inputs: dict[str, Tensor] = {"input_ids": batch.input_ids}
        if batch.segments is not None:
            inputs["attention_mask"] = borders_of(batch)
            inputs["position_ids"] = positions_of(batch.segments, encoder_of(self.model).config)
        elif self.needs_mask:
            inputs["attention_mask"] = batch.mask.long()
        elif batch.padded:
            inputs["attention_mask"] = batch.mask
        if self.takes_token_types and batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        # ZeRO-3 releases a module's weights after its forward, which therefore has to end
        end = None if is_sharded(self.model) else self.end
        targets = batch.targets if wants_logits else None
        record = Recorder(self.wanted, targets, self.last_layer, end)
        output: Any = None
        record_with(record)
        try:
            output = (self.model if wants_logits else encoder_of(self.model))(**inputs)
        except Enough:
            pass
        finally:
            record_with(None)
        expected = self.num_layers if end is None else end[1]
        if record.attention_calls != expected:
            raise RuntimeError(
                f"{type(self.model).__name__} made {record.attention_calls} calls of the attention interface in "
                f"{expected} layers; this family keeps attention code of its own and cannot be captured"
            )
        if wants_logits:
            logits = output.logits
            record.put("logits", -1, logits.squeeze(0) if batch.targets is not None else logits)
        return Features(signals=record.signals, scaling=record.scaling, windows=record.windows)
