"""Tokenized rows of one split in memory, and batches of them.

Letters in shapes: N rows, T tokens of all rows, B rows of a batch, L its length, C classes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsdistill.core import IGNORED_LABEL, Batch
from dsdistill.corpus.order import accumulation_steps, micro_batch_positions, positions_to_rows
from dsdistill.corpus.tokenizing import plain_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_ROWS = 8192
_PAD_MULTIPLE = 8
_STEPS_AT_ONCE = 64
"""Steps whose rows are looked up together: as numpy calls, one step costs as much as many."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Rows:
    """Rows of one split; never changed, operations give new ones.

    Attributes:
        ids: int32 (T,), the tokens of all rows, special tokens included.
        offsets: int64 (N + 1,), where each row starts, and the end.
        token_types: uint8 (T,), or None where the model has none.
        labels: int64 (N,) class numbers, float32 (N,) numbers, float32 (N, C) of 0 and 1, or None. Rows that wait for
            a label have -100, or NaN.
        is_augmented: bool (N,), True for rows made by augmentation.
        max_length: Tokens per row at most.
        pad_id: Token that fills up short rows.
        num_cut: How many rows were longer than `max_length` and lost their end.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    token_types: NDArray[np.uint8] | None
    labels: NDArray[Any] | None
    is_augmented: NDArray[np.bool_]
    max_length: int
    pad_id: int
    num_cut: int = 0

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.offsets) - 1

    def batch(self, numbers: NDArray[np.integer]) -> Batch:
        """Some rows as tensors, padded to a multiple of 8 tokens but not beyond `max_length`.

        Args:
            numbers: (B,), which rows; they become `Batch.sample_ids`.
        """
        numbers = np.asarray(numbers, np.int64)
        starts = self.offsets[numbers]
        lengths = self.offsets[numbers + 1] - starts
        length = min(-(-int(lengths.max()) // _PAD_MULTIPLE) * _PAD_MULTIPLE, self.max_length)
        columns = np.arange(length)
        mask = columns < lengths[:, None]
        places = (starts[:, None] + columns)[mask]
        input_ids = np.full(mask.shape, self.pad_id, np.int64)
        input_ids[mask] = self.ids[places]
        token_type_ids = None
        if self.token_types is not None:
            token_type_ids = np.zeros(mask.shape, np.int64)
            token_type_ids[mask] = self.token_types[places]
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            mask=torch.from_numpy(mask),
            sample_ids=torch.from_numpy(numbers),
            token_type_ids=None if token_type_ids is None else torch.from_numpy(token_type_ids),
            labels=None if self.labels is None else torch.from_numpy(self.labels[numbers]),
            padded=len(places) < mask.size,
        )

    def first(self, count: int) -> Rows:
        """The first `count` rows, or all."""
        count = min(count, self.num_rows)
        end = int(self.offsets[count])
        return replace(
            self,
            ids=self.ids[:end],
            offsets=self.offsets[: count + 1],
            token_types=None if self.token_types is None else self.token_types[:end],
            labels=None if self.labels is None else self.labels[:count],
            is_augmented=self.is_augmented[:count],
        )

    def extended(self, *more: Rows) -> Rows:
        """These rows and then others of the same task.

        Raises:
            ValueError: If some have token types or labels and others have not, or lengths or padding differ.
        """
        rows = (self, *more)
        kinds = {(r.token_types is None, r.labels is None, r.max_length, r.pad_id) for r in rows}
        if len(kinds) > 1:
            raise ValueError(f"rows of different kinds cannot be joined: {sorted(kinds)}")
        starts = np.cumsum([r.offsets[-1] for r in rows]) - [r.offsets[-1] for r in rows]
        ends = [r.offsets[1:] + start for r, start in zip(rows, starts, strict=True)]
        return replace(
            self,
            ids=np.concatenate([r.ids for r in rows]),
            offsets=np.concatenate([self.offsets[:1], *ends]),
            token_types=_joined([r.token_types for r in rows]),
            labels=_joined([r.labels for r in rows]),
            is_augmented=np.concatenate([r.is_augmented for r in rows]),
            num_cut=sum(r.num_cut for r in rows),
        )

    def with_labels(self, numbers: NDArray[np.integer], labels: NDArray[Any]) -> Rows:
        """The same rows with other labels for some.

        Args:
            numbers: (M,), which rows.
            labels: (M,) or (M, C), their labels.

        Raises:
            ValueError: If there are no labels to replace, or shapes differ.
        """
        if self.labels is None or labels.shape != (len(numbers), *self.labels.shape[1:]):
            have = None if self.labels is None else self.labels.shape[1:]
            raise ValueError(f"labels of shape {labels.shape} for {len(numbers)} rows with labels of shape {have}")
        changed = self.labels.copy()
        changed[numbers] = labels
        return replace(self, labels=changed)

    def fingerprint(self) -> str:
        """SHA-256 of everything the batches depend on, and of which rows are augmented; 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                digest.update(f"{field.name} {value.dtype.str} {value.shape}\n".encode())
                digest.update(np.ascontiguousarray(value).data)
            elif field.name != "num_cut":
                digest.update(f"{field.name} {value}\n".encode())
        return digest.hexdigest()


