"""Batches of this rank: row numbers from the order, rows from the store, masks from the masker, nothing remembered."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dsdistill.core import IGNORED_LABEL, Batch, document_borders
from dsdistill.corpus.masking import Masker
from dsdistill.corpus.order import accumulation_steps, micro_batch_positions, positions_to_rows
from dsdistill.corpus.store import Corpus

_HELD_OUT_SEED = 0  # the held-out rows and their masks never change


def make_batch(
    corpus: Corpus,
    masker: Masker,
    rows: np.ndarray,
    *,
    seed: int,
    epochs: np.ndarray | int,
    with_labels: bool = True,
    all_targets: bool = False,
    isolate: bool = False,
) -> Batch:
    """Read and mask some rows.

    Args:
        corpus: Where the rows are.
        masker: How they are masked.
        rows: int64 (B,), their numbers.
        seed: Of the masks.
        epochs: int64 (B,) or one number.
        with_labels: Whether labels and targets are wanted; the inputs are masked in any case.
        all_targets: Whether all real positions are targets, special tokens too, not only those chosen for masking;
            labels stay as they are.
        isolate: Whether documents packed into one row are kept apart: the batch then says where they begin.
    """
    arrays = corpus.rows(rows)
    input_ids, labels = masker(arrays.input_ids, arrays.mask, seed=seed, epochs=epochs, rows=rows)
    targets = np.flatnonzero(arrays.mask if all_targets else labels != IGNORED_LABEL) if with_labels else None
    mask = torch.from_numpy(arrays.mask)
    segments = torch.from_numpy(arrays.segments) if isolate and arrays.segments is not None else None
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        mask=mask,
        sample_ids=torch.from_numpy(rows),
        segments=segments,
        token_type_ids=None if arrays.token_type_ids is None else torch.from_numpy(arrays.token_type_ids),
        labels=torch.from_numpy(labels) if with_labels else None,
        targets=None if targets is None else torch.from_numpy(targets),
        padded=not arrays.mask.all(),
        borders=None if segments is None else document_borders(segments, mask),
    )


class _MicroBatches(Dataset[Batch]):
    """Item i is this rank's i-th micro-batch from `first_step` on."""

    def __init__(
        self,
        corpus: Corpus,
        masker: Masker,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
        with_labels: bool,
        all_targets: bool,
        isolate: bool,
    ) -> None:
        self._corpus, self._masker, self._seed = corpus, masker, seed
        self._wanted = {"with_labels": with_labels, "all_targets": all_targets, "isolate": isolate}
        self._batches = {"global_batch": global_batch, "micro_batch": micro_batch, "world_size": world_size}
        self._rank, self._first_step, self._last_step = rank, first_step, last_step
        self._accumulation = accumulation_steps(**self._batches)

    def __len__(self) -> int:
        return max(0, self._last_step - self._first_step) * self._accumulation

    def __getitem__(self, index: int) -> Batch:
        step, micro_step = divmod(index, self._accumulation)
        positions = micro_batch_positions(self._first_step + step, micro_step, self._rank, **self._batches)
        epochs, rows = positions_to_rows(positions, num_rows=self._corpus.num_rows, seed=self._seed)
        return make_batch(self._corpus, self._masker, rows, seed=self._seed, epochs=epochs, **self._wanted)


