"""What the code knows about the insides of encoder families; everything else asks here.

Transformers 5 tells, on every model class, which module is a layer (`_can_record_outputs`), so a family that routes
its attention through the attention interface needs no entry of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dsdistill.core import ModelShape, Signal

Wanted = Mapping[Signal, Collection[int]]
"""Layers by signal; logits under layer -1."""


Names = tuple[tuple[str, str], ...]

LM_HEAD: Names = (
    ("lm_head.dense.", "cls.predictions.transform.dense."),
    ("lm_head.layer_norm.", "cls.predictions.transform.LayerNorm."),
    ("lm_head.decoder.", "cls.predictions.decoder."),
    ("lm_head.bias", "cls.predictions.bias"),
)
"""RoBERTa's masked-LM head, which several families share."""

PROJ = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the code knows about one family.

    Attributes:
        title: Its name for people.
        tested: The class that the tests build.
        own_attention: Whether it does not use the attention interface; `own_attention.py` then has its attention.
        bias: What its attention adds to the scores, in words; None if they are scaled products only.
        layer: Name of the class of its layers, where the model class does not say.
        after_first_layer: Name of the class of a module that makes the first layer's hidden state, if a model has one.
        needs_mask: Whether it must always be given a mask, of integers: without one it asks the device for padding.
        isolates: Whether documents packed into one row can be kept apart.
        names: Where it is built as BERT is, what its weights are called: (here, in BERT), parts of names, replaced one
            after the other; empty where they are called the same. None: weights go to no other family.
        projections: Names of the query, key and value projections of an attention module, called in this order on one
            tensor, so that a frozen model can join them; empty where it does so itself or calls them otherwise.
        first_position: Position id of a row's first token; None if it is `pad_token_id + 1`. So many tokens fewer fit
            than there are position embeddings.
    """

    title: str
    tested: str
    own_attention: bool = False
    bias: str | None = None
    layer: str | None = None
    after_first_layer: str | None = None
    needs_mask: bool = False
    isolates: bool = True
    names: Names | None = None
    projections: tuple[str, ...] = ("query", "key", "value")
    first_position: int | None = 0


FAMILIES: dict[str, Family] = {
    "albert": Family(title="ALBERT", tested="AlbertForMaskedLM"),
    "bert": Family(title="BERT", tested="BertForMaskedLM", names=()),
    "camembert": Family(title="CamemBERT", tested="CamembertForMaskedLM", names=LM_HEAD, first_position=None),
    "data2vec-text": Family(
        title="data2vec-text", tested="Data2VecTextForMaskedLM", names=LM_HEAD, first_position=None
    ),
    "deberta-v2": Family(
        title="DeBERTa-v2, -v3",
        tested="DebertaV2ForMaskedLM",
        own_attention=True,
        bias="products of content and position",
        layer="DebertaV2Layer",
        after_first_layer="ConvLayer",
        needs_mask=True,
        isolates=False,
        projections=(),
    ),
    "distilbert": Family(
        title="DistilBERT",
        tested="DistilBertForMaskedLM",
        names=(
            ("transformer.layer.", "encoder.layer."),
            (".attention.q_lin.", ".attention.self.query."),
            (".attention.k_lin.", ".attention.self.key."),
            (".attention.v_lin.", ".attention.self.value."),
            (".attention.out_lin.", ".attention.output.dense."),
            (".sa_layer_norm.", ".attention.output.LayerNorm."),
            (".ffn.lin1.", ".intermediate.dense."),
            (".ffn.lin2.", ".output.dense."),
            (".output_layer_norm.", ".output.LayerNorm."),
            ("vocab_transform.", "cls.predictions.transform.dense."),
            ("vocab_layer_norm.", "cls.predictions.transform.LayerNorm."),
            ("vocab_projector.weight", "cls.predictions.decoder.weight"),
            ("vocab_projector.bias", "cls.predictions.bias"),
        ),
        projections=("q_lin", "k_lin", "v_lin"),
    ),
    "electra": Family(
        title="ELECTRA",
        tested="ElectraForMaskedLM",
        names=(
            ("generator_predictions.dense.", "cls.predictions.transform.dense."),
            ("generator_predictions.LayerNorm.", "cls.predictions.transform.LayerNorm."),
            ("generator_lm_head.weight", "cls.predictions.decoder.weight"),
            ("generator_lm_head.bias", "cls.predictions.bias"),
        ),
    ),
    "ernie": Family(title="ERNIE", tested="ErnieForMaskedLM", names=()),
    "eurobert": Family(title="EuroBERT", tested="EuroBertForMaskedLM", projections=PROJ),
    "gte": Family(title="GTE", tested="GteForMaskedLM", projections=PROJ),
    "modernbert": Family(title="ModernBERT", tested="ModernBertForMaskedLM", projections=()),
    "mpnet": Family(
        title="MPNet",
        tested="MPNetForMaskedLM",
        own_attention=True,
        bias="a learned number per head and distance",
        layer="MPNetLayer",
        names=(
            (".attention.attn.q.", ".attention.self.query."),
            (".attention.attn.k.", ".attention.self.key."),
            (".attention.attn.v.", ".attention.self.value."),
            (".attention.attn.o.", ".attention.output.dense."),
            (".attention.LayerNorm.", ".attention.output.LayerNorm."),
            *LM_HEAD,
        ),
        projections=("q", "k", "v"),
        first_position=2,
    ),
    "nomic_bert": Family(title="NomicBERT", tested="NomicBertForMaskedLM", projections=PROJ),
    "roberta": Family(title="RoBERTa", tested="RobertaForMaskedLM", names=LM_HEAD, first_position=None),
    "xlm-roberta": Family(title="XLM-R", tested="XLMRobertaForMaskedLM", names=LM_HEAD, first_position=None),
    "xlm-roberta-xl": Family(title="XLM-R XL", tested="XLMRobertaXLForMaskedLM", first_position=None),
}
"""By `model_type`. Families that use the attention interface and tell their layers need no entry."""

ANY = Family(title="any other that uses the attention interface", tested="RoCBertForMaskedLM", projections=())
"""What is assumed of a family without an entry."""


def family_of(config: PreTrainedConfig) -> Family:
    """What the code knows about the family of a model."""
    return FAMILIES.get(config.model_type, ANY)


def added_to_scores(config: PreTrainedConfig) -> str | None:
    """What such a model adds to its attention scores, in words; None if they are scaled products only."""
    return family_of(config).bias if getattr(config, "relative_attention", True) else None


def available(config: PreTrainedConfig, wanted: Wanted) -> dict[Signal, tuple[int, ...]]:
    """The wanted signals that such a model has: all, except the bias where its attention adds none."""
    biased = added_to_scores(config) is not None
    return {
        signal: tuple(sorted(layers)) for signal, layers in wanted.items() if layers and (biased or signal != "bias")
    }


def shares_keys(config: PreTrainedConfig) -> bool:
    """Whether such a model can let several queries share a key and a value (grouped heads)."""
    return hasattr(config, "num_key_value_heads")


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """Sizes of a model, from its config."""
    return ModelShape(
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_heads=(shares_keys(config) and config.num_key_value_heads) or config.num_attention_heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
    )


def neurons_of(config: PreTrainedConfig) -> int | None:
    """Width of the feed-forward parts, which DistilBERT has a name of its own for; None if the config does not tell."""
    return getattr(config, "hidden_dim" if config.model_type == "distilbert" else "intermediate_size", None)


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its task head; the model itself where it has none."""
    return getattr(model, model.base_model_prefix, model)


def layer_class(model: PreTrainedModel) -> type[nn.Module]:
    """The class whose outputs are the hidden states of the layers.

    Raises:
        ValueError: If this family does not say.
    """
    named = family_of(encoder_of(model).config).layer
    if named is not None:
        return next(type(module) for module in model.modules() if type(module).__name__ == named)
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


def hidden_state_modules(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules whose inputs, and those whose outputs, are hidden states of the layers, each called once a layer."""
    wanted, named = layer_class(model), family_of(encoder_of(model).config).after_first_layer
    layers = [module for module in model.modules() if isinstance(module, wanted)]
    instead_of_first = [module for module in model.modules() if type(module).__name__ == named]
    return layers, [*instead_of_first, *layers[len(instead_of_first) :]]


def first_position(config: PreTrainedConfig) -> int:
    """Position id of a row's first token."""
    first = family_of(config).first_position
    return config.pad_token_id + 1 if first is None else first


def max_length(config: PreTrainedConfig) -> int | None:
    """The longest row the model has positions for, or None if it has no such limit."""
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else positions - first_position(config)


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
