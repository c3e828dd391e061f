"""More training rows by replacing words; Jiao et al. 2020 (TinyBERT, arXiv:1909.10351), algorithm 1.

Each word of a row is replaced with probability p_t. A word of one token is replaced by one of the K words that a
masked language model finds most probable in its place, any other by one of the K words with the nearest vectors. N_a
rows are made of each row; their labels come from the teacher.

Departures: the model sees the original text with one word masked, not a text with replacements made before, so that
one forward serves all copies; only words with a letter or digit are replaced; texts of a pair are replaced
independently of each other. Which words, and by which, depends on (seed, row, copy) only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from dsdistill.corpus.hashing import hash64
from dsdistill.corpus.tokenizing import plain_backend
from dsdistill.tasks.rows import Rows, no_labels_yet, tokenize_rows
from dsdistill.tasks.settings import AugmentSettings
from dsdistill.tasks.task import Task
from dsdistill.tasks.vectors import WordVectors, whole_words

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHUNK_ROWS = 1024
_TOKENS_AT_ONCE = 4096
_AUGMENT_DOMAIN = 0x6175676D656E74  # keeps these hashes apart from those of the order and the masks


@dataclass(frozen=True, slots=True)
class Word:
    """A word in a text.

    Attributes:
        text: Which text of the list.
        number: Which word of the text.
        start: Its first character.
        end: The character after its last.
        token: Place of its token if it is one token that the vocabulary knows, else None.
    """

    text: int
    number: int
    start: int
    end: int
    token: int | None


class MaskedLM:
    """A masked language model that says which words fit in a place."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        """Look at the vocabulary.

        Args:
            model: With a masked-LM head, in eval mode, on the device where it shall run.
            tokenizer: Its tokenizer.
            max_length: Tokens of a text that the model sees; words beyond are not replaced.

        Raises:
            ValueError: If the tokenizer has no mask token, or the model is in training mode.
        """
        mask_id = tokenizer.mask_token_id
        if not isinstance(mask_id, int):
            raise ValueError(
                f"{tokenizer.name_or_path}: no mask token; augment.masked_lm needs a masked language model"
            )
        if model.training:
            raise ValueError("the masked language model is in training mode; call model.eval() first")
        self._model, self._mask_id = model, mask_id
        self.finder = WordFinder(tokenizer, max_length=max_length)
        whole = whole_words(self.finder.backend)
        size = model.config.vocab_size
        if max(whole) >= size:
            raise ValueError(f"{tokenizer.name_or_path}: its vocabulary is larger than the model's, which is {size}")
        self._words = list(whole.values())
        self._word_ids = torch.tensor(list(whole), device=model.device)

    @torch.no_grad()
    def candidates(self, encodings: Sequence[Encoding], words: Sequence[Word], count: int) -> list[list[str]]:
        """The most probable words in the place of each word, the best first.

        Args:
            encodings: Of all texts.
            words: Words of one token.
            count: Candidates per word.
        """
        result: list[list[str]] = [[] for _ in words]
        count = min(count, len(self._words))
        for chosen in _batches_of_similar_length([len(encodings[word.text]) for word in words]):
            places = torch.tensor([words[i].token for i in chosen])
            logits = self._logits([encodings[words[i].text].ids for i in chosen], places)
            best = logits[:, self._word_ids].topk(count).indices.tolist()  # sync
            for i, numbers in zip(chosen, best, strict=True):
                result[i] = [self._words[number] for number in numbers]
        return result

    def _logits(self, rows: Sequence[list[int]], places: torch.Tensor) -> torch.Tensor:
        """(B, V) at one masked place of each row."""
        length = max(map(len, rows))
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        ids = torch.tensor([row + [self._mask_id] * (length - len(row)) for row in rows])
        numbers = torch.arange(len(rows))
        ids[numbers, places] = self._mask_id
        device = self._model.device
        output = self._model(input_ids=ids.to(device), attention_mask=mask.to(device))
        return output.logits[numbers.to(device), places.to(device)]


def _batches_of_similar_length(lengths: Sequence[int]) -> Iterable[list[int]]:
    """Numbers of rows, grouped so that a padded group has a bounded number of tokens."""
    order = np.argsort(-np.array(lengths, np.int64), kind="stable").tolist()
    start = 0
    while start < len(order):
        stop = start + max(1, _TOKENS_AT_ONCE // lengths[order[start]])
        yield order[start:stop]
        start = stop


class WordFinder:
    """Where a tokenizer sees words in a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        self.backend = plain_backend(tokenizer)
        self.backend.enable_truncation(max_length)
        self._unknown_id = tokenizer.unk_token_id

    def __call__(self, texts: Sequence[str]) -> tuple[list[Encoding], list[Word]]:
        """Tokens and words of some texts, without punctuation around; what is cut off at `max_length` has no words."""
        encodings = self.backend.encode_batch(list(texts))
        return encodings, [
            word
            for number, (text, encoding) in enumerate(zip(texts, encodings, strict=True))
            for word in self._words(number, text, encoding)
        ]

    def _words(self, number: int, text: str, encoding: Encoding) -> Iterable[Word]:
        tokens: dict[int, list[int]] = {}
        for token, word in enumerate(encoding.word_ids):
            if word is not None:
                tokens.setdefault(word, []).append(token)
        if encoding.overflowing and tokens:
            tokens.popitem()  # its last pieces may be cut off
        offsets, ids = encoding.offsets, encoding.ids
        for word, places in tokens.items():
            inner = [place for place in places if any(map(str.isalnum, text[slice(*offsets[place])]))]
            if not inner:
                continue  # punctuation
            start, end = offsets[inner[0]][0], offsets[inner[-1]][1]
            piece = text[start:end]
            start += len(piece) - len(piece.lstrip())
            single = len(inner) == 1 and ids[inner[0]] != self._unknown_id
            yield Word(number, word, start, start + len(piece.strip()), inner[0] if single else None)