def train_batches(
    corpus: Corpus,
    masker: Masker,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    first_step: int,
    last_step: int,
    num_workers: int = 2,
    pin_memory: bool = False,
    with_labels: bool = True,
    all_targets: bool = False,
    isolate: bool = False,
    start_method: str | None = None,
) -> DataLoader[Batch]:
    """Micro-batches of one rank for the optimizer steps first_step, ..., last_step - 1, in order.

    Which rows and masks they hold depends on (seed, step) only: resuming means giving another `first_step`, and
    together the ranks read the same global batch whatever their number. The global random state is not touched.

    Args:
        corpus: Training split.
        masker: Masks; probability 0 for none.
        seed: Of order and masks.
        global_batch: Rows per optimizer step over all ranks.
        micro_batch: Rows per batch.
        rank: This rank.
        world_size: Number of ranks.
        first_step: Steps already done.
        last_step: Step to stop before.
        num_workers: Loader processes; 0 reads in this one.
        pin_memory: Page-locked batches, for copies to a GPU.
        with_labels: Whether an objective reads labels; without, `labels` and `targets` are None.
        all_targets: Whether all real positions are targets, as in `make_batch`.
        isolate: Whether documents of a row are kept apart, as in `make_batch`.
        start_method: "fork", "spawn" or "forkserver"; the platform's default if None.

    Returns:
        Iterable of `Batch`, with a length.

    Raises:
        ValueError: If global_batch is not a multiple of micro_batch * world_size.
    """
    batches = _MicroBatches(
        corpus,
        masker,
        seed=seed,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        first_step=first_step,
        last_step=last_step,
        with_labels=with_labels,
        all_targets=all_targets,
        isolate=isolate,
    )
    return DataLoader(
        batches,
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_pack_in_worker,  # pyright: ignore[reportArgumentType]  # declared for lists, but batch_size is None
        prefetch_factor=4 if num_workers else None,
        multiprocessing_context=start_method if num_workers else None,
        worker_init_fn=_stay_until_dismissed if num_workers else None,
        generator=torch.Generator().manual_seed(0),  # otherwise it draws from the global one, and dropout changes
    )


def _stay_until_dismissed(_worker: int) -> None:
    """Let a worker outlive the signals that ask a whole job to stop: its rank still needs batches for a last step.

    A terminal, SLURM and the deepspeed launcher signal workers too; SIGTERM counts only if the rank itself sends it.
    A worker whose rank is gone leaves within a second: torch's own check does not, once batches fill the pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_when_dismissed, daemon=True).start()


def _leave_when_dismissed() -> None:
    rank = multiprocessing.parent_process()
    while rank is not None and rank.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == rank.pid:
            break
    os._exit(0)


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A batch on its way out of a worker: pickled as plain bytes, unpickled as a `Batch`.

    Torch would send each tensor through a shared-memory file of its own, which takes longer than making it. The arrays
    are made here and not while pickling: an error there would be lost in a thread, and the reader would wait for ever.
    """

    values: dict[str, Any]

    def __reduce__(self):
        return _unpack, (self.values,)


def _unpack(values: dict[str, Any]) -> Batch:
    batch: dict[str, Any] = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in values.items()}
    return Batch(**batch)


def _pack_in_worker(batch: Batch) -> Batch | _Parcel:
    if get_worker_info() is None:
        return batch
    return _Parcel({n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in batch._asdict().items()})


def held_out_batches(
    corpus: Corpus,
    masker: Masker,
    *,
    rows: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    with_labels: bool = True,
    all_targets: bool = False,
    isolate: bool = False,
) -> Iterator[Batch]:
    """Some held-out rows, spread over the whole split, with masks that never change.

    Every rank gets equally many batches of equal size: rows that do not fill a batch on every rank are left out, so
    that the rows are the same for all world sizes that divide `rows` evenly. If there are too few rows for one full
    batch per rank, each rank gets one smaller batch.

    Args:
        corpus: Held-out split.
        masker: As in training.
        rows: How many rows at most.
        micro_batch: Rows per batch at most.
        rank: This rank.
        world_size: Number of ranks.
        with_labels: Whether an objective reads labels.
        all_targets: Whether all real positions are targets, as in `make_batch`.
        isolate: Whether documents of a row are kept apart, as in `make_batch`.

    Raises:
        ValueError: If there are fewer rows than ranks.
    """
    available = min(rows, corpus.num_rows)
    size = min(micro_batch, available // world_size)
    if size == 0:
        raise ValueError(
            f"{corpus.directory}: {available} held-out rows for {world_size} ranks; prepare it with a larger held_out"
        )
    _, numbers = positions_to_rows(np.arange(available), num_rows=corpus.num_rows, seed=_HELD_OUT_SEED)
    return (
        make_batch(
            corpus,
            masker,
            numbers[start + rank * size : start + (rank + 1) * size],
            seed=_HELD_OUT_SEED,
            epochs=0,
            with_labels=with_labels,
            all_targets=all_targets,
            isolate=isolate,
        )
        for start in range(0, available - size * world_size + 1, size * world_size)
    )
