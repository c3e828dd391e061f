"""Directories that several jobs share: one works in it, the others wait.

Imports nothing heavy: workers of a grid tell that they live before they import torch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from dsdistill.training.signals import StoppedError

if TYPE_CHECKING:
    from dsdistill.training.dist import Place
    from dsdistill.training.watchdog import Watchdog


def lock_of(directory: Path) -> FileLock:
    """Held by who works in a directory; given back by the kernel when the process is gone."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(directory.with_name(f"{directory.name}.lock"), poll_interval=0.2)


@contextlib.contextmanager
def one_job(directory: Path, place: Place, watchdog: Watchdog) -> Iterator[None]:
    """Let one job at a time work in a directory that several share; the others wait for as long as it takes.

    The kernel gives the lock of a killed job back. Every process must enter.

    Raises:
        StoppedError: If a signal asked to stop before the other job was done.
    """
    lock = lock_of(directory)
    doing = f"waiting for another job that works in {directory}"

    def acquire() -> None:
        told = False
        while True:
            watchdog.at(doing)
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0.5)
                return
            if watchdog.stop_wished():
                raise StoppedError(f"stopped while {doing}")
            if not told:
                print(doing, file=sys.stderr, flush=True)
            told = True

    watchdog.first_alone(doing, acquire)
    try:
        yield
    finally:
        lock.release()
