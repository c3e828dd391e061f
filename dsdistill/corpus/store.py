"""A finished corpus, memory-mapped: any rows by number, as padded arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsdistill.corpus.manifest import Manifest, Split, check_shards, read_manifest
from dsdistill.corpus.shards import Shard, map_shard

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class RowArrays(NamedTuple):
    """Some rows; B rows, L the corpus's row length.

    Attributes:
        input_ids: int64 (B, L), padded at the end.
        mask: bool (B, L), True = real token.
        segments: int64 (B, L), document number within the row; None with one document per row.
        token_type_ids: int64 (B, L); None for single texts.
    """

    input_ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    segments: NDArray[np.int64] | None
    token_type_ids: NDArray[np.int64] | None


class Corpus:
    """One split of a finished corpus; opened by `Corpus.open`. Copies sent to other processes map the files anew.

    Attributes:
        directory: Where it lies.
        split: "train" or "held_out".
        manifest: All that is known about it.
    """

    def __init__(self, directory: Path, split: Split, manifest: Manifest) -> None:
        self.directory = directory
        self.split: Split = split
        self.manifest = manifest
        self._record = manifest.splits[split]
        self._first_rows = np.cumsum([0] + [shard.rows for shard in self._record.shards])
        self._shards: dict[int, Shard] = {}

    @classmethod
    def open(cls, directory: str | Path, split: Split = "train", *, verify: bool = False) -> Corpus:
        """Open a split of a finished corpus after checking its files.

        Args:
            directory: Made by `dsdistill.corpus.prepare`.
            split: Which part.
            verify: Compute the checksum of every shard, also of those unchanged since the last check.

        Raises:
            ValueError: If the corpus is unfinished or damaged (names the file), or the split has no rows.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        check_shards(directory, manifest, verify=verify)
        if split not in manifest.splits or manifest.splits[split].rows == 0:
            raise ValueError(f"{directory}: the {split} split has no rows; prepare it with another held_out share")
        return cls(directory, split, manifest)

    def __reduce__(self):
        return Corpus, (self.directory, self.split, self.manifest)

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_rows(self) -> int:
        return self._record.rows

    @property
    def length(self) -> int:
        """Tokens per row, padding included."""
        return self.manifest.length

    @property
    def has_padding(self) -> bool:
        """Whether any row is shorter than `length`."""
        return self._record.padded_rows > 0

    def rows(self, numbers: NDArray[np.integer]) -> RowArrays:
        """Some rows, in the order asked for.

        Args:
            numbers: (B,), each in [0, num_rows).

        Raises:
            IndexError: If a number is out of range.
        """
        numbers = np.asarray(numbers, np.int64)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.num_rows:
            raise IndexError(f"row numbers {numbers.min()}..{numbers.max()} are not in 0..{self.num_rows - 1}")
        columns = np.arange(self.length)
        input_ids = np.empty((len(numbers), self.length), np.int64)
        segments, lengths, seconds = None, np.empty((len(numbers), 1), np.int64), None
        shard_of_row = np.searchsorted(self._first_rows, numbers, side="right") - 1
        for index in np.unique(shard_of_row):
            shard = self._shard(int(index))
            chosen = np.flatnonzero(shard_of_row == index)
            local = numbers[chosen] - self._first_rows[index]
            first = shard.offsets[local].astype(np.int64)
            places = first[:, None] + columns
            input_ids[chosen] = np.take(shard.ids, places, mode="clip")
            lengths[chosen, 0] = shard.offsets[local + 1] - first
            if shard.segments is not None:
                segments = np.empty_like(input_ids) if segments is None else segments
                segments[chosen] = np.take(shard.segments, places, mode="clip")
            if shard.seconds is not None:
                seconds = np.empty_like(lengths) if seconds is None else seconds
                seconds[chosen, 0] = shard.seconds[local]
        mask = columns < lengths
        input_ids[~mask] = self.manifest.tokenizer.pad_id
        if segments is not None:
            segments = np.maximum.accumulate(np.where(mask, segments, 0), axis=1)
        token_type_ids = None if seconds is None else ((columns >= seconds) & mask).astype(np.int64)
        return RowArrays(input_ids, mask, segments, token_type_ids)

    def _shard(self, index: int) -> Shard:
        """Map a shard at its first use; checked by `open`."""
        if index not in self._shards:
            self._shards[index] = map_shard(self.directory / self._record.shards[index].file)
        return self._shards[index]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase | Tokenizer) -> None:
        """Make sure that a tokenizer is the one that the corpus was prepared with.

        Raises:
            ValueError: If it makes other tokens.
        """
        from dsdistill.corpus.tokenizing import tokenizer_fingerprint

        mine = self.manifest.tokenizer
        theirs = tokenizer_fingerprint(tokenizer)
        if theirs != mine.fingerprint:
            name = getattr(tokenizer, "name_or_path", "") or "the given tokenizer"
            raise ValueError(
                f"{self.directory} was prepared with the tokenizer of {mine.name} (fingerprint "
                f"{mine.fingerprint[:12]}), but {name} makes other tokens (fingerprint {theirs[:12]}); "
                "prepare the corpus with the teacher's tokenizer"
            )

    def check_vocabulary(self, vocab_size: int, *, model: str) -> None:
        """Make sure that a model has an embedding for every token that may occur.

        Raises:
            ValueError: If the tokenizer knows more tokens than the model.
        """
        needed = self.manifest.tokenizer.vocab_size
        if vocab_size < needed:
            raise ValueError(
                f"{model} has embeddings for {vocab_size} tokens, but {self.directory} was prepared with a tokenizer "
                f"of {needed} tokens; prepare it with the model's own tokenizer"
            )
