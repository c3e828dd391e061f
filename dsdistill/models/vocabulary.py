"""Another vocabulary for a student: embeddings of tokens that the teacher knows too are the teacher's.

A token is looked up by its role if it is special, else by its text and whether it begins a word, however its tokenizer
writes that. A token that the teacher does not have gets the mean of the pieces that the teacher makes of its text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from dsdistill.locate import Source
from dsdistill.models.families import encoder_of, family_of
from dsdistill.models.loading import load_tokenizer

ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")

Key = tuple[bool, str]


def set_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make a config describe a model for this tokenizer, in place.

    Raises:
        ValueError: If the family counts positions from its padding, and this tokenizer's is another.
    """
    if family_of(config).first_position != 0 and tokenizer.pad_token_id != config.pad_token_id:
        raise ValueError(
            f"student.tokenizer has padding {tokenizer.pad_token_id}, but {config.model_type} counts positions from "
            f"padding {config.pad_token_id}; train it with --like this teacher"
        )
    config.vocab_size = len(tokenizer)
    for role in ROLES:
        name = f"{role}_token_id"
        if getattr(config, name, None) is not None and getattr(tokenizer, name) is not None:
            setattr(config, name, getattr(tokenizer, name))


def tokens_problem(init_from: Path | None, tokenizer: Source) -> str | None:
    """Why a saved student cannot go on with a tokenizer, or None if it can, or was saved without its own.

    Raises:
        ValueError: If one of the tokenizers cannot be read.
    """
    if init_from is None or not (init_from / "tokenizer.json").is_file():
        return None
    theirs = load_tokenizer(Source(model=str(init_from)))
    if theirs.get_vocab() == load_tokenizer(tokenizer).get_vocab():
        return None
    return (
        f"student.init_from={str(init_from)!r} was trained with another tokenizer than that of {tokenizer.model}, so "
        "that its embeddings are of other tokens; a student with a tokenizer of its own is its own teacher.model in a "
        "task (objective task only), and needs its student.tokenizer on text"
    )


def keys_of(tokenizer: PreTrainedTokenizerFast) -> dict[int, Key]:
    """Number to (begins a word, text) of all tokens that are not special."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    pieces = any(token.startswith("##") for token in vocabulary)
    keys = {}
    for token, number in vocabulary.items():
        if token in special:
            continue
        if pieces:
            keys[number] = (not token.startswith("##"), token.removeprefix("##"))
        else:
            begins = token[:1] in ("\u2581", "\u0120")  # SentencePiece, byte-level BPE
            keys[number] = (begins, token[1:] if begins else token)
    return keys


def sources_of(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> list[list[int]]:
    """For each of the student's tokens the teacher's tokens that stand for it; empty if none do."""
    numbers: dict[Key, int] = {key: number for number, key in keys_of(teacher).items()}
    lowered: dict[Key, int] = {(begins, text.lower()): number for (begins, text), number in numbers.items()}
    sources: list[list[int]] = [[] for _ in range(len(student))]
    backend: Any = teacher.backend_tokenizer
    for number, (begins, text) in keys_of(student).items():
        found = numbers.get((begins, text), lowered.get((begins, text.lower())))
        if found is not None:
            sources[number] = [found]
        elif text:
            pieces = backend.encode(text, add_special_tokens=False).ids
            sources[number] = [piece for piece in pieces if piece != teacher.unk_token_id]
    for role in ROLES:
        ours, theirs = (getattr(tokenizer, f"{role}_token_id") for tokenizer in (student, teacher))
        if ours is not None and theirs is not None:
            sources[ours] = [theirs]
    return sources


@torch.no_grad()
def change_vocabulary(
    model: PreTrainedModel, ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast, *, seed: int
) -> int:
    """Give a model the embeddings, and the head's biases, of another tokenizer's tokens, in place.

    Args:
        model: With the teacher's vocabulary.
        ours: The tokenizer that it is for from now on.
        theirs: The teacher's.
        seed: Of tokens for which the teacher has nothing.

    Returns:
        How many tokens have the embedding of one of the teacher's.
    """
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings()
    vectors, biases = table.weight.clone(), None if head is None or head.bias is None else head.bias.clone()
    sources = sources_of(ours, theirs)
    model.resize_token_embeddings(len(ours), mean_resizing=False)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    noise = torch.randn(len(ours), vectors.shape[1], generator=torch.Generator().manual_seed(seed))
    table.weight.copy_(_mixed(vectors, sources, vectors.mean(0) + noise * vectors.std(0)))
    if biases is not None:
        head.bias.copy_(_mixed(biases, sources, biases.mean().expand(len(ours))))
    set_vocabulary(encoder_of(model).config, ours)
    return sum(len(found) == 1 for found in sources)


def _mixed(values: Tensor, sources: list[list[int]], otherwise: Tensor) -> Tensor:
    """For each token the mean of the values of its sources, or what stands in `otherwise`."""
    rows = [values[found].mean(0) if found else otherwise[number] for number, found in enumerate(sources)]
    return torch.stack(rows)
