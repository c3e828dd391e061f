"""Builds the student: a config with fewer layers, of the teacher's family or another, and weights of chosen layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from dsdistill.locate import Source
from dsdistill.models.capture import ATTENTION
from dsdistill.models.families import drop_pooler, encoder_of, keep_layers, layer_list, neurons_of
from dsdistill.models.loading import head_of, load_config, load_encoder
from dsdistill.models.resize import Resize, check_shrinks, resize_weights, sizes_of
from dsdistill.models.translate import bert_weights, check_translates, config_in_family, load_bert_weights

DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "classifier_dropout"),
    *("embedding_dropout", "mlp_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_prob"),
)


def student_config(
    teacher: PreTrainedConfig,
    num_layers: int,
    layers: tuple[int, ...] | None,
    *,
    family: str | None = None,
    dropout: float | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """The student's config: the teacher's with fewer layers, or that of another family with the teacher's sizes.

    Args:
        teacher: Config of the whole teacher.
        num_layers: Layers of the student.
        layers: Teacher layers (1..T) the student starts from, which decide the kind of each layer where kinds
            alternate (ModernBERT); None for a random student.
        family: `model_type` of another family; None for the teacher's.
        dropout: Replaces every dropout rate of the teacher, except the classifier's unset one; None keeps them.
        overrides: Other config keys to replace, such as `hidden_size`.

    Raises:
        ValueError: If there is no such family, or an override is not a key of it.
    """
    if family in (None, teacher.model_type):
        config = copy.deepcopy(teacher)
        keep_layers(config, layers or tuple(range(1, num_layers + 1)))
    else:
        config = config_in_family(teacher, family, num_layers)
    for name in DROPOUTS if dropout is not None else ():
        if getattr(config, name, None) is not None:
            setattr(config, name, dropout)
    for name, value in (overrides or {}).items():
        if not hasattr(config, name):
            raise ValueError(f"student.overrides: {name!r} is no config key of {config.model_type}")
        setattr(config, name, value)
    return config


def check_start(
    teacher: PreTrainedConfig,
    student: PreTrainedConfig,
    *,
    layers: tuple[int, ...] | None = None,
    resize: Resize | None,
    init_from: Path | None,
) -> None:
    """Refuse, as far as configs tell, a student that cannot start as asked.

    Args:
        teacher: Config of the whole teacher.
        student: From `student_config`.
        layers: As in `build_student`.
        resize: As in `build_student`.
        init_from: As in `build_student`.

    Raises:
        ValueError: If weights mean something else in the student's family, sizes differ or would grow, or the
            checkpoint is missing or of another shape.
    """
    if layers is not None and student.model_type != teacher.model_type:
        check_translates(teacher, student)
    if resize is not None:
        check_shrinks(sizes_of(teacher), sizes_of(student))
    elif layers is not None:
        check_same_sizes(teacher, student)
    if init_from is not None:
        found = load_config(Source(model=str(init_from)))
        for name in ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"):
            theirs, ours = getattr(found, name, None), getattr(student, name, None)
            if theirs != ours:
                raise ValueError(f"student.init_from={str(init_from)!r} has {name} {theirs}, the student {ours}")


def check_same_sizes(teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Refuse sizes that the teacher's weights do not have.

    Raises:
        ValueError: Names them all.
    """

    def sizes(config: PreTrainedConfig) -> dict[str, int | None]:
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "embedding_size": getattr(config, "embedding_size", config.hidden_size),
            "intermediate_size": neurons_of(config),
        }

    theirs = sizes(teacher)
    different = [
        f"{name} is {size} in the student and {theirs[name]} in the teacher"
        for name, size in sizes(student).items()
        if size != theirs[name]
    ]
    if different:
        raise ValueError(
            f"student.init: {'; '.join(different)}; a student of another shape starts from init: random, or from the "
            "teacher's weights made narrower (student.resize)"
        )


def check_recomputes(config: PreTrainedConfig) -> None:
    """Refuse activation checkpointing of models that cannot do it.

    Raises:
        ValueError: Names the family.
    """
    classes = MODEL_MAPPING.get(type(config), None)
    encoder = classes[0] if isinstance(classes, tuple) else classes
    if encoder is not None and not encoder.supports_gradient_checkpointing:
        raise ValueError(
            f"student.activation_checkpointing: {config.model_type} cannot recompute its layers in transformers; "
            "drop it"
        )


def restore_dropout(config: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Give an exported student its teacher's dropout rates, for whoever fine-tunes it; distillation may need less."""
    defaults = type(config)()
    for name in DROPOUTS:
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(teacher, name, getattr(defaults, name)))