def _joined(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


def tokenize_rows(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    labels: NDArray[Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    augmented: bool = False,
) -> Rows:
    """Tokenize texts or pairs of texts; rows that are too long lose tokens at the end of their longer text.

    The tokens are those of `tokenizer(texts, pairs, truncation="longest_first", max_length=max_length)`, except that
    special tokens written in a text are text. The Rust tokenizer is called directly, which takes half the time.

    Raises:
        ValueError: If the tokenizer has no padding token, or `max_length` has no room for special tokens and text.
    """
    pad_id = tokenizer.pad_token_id
    if not isinstance(pad_id, int):
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no padding token")
    backend = plain_backend(tokenizer)
    num_special = backend.num_special_tokens_to_add(is_pair=pairs is not None)
    if max_length < num_special + 2:
        raise ValueError(f"max_length={max_length} has no room for {num_special} special tokens and some text")
    backend.enable_truncation(max_length, strategy="longest_first")
    typed = "token_type_ids" in tokenizer.model_input_names
    ids: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    types: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)]
    lengths: list[int] = []
    num_cut = 0
    for start in range(0, len(texts), _CHUNK_ROWS):
        chunk: Any = texts[start : start + _CHUNK_ROWS]
        if pairs is not None:
            chunk = list(zip(chunk, pairs[start : start + _CHUNK_ROWS], strict=True))
        encodings = backend.encode_batch_fast(list(chunk))
        lengths += map(len, encodings)
        num_cut += sum(len(encoding) == max_length and bool(encoding.overflowing) for encoding in encodings)
        ids.append(np.array([token for encoding in encodings for token in encoding.ids], np.int32))
        if typed:
            types.append(np.array([kind for encoding in encodings for kind in encoding.type_ids], np.uint8))
    return Rows(
        ids=np.concatenate(ids),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        token_types=np.concatenate(types) if typed else None,
        labels=labels,
        is_augmented=np.full(len(texts), augmented),
        max_length=max_length,
        pad_id=pad_id,
        num_cut=num_cut,
    )


def no_labels_yet(like: NDArray[Any] | None, num_rows: int) -> NDArray[Any] | None:
    """Labels of rows that wait for the teacher's: -100 for classes, NaN for numbers; None if `like` is None."""
    if like is None:
        return None
    waiting = IGNORED_LABEL if np.issubdtype(like.dtype, np.integer) else np.nan
    return np.full((num_rows, *like.shape[1:]), waiting, like.dtype)


def train_batches(
    rows: Rows,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    first_step: int,
    last_step: int,
) -> Iterator[Batch]:
    """Micro-batches of one rank for the optimizer steps first_step, ..., last_step - 1, in order.

    Which rows come when depends on (seed, step) only, as in the corpus: an epoch is a permutation of the rows, and all
    ranks together read the same global batches whatever their number.

    Raises:
        ValueError: If global_batch is not a multiple of micro_batch * world_size.
    """
    sizes = {"global_batch": global_batch, "micro_batch": micro_batch, "world_size": world_size}
    num_micro_steps = accumulation_steps(**sizes)

    def numbers(steps: range) -> NDArray[np.int64]:
        parts = itertools.product(steps, range(num_micro_steps))
        positions = np.stack([micro_batch_positions(step, part, rank, **sizes) for step, part in parts])
        return positions_to_rows(positions, num_rows=rows.num_rows, seed=seed)[1]

    return (
        rows.batch(chosen)
        for start in range(first_step, last_step, _STEPS_AT_ONCE)
        for chosen in numbers(range(start, min(start + _STEPS_AT_ONCE, last_step)))
    )


def evaluation_batches(rows: Rows, *, micro_batch: int, rank: int, world_size: int) -> Iterator[Batch]:
    """Every row once over all ranks, rows of similar length together, long ones first.

    Every rank gets equally many batches of equal size. The last ones are filled up with rows that come elsewhere too;
    `in_row_order` drops the repetitions.
    """
    size = min(micro_batch, -(-rows.num_rows // world_size))
    over_ranks = size * world_size
    order = np.argsort(-np.diff(rows.offsets), kind="stable")
    order = np.resize(order, -(-rows.num_rows // over_ranks) * over_ranks)
    return (
        rows.batch(order[start + rank * size : start + (rank + 1) * size]) for start in range(0, len(order), over_ranks)
    )


def in_row_order(sample_ids: NDArray[np.integer], outputs: NDArray[Any], *, num_rows: int) -> NDArray[Any]:
    """What models said about all rows, put in the rows' order; repetitions are dropped, the first counts.

    Args:
        sample_ids: (M,), row numbers in any order, from all ranks.
        outputs: (M, ...), one entry for each.
        num_rows: How many rows there are.

    Returns:
        (N, ...).

    Raises:
        ValueError: If a row is missing; names it.
    """
    found, first = np.unique(sample_ids, return_index=True)
    if not np.array_equal(found, np.arange(num_rows)):
        missing = np.setdiff1d(np.arange(num_rows), found)
        raise ValueError(f"{len(missing)} of {num_rows} rows have no output, the first is {missing[:1].tolist()}")
    return outputs[first]
