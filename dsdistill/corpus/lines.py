"""Lines of UTF-8 text from plain and compressed files: streamed, checked, with the place of every fault."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa

COMPRESSIONS = (".gz", ".xz", ".zst")
LIMIT_BYTES = 16 * 2**20  # of one line and of one document: bounds the memory whatever the input

_BLOCK_BYTES = 1 << 20
_DAMAGED = (gzip.BadGzipFile, EOFError, lzma.LZMAError, zlib.error)


@dataclass
class Meter:
    """How many bytes of the input files (as stored, so compressed) have been read."""

    done: int = 0


def read_lines(path: Path, meter: Meter) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, line ends kept, a byte order mark removed.

    Raises:
        ValueError: If the file is empty, damaged, not UTF-8, binary, or a line is longer than `LIMIT_BYTES`; names
            the file and the line and byte of the fault.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    number, offset, rest = 0, 0, b""
    for block in _blocks(path, meter):
        lines = (rest + block).split(b"\n") if rest else block.split(b"\n")
        rest = lines.pop()
        for line in lines:
            number += 1
            yield number, _decode(line, path, number, offset) + "\n"
            offset += len(line) + 1
        _check_size(len(rest), path, number + 1, offset)
    if rest:
        yield number + 1, _decode(rest, path, number + 1, offset)


def _blocks(path: Path, meter: Meter) -> Iterator[bytes]:
    """Decompressed blocks; reports the bytes read from disk."""
    before = meter.done
    damaged = (*_DAMAGED, OSError) if path.suffix == ".zst" else _DAMAGED  # pyarrow raises plain OSError
    with path.open("rb") as raw, _decompressed(raw, path.suffix) as stream:
        while True:
            try:
                block = stream.read(_BLOCK_BYTES)
            except damaged as error:
                raise ValueError(
                    f"{path}: damaged or cut {path.suffix} data near byte {raw.tell()} ({error})"
                ) from None
            if not block:
                return
            meter.done = before + raw.tell()
            yield block


def _decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType]  # a binary file in all that matters
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        return pa.CompressedInputStream(raw, "zstd")  # zstandard's reader takes a cut file for a whole one
    return raw


def _decode(line: bytes, path: Path, number: int, offset: int) -> str:
    _check_size(len(line), path, number, offset)
    if b"\0" in line:
        place = offset + line.index(b"\0")
        raise ValueError(f"{path}: binary data, not text (zero byte at line {number}, byte {place})")
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = line[error.start]
        raise ValueError(
            f"{path}: not UTF-8 at line {number}, byte {offset + error.start} (0x{bad:02x}); "
            "convert it first, for example with iconv"
        ) from None


def _check_size(size: int, path: Path, number: int, offset: int) -> None:
    if size > LIMIT_BYTES:
        raise ValueError(
            f"{path}: line {number} (from byte {offset}) is longer than the limit of {LIMIT_BYTES} bytes; break it up"
        )
