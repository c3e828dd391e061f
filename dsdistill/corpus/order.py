"""Which row of the corpus comes when: a pure function of (seed, position), with no state and no table.

The training stream is an endless line of positions 0, 1, 2, ... Position p belongs to epoch p // num_rows, and each
epoch is its own permutation of the rows. Optimizer step s takes the positions from s * global_batch on, whatever the
number of ranks, so that a run continues with the same global batches on another number of ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsdistill.corpus.hashing import hash64, mix64

_ROUNDS = 8
_ORDER_DOMAIN = 0x6F72646572  # keeps the order's hashes apart from those of the masks


def positions_to_rows(
    positions: NDArray[np.integer], *, num_rows: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Epoch and row of each position of the training stream.

    Time and memory do not depend on `num_rows` or on how far the positions are.

    Args:
        positions: Integers >= 0, any shape.
        num_rows: Rows of the corpus, >= 1.
        seed: Any integer.

    Returns:
        Epochs and rows, int64, in the shape of `positions`. Within an epoch each row comes exactly once.

    Raises:
        ValueError: If a position is negative or there are no rows.
    """
    positions = np.asarray(positions, np.int64)
    if num_rows < 1:
        raise ValueError(f"num_rows={num_rows}: a stream needs at least one row")
    if positions.size and positions.min() < 0:
        raise ValueError(f"position {positions.min()} is negative")
    epochs, places = np.divmod(positions.ravel(), num_rows)
    keys = hash64(_ORDER_DOMAIN, seed, epochs)
    rows = _permute(places.astype(np.uint64), keys, num_rows).astype(np.int64)
    return epochs.reshape(positions.shape), rows.reshape(positions.shape)


def _permute(places: NDArray[np.uint64], keys: NDArray[np.uint64], num_rows: int) -> NDArray[np.uint64]:
    """Keyed bijection of 0..num_rows-1: a Feistel network, walked until it comes back into the range.

    Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 3 (cycle walking). The network's
    domain is less than four times `num_rows` (or 64 if that is more), so few walks are needed.
    """
    half_bits = max(3, ((num_rows - 1).bit_length() + 1) // 2)
    result = _feistel(places, keys, half_bits)
    outside = np.flatnonzero(result >= num_rows)
    while outside.size:
        result[outside] = _feistel(result[outside], keys[outside], half_bits)
        outside = outside[result[outside] >= num_rows]
    return result


def _feistel(x: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: int) -> NDArray[np.uint64]:
    """One pass of the network over numbers of 2 * half_bits bits."""
    shift, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> shift, x & low
    for _ in range(_ROUNDS):
        keys = mix64(keys)
        left, right = right, left ^ (mix64(keys ^ right) & low)
    return (left << shift) | right


def micro_batch_positions(
    step: int, micro_step: int, rank: int, *, global_batch: int, micro_batch: int, world_size: int
) -> NDArray[np.int64]:
    """Stream positions that one rank reads in one micro-step.

    Args:
        step: Optimizer step, from 0.
        micro_step: Which of the step's global_batch / (micro_batch * world_size) accumulation parts, from 0.
        rank: This rank, from 0.
        global_batch: Rows per optimizer step over all ranks.
        micro_batch: Rows per rank and micro-step.
        world_size: Number of ranks.

    Returns:
        int64 (micro_batch,). Over micro-steps and ranks of one step they are step * global_batch and the
        global_batch - 1 positions after it, each once.

    Raises:
        ValueError: If global_batch is not a multiple of micro_batch * world_size, or an index is out of range.
    """
    num_micro_steps = accumulation_steps(global_batch=global_batch, micro_batch=micro_batch, world_size=world_size)
    if step < 0 or not 0 <= micro_step < num_micro_steps or not 0 <= rank < world_size:
        raise ValueError(
            f"step={step}, micro_step={micro_step} of {num_micro_steps}, rank={rank} of {world_size}: out of range"
        )
    start = step * global_batch + (micro_step * world_size + rank) * micro_batch
    return np.arange(start, start + micro_batch, dtype=np.int64)


def accumulation_steps(*, global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro-steps per optimizer step.

    Raises:
        ValueError: If the global batch cannot be divided into equal micro-batches; names the numbers.
    """
    if min(global_batch, micro_batch, world_size) < 1 or global_batch % (micro_batch * world_size):
        raise ValueError(
            f"global_batch={global_batch} is not a multiple of micro_batch={micro_batch} * world_size={world_size}"
        )
    return global_batch // (micro_batch * world_size)
