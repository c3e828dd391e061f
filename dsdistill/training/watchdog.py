"""Notices a rank that hangs or is gone, says which one and what it was doing, and ends this process.

Every rank has a thread that tells all others, through the job's key-value store, what the rank is doing. A rank that
has done the same thing for too long reads what the others told, prints it and leaves. That works whatever the rank
waits for (a collective on a GPU, a loader worker, a disk), and also while it holds no Python lock.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dsdistill.training import signals
from dsdistill.training.dist import Place, wait_for_all

LOST = 1
"""Exit code of a process that leaves because of the others."""

POLL_S = 0.1
"""How often a rank asks whether rank 0 has done what it does alone."""

_STOP = "dsdistill/stop"
_times_alone = itertools.count()
"""Counted as long as the process lives: watchdogs that follow one another share the store."""

_SHARED = (OSError, ValueError, signals.StoppedError)


class LostRankError(RuntimeError):
    """Another process of the job hangs or is gone."""


class Watchdog(contextlib.AbstractContextManager):
    """Watches from `with` to its end; every process of the job must enter.

    Args:
        place: This process; joined with the others.
        timeout_s: How long a rank may do one thing. Counted in wake-ups of the thread and not by a clock, so that a
            job that was suspended as a whole goes on.
    """

    def __init__(self, place: Place, timeout_s: float):
        self.place, self.timeout_s = place, timeout_s
        self.period_s = min(1.0, timeout_s / 20)
        self.doing, self.moves, self.beats = "starting", 0, 0
        self.ended = threading.Event()
        self.store: Any = None

    def __enter__(self) -> Watchdog:
        if self.place.num_processes > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            patience = timedelta(seconds=10)
            # documented, but not in __all__
            self.store = dist.TCPStore(address, port, is_master=False, timeout=patience)  # pyright: ignore[reportPrivateImportUsage]
            self._tell()
            # from here on every rank has told something
            everyone = [f"dsdistill/{rank}" for rank in range(self.place.num_processes)]
            self.store.wait(everyone, timedelta(seconds=2 * self.timeout_s))
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def at(self, doing: str) -> None:
        """Note what the main thread begins to do."""
        self.doing = doing
        self.moves += 1

    def stop_wished(self) -> bool:
        """Whether a signal asked any rank to stop; ranks learn it within a second or so, not at the same moment."""
        return signals.received() is not None or (self.store is not None and self.store.check([_STOP]))

    def first_alone(self, doing: str, work: Callable[[], object]) -> None:
        """Let rank 0 do something that may take long; every rank must call this.

        The others wait as long as rank 0 lives and its own watchdog is content, which `work` tells what it is doing.

        Args:
            doing: What it is, for people.
            work: Called on rank 0 when all ranks are here.

        Raises:
            OSError: If `work` did, on all ranks alike; so with ValueError and StoppedError.
        """
        self.at(doing)
        wait_for_all(self.place)
        key, problem = f"dsdistill/alone/{next(_times_alone)}", None
        if self.place.is_first:
            try:
                work()
            except _SHARED as error:
                problem = error
            if self.store is not None:
                kind = next((k.__name__ for k in _SHARED if isinstance(problem, k)), "")
                self.store.set(key, json.dumps([kind, str(problem)]))
        else:
            while not self.store.check([key]):
                self.at(f"waiting for rank 0, {doing}")
                time.sleep(POLL_S)
            name, text = json.loads(self.store.get(key))
            problem = next((kind(text) for kind in _SHARED if kind.__name__ == name), None)
        self.at(doing)
        wait_for_all(self.place)  # rank 0 keeps the store
        if problem is not None:
            raise problem

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Stop watching.

        Raises:
            LostRankError: If another rank is gone, and that is why this one failed.
        """
        if isinstance(error, RuntimeError) and self.store is not None:
            silent = [line for line in self._others() if "silent" in line]
            if silent:
                raise LostRankError(f"rank {self.place.rank} at {self.doing}: {'; '.join(silent)}") from error
        self.ended.set()

    def _watch(self) -> None:
        seen, wake_ups = -1, 0
        while not self.ended.wait(self.period_s):
            self._tell()
            wake_ups = wake_ups + 1 if self.moves == seen else 0
            seen = self.moves
            if wake_ups * self.period_s >= self.timeout_s:
                line = f"error: rank {self.place.rank} has been at {self.doing} for {self.timeout_s:.0f} s"
                print("; ".join([line, *self._others()]), file=sys.stderr, flush=True)
                for child in multiprocessing.active_children():
                    child.kill()
                os._exit(LOST)

    def _tell(self) -> None:
        if self.store is None:
            return
        self.beats += 1
        with contextlib.suppress(RuntimeError):  # the store is gone with rank 0; `_others` says so when asked
            self.store.set(f"dsdistill/{self.place.rank}", f"{self.beats} {self.doing}")
            if signals.received() is not None:
                self.store.set(_STOP, "")

    def _others(self) -> list[str]:
        """What each other rank is doing, or was doing when it fell silent; a line each."""
        if self.store is None:
            return []
        told: list[dict[int, str]] = []

        def read_twice() -> None:
            for pause in (max(2 * self.period_s, 1.0), 0):
                told.append({rank: self._last_word(rank) for rank in range(self.place.num_processes)})
                time.sleep(pause)

        # a store whose process is stopped answers never: ask in a thread, and do not wait for ever
        reader = threading.Thread(target=read_twice, daemon=True)
        reader.start()
        reader.join(10 + 2 * self.period_s)
        if len(told) < 2:
            return ["rank 0, which keeps the list of what all ranks do, is silent"]
        before, after = told
        lines = []
        for rank, word in after.items():
            state = "silent, last heard of at" if before[rank] == word else "at"
            if rank != self.place.rank:
                name = f"rank {rank} (teacher)" if rank >= self.place.world_size else f"rank {rank}"
                lines.append(f"{name} is {state} {word.partition(' ')[2]}")
        return lines

    def _last_word(self, rank: int) -> str:
        return self.store.get(f"dsdistill/{rank}").decode()
