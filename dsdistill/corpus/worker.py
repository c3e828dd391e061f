"""Tokenizer processes: started as plain commands, fed and read through pipes, gone when their parent is gone.

Not `multiprocessing`: forking a process that runs DeepSpeed's or a tokenizer's threads may hang, and spawning would
import the whole launch script in every worker. A worker needs a fraction of a second and 100 MB.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_PIECE_CHARACTERS = 1 << 17
_BATCH_CHARACTERS = 1 << 18

Item = TypeVar("Item")


class Tokens(NamedTuple):
    """Tokens of some documents, one after the other, without special tokens."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]


def tokenize(backend: Tokenizer, texts: list[str]) -> Tokens:
    """Tokens of each text.

    Very long texts are cut at spaces before tokenization, and few texts are in work at a time: the tokenizer's own
    records take a hundred times the memory of the tokens.
    """
    pieces = [(number, piece) for number, text in enumerate(texts) for piece in _pieces(text)]
    lengths = np.zeros(len(texts), np.int64)
    ids: list[NDArray[np.int32]] = []
    for batch in _batches(pieces):
        encodings = backend.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
        for (number, _), encoding in zip(batch, encodings, strict=True):
            piece_ids = np.array(encoding.ids, np.int32)
            ids.append(piece_ids)
            lengths[number] += len(piece_ids)
    return Tokens(np.concatenate(ids) if ids else np.empty(0, np.int32), lengths)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = start + _PIECE_CHARACTERS
        space = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
        end = space if space > start else end
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(pieces: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class TokenizerPool(Generic[Item]):
    """Tokenizes in the order of the input, in this process or in several others; the result is the same."""

    def __init__(self, backend: Tokenizer, processes: int) -> None:
        self._backend = backend
        self._processes = processes
        self._local = threading.local()
        self._workers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> TokenizerPool[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()
            worker.communicate()

    def map(self, items: Iterable[Item], texts_of: Callable[[Item], list[str]]) -> Iterator[tuple[Item, Tokens]]:
        """Each item with the tokens of its texts; reads only a few items ahead."""
        if self._processes == 1:
            for item in items:
                yield item, tokenize(self._backend, texts_of(item))
            return
        serialized = self._backend.to_str().encode()
        waiting: deque[tuple[Item, Future[Tokens]]] = deque()
        with ThreadPoolExecutor(self._processes, initializer=self._start, initargs=(serialized,)) as threads:
            for item in items:
                waiting.append((item, threads.submit(self._ask, texts_of(item))))
                if len(waiting) >= 2 * self._processes + 4:
                    item, future = waiting.popleft()
                    yield item, future.result()
            for item, future in waiting:
                yield item, future.result()

    def _start(self, serialized: bytes) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", "from dsdistill.corpus.worker import serve; serve()"]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._workers.append(worker)
        self._local.worker = worker
        _send(worker.stdin, serialized)

    def _ask(self, texts: list[str]) -> Tokens:
        worker: subprocess.Popen[bytes] = self._local.worker
        try:
            _send(worker.stdin, texts)
            assert worker.stdout is not None
            return Tokens(*pickle.load(worker.stdout))
        except (EOFError, OSError, pickle.UnpicklingError):
            raise RuntimeError(
                f"a tokenizer process ended (exit status {worker.wait()}); out of memory? try fewer processes"
            ) from None


def _send(pipe, message: object) -> None:
    pickle.dump(message, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def serve() -> None:
    """A worker: reads the tokenizer, then lists of texts, and answers with their tokens until its input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    backend = Tokenizer.from_str(pickle.load(sys.stdin.buffer).decode())
    backend.encode_special_tokens = True
    try:
        while True:
            _send(answers, tuple(tokenize(backend, pickle.load(sys.stdin.buffer))))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
