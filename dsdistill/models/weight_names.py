"""What a model's file of weights names, read without the weights: whether the head that its config claims is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForMaskedLM, PreTrainedConfig
from transformers.utils.hub import cached_file

from dsdistill.locate import Source
from dsdistill.models.loading import has_masked_lm_architecture, reading_weights

OLD_NAMES = ((".gamma", ".weight"), (".beta", ".bias"))
"""As norms were called once, and are."""


def has_masked_lm_head(source: Source, config: PreTrainedConfig) -> bool:
    """Whether a model has a masked-LM head, as far as it can be known before weights are read.

    The configs of sentence encoders often claim the head of the model that they were trained from. It is not there if
    the file names weights of the encoder only. Files that have not been fetched yet, are no safetensors, or name
    weights in another way (transformers renames those of some families as it reads them) are believed; loading tells.

    Raises:
        ValueError: If the file of weights is damaged.
    """
    if not has_masked_lm_architecture(config):
        return False
    with reading_weights(source):
        names = names_of_weights(source)
    if names is None:
        return True
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config, trust_remote_code=source.trust_remote_code)
    prefix = f"{model.base_model_prefix}."
    inside = {name.removeprefix(prefix) for name in model.state_dict() if name.startswith(prefix)}
    return any(name.removeprefix(prefix) not in inside and not _is_spare(name) for name in names)


def _is_spare(name: str) -> bool:
    """Whether encoders are often saved with this, which the model of a masked-LM head has not."""
    return re.search(r"(^|\.)pooler\.|(position|token_type)_ids$", name) is not None


def names_of_weights(source: Source) -> frozenset[str] | None:
    """The names in a model's safetensors file or its index; None if there is no such file on this machine.

    Raises:
        ValueError: If the index is no JSON.
    """
    index = _file_here(source, "model.safetensors.index.json")
    if index is not None:
        try:
            found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except ValueError as error:
            raise ValueError(f"model {source.model!r}: {index.name} is no JSON ({error}); get it again") from error
    elif (file := _file_here(source, "model.safetensors")) is not None:
        with safe_open(file, framework="pt") as opened:
            found = opened.keys()
    else:
        return None
    return frozenset(re.sub(r"\.(gamma|beta)$", lambda old: dict(OLD_NAMES)[old[0]], name) for name in found)


def _file_here(source: Source, name: str) -> Path | None:
    """A file of the model's directory, or of its repository if that has been fetched; None without."""
    found = cached_file(
        source.arguments()["pretrained_model_name_or_path"],
        name,
        revision=source.revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None
