"""Masked-language-model inputs: a pure function of (seed, epoch, row, position).

Devlin et al. 2019 (arXiv:1810.04805), section 3.1: of 15 % chosen tokens 80 % become the mask token, 10 % a random
token, 10 % stay. Dynamic as in RoBERTa: each epoch chooses anew. Letters in shapes: B rows, L length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsdistill.core import IGNORED_LABEL
from dsdistill.corpus.hashing import hash64, mix64

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MASK_DOMAIN = 0x6D61736B  # keeps the masks' hashes apart from those of the order
_REPLACEMENT_DOMAIN = np.uint64(0x72616E646F6D)
_MASKED_SHARE, _RANDOM_SHARE = 0.8, 0.1
_BYTE_LEVEL_SPACE, _SENTENCE_PIECE_SPACE = "\u0120", "\u2581"


@dataclass(frozen=True, slots=True)
class Masker:
    """Chooses and replaces tokens; made by `Masker.from_tokenizer`.

    Attributes:
        probability: Share of the tokens that are chosen, in [0, 1); 0 leaves the rows as they are.
        mask_id: The mask token.
        special: bool (V,), tokens that are never chosen and never put in.
        replacements: int64, tokens that may be put in at random.
        word_start: bool (V,), tokens that begin a word; None to choose tokens one by one.
    """

    probability: float
    mask_id: int
    special: NDArray[np.bool_]
    replacements: NDArray[np.int64]
    word_start: NDArray[np.bool_] | None = None

    @classmethod
    def from_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, *, probability: float = 0.15, whole_word: bool = False
    ) -> Masker:
        """Build the tables of one vocabulary.

        Args:
            tokenizer: The tokenizer that the corpus was prepared with.
            probability: Share of tokens to choose, in [0, 1); 0 for no masking.
            whole_word: Choose all tokens of a word together.

        Raises:
            ValueError: If the probability is out of range, there is no mask token, or `whole_word` is asked of a
                vocabulary that does not mark words.
        """
        if not 0 <= probability < 1:
            raise ValueError(f"masking probability {probability} is not in [0, 1)")
        mask_id = tokenizer.mask_token_id
        if mask_id is None and probability > 0:
            raise ValueError("the tokenizer has no mask token: set the masking probability to 0")
        vocabulary = tokenizer.get_vocab()
        special_ids = sorted(set(tokenizer.all_special_ids))
        special = np.zeros(max(vocabulary.values()) + 1, np.bool_)
        special[special_ids] = True
        replacements = np.array(sorted(set(vocabulary.values()) - set(special_ids)), np.int64)
        return cls(
            probability=probability,
            mask_id=mask_id if isinstance(mask_id, int) else -1,
            special=special,
            replacements=replacements,
            word_start=word_start_table(vocabulary) if whole_word else None,
        )

    def __call__(
        self,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.bool_],
        *,
        seed: int,
        epochs: NDArray[np.int64] | int,
        rows: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Masked copy of the rows, and labels.

        Args:
            input_ids: int64 (B, L).
            mask: bool (B, L), True = real token.
            seed: Any integer.
            epochs: int64 (B,) or one number.
            rows: int64 (B,), the rows' numbers in the corpus.

        Returns:
            New input_ids (B, L) and labels (B, L): the original token where chosen, -100 elsewhere.
        """
        labels = np.full(input_ids.shape, IGNORED_LABEL, np.int64)
        if self.probability == 0:
            return input_ids.copy(), labels
        row_keys = hash64(_MASK_DOMAIN, seed, epochs, rows)
        hashes = mix64(row_keys[:, None] ^ np.arange(input_ids.shape[1], dtype=np.uint64))
        chosen = self._choose(hashes, input_ids, mask)
        places = np.flatnonzero(chosen)
        original, draws = input_ids.ravel()[places], hashes.ravel()[places]
        labels.ravel()[places] = original
        masked = input_ids.copy()
        masked.ravel()[places] = self._replace(original, draws)
        return masked, labels

    def _choose(
        self, hashes: NDArray[np.uint64], input_ids: NDArray[np.int64], mask: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Which tokens are predicted, bool (B, L): by the high half of the hash, of the word's first token if asked."""
        special = self.special[input_ids] | ~mask
        chosen = (hashes >> np.uint64(32)) < np.uint64(self.probability * 2**32)
        if self.word_start is not None:
            starts = self.word_start[input_ids] | special
            starts[:, 1:] |= special[:, :-1]
            starts[:, 0] = True
            first = np.maximum.accumulate(np.where(starts, np.arange(input_ids.shape[1]), 0), axis=1)
            chosen = np.take_along_axis(chosen, first, axis=1)
        return chosen & ~special

    def _replace(self, original: NDArray[np.int64], draws: NDArray[np.uint64]) -> NDArray[np.int64]:
        """What stands in the chosen places: by the low half of the hash."""
        share = (draws & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32
        picks = mix64(draws ^ _REPLACEMENT_DOMAIN) % np.uint64(len(self.replacements))
        random = self.replacements[picks.astype(np.int64)]
        kept = np.where(share < _MASKED_SHARE + _RANDOM_SHARE, random, original)
        return np.where(share < _MASKED_SHARE, self.mask_id, kept)


def word_start_table(vocabulary: dict[str, int]) -> NDArray[np.bool_]:
    """Which tokens begin a word, by the marks of WordPiece, byte-level BPE or SentencePiece.

    Tokens without a letter or digit (punctuation) count as words of their own.

    Args:
        vocabulary: Token to id.

    Returns:
        bool (largest id + 1,).

    Raises:
        ValueError: If the vocabulary has none of the three marks.
    """
    continued = sum(token.startswith("##") for token in vocabulary)
    spaced = sum(token.startswith((_BYTE_LEVEL_SPACE, _SENTENCE_PIECE_SPACE)) for token in vocabulary)
    if not continued and not spaced:
        raise ValueError("whole-word masking: this vocabulary marks neither word starts nor word pieces")
    table = np.zeros(max(vocabulary.values()) + 1, np.bool_)
    for token, number in vocabulary.items():
        if continued > spaced:
            table[number] = not token.startswith("##")
        else:
            marked = token.startswith((_BYTE_LEVEL_SPACE, _SENTENCE_PIECE_SPACE))
            table[number] = marked or not any(character.isalnum() for character in token)
    return table
