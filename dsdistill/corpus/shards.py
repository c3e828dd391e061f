"""One file of rows: an Arrow stream with one record batch, which is mapped and never copied."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dsdistill.corpus.files import sha256_of, write_arrow
from dsdistill.corpus.manifest import ShardRecord
from dsdistill.corpus.packing import Rows


class Shard(NamedTuple):
    """A mapped file; see `dsdistill.corpus.packing.Rows` for its parts."""

    ids: NDArray
    offsets: NDArray[np.int32]
    segments: NDArray[np.uint16] | None
    seconds: NDArray[np.int32] | None


def write_shard(path: Path, rows: Rows) -> ShardRecord:
    """Write rows to a file and describe it."""
    offsets = pa.array(rows.offsets)
    columns: dict[str, pa.Array] = {"input_ids": pa.ListArray.from_arrays(offsets, pa.array(rows.ids))}
    if rows.segments is not None:
        columns["segments"] = pa.ListArray.from_arrays(offsets, pa.array(rows.segments))
    if rows.seconds is not None:
        columns["second_start"] = pa.array(rows.seconds)
    write_arrow(path, pa.RecordBatch.from_pydict(columns))
    return ShardRecord(file=path.name, rows=len(rows), bytes=path.stat().st_size, sha256=sha256_of(path))


def map_shard(path: Path) -> Shard:
    """Map a file.

    Raises:
        ValueError: If it is no shard.
    """
    try:
        with pa.memory_map(str(path)) as file:
            batch = pa.ipc.open_stream(file).read_next_batch()
    except (pa.ArrowException, OSError, StopIteration) as error:
        raise ValueError(f"{path}: damaged shard ({error}); prepare the corpus again") from None
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    ids = columns["input_ids"]
    return Shard(
        ids=ids.values.to_numpy(zero_copy_only=True),
        offsets=ids.offsets.to_numpy(zero_copy_only=True),
        segments=columns["segments"].values.to_numpy(zero_copy_only=True) if "segments" in columns else None,
        seconds=columns["second_start"].to_numpy(zero_copy_only=True) if "second_start" in columns else None,
    )
