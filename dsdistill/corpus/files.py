"""Files that are either complete or not there: written aside, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from dsdistill.progress import waiting

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file; afterwards `path` holds all of it, or what it held before.

    Raises:
        OSError: If the disk is full; names the path and the bytes already written.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                written = os.fstat(file.fileno()).st_size
                # What is still buffered cannot be written when the file is closed: point it at nothing.
                _discard(file)
                raise _full(error, path, written) from None
        os.replace(aside, path)
        sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _discard(file: IO[bytes]) -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, file.fileno())
    os.close(sink)


def _full(error: OSError, path: Path, written: int) -> OSError:
    free = os.statvfs(path.parent)
    return OSError(
        error.errno,
        f"{os.strerror(error.errno or 0)}: {path} could not be written beyond {written} bytes "
        f"({free.f_bavail * free.f_frsize} bytes free there); "
        "make room and start the same command again to go on",
    )


def sync(path: Path) -> None:
    """Make what is in a file, or renames in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_arrow(path: Path, batch: pa.RecordBatch) -> None:
    """One record batch as an Arrow stream, the format that `datasets.Dataset.from_file` maps."""

    def write(file: IO[bytes]) -> None:
        with pa.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)

    write_atomically(path, write)


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a run has written.

    Raises:
        ValueError: If it cannot be read or holds something else; names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def sha256_of(path: Path) -> str:
    """Checksum of a file's content."""
    with waiting(f"checksum of {path}"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