def build_student(
    teacher: PreTrainedModel,
    config: PreTrainedConfig,
    layers: tuple[int, ...] | None,
    *,
    seed: int,
    resize: Resize | None = None,
    init_from: Path | None = None,
    random_head: bool = False,
) -> PreTrainedModel:
    """A student in float32, wired for capture.

    Embeddings, head and all that does not belong to a layer are copied from the teacher, then layer i from teacher
    layer `layers[i - 1]`. With `layers` None all weights are random, or those of `init_from`.

    Args:
        teacher: Complete teacher with real weights.
        config: From `student_config`.
        layers: Teacher layers, 1..T, one for each student layer, or None.
        seed: For weights that are not copied.
        resize: How weights become those of a narrower student; None refuses other shapes.
        init_from: Directory of a student of this shape to start from; `layers` must be None.
        random_head: Copy the encoder only. With `init_from` the head of a task is always random: that student was
            distilled without one, and perhaps without a pooler.

    Raises:
        ValueError: If weights to be copied do not fit the student's shapes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = class_like(teacher, config)._from_config(
            copy.deepcopy(config), attn_implementation=ATTENTION, dtype=torch.float32
        )
    if head_of(teacher) != "task" and getattr(encoder_of(teacher), "pooler", None) is None:
        drop_pooler(student)
    fresh = head_weights(student) if random_head else {}
    if init_from is not None:
        copy_student(init_from, student)
    elif layers is not None and (resize is not None or config.model_type != teacher.config.model_type):
        copy_translated(teacher, student, layers, resize)
    elif layers is not None:
        copy_weights(teacher, student, layers)
    student.load_state_dict(fresh, strict=False)
    return student


def head_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copies of the weights outside of the encoder."""
    inside = f"{model.base_model_prefix}."
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith(inside)}


def class_like(teacher: PreTrainedModel, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a student with the teacher's head, in the student's family.

    Raises:
        ValueError: If that family has no such head.
    """
    if config.model_type == teacher.config.model_type:
        return type(teacher)
    mappings = {
        "none": MODEL_MAPPING,
        "masked LM": MODEL_FOR_MASKED_LM_MAPPING,
        "task": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }
    found = mappings[head_of(teacher)].get(type(config), None)
    found = found[0] if isinstance(found, tuple) else found
    if found is None:
        raise ValueError(f"student.family: {config.model_type} has no head as the teacher's in transformers")
    return found


@torch.no_grad()
def copy_translated(
    teacher: PreTrainedModel, student: PreTrainedModel, layers: tuple[int, ...], resize: Resize | None
) -> None:
    """Give a student of another family or shape the weights of a student of the teacher's.

    A pooler, and the head of a task, may be of a kind that the teacher has not, and keep what they had.

    Raises:
        ValueError: If a family is not built like BERT, or shapes do not fit.
    """
    wide_config = copy.deepcopy(encoder_of(teacher).config)
    keep_layers(wide_config, layers)
    wide = build_student(teacher, wide_config, layers, seed=0)
    if wide.config.model_type != student.config.model_type:
        check_translates(wide.config, student.config)
    weights = bert_weights(wide)
    if resize is not None:
        weights = resize_weights(weights, sizes_of(wide.config), sizes_of(student.config), resize)
    inside = f"{student.base_model_prefix}." if head_of(student) == "task" else ""
    lacking = [name for name in load_bert_weights(student, weights) if "pooler" not in name and name.startswith(inside)]
    if lacking:
        raise ValueError(f"the teacher has no weight for the student's {lacking[0]}; use init: random")


def copy_student(directory: Path, student: PreTrainedModel) -> None:
    """Copy all weights from a Hugging Face directory that holds a model of the student's shape.

    A student with the head of a task gets the encoder's, and the pooler's if there is one.

    Raises:
        ValueError: If it has other weights or shapes than the student.
    """
    model = load_encoder(Source(model=str(directory)))
    if head_of(student) == "task":
        model, student = encoder_of(model), encoder_of(student)
    weights, wanted = model.state_dict(), student.state_dict()
    if not any("pooler" in name for name in weights):
        wanted = {name: tensor for name, tensor in wanted.items() if "pooler" not in name}
    if weights.keys() != wanted.keys():
        different = sorted(weights.keys() ^ wanted.keys())
        raise ValueError(
            f"student.init_from={str(directory)!r} is not built as the student: {different[0]} is only in one of them; "
            "use a checkpoint with the same num_layers and head"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            _copy(tensor, weights[name], f"student.init_from: {name}", origin="the checkpoint")


def copy_weights(teacher: PreTrainedModel, student: PreTrainedModel, layers: tuple[int, ...]) -> None:
    """Copy everything outside the layers, and the chosen layers, from teacher to student.

    Raises:
        ValueError: If shapes differ.
    """
    sources, targets = layer_list(teacher), layer_list(student)
    inside = {id(p) for p in (targets.parameters() if targets is not None else ())}
    inside |= {id(b) for b in (targets.buffers() if targets is not None else ())}
    weights = dict(teacher.state_dict())
    with torch.no_grad():
        for name, tensor in student.state_dict(keep_vars=True).items():
            if id(tensor) not in inside:
                _copy(tensor, weights[name], name)
        if sources is None or targets is None:
            return
        for number, (target, layer) in enumerate(zip(targets, layers, strict=True), start=1):
            _copy_layer(sources[layer - 1], target, f"student layer {number} from teacher layer {layer}")


def _copy_layer(source: nn.Module, target: nn.Module, what: str) -> None:
    """Copy what the two layers share; ModernBERT's first layer has one norm less than the others."""
    weights = source.state_dict()
    for name, tensor in target.state_dict(keep_vars=True).items():
        if name in weights:
            _copy(tensor, weights[name], f"{what}: {name}")


def _copy(target: torch.Tensor, source: torch.Tensor, what: str, *, origin: str = "the teacher") -> None:
    if target.shape != source.shape:
        raise ValueError(
            f"{what} has shape {tuple(source.shape)} in {origin} and {tuple(target.shape)} in the student; a student "
            "of another shape starts from init: random, or from the teacher's weights made narrower (student.resize)"
        )
    target.data.copy_(source)


def describe(model: PreTrainedModel) -> dict[str, int]:
    """Layers, width, and parameters of a model, for people."""
    config = encoder_of(model).config
    return {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
