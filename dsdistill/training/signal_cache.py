"""Teacher signals computed once, kept on disk and read by row number.

For tasks: their few rows are read for many epochs, by many students. A cache belongs to one teacher, one set of rows
and one precision, known by their checksums, and refuses all others. Each signal of each layer is a file of its own,
added when first wanted, so that runs with different objectives share what they have in common.

DIRECTORY/
    identity.json            what the signals belong to
    hidden-6.bin             one row a token (or for logits one a row of data), memory-mapped
    hidden-6.json            its type, shape, checksum and the attention's constants; written last
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter
from torch import Tensor

from dsdistill.core import Batch, Features, Signal
from dsdistill.corpus.files import read_json, sha256_of, write_text
from dsdistill.models.capture import Wanted
from dsdistill.training.dist import Place

IDENTITY = "identity.json"
HEADS: tuple[Signal, ...] = ("query", "key", "value")
RESIDENT_BYTES = 2**30


def file_name(signal: Signal, layer: int) -> str:
    """Name of the files of one signal of one layer, without suffix."""
    return "logits" if signal == "logits" else f"{signal}-{layer}"


def _names(wanted: Wanted) -> list[str]:
    return [file_name(signal, layer) for signal, layers in wanted.items() for layer in layers]


@dataclass(frozen=True, slots=True)
class Array:
    """One signal of one layer, as its file holds it.

    Attributes:
        signal: Which.
        layer: Of the teacher, -1 for logits.
        dtype: Such as `float16`.
        places: Rows of the file: tokens of all rows of data one after the other, or rows of data for logits.
        width: Numbers in each.
        heads: Heads that the width is divided into; 1 for hidden states and logits.
        scaling: Of the layer's attention, if known.
        window: Of the layer's attention, if it has one.
    """

    signal: Signal
    layer: int
    dtype: Annotated[str, Field(pattern="^(float16|bfloat16|float32)$")]
    places: NonNegativeInt
    width: PositiveInt
    heads: PositiveInt
    scaling: float | None
    window: int | None

    @property
    def name(self) -> str:
        """Name of its files."""
        return file_name(self.signal, self.layer)

    @property
    def num_bytes(self) -> int:
        """Size of its file."""
        return self.places * self.width * getattr(torch, self.dtype).itemsize

    def map(self, path: Path, *, writable: bool = False) -> Tensor:
        """The file as a tensor (places, width) on the CPU, read as it is used."""
        dtype = getattr(torch, self.dtype)
        flat = torch.from_file(str(path), shared=writable, size=self.places * self.width, dtype=dtype)
        return flat.view(self.places, self.width)


_ARRAY = TypeAdapter(Array)


def num_places(signal: Signal, lengths: np.ndarray) -> int:
    """Rows of a signal's file, for rows of data of these lengths."""
    return len(lengths) if signal == "logits" else int(lengths.sum())


def describe(features: Features, lengths: np.ndarray) -> list[Array]:
    """How the signals of all rows will be kept, known from those of one batch."""
    arrays = []
    for signal, layers in features.signals.items():
        for layer, tensor in layers.items():
            heads = tensor.shape[1] if signal in HEADS else 1
            arrays.append(
                Array(
                    signal=signal,
                    layer=layer,
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    places=num_places(signal, lengths),
                    width=tensor.shape[-1] * heads,
                    heads=heads,
                    scaling=features.scaling.get(layer),
                    window=features.windows.get(layer),
                )
            )
    return arrays