def augment_rows(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    settings: AugmentSettings,
    *,
    seed: int,
    vectors: WordVectors,
    masked_lm: MaskedLM | None = None,
    at: Callable[[int], None] = lambda row: None,
) -> Rows:
    """The rows that augmentation makes of a task's training rows: `copies` for each, in the order of the rows.

    The masked language model is asked once for each word that any copy replaces: for most words of the training texts
    with the paper's numbers.

    Args:
        task: Its `train` is not changed; `task.train.extended(...)` joins both.
        tokenizer: As in `open_task`.
        settings: Numbers of copies and candidates, probability.
        seed: Of all choices.
        vectors: Where words of several tokens find their candidates; all words without a `masked_lm`.
        masked_lm: Where words of one token find theirs.
        at: Told the row that comes next, every so many rows.

    Returns:
        Rows with `is_augmented` set, which wait for labels (`Rows.with_labels`).

    Raises:
        ValueError: If `settings.masked_lm` is set and no model is given, or the other way round.
    """
    if (settings.masked_lm is None) != (masked_lm is None):
        given = "no model is given" if masked_lm is None else "a model is given"
        raise ValueError(f"augment.masked_lm={settings.masked_lm!r}, but {given}")
    max_length = task.train.max_length
    finder = WordFinder(tokenizer, max_length=max_length) if masked_lm is None else masked_lm.finder
    columns = [task.texts]
    if task.pairs is not None:
        columns.append(task.pairs)
    parts: list[Rows] = []
    for first in range(0, len(task.texts), _CHUNK_ROWS):
        at(first)
        texts, *pairs = [
            _replaced(column[first : first + _CHUNK_ROWS], (seed, first, part), settings, finder, vectors, masked_lm)
            for part, column in enumerate(columns)
        ]
        labels = no_labels_yet(task.train.labels, len(texts))
        parts.append(
            tokenize_rows(texts, pairs[0] if pairs else None, labels, tokenizer, max_length=max_length, augmented=True)
        )
    return parts[0].extended(*parts[1:])


def _replaced(
    texts: Sequence[str],
    key: tuple[int, int, int],
    settings: AugmentSettings,
    finder: WordFinder,
    vectors: WordVectors,
    masked_lm: MaskedLM | None,
) -> list[str]:
    """Copies of some texts with words replaced.

    Args:
        texts: N texts.
        key: Seed, row of the first text, which text of a pair.
        settings: As in `augment_rows`, as the other arguments.
        finder: Of words.
        vectors: Of words.
        masked_lm: Model or None.

    Returns:
        N * copies texts; those of one text follow each other.
    """
    encodings, words = finder(texts)
    picked, draws = _choices(words, key, settings)
    needed = np.flatnonzero(picked.any(axis=0)).tolist()
    by_model = [i for i in needed if masked_lm is not None and words[i].token is not None]
    by_vector = sorted(set(needed) - set(by_model))
    candidates: dict[int, list[str]] = {}
    if masked_lm is not None:
        found = masked_lm.candidates(encodings, [words[i] for i in by_model], settings.candidates)
        candidates |= dict(zip(by_model, found, strict=True))
    spelled = {i: texts[words[i].text][words[i].start : words[i].end] for i in by_vector}
    nearest = vectors.neighbours(dict.fromkeys(spelled.values()), settings.candidates)
    candidates |= {i: nearest[word] for i, word in spelled.items()}

    pieces: list[list[list[str]]] = [[[] for _ in range(settings.copies)] for _ in texts]
    ends = [0] * len(texts)
    for i, word in enumerate(words):
        text, fitting = texts[word.text], candidates.get(i) or []
        before, original = text[ends[word.text] : word.start], text[word.start : word.end]
        for copy, parts in enumerate(pieces[word.text]):
            replaced = bool(fitting) and picked[copy, i]
            parts += (before, fitting[draws[copy, i] % len(fitting)] if replaced else original)
        ends[word.text] = word.end
    return [
        "".join((*parts, text[end:])) for text, end, copies in zip(texts, ends, pieces, strict=True) for parts in copies
    ]


def _choices(
    words: Sequence[Word], key: tuple[int, int, int], settings: AugmentSettings
) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
    """Whether each copy replaces each word, and a number that says by which candidate; both (copies, words).

    One hash serves both: its high bits decide, its low bits (the remainder by a small count) choose.
    """
    seed, first, part = key
    rows = np.array([first + word.text for word in words], np.int64)
    numbers = np.array([word.number for word in words], np.int64)
    draws = hash64(_AUGMENT_DOMAIN, seed, rows, np.arange(settings.copies)[:, None], part, numbers)
    return (draws >> np.uint64(11)) * 2.0**-53 < settings.probability, draws
