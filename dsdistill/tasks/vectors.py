"""Word vectors and their nearest neighbours: from a file in GloVe's format, or from a model's word embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from dsdistill.corpus.lines import Meter, read_lines
from dsdistill.corpus.tokenizing import plain_backend

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_QUERIES_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class WordVectors:
    """Words that may replace others.

    Attributes:
        words: V words.
        vectors: float32 (V, E), of length one.
        find: The vector (E,) of any word, or None if it has none.
    """

    words: list[str]
    vectors: NDArray[np.float32]
    find: Callable[[str], NDArray[np.float32] | None]
    _found: dict[tuple[str, int], list[str]] = field(default_factory=dict)

    def neighbours(self, words: Iterable[str], count: int) -> dict[str, list[str]]:
        """The most similar other words by cosine, nearest first; remembered, since words come again.

        Args:
            words: Any words; those without a vector get no neighbours.
            count: Neighbours per word.
        """
        wanted = list(dict.fromkeys(words))
        new = [word for word in wanted if (word, count) not in self._found]
        known = [(word, vector) for word in new if (vector := self.find(word)) is not None]
        self._found.update(((word, count), []) for word in new)
        for start in range(0, len(known), _QUERIES_AT_ONCE):
            queries = known[start : start + _QUERIES_AT_ONCE]
            vectors = torch.from_numpy(np.stack([vector for _, vector in queries]))
            best = (vectors @ torch.from_numpy(self.vectors).T).topk(min(count + 2, len(self.words))).indices
            for (word, _), places in zip(queries, best.tolist(), strict=True):
                near = [self.words[at] for at in places if self.words[at] not in (word, word.lower())]
                self._found[word, count] = near[:count]
        return {word: self._found[word, count] for word in wanted}


def is_word(text: str) -> bool:
    """Whether a piece of text is a word and no punctuation."""
    return any(map(str.isalnum, text)) and not any(map(str.isspace, text))


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12))


def read_vectors(path: Path) -> WordVectors:
    """Vectors from text: a word and its numbers in each line, separated by spaces.

    What is no word (punctuation, several words) is left out; a first line with two counts (word2vec's) is skipped.
    Words are found as written, else in lower case.

    Raises:
        ValueError: If the file is missing or broken; names the line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file of word vectors")
    words: list[str] = []
    vectors: list[NDArray[np.float32]] = []
    width = 0
    for number, line in read_lines(path, Meter()):
        fields = line.rstrip().split(" ")
        if number == 1 and len(fields) == 2 and all(map(str.isdigit, fields)):
            continue
        width = width or len(fields) - 1
        vector = _vector(fields[-width:]) if 0 < width < len(fields) else None
        if vector is None:
            raise ValueError(f"{path}: line {number}: not a word and {width or 'some'} numbers")
        word = " ".join(fields[:-width])
        if is_word(word):
            words.append(word)
            vectors.append(vector)
    if not words:
        raise ValueError(f"{path}: no word found")
    unit = _unit(np.stack(vectors))
    places = {word: at for at, word in reversed(list(enumerate(words)))}

    def find(word: str) -> NDArray[np.float32] | None:
        at = places.get(word, places.get(word.lower()))
        return None if at is None else unit[at]

    return WordVectors(words, unit, find)


def _vector(fields: Sequence[str]) -> NDArray[np.float32] | None:
    try:
        vector = np.array(fields, np.float32)
    except ValueError:
        return None
    return vector if np.isfinite(vector).all() else None


def model_vectors(embeddings: Tensor, tokenizer: PreTrainedTokenizerBase) -> WordVectors:
    """Vectors from a model's word embeddings: whole words of its vocabulary; other words are the mean of their pieces.

    Args:
        embeddings: (V, E), `model.get_input_embeddings().weight`.
        tokenizer: The model's.

    Raises:
        ValueError: If the tokenizer has more tokens than there are embeddings.
    """
    backend = plain_backend(tokenizer)
    whole = whole_words(backend)
    table = embeddings.detach().float().cpu().numpy()
    if max(whole) >= len(table):
        raise ValueError(f"{tokenizer.name_or_path}: its vocabulary is larger than the model's, which is {len(table)}")
    special = set(tokenizer.all_special_ids)

    def find(word: str) -> NDArray[np.float32] | None:
        pieces = backend.encode(" " + word, add_special_tokens=False).ids
        return None if not pieces or special.intersection(pieces) else _unit(table[pieces].mean(axis=0))

    return WordVectors(list(whole.values()), _unit(table[list(whole)]), find)


def whole_words(backend: Tokenizer) -> dict[int, str]:
    """Tokens that are a whole word in running text, with the word; pieces and special tokens are left out.

    Args:
        backend: From `plain_backend`.

    Raises:
        ValueError: If there is none.
    """
    added = backend.get_added_tokens_decoder()
    ids = sorted(set(backend.get_vocab().values()) - set(added))
    words = [text.strip() for text in backend.decode_batch([[number] for number in ids])]
    encodings = backend.encode_batch_fast([" " + word for word in words], add_special_tokens=False)
    whole: dict[int, str] = {
        number: word
        for number, word, encoding in zip(ids, words, encodings, strict=True)
        if encoding.ids == [number] and is_word(word)
    }
    if not whole:
        raise ValueError("the tokenizer's vocabulary has no whole word")
    return whole
