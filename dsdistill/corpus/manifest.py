"""What a corpus directory says about itself: written last, so that a directory without it is unfinished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsdistill.corpus.files import sha256_of, write_text
from dsdistill.progress import each

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

_STAMP_NAME = "verified.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardRecord(_Record):
    """One Arrow file."""

    file: str = Field(pattern=r"^(train|held_out)-\d{5}\.arrow$")
    rows: int
    bytes: int
    sha256: str


class SplitRecord(_Record):
    """Counts and shards of one split; tokens are counted with special tokens, as they lie in the rows."""

    documents: int
    rows: int
    tokens: int
    dropped_tokens: int = Field(description="Tokens in no row: an incomplete last row, truncated documents.")
    padded_rows: int = Field(description="Rows shorter than the length; 0: no row has padding.")
    shards: tuple[ShardRecord, ...]


class TokenizerRecord(_Record):
    """The tokenizer that made the tokens."""

    name: str
    fingerprint: str
    vocab_size: int = Field(description="Largest token id + 1: what a model's embedding must have at least.")
    pad_id: int


class Manifest(_Record):
    """Everything about a finished corpus."""

    format: Literal["dsdistill-corpus"] = "dsdistill-corpus"
    version: Literal[1] = FORMAT_VERSION
    settings: dict[str, Any] = Field(description="What decides the content; see CorpusSettings.identity.")
    sources: tuple[tuple[str, int], ...] = Field(description="Name and size in bytes of each input.")
    tokenizer: TokenizerRecord
    length: int
    splits: dict[Split, SplitRecord]


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Declare a directory finished."""
    write_text(directory / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a finished corpus.

    Raises:
        ValueError: If there is none, it is damaged, or it is of another version.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        state = "an unfinished corpus" if directory.is_dir() else "no such directory"
        raise ValueError(
            f"{directory}: {state} (no {MANIFEST_NAME}); run launch/prepare_corpus.py --output {directory}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path}: version {content['version']}, but this program reads version {FORMAT_VERSION}; "
                "prepare the corpus again"
            )
        return Manifest.model_validate(content)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"{path}: damaged manifest ({str(error).splitlines()[0]}); prepare the corpus again") from None


def check_shards(directory: Path, manifest: Manifest, *, verify: bool) -> None:
    """Compare the shards with the manifest.

    Sizes are always compared. Checksums are computed if `verify` is set, and otherwise only of the shards whose size
    or time of change differ from those at the last successful check, which is remembered next to the manifest.

    Raises:
        ValueError: If a shard is missing, cut or altered; names it.
    """
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    known = {} if verify else _read_stamp(directory)
    stamp: dict[str, list[object]] = {}
    for shard in each(shards, f"checking {directory}", sum(shard.bytes for shard in shards), unit="B", size=_bytes_of):
        path = directory / shard.file
        if not path.is_file():
            raise ValueError(f"{path}: this shard of the corpus is missing; prepare the corpus again")
        status = path.stat()
        if status.st_size != shard.bytes:
            raise ValueError(
                f"{path}: {status.st_size} bytes, but the manifest says {shard.bytes}; prepare the corpus again"
            )
        stamp[shard.file] = [shard.sha256, status.st_size, status.st_mtime_ns]
        if known.get(shard.file) != stamp[shard.file] and sha256_of(path) != shard.sha256:
            raise ValueError(f"{path}: altered (its checksum is not the manifest's); prepare the corpus again")
    if stamp != known:
        _write_stamp(directory, stamp)


def _bytes_of(shard: ShardRecord) -> int:
    return shard.bytes


def _read_stamp(directory: Path) -> dict[str, Any]:
    try:
        content = json.loads((directory / _STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_stamp(directory: Path, stamp: dict[str, list[object]]) -> None:
    try:
        write_text(directory / _STAMP_NAME, json.dumps(stamp))
    except OSError:
        return  # a read-only corpus is checked anew each time
