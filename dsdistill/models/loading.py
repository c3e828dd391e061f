"""Reads pretrained encoders from disk or the hub, and refuses half-initialised ones."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import pickle
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from dsdistill.core import Problem
from dsdistill.locate import Source
from dsdistill.models.families import FAMILIES, encoder_of, family_of
from dsdistill.models.recorder import ATTENTION
from dsdistill.progress import waiting


def load_config(source: Source) -> PreTrainedConfig:
    """The model's config.

    Raises:
        ValueError: If there is no such model, or it is not an encoder.
    """
    try:
        config = AutoConfig.from_pretrained(**source.arguments())
    except (OSError, ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise ValueError(
            f"model {source.model!r} cannot be read ({first_line_of(error)}); give a local directory with config.json, "
            "a hub name, or package:<import name>"
        ) from error
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        raise ValueError(f"model {source.model!r} is a {config.model_type} decoder; only encoders can be distilled")
    check_family(config)
    return config


def check_family(config: PreTrainedConfig) -> None:
    """Refuse families whose attention cannot be captured, before weights are read.

    Raises:
        ValueError: If the family keeps attention code of its own, or does not say which modules are its layers.
    """
    if family_of(config).own_attention:
        return
    classes = MODEL_MAPPING.get(type(config), None)
    for encoder in classes if isinstance(classes, tuple) else (classes,):
        if encoder is None or (
            encoder._supports_attention_backend and "hidden_states" in (encoder._can_record_outputs or {})
        ):
            return  # None: code that came with the model, which tells at its first forward
    raise ValueError(
        f"{config.model_type} keeps attention code of its own (not transformers' attention interface), which cannot be "
        f"captured; families that can: {', '.join(family.title for family in FAMILIES.values())} and others that use "
        "the interface"
    )


def load_tokenizer(source: Source) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer.

    Raises:
        ValueError: If there is no such model, or it has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source.arguments())
    except Exception as error:  # the tokenizers library raises plain Exceptions for files it cannot read
        raise ValueError(f"the tokenizer of model {source.model!r} cannot be read ({first_line_of(error)})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"model {source.model!r} has no fast tokenizer; save one beside it (tokenizer.json)")
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # transformers makes one up
        raise ValueError(f"model {source.model!r} has no tokenizer files; save its tokenizer beside it")
    return tokenizer


def first_line_of(error: BaseException) -> str:
    """What went wrong in a library, in one line."""
    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def load_encoder(source: Source, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in eval mode, wired for capture; with its masked-LM head where the weights have one.

    Raises:
        ValueError: If weights of the encoder itself are missing, which would leave them random without a word, or if
            the file of weights holds more than tensors.
    """
    config = load_config(source)
    arguments = {**source.arguments(), "attn_implementation": ATTENTION, "dtype": dtype, "output_loading_info": True}
    with reading_weights(source):
        return _load_with_head_or_without(source, config, arguments)


def _load_with_head_or_without(source: Source, config: PreTrainedConfig, arguments: dict[str, Any]) -> PreTrainedModel:
    if has_masked_lm_architecture(config):
        model, info = AutoModelForMaskedLM.from_pretrained(**arguments)
        if not info["missing_keys"]:
            return model.eval()
    model, info = AutoModel.from_pretrained(**arguments)
    _check_complete(source, info)
    if info["missing_keys"]:
        model.pooler = None
    return model.eval()


def load_with_new_head(source: Source, *, seed: int) -> PreTrainedModel:
    """An encoder with a masked-LM head that starts random unless the weights have one, in float32 and eval mode.

    Raises:
        ValueError: If the family has no such head, weights of the encoder are missing, or their file is damaged.
    """
    config = load_config(source)
    if "masked LM" not in heads_of(config):
        raise ValueError(f"{config.model_type} has no masked-LM head in transformers; use another teacher")
    arguments = {**source.arguments(), "attn_implementation": ATTENTION, "dtype": torch.float32}
    with reading_weights(source), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = AutoModelForMaskedLM.from_pretrained(**arguments, output_loading_info=True)
    _check_complete(source, info, within=f"{model.base_model_prefix}.")
    return model.eval()


