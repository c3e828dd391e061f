"""A student as a plain Hugging Face directory: safetensors, config, tokenizer, model card; reloaded and compared."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from dsdistill.locate import Source
from dsdistill.models.capture import ATTENTION
from dsdistill.models.families import drop_pooler, encoder_of
from dsdistill.models.loading import Head, auto_class, head_of
from dsdistill.models.sentences import read_sentence_modules, write_sentence_modules
from dsdistill.progress import waiting


def save_skeleton(student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Keep what is needed to rebuild the student around saved weights: its config and tokenizer."""
    config = encoder_of(student).config
    config.architectures = [type(student).__name__]
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def rebuild(skeleton: Path, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The student in eval mode from its skeleton and weights, tied weights named once.

    Raises:
        ValueError: If weights are missing or left over.
    """
    config = AutoConfig.from_pretrained(skeleton)
    saved_as = (config.architectures or [""])[0]
    head: Head = "masked LM" if "MaskedLM" in saved_as else "task" if "SequenceClassification" in saved_as else "none"
    model = auto_class(head).from_config(config, attn_implementation=ATTENTION, dtype=torch.float32)
    if not any("pooler" in name for name in weights):
        drop_pooler(model)
    tied = (
        set(model.state_dict())
        - {name for name, _ in model.named_parameters()}
        - {name for name, _ in model.named_buffers()}
    )
    result = model.load_state_dict(dict(weights), strict=False)
    lost = set(result.missing_keys) - tied
    if lost or result.unexpected_keys:
        raise ValueError(
            f"weights do not fit {skeleton}: missing {sorted(lost)[:3]}, left over {result.unexpected_keys[:3]}"
        )
    model.tie_weights()
    return model.eval()


def export_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    *,
    card: str,
    teacher: Source | None,
) -> None:
    """Write the model, reload it from there, and compare; the directory appears only when all is well.

    Args:
        model: In float32.
        tokenizer: Saved beside it.
        directory: Replaced if it exists.
        card: Text of README.md.
        teacher: If it is a sentence-transformers model, the student becomes one with the same pooling.

    Raises:
        RuntimeError: If the reloaded model computes something else.
    """
    with waiting(f"exporting to {directory}"):
        _export(model, tokenizer, directory, card, teacher)


def _export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path, card: str, teacher: Source | None
) -> None:
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    modules = read_sentence_modules(teacher) if teacher is not None else None
    if teacher is not None and modules is not None and modules.problem is None:
        write_sentence_modules(teacher, encoder_of(model).config.hidden_size, partial)
    check_reloaded(model, partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


@torch.no_grad()
def check_reloaded(model: PreTrainedModel, directory: Path) -> None:
    """Compare a model with what a user gets from its directory.

    Raises:
        RuntimeError: If the outputs differ, or weights were not found there.
    """
    reloaded, info = auto_class(head_of(model)).from_pretrained(directory, output_loading_info=True)
    missing = [key for key in info["missing_keys"] if "pooler" not in key or head_of(model) == "task"]
    if missing:
        raise RuntimeError(f"export in {directory} lacks {missing[0]}")
    ids = torch.arange(5, 21).remainder(encoder_of(model).config.vocab_size)[None]
    theirs, ours = (m.eval()(input_ids=ids.to(m.device))[0] for m in (reloaded, model))
    if not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4):
        raise RuntimeError(
            f"export in {directory} computes something else: largest difference {(theirs - ours).abs().max():.2e}"
        )