class SignalCache:
    """The signals of one teacher for one set of rows.

    Args:
        directory: Made if it is not there.
        identity: Checksums and settings that the signals depend on, as JSON values.
        lengths: int (N,), tokens of each row.

    Raises:
        ValueError: If the directory holds the signals of something else; names what differs.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], lengths: np.ndarray):
        self.directory = directory
        self.identity = {**identity, "version": 1}
        self.lengths = np.asarray(lengths, np.int64)
        self.starts = torch.from_numpy(np.cumsum(self.lengths) - self.lengths)
        found = directory / IDENTITY
        if found.is_file():
            self._check(self._read(found))

    def _check(self, found: Mapping[str, Any]) -> None:
        different = sorted(key for key in {*found, *self.identity} if found.get(key) != self.identity.get(key))
        if different:
            raise ValueError(
                f"the teacher signals in {self.directory} were made with another {', '.join(different)} and are not "
                "used: delete that directory, or set teacher.directory to another one, or teacher.cache=none"
            )

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; delete {self.directory}, the teacher signals will be made again") from error

    def missing(self, wanted: Wanted) -> dict[Signal, set[int]]:
        """What of `wanted` is not there yet."""
        absent: dict[Signal, set[int]] = {}
        for signal, layers in wanted.items():
            for layer in layers:
                if not (self.directory / f"{file_name(signal, layer)}.json").is_file():
                    absent.setdefault(signal, set()).add(layer)
        return absent

    def fill(
        self,
        teacher: Callable[[Batch], Features],
        batches: Iterable[Batch],
        place: Place,
        *,
        first_alone: Callable[[str, Callable[[], object]], None],
        at: Callable[[str], None],
    ) -> None:
        """Ask the teacher for all rows and write what it says; every process must call this.

        Args:
            teacher: Gives just the signals that are missing.
            batches: This rank's rows; together the ranks have each row at least once.
            place: This process.
            first_alone: Lets the first process do something when all are there (`Watchdog.first_alone`).
            at: Is told what this process is doing.

        Raises:
            OSError: If there is no room; names the bytes.
        """
        began = time.perf_counter()
        arrays: list[Array] = []
        maps: dict[str, Tensor] = {}
        try:
            for number, batch in enumerate(batches):
                at(f"teacher signals, batch {number}")
                features = teacher(batch.to(place.device))
                if not arrays:
                    arrays = describe(features, self.lengths)
                    first_alone("room for teacher signals", partial(self._make_room, arrays))
                    maps = {array.name: array.map(self._partial(array), writable=True) for array in arrays}
                for array in arrays:
                    self._put(array, maps[array.name], features, batch)
            maps.clear()
            seconds = time.perf_counter() - began
            for array in arrays:
                first_alone(f"checksum of teacher signals {array.name}", partial(self._seal, array, seconds))
        except BaseException:
            if place.is_first:
                self._remove_unfinished()
            raise

    def _remove_unfinished(self) -> None:
        for leftover in self.directory.glob("*.partial"):
            leftover.unlink(missing_ok=True)

    def _make_room(self, arrays: list[Array]) -> None:
        """Reserve the files: a disk that is full is told here, and not by a signal in the middle of writing."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        needed, free = sum(array.num_bytes for array in arrays), shutil.disk_usage(self.directory).free
        names = ", ".join(array.name for array in arrays)
        lack = f"teacher signals ({names}) need {needed:,} bytes in {self.directory}, {free:,} are free"
        advice = "make room, set teacher.directory to another disk, or teacher.cache=none"
        if needed > free:
            raise OSError(f"{lack}; {advice}")
        print(
            f"teacher signals: {needed / 2**20:.1f} MiB will be written to {self.directory} ({names}; "
            f"{len(self.lengths):,} rows)",
            file=sys.stderr,
            flush=True,
        )
        write_text(self.directory / IDENTITY, json.dumps(self.identity, indent=2) + "\n")
        try:
            for array in arrays:
                with self._partial(array).open("xb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(1, array.num_bytes))
        except OSError as error:
            raise OSError(f"{lack}, but not for these files ({error.strerror}); {advice}") from error

    def _partial(self, array: Array) -> Path:
        return self.directory / f"{array.name}.partial"

    def _put(self, array: Array, target: Tensor, features: Features, batch: Batch) -> None:
        tensor, mask = features.at(array.signal, array.layer).cpu(), batch.mask.cpu()
        if array.signal == "logits":
            target[batch.sample_ids.cpu()] = tensor
            return
        if array.signal in HEADS:
            tensor = tensor.transpose(1, 2).flatten(2)
        target[places_of(batch.sample_ids.cpu(), mask, self.starts)[mask]] = tensor[mask]

    def _seal(self, array: Array, seconds: float) -> None:
        path = self._partial(array).rename(self.directory / f"{array.name}.bin")
        fields = {name: getattr(array, name) for name in Array.__slots__}
        told = {**fields, "sha256": sha256_of(path), "seconds": seconds}
        write_text(self.directory / f"{array.name}.json", json.dumps(told) + "\n")

    def seconds(self, wanted: Wanted) -> float:
        """How long the teacher took for all rows, in the slowest pass that made any of the wanted signals."""
        return max(self._told(name)[2] for name in _names(wanted))

    def num_bytes(self, wanted: Wanted) -> int:
        """Size of the files of the wanted signals."""
        return sum((self.directory / f"{name}.bin").stat().st_size for name in _names(wanted))

    def teacher(self, wanted: Wanted, place: Place) -> CachedTeacher:
        """Something to ask instead of the teacher.

        Raises:
            ValueError: If a file is damaged.
        """
        return CachedTeacher(self.starts, [self._open(name) for name in _names(wanted)], place)

    def array(self, name: str) -> Tensor:
        """All of one signal, (places, width) on the CPU, read as it is used.

        Raises:
            ValueError: If its file is damaged.
        """
        return self._open(name)[1]

    def _open(self, name: str) -> tuple[Array, Tensor]:
        path = self.directory / f"{name}.bin"
        array, checksum, _ = self._told(name)
        if not path.is_file() or path.stat().st_size != array.num_bytes or sha256_of(path) != checksum:
            raise ValueError(f"teacher signals {path} are damaged; delete {self.directory}, they will be made again")
        return array, array.map(path)

    def _told(self, name: str) -> tuple[Array, str, float]:
        """What the file beside a signal says: what it is, its checksum, and the seconds it took."""
        path = self.directory / f"{name}.json"
        told = self._read(path)
        try:
            array = _ARRAY.validate_python({key: told[key] for key in Array.__slots__})
            checksum, seconds = str(told["sha256"]), float(told["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            problem = "; ".join(str(error).split("\n")[:2])
            raise ValueError(f"{path} is not what a run writes ({problem}); delete {self.directory}") from error
        if array.name != name or array.places != num_places(array.signal, self.lengths):
            raise ValueError(f"{path} tells of {array.name} with {array.places} places; delete {self.directory}")
        return array, checksum, seconds


def places_of(rows: Tensor, mask: Tensor, starts: Tensor) -> Tensor:
    """Place of each token in the file, int64 (B, L); meaningless at padding.

    Args:
        rows: int64 (B,), numbers of the rows.
        mask: bool (B, L), True = real; real tokens come first.
        starts: int64 (N,), place of each row's first token.
    """
    return starts[rows][:, None] + torch.arange(mask.shape[1], device=mask.device)


class CachedTeacher:
    """Answers as the teacher would, from its cache; at padding it says 0.

    Signals that fit into `RESIDENT_BYTES` are kept on the device, so that nothing waits for the host.

    Args:
        starts: int64 (N,), place of each row's first token.
        arrays: The signals and their mapped files.
        place: Where answers go.
    """

    def __init__(self, starts: Tensor, arrays: list[tuple[Array, Tensor]], place: Place):
        self.device = place.device
        self.at = place.device if sum(array.num_bytes for array, _ in arrays) <= RESIDENT_BYTES else torch.device("cpu")
        self.starts = starts.to(self.at)
        self.arrays = [(array, values.to(self.at)) for array, values in arrays]

    def __call__(self, batch: Batch) -> Features:
        """The wanted signals of a batch; constants for autograd."""
        rows, mask = batch.sample_ids.to(self.at), batch.mask.to(self.at)  # sync, if signals are not on the device
        places = places_of(rows, mask, self.starts)
        signals: dict[Signal, dict[int, Tensor]] = {}
        for array, values in self.arrays:
            if array.signal == "logits":
                tensor = values[rows]
            else:
                read = values[places.clamp(max=array.places - 1)]
                tensor = read.masked_fill_(~mask[..., None], 0.0)
            tensor = tensor.to(self.device, non_blocking=True)
            if array.signal in HEADS:
                tensor = tensor.unflatten(2, (array.heads, -1)).transpose(1, 2)
            signals.setdefault(array.signal, {})[array.layer] = tensor
        told = [array for array, _ in self.arrays]
        return Features(
            signals=signals,
            scaling={array.layer: array.scaling for array in told if array.scaling is not None},
            windows={array.layer: array.window for array in told if array.window is not None},
        )
