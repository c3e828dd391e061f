"""From tokens of documents to rows of a fixed length: filled up one after the other, or one document per row.

Letters in shapes: N rows, L length of a row, C room for content (L less the special tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsdistill.corpus.tokenizing import Template
from dsdistill.corpus.worker import Tokens

_SLICE_ROWS = 4096


@dataclass
class Rows:
    """Finished rows, flat: row i is ids[offsets[i]:offsets[i + 1]].

    Attributes:
        ids: Tokens, special tokens included.
        segments: uint16 like `ids`, number of the document within the row; None with one document per row.
        offsets: int32 (N + 1,).
        seconds: int32 (N,), where token type 1 begins; None for single texts.
    """

    ids: NDArray
    segments: NDArray[np.uint16] | None
    offsets: NDArray[np.int32]
    seconds: NDArray[np.int32] | None

    def __len__(self) -> int:
        return len(self.offsets) - 1


def join_rows(parts: list[Rows]) -> Rows:
    """One after the other; at least one part."""
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    segments = [part.segments for part in parts if part.segments is not None]
    seconds = [part.seconds for part in parts if part.seconds is not None]
    return Rows(
        ids=np.concatenate([part.ids for part in parts]),
        segments=np.concatenate(segments) if segments else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        seconds=np.concatenate(seconds) if seconds else None,
    )


@dataclass
class Shape:
    """How rows look: fixed for a corpus."""

    length: int
    template: Template
    packed: bool
    truncate: bool
    pairs: bool
    sentence_end: NDArray[np.bool_]
    dtype: type[np.unsignedinteger] | type[np.signedinteger]

    @property
    def room(self) -> int:
        """Tokens of content per row."""
        return self.length - self.template.num_special


@dataclass
class RowBuilder:
    """Collects the documents of one split and cuts them into rows.

    Packed as RoBERTa's FULL-SENTENCES (Liu et al. 2019, arXiv:1907.11692, section 4.2): consecutive documents with a
    separator in between fill each row to the last place; a row never begins with a separator.

    Attributes:
        shape: Of the rows.
        num_rows: Rows cut so far, in the whole split.
        dropped_tokens: Tokens that came into no row.
        padded_rows: Rows shorter than the length.
    """

    shape: Shape
    num_rows: int = 0
    dropped_tokens: int = 0
    padded_rows: int = 0
    _ids: list[NDArray[np.int32]] = field(default_factory=list)
    _lengths: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, tokens: Tokens) -> None:
        """Append documents without tokens of their own left out."""
        self._ids.append(tokens.ids)
        self._lengths.append(tokens.lengths[tokens.lengths > 0])

    def state(self) -> dict[str, Any]:
        """All there is to know between two cuts, as JSON values; what is in no row yet is less than a row."""
        ids, lengths = _joined(self._ids, np.int32), _joined(self._lengths, np.int64)
        counts = {"rows": self.num_rows, "dropped_tokens": self.dropped_tokens, "padded_rows": self.padded_rows}
        return counts | {"ids": ids.tolist(), "lengths": lengths.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.num_rows, self.dropped_tokens = state["rows"], state["dropped_tokens"]
        self.padded_rows = state["padded_rows"]
        self._ids, self._lengths = [np.array(state["ids"], np.int32)], [np.array(state["lengths"], np.int64)]

    def cut(self, *, final: bool) -> Rows:
        """Take out the rows that are complete.

        Args:
            final: No more documents follow. An incomplete last row of a packed split is then dropped, except where it
                is the only one.
        """
        ids, lengths = _joined(self._ids, np.int32), _joined(self._lengths, np.int64)
        self._ids, self._lengths = [], []
        rows = self._cut_packed(ids, lengths, final=final) if self.shape.packed else self._cut_documents(ids, lengths)
        self.num_rows += len(rows)
        self.padded_rows += int((np.diff(rows.offsets) < self.shape.length).sum())
        return rows

    def _cut_documents(self, ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> Rows:
        room = self.shape.room
        num_pieces = np.ones_like(lengths) if self.shape.truncate else -(-lengths // room)
        number = np.arange(num_pieces.sum()) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        starts = np.repeat(np.cumsum(lengths) - lengths, num_pieces) + number * room
        piece_lengths = np.minimum(np.repeat(lengths, num_pieces) - number * room, room)
        keep = piece_lengths >= (2 if self.shape.pairs else 1)
        self.dropped_tokens += len(ids) - int(piece_lengths[keep].sum())
        return _assemble(self.shape, ids, None, starts[keep], piece_lengths[keep])

    def _cut_packed(self, ids: NDArray[np.int32], lengths: NDArray[np.int64], *, final: bool) -> Rows:
        stream, documents, ends = _separated(ids, lengths, self.shape.template.separator)
        starts, next_start = _row_starts(ends, self.shape.room)
        row_lengths = np.full(len(starts), self.shape.room, np.int64)
        rest = np.arange(next_start, len(stream))[~ends[next_start:]]
        if final and len(rest) >= 2 and self.num_rows + len(starts) == 0:
            last = rest[-1] + 1 - next_start
            starts, row_lengths = np.array([next_start], np.int64), np.array([last], np.int64)
        elif final:
            self.dropped_tokens += len(rest)
        elif len(rest):
            self._ids = [stream[rest]]
            self._lengths = [np.unique(documents[rest], return_counts=True)[1]]
        return _assemble(self.shape, stream, documents, starts, row_lengths)


def _joined(arrays: list[NDArray], dtype: type) -> NDArray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _separated(
    ids: NDArray[np.int32], lengths: NDArray[np.int64], separator: int | None
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """Documents one after the other with a separator after each; the document of each token; which are separators."""
    numbers = np.arange(len(lengths), dtype=np.int32)
    if separator is None:
        return ids, np.repeat(numbers, lengths), np.zeros(len(ids), np.bool_)
    ends = np.zeros(len(ids) + len(lengths), np.bool_)
    ends[np.cumsum(lengths + 1) - 1] = True
    stream = np.full(len(ends), separator, np.int32)
    stream[~ends] = ids
    return stream, np.repeat(numbers, lengths + 1), ends


def _row_starts(ends: NDArray[np.bool_], room: int) -> tuple[NDArray[np.int64], int]:
    """Where full rows begin in the stream, and where the next one would."""
    separators = ends.tobytes()
    starts: list[int] = []
    start, size = 0, len(separators)
    while start + room <= size:
        starts.append(start)
        start += room
        if start < size and separators[start]:
            start += 1
    return np.array(starts, np.int64), start


def _assemble(
    shape: Shape,
    stream: NDArray[np.int32],
    documents: NDArray[np.int32] | None,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> Rows:
    """Put the special tokens around the content that lies at `starts` in the stream."""
    slices = [slice(at, at + _SLICE_ROWS) for at in range(0, len(starts), _SLICE_ROWS)]
    parts = [_assemble_slice(shape, stream, documents, starts[s], lengths[s]) for s in slices]
    row_lengths = lengths + shape.template.num_special
    return Rows(
        ids=_joined([ids for ids, _, _ in parts], shape.dtype),
        segments=None if documents is None else _joined([s for _, s, _ in parts if s is not None], np.uint16),
        offsets=np.concatenate([[0], np.cumsum(row_lengths)]).astype(np.int32),
        seconds=_joined([s for _, _, s in parts if s is not None], np.int32) if shape.pairs else None,
    )


def _assemble_slice(
    shape: Shape,
    stream: NDArray[np.int32],
    documents: NDArray[np.int32] | None,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> tuple[NDArray, NDArray[np.uint16] | None, NDArray[np.int32] | None]:
    template, columns = shape.template, np.arange(shape.length)
    prefix, middle, suffix = (np.array(part, np.int32) for part in (template.prefix, template.middle, template.suffix))
    cuts = _pair_cuts(shape, stream, starts, lengths) if shape.pairs else lengths
    middle_at = (len(prefix) + cuts)[:, None]
    suffix_at = (len(prefix) + lengths + len(middle))[:, None]
    second = columns >= middle_at + len(middle)
    content_at = np.clip(columns - len(prefix) - len(middle) * second, 0, lengths[:, None] - 1) + starts[:, None]
    ids = stream[content_at]
    ids[:, : len(prefix)] = prefix
    for special, place in ((middle, middle_at), (suffix, suffix_at)):
        for number, token in enumerate(special):
            np.put_along_axis(ids, place + number, token, axis=1)
    real = columns < suffix_at + len(suffix)
    segments = None
    if documents is not None:
        in_stream = documents[content_at]
        segments = (in_stream - in_stream[:, :1])[real].astype(np.uint16)
    seconds = None
    if shape.pairs:
        first_of_second = cuts + len(prefix) + template.middle_first
        seconds = np.where(template.second_type == 1, first_of_second, shape.length).astype(np.int32)
    return ids[real].astype(shape.dtype), segments, seconds


def _pair_cuts(
    shape: Shape, stream: NDArray[np.int32], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many tokens of each row's content belong to the first text: up to the sentence end nearest the middle."""
    before = np.arange(shape.room)
    content = stream[np.minimum(starts[:, None] + before, len(stream) - 1)]
    ends = shape.sentence_end[content] & (before < lengths[:, None] - 1)
    if shape.template.separator is not None:
        ends[:, :-1] &= content[:, 1:] != shape.template.separator
    distance = np.where(ends, np.abs(2 * (before + 1) - lengths[:, None]), 2 * shape.length)
    nearest = distance.argmin(axis=1)
    return np.where(ends.any(axis=1), nearest + 1, lengths // 2)
