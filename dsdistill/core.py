"""The nouns that move between the rooms: `Batch`, `Features`, `Losses`, and the layer pairs they are read by.

Letters in shapes: B rows, L length, E width, H heads, D width per head, V vocabulary, C classes, N chosen positions.
Layers are numbered 1..N as in papers; layer 0 is the embedding output. What enters or leaves an `nn.Module` is a named
tuple, because ZeRO-3 looks for the tensors that start its backward in tuples, lists and dicts only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Signal = Literal["query", "key", "value", "bias", "hidden", "logits"]

Problem = Literal["classification", "regression", "multi_label"]
"""What a task's labels are: one of C classes, a real number, or for each of C classes yes or no."""

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class LayerPairs:
    """Which layers are compared with which; made by `dsdistill.objectives.mapping`.

    Iterating gives (student layer, teacher layer). With `combine`, all of `student` together answer for all of
    `teacher` together, the two need not be equally long, and there is nothing to iterate.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    combine: bool = False

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.combine:
            raise ValueError("combined layers have no pairs; this objective cannot be used with layers: combine")
        return iter(zip(self.student, self.teacher, strict=True))

    def __len__(self) -> int:
        return len(self.student)


class Batch(NamedTuple):
    """Rows of tokens as the data yields them.

    Attributes:
        input_ids: int64 (B, L), after masking.
        mask: bool (B, L), True = real token.
        segments: int64 (B, L), document number in a packed row; where given, neither the models nor the objectives
            look across documents. None where rows are taken as they are.
        token_type_ids: int64 (B, L), or None where the model has none.
        labels: int64 (B, L), -100 = ignored, for masked language modelling; (B,) for tasks; None without labels.
        targets: int64 (N,), flat indices into (B * L) of the positions whose logits are wanted: those with a label,
            or all real ones; None without token labels. Computed where the batch is made, so that the device never
            has to be asked how many there are.
        sample_ids: int64 (B,), the row's number in its data set.
        padded: Whether any position is padding; known where the batch is made, so that no device has to be asked.
        borders: int32 (M + 1,), where `segments` are given: from `document_borders`.
    """

    input_ids: Tensor
    mask: Tensor
    sample_ids: Tensor
    segments: Tensor | None = None
    token_type_ids: Tensor | None = None
    labels: Tensor | None = None
    targets: Tensor | None = None
    padded: bool = True
    borders: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Page-locked copy; called by `torch.utils.data.DataLoader`."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> Batch:
        return self._replace(**{name: function(v) for name, v in self._asdict().items() if isinstance(v, Tensor)})


FEWEST_BORDERS = 64


def document_borders(segments: Tensor, mask: Tensor) -> Tensor:
    """Where the documents of a batch begin, the padding of a row counted as one.

    Args:
        segments: int (B, L), document numbers in a row.
        mask: bool (B, L), True = real.

    Returns:
        int32 (M + 1,), places in the rows laid end to end; the last ones, repeated until M is a power of two that is at
        least 64, are B * L: a compiled model sees few shapes.
    """
    begins = torch.ones_like(mask)
    begins[:, 1:] = (segments[:, 1:] != segments[:, :-1]) | (mask[:, 1:] != mask[:, :-1])
    starts = begins.flatten().nonzero().squeeze(1)  # sync, if the batch is on a device
    size = max(FEWEST_BORDERS, 1 << (len(starts) - 1).bit_length())
    borders = torch.full((size + 1,), mask.numel(), dtype=torch.int32, device=mask.device)
    borders[: len(starts)] = starts
    return borders


class Features(NamedTuple):
    """What capture recorded in one forward of one model.

    Attributes:
        signals: query, key, value (B, H, L, D) by layer, heads split and, for rotary models, rotated;
            bias (B or 1, H, L, L) by layer, what a family adds to its attention scores, absent in families that add
            nothing; hidden (B, L, E) by layer; logits (N, V) at `Batch.targets`, or (B, C) in a task, under layer -1.
        scaling: Factor on query-key products before the softmax, by layer.
        windows: For layers with local attention, the largest distance |i - j| that attends; others are absent.
    """

    signals: Mapping[Signal, Mapping[int, Tensor]]
    scaling: Mapping[int, float] = {}
    windows: Mapping[int, int] = {}

    def at(self, signal: Signal, layer: int) -> Tensor:
        """The tensor of one signal at one layer.

        Raises:
            KeyError: If it was not captured; names what was.
        """
        try:
            return self.signals[signal][layer]
        except KeyError:
            got = {name: sorted(layers) for name, layers in self.signals.items()}
            raise KeyError(f"{signal} of layer {layer} was not captured; captured: {got}") from None

    def bias(self, layer: int) -> Tensor | None:
        """What a layer adds to its attention scores; None in families that add nothing.

        Raises:
            KeyError: If it adds something that was not captured.
        """
        return self.at("bias", layer) if "bias" in self.signals else None

    @property
    def logits(self) -> Tensor:
        """Logits, (N, V) or (B, C)."""
        return self.at("logits", -1)


NOTHING = Features(signals={})
"""What a teacher says whom nobody asks."""


class Losses(NamedTuple):
    """What the objectives return for one batch.

    Attributes:
        total: Weighted sum, scalar; what backward sees.
        terms: Each term, unweighted and detached, for people.
        answer: What the student said, if the model was only asked to answer, else None.
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    answer: Features | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model that objectives and mappings depend on; width is that of the hidden states.

    Keys and values have fewer heads than queries where several queries share them (grouped heads).
    """

    num_layers: int
    width: int
    num_heads: int
    num_key_heads: int
    head_width: int
    vocab_size: int

    def width_of(self, signal: Signal) -> int:
        """Width of a layer's queries, keys or values, all heads together."""
        return (self.num_heads if signal == "query" else self.num_key_heads) * self.head_width