def encoder_checksum(model: PreTrainedModel) -> str:
    """SHA-256 of the encoder's weights with their names; the pooler, which a masked-LM head does without, left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder_of(model).state_dict().items()):
        if "pooler" not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def word_embeddings(model: PreTrainedModel) -> torch.Tensor:
    """The vectors of the vocabulary, (V, E)."""
    table = model.get_input_embeddings()
    assert isinstance(table, torch.nn.Embedding)
    return table.weight


def load_masked_lm(source: Source, *, device: torch.device) -> PreTrainedModel:
    """A masked language model in float32 and eval mode.

    Raises:
        ValueError: If it cannot be read or has no masked-LM head.
    """
    model = load_encoder(source)
    if head_of(model) != "masked LM":
        raise ValueError(f"model {source.model!r} has no masked-LM head; use one that was saved with it")
    torch.nn.Module.to(model, device)
    return model


@contextlib.contextmanager
def reading_weights(source: Source) -> Iterator[None]:
    """Within, weights are read: what is wrong with their file becomes a sentence."""
    try:
        with waiting(f"loading {source.model}"):
            yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"model {source.model!r}: its file of weights holds more than tensors and was not loaded: it may run code; "
            "use a model saved as safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model {source.model!r}: its weights are damaged, or do not fit its config.json ({first_line_of(error)})"
        ) from error


def _check_complete(source: Source, info: dict[str, Any], *, within: str = "") -> None:
    """Refuse missing weights of the encoder, whose names start with `within`; a pooler may be missing."""
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key and key.startswith(within))
    if missing:
        raise ValueError(
            f"model {source.model!r} lacks {len(missing)} weights of its encoder, the first is {missing[0]}; "
            "they would be random"
        )


def task_config(config: PreTrainedConfig, labels: Sequence[str], problem: Problem) -> PreTrainedConfig:
    """A model's config with the outputs of a task.

    Args:
        config: Of a model with the head of this task, or of an encoder without.
        labels: Names of the classes in order; none for regression.
        problem: What the labels are.

    Raises:
        ValueError: If the family has no head for tasks.
    """
    if "task" not in heads_of(config):
        raise ValueError(f"{config.model_type} has no head for tasks in transformers; use another family")
    config = copy.deepcopy(config)
    config.id2label = dict(enumerate(labels or ("score",)))
    config.label2id = {name: number for number, name in config.id2label.items()}
    if problem == "regression":
        config.problem_type = "regression"
    else:
        config.problem_type = (
            "single_label_classification" if problem == "classification" else "multi_label_classification"
        )
    return config


def load_classifier(
    source: Source, config: PreTrainedConfig, *, seed: int, columns: Sequence[int] | None = None
) -> PreTrainedModel:
    """The model with the head of a task, in float32 and eval mode, wired for capture.

    Args:
        source: A model with that head, or an encoder whose head starts random.
        config: From `task_config`.
        seed: Of a head that starts random.
        columns: Which of the saved head's outputs stands for each label of the task; None where that is their order.

    Raises:
        ValueError: If weights of the encoder are missing, or the file of weights holds more than tensors.
    """
    arguments = {**source.arguments(), "config": config, "attn_implementation": ATTENTION, "dtype": torch.float32}
    with reading_weights(source), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = AutoModelForSequenceClassification.from_pretrained(**arguments, output_loading_info=True)
    _check_complete(source, info, within="" if has_task_architecture(config) else f"{model.base_model_prefix}.")
    if columns is not None and tuple(columns) != tuple(range(len(columns))):
        reorder_outputs(model, columns)
    return model.eval()


@torch.no_grad()
def reorder_outputs(model: PreTrainedModel, columns: Sequence[int]) -> None:
    """Let output i of a classifier be what output `columns[i]` was, in place."""
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == len(columns)]
    last = heads[-1]  # the head comes after the encoder
    for tensor in (last.weight, last.bias) if last.bias is not None else (last.weight,):
        tensor.copy_(tensor[list(columns)].clone())


def has_task_architecture(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint was saved from a model with the head of a task."""
    return any("SequenceClassification" in name for name in config.architectures or ())


def has_masked_lm_architecture(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint was saved from a model with a masked-LM head."""
    saved_with = [name for name in config.architectures or () if "MaskedLM" in name or "PreTraining" in name]
    return bool(saved_with) and "masked LM" in heads_of(config)


Head = Literal["masked LM", "task", "none"]


def heads_of(config: PreTrainedConfig) -> tuple[Head, ...]:
    """The heads with logits that transformers has for a family."""
    names: dict[Head, Collection[str]] = {
        "masked LM": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "task": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    return tuple(head for head, families in names.items() if config.model_type in families)


def head_of(model: PreTrainedModel) -> Head:
    """What a loaded model ends in."""
    if not model.base_model_prefix or not hasattr(model, model.base_model_prefix):
        return "none"
    return "task" if "SequenceClassification" in type(model).__name__ else "masked LM"


def auto_class(head: Head) -> type:
    """The class of transformers that loads such a model."""
    return {"masked LM": AutoModelForMaskedLM, "task": AutoModelForSequenceClassification, "none": AutoModel}[head]
