"""Trains a tokenizer on text: WordPiece as BERT's, or SentencePiece's unigram and BPE models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dsdistill.corpus.lines import Meter
from dsdistill.corpus.progress import Reading
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.sources import Source, find_sources, read_documents
from dsdistill.corpus.tokenizing import load_tokenizer

Kind = Literal["wordpiece", "unigram", "bpe"]

ROLES = ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token", "bos_token", "eos_token")


def train_tokenizer(
    settings: CorpusSettings, *, kind: Kind, vocab_size: int, lowercase: bool = False
) -> PreTrainedTokenizerFast:
    """A new tokenizer for the text, with the special tokens of another, saved in `settings.output`.

    Special tokens come first, in the order that they have in the other: its padding keeps its number where that is
    small, as models that count positions from it need.

    Args:
        settings: Text, and in `tokenizer` the model whose special tokens are taken.
        kind: WordPiece, or SentencePiece's unigram or BPE.
        vocab_size: Tokens, special ones included; fewer if the text has not so many.
        lowercase: Whether case is dropped.

    Raises:
        ValueError: If the text cannot be read, or the other tokenizer has no cls, sep, pad, mask and unk tokens.
    """
    like: Any = load_tokenizer(settings.tokenizer)
    names = {role: str(getattr(like, role)) for role in ROLES if getattr(like, role, None) is not None}
    lacking = [role for role in ROLES[:5] if role not in names]
    if lacking:
        raise ValueError(f"the tokenizer of {settings.tokenizer} has no {', '.join(lacking)}; use an encoder's")
    special = sorted(set(names.values()), key=like.convert_tokens_to_ids)
    tokenizer, trainer = _untrained(kind, vocab_size, special, names["unk_token"], lowercase)
    sources = find_sources(settings)
    with Reading("training tokenizer", settings, sources, beats=True) as progress:
        tokenizer.train_from_iterator(_texts(settings, sources, progress), trainer)
    cls, sep = names["cls_token"], names["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {cls, sep}],
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=like.model_max_length, **names)
    made.save_pretrained(settings.output)
    return made


def _untrained(
    kind: Kind, vocab_size: int, special: list[str], unknown: str, lowercase: bool
) -> tuple[Tokenizer, trainers.Trainer]:
    shared: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": special, "show_progress": False}
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer, trainers.WordPieceTrainer(**shared)
    tokenizer = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token=unknown))
    steps = [normalizers.NFKC(), normalizers.Replace("\n", " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence([*steps, *([normalizers.Lowercase()] * lowercase)])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if kind == "unigram":
        return tokenizer, trainers.UnigramTrainer(**shared, unk_token=unknown)
    return tokenizer, trainers.BpeTrainer(**shared)


def _texts(settings: CorpusSettings, sources: list[Source], progress: Reading) -> Iterator[str]:
    meter = Meter()
    documents = itertools.islice(read_documents(sources, settings, meter), settings.max_documents)
    for number, text in enumerate(documents, 1):
        yield text
        progress.at(meter.done, number)
    progress.to(progress.done, "text is read, choosing tokens")
