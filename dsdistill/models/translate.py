"""Weights of one family for a model of another, where both are built as BERT is: by way of BERT's names.

Such families add and normalise in the same places, so that layers mean the same. What differs is kept in step: rows of
the position table are counted from a text's first token; what a teacher does not have adds nothing to the student (its
token types, position biases start at zero); token type 0, which a teacher adds everywhere, goes into the positions of
a student without token types. A teacher's position bias has no counterpart in families without one, and is lost.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from dsdistill.models.families import FAMILIES, encoder_of, family_of, first_position, max_length, neurons_of

POSITIONS = "embeddings.position_embeddings.weight"
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
ADDED = (TOKEN_TYPES, "embeddings.task_type_embeddings.weight", "encoder.relative_attention_bias.weight")
"""What is added where a family has it."""

CARRIED = (
    *("hidden_act", "layer_norm_eps", "initializer_range", "id2label", "label2id", "problem_type"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"),
)
"""Settings that mean the same in all families, and go over where both have them."""


def config_in_family(teacher: PreTrainedConfig, model_type: str, num_layers: int) -> PreTrainedConfig:
    """The config of a model of another family with the teacher's sizes, vocabulary and longest row.

    Raises:
        ValueError: If there is no such family.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"student.family={model_type!r} is none of transformers'; known here: {', '.join(FAMILIES)}")
    kind: Any = CONFIG_MAPPING[model_type]
    sizes = {name: getattr(teacher, name) for name in ("vocab_size", "hidden_size", "num_attention_heads")} | {
        "num_hidden_layers": num_layers
    }
    defaults = kind()
    sizes["intermediate_size" if hasattr(defaults, "intermediate_size") else "hidden_dim"] = neurons_of(teacher)
    if hasattr(defaults, "embedding_size"):
        sizes["embedding_size"] = getattr(teacher, "embedding_size", teacher.hidden_size)
    for name in CARRIED:
        if hasattr(defaults, name) and hasattr(teacher, name):
            sizes[name] = copy.deepcopy(getattr(teacher, name))
    config = kind(**sizes)
    longest = max_length(teacher)
    if longest is not None and hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = longest + first_position(config)
    return config


def check_translates(teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Refuse families between which weights cannot go.

    Raises:
        ValueError: Names the family that is not built as BERT is.
    """
    for config in (teacher, student):
        if family_of(config).names is None:
            raise ValueError(
                f"student.init: weights of {teacher.model_type} layers mean something else in {student.model_type}, "
                f"since {config.model_type} is not built as BERT is; use init: random"
            )


def bert_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's weights under BERT's names, positions counted from the first token."""
    config = encoder_of(model).config
    weights = {bert_name(model, name): tensor for name, tensor in model.state_dict().items()}
    if POSITIONS in weights:
        weights[POSITIONS] = weights[POSITIONS][first_position(config) :]
    return weights


def bert_name(model: PreTrainedModel, name: str) -> str:
    """What a weight is called in BERT, without the name of the encoder before it."""
    name = name.removeprefix(f"{model.base_model_prefix}.")
    for here, there in family_of(encoder_of(model).config).names or ():
        name = name.replace(here, there)
    return name


def load_bert_weights(student: PreTrainedModel, weights: dict[str, Tensor]) -> list[str]:
    """Copy weights with BERT's names into a model of the same sizes.

    Returns:
        Names of the student's weights that there are none for, and which keep what they had.

    Raises:
        ValueError: If shapes differ.
    """
    own = student.state_dict(keep_vars=True)
    wanted = {bert_name(student, name): (name, tensor) for name, tensor in own.items()}
    if TOKEN_TYPES in weights and TOKEN_TYPES not in wanted and POSITIONS in weights:
        weights = weights | {POSITIONS: weights[POSITIONS] + weights[TOKEN_TYPES][0]}
    first, absent = first_position(encoder_of(student).config), {}
    for name, (own_name, tensor) in wanted.items():
        target = tensor.data[first:] if name == POSITIONS else tensor.data
        if name in weights:
            if target.shape != weights[name].shape:
                raise ValueError(
                    f"{own_name} has shape {tuple(weights[name].shape)} in the teacher and {tuple(target.shape)} in "
                    "the student; use init: random, or student.resize for a narrower student"
                )
            target.copy_(weights[name])
        elif name in ADDED:
            target.zero_()
        else:
            absent[own_name] = tensor
    given = {id(tensor) for name, (_, tensor) in wanted.items() if name in weights}
    return [name for name, tensor in absent.items() if id(tensor) not in given]  # a tied one goes by two names
