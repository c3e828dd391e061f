"""Text to rows of tokens on disk: read in one process, tokenized in many, resumable, byte-identical for any number."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tokenizers import Tokenizer

from dsdistill.corpus.files import write_text
from dsdistill.corpus.lines import Meter
from dsdistill.corpus.manifest import (
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    ShardRecord,
    Split,
    SplitRecord,
    TokenizerRecord,
    check_shards,
    read_manifest,
    write_manifest,
)
from dsdistill.corpus.packing import RowBuilder, Rows, Shape, join_rows
from dsdistill.corpus.progress import Reading
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.shards import write_shard
from dsdistill.corpus.sources import Source, find_sources, read_documents, text_hash
from dsdistill.corpus.tokenizing import (
    load_tokenizer,
    plain_backend,
    sentence_end_ids,
    special_template,
    tokenizer_fingerprint,
)
from dsdistill.corpus.worker import TokenizerPool, Tokens

_CHUNK_BYTES = 1 << 20
_LOCK_NAME = ".lock"
_OUR_FILES = ("part-*.json", "train-*.arrow", "held_out-*.arrow", "*.tmp", "verified.json", MANIFEST_NAME)


def prepare(settings: CorpusSettings, *, overwrite: bool = False, progress: bool = True) -> Path:
    """Prepare a corpus, or find that it is already there; several processes may call this at once.

    An interrupted preparation goes on after its last finished shard when it is called again with equal settings.

    Args:
        settings: What to read and how to cut it.
        overwrite: Throw away a corpus of other settings in the same place.
        progress: Show a progress bar.

    Returns:
        `settings.output`, which `Corpus.open` opens.

    Raises:
        ValueError: If an input or the tokenizer cannot be used (names file and place), or the output directory holds
            something else.
        OSError: If a file cannot be written, on a full disk for example.
    """
    sources = find_sources(settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    backend = plain_backend(tokenizer)
    record = TokenizerRecord(
        name=settings.tokenizer,
        fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=max(backend.get_vocab().values()) + 1,
        pad_id=pad_id if isinstance(pad_id := tokenizer.pad_token_id, int) else 0,
    )
    settings.output.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.output / _LOCK_NAME):
        preparation = _Preparation(settings, sources, backend, record)
        if overwrite:
            preparation.remove_files()
        if not preparation.is_finished():
            preparation.run(progress=progress)
    return settings.output


@dataclass
class _Chunk:
    """Consecutive documents of one part (one shard per split); the last chunk of a part closes it."""

    part: int
    texts: list[str] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    bytes_read: int = 0
    closes_part: bool = False
    final: bool = False


class _Preparation:
    """One run of `prepare` over one output directory."""

    def __init__(
        self, settings: CorpusSettings, sources: list[Source], backend: Tokenizer, record: TokenizerRecord
    ) -> None:
        self.settings = settings
        self.sources = sources
        self.backend = backend
        self.record = record
        self.directory = settings.output
        self.request: dict[str, Any] = {
            "settings": settings.identity(),
            "sources": [[Path(source.name).name, source.num_bytes] for source in sources],
            "tokenizer": record.model_dump(),
        }
        shape = _shape(settings, backend, record)
        self.builders: dict[Split, RowBuilder] = {split: RowBuilder(shape) for split in SPLITS}
        self.rows: dict[Split, list[Rows]] = {split: [] for split in SPLITS}  # of the part in work
        self.documents: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self.tokens: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self.shards: dict[Split, list[ShardRecord]] = {split: [] for split in SPLITS}
        self.held_out_below = int(settings.held_out * 2**64)

    def remove_files(self) -> None:
        """Delete what an earlier preparation left, the manifest first."""
        (self.directory / MANIFEST_NAME).unlink(missing_ok=True)
        for pattern in _OUR_FILES:
            for path in self.directory.glob(pattern):
                path.unlink()

    def is_finished(self) -> bool:
        """Whether this very corpus is already there.

        Raises:
            ValueError: If a finished one of other settings, or something else, lies there.
        """
        if (self.directory / MANIFEST_NAME).is_file():
            manifest = read_manifest(self.directory)
            found = json.loads(manifest.model_dump_json(include=set(self.request)))
            self._refuse_other_request(found, "a finished corpus")
            check_shards(self.directory, manifest, verify=False)
            return True
        ours = {path for pattern in _OUR_FILES for path in self.directory.glob(pattern)}
        others = sorted(p.name for p in self.directory.iterdir() if p not in ours and p.name != _LOCK_NAME)
        if others:
            raise ValueError(
                f"{self.directory}: the output directory already holds {others[0]!r}, which is no part of a corpus"
            )
        return False

    def _refuse_other_request(self, found: dict[str, Any], what: str) -> None:
        mine, theirs = _flat(self.request), _flat(found)
        differences = [name for name in mine if mine[name] != theirs.get(name)]
        if differences:
            raise ValueError(
                f"{self.directory}: holds {what} of another request (other: {', '.join(differences)}); "
                "choose another output directory, or overwrite this one (--overwrite)"
            )

    def run(self, *, progress: bool) -> None:
        """Read, tokenize, pack and write all that is not there yet, then the manifest."""
        for path in self.directory.glob("*.tmp"):
            path.unlink()
        digests, finished = self._restore()
        processes = self.settings.processes or len(os.sched_getaffinity(0))
        with (
            Reading("preparing corpus", self.settings, self.sources, shown=progress) as bar,
            TokenizerPool(self.backend, processes) as pool,
        ):
            digest, num_tokens = hashlib.sha256(), sum(self.tokens.values())
            chunks = () if finished else self._chunks(digests, bar)
            for chunk, tokens in pool.map(chunks, lambda chunk: chunk.texts):
                digest.update(np.array(chunk.hashes, np.uint64).tobytes())
                self._add(chunk, tokens)
                num_tokens += len(tokens.ids)
                bar.at(chunk.bytes_read, sum(self.documents.values()), num_tokens)
                if chunk.closes_part:
                    self._write_part(chunk, digest.hexdigest())
                    digest = hashlib.sha256()
        self._finish()

    def _chunks(self, digests: list[str], bar: Reading) -> Iterator[_Chunk]:
        """Chunks of the documents that are in no finished part; those in finished parts are only compared."""
        meter, digest = Meter(), hashlib.sha256()
        part, part_bytes, chunk_bytes = 0, 0, 0
        chunk = _Chunk(part)
        for text in read_documents(self.sources, self.settings, meter):
            size = len(text.encode())
            chunk.hashes.append(text_hash(text))
            chunk.texts.append(text)
            chunk_bytes, part_bytes = chunk_bytes + size, part_bytes + size
            chunk.closes_part = part_bytes >= self.settings.shard_mb * 1e6
            if chunk.closes_part or chunk_bytes >= _CHUNK_BYTES:
                chunk.bytes_read = meter.done
                if part >= len(digests):
                    yield chunk
                else:
                    digest.update(np.array(chunk.hashes, np.uint64).tobytes())
                    self._compare(part, digests[part], digest.hexdigest() if chunk.closes_part else digests[part])
                    bar.at(meter.done, sum(self.documents.values()))
                if chunk.closes_part:
                    part, part_bytes, digest = part + 1, 0, hashlib.sha256()
                chunk, chunk_bytes = _Chunk(part), 0
        chunk.bytes_read, chunk.closes_part, chunk.final = meter.done, True, True
        if part < len(digests):
            self._compare(part, digests[part], "")
        yield chunk

    def _compare(self, part: int, before: str, now: str) -> None:
        if before != now:
            raise ValueError(
                f"{self.directory}: the input has changed since the interrupted preparation (part {part}); "
                "start anew by overwriting (--overwrite)"
            )

    def _add(self, chunk: _Chunk, tokens: Tokens) -> None:
        """Hand the documents of a chunk to their splits, and cut them into rows while the workers are busy."""
        held_out = np.array(chunk.hashes, np.uint64) < np.uint64(self.held_out_below)
        held_out_tokens = np.repeat(held_out, tokens.lengths)
        parts: dict[Split, Tokens] = {
            "train": Tokens(tokens.ids[~held_out_tokens], tokens.lengths[~held_out]),
            "held_out": Tokens(tokens.ids[held_out_tokens], tokens.lengths[held_out]),
        }
        for split, (ids, lengths) in parts.items():
            self.documents[split] += int((lengths > 0).sum())
            self.builders[split].add(Tokens(ids, lengths))
            self.rows[split].append(self.builders[split].cut(final=chunk.final))

    def _write_part(self, chunk: _Chunk, digest: str) -> None:
        """Write the complete rows of both splits, then the record that makes them count."""
        for split in SPLITS:
            rows = join_rows(self.rows[split])
            self.rows[split].clear()
            if len(rows):
                self.tokens[split] += len(rows.ids)
                self.shards[split].append(write_shard(self.directory / f"{split}-{chunk.part:05d}.arrow", rows))
        state = {
            "request": self.request,
            "digest": digest,
            "final": chunk.final,
            "documents": self.documents,
            "tokens": self.tokens,
            "shards": {split: [shard.model_dump() for shard in self.shards[split]] for split in SPLITS},
            "builders": {split: self.builders[split].state() for split in SPLITS},
        }
        write_text(self.directory / f"part-{chunk.part:05d}.json", json.dumps(state))

    def _restore(self) -> tuple[list[str], bool]:
        """Take over what an interrupted preparation finished: the digest of each part, and whether all are there."""
        digests: list[str] = []
        state: dict[str, Any] = {"final": False}
        for part in count():
            path = self.directory / f"part-{part:05d}.json"
            if not path.is_file():
                break
            state = json.loads(path.read_text(encoding="utf-8"))
            self._refuse_other_request(state["request"], "an unfinished corpus")
            digests.append(state["digest"])
        if digests:
            self.documents, self.tokens = state["documents"], state["tokens"]
            for split in SPLITS:
                self.shards[split] = [ShardRecord.model_validate(shard) for shard in state["shards"][split]]
                self.builders[split].restore(state["builders"][split])
        return digests, state["final"]

    def _finish(self) -> None:
        """Check that there is something, write the manifest, remove the records of the parts."""
        splits: dict[Split, SplitRecord] = {
            split: SplitRecord(
                documents=self.documents[split],
                rows=self.builders[split].num_rows,
                tokens=self.tokens[split],
                dropped_tokens=self.builders[split].dropped_tokens,
                padded_rows=self.builders[split].padded_rows,
                shards=tuple(self.shards[split]),
            )
            for split in SPLITS
        }
        if splits["train"].rows == 0:
            raise ValueError(f"{', '.join(self.settings.input)}: too little text for a single row")
        manifest = Manifest(**self.request, length=self.settings.length, splits=splits)
        check_shards(self.directory, manifest, verify=False)
        write_manifest(self.directory, manifest)
        for path in self.directory.glob("part-*.json"):
            path.unlink()


def _flat(request: dict[str, Any]) -> dict[str, Any]:
    sections = ("settings", "tokenizer")
    fields = {f"{section}.{name}": value for section in sections for name, value in request[section].items()}
    return fields | {"sources": request["sources"]}


def _shape(settings: CorpusSettings, backend: Tokenizer, record: TokenizerRecord) -> Shape:
    """How rows look.

    Raises:
        ValueError: If the special tokens leave no room in a row.
    """
    template = special_template(backend, pairs=settings.pairs)
    if settings.length - template.num_special < 2:
        raise ValueError(f"length={settings.length}: {template.num_special} special tokens leave no room for text")
    sentence_end = np.zeros(record.vocab_size, np.bool_)
    sentence_end[sentence_end_ids(backend)] = True
    return Shape(
        length=settings.length,
        template=template,
        packed=settings.rows == "packed",
        truncate=settings.long_documents == "truncate",
        pairs=settings.pairs,
        sentence_end=sentence_end,
        dtype=np.uint16 if record.vocab_size <= 2**16 else np.int32,
    )
