"""What the code knows about the insides of encoder families; everything else asks here.

Transformers 5 tells, on every model class, which module is a layer (`_can_record_outputs`), so a family that routes
its attention through the attention interface needs no entry of its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dsdistill.core import ModelShape


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """Sizes of a model, from its config."""
    return ModelShape(
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
    )


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its task head; the model itself where it has none."""
    return getattr(model, model.base_model_prefix, model)


def layer_class(model: PreTrainedModel) -> type[nn.Module]:
    """The class whose outputs are the hidden states of the layers.

    Raises:
        ValueError: If this family does not say.
    """
    recorded = (encoder_of(model)._can_record_outputs or {}).get("hidden_states")
    recorded = recorded[0] if isinstance(recorded, (list, tuple)) else recorded
    found = getattr(recorded, "target_class", recorded)
    if not isinstance(found, type):
        raise ValueError(f"{type(model).__name__} does not declare its layer class; this family is not supported")
    return found


def layer_list(model: PreTrainedModel) -> nn.ModuleList | None:
    """The list that holds layers 1..N in order, or None where layers share weights (ALBERT)."""
    encoder, wanted = encoder_of(model), layer_class(model)
    for module in encoder.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == encoder.config.num_hidden_layers
            and all(isinstance(layer, wanted) for layer in module)
        ):
            return module
    return None


POSITIONS_AFTER_PADDING = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer"})
"""Families that count positions from `pad_token_id + 1`, so that fewer tokens fit than there are embeddings."""


def max_length(config: PreTrainedConfig) -> int | None:
    """The longest row the model has positions for, or None if it has no such limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in POSITIONS_AFTER_PADDING:
        return positions - config.pad_token_id - 1
    return positions


def keep_layers(config: PreTrainedConfig, layers: tuple[int, ...]) -> None:
    """Make a config describe a model of just these layers (1..N) of the model it describes now."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = [kinds[layer - 1] for layer in layers]
    config.num_hidden_layers = len(layers)


def truncate(model: PreTrainedModel, depth: int) -> None:
    """Drop the layers above `depth`, in place; models with shared layers just run fewer times."""
    config, layers = encoder_of(model).config, layer_list(model)
    if depth >= config.num_hidden_layers:
        return
    if layers is None and getattr(config, "num_hidden_groups", 1) > 1:
        return  # ALBERT spreads its groups over the depth: a shallower model would run other weights
    if layers is not None:
        del layers[depth:]
    keep_layers(config, tuple(range(1, depth + 1)))


def drop_pooler(model: PreTrainedModel) -> None:
    """Remove the pooler, in place; the families that have one run without it."""
    encoder: Any = encoder_of(model)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
