"""Ctrl-C, SIGTERM and SIGUSR1: a wish to stop, noticed at once, fulfilled by the loop after one saved step.

Imports nothing heavy: a signal may come while torch is still being imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

STOPPED = 3
"""Exit code of a run that was asked to stop and can go on from what it saved."""

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_received: list[signal.Signals] = []
_deferred = threading.Event()


class StoppedError(Exception):
    """The run was asked to stop and did, at the same step on all ranks."""


def install() -> None:
    """Handle the signals from now on: each ends the process with `STOPPED`, within `deferred` it is only noted.

    A second Ctrl-C ends the process at once, also while the main thread waits for another rank, where Python's own
    handlers do not run: a thread reads the numbers of signals as they come. Processes forked from this one start
    without any of this.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in _STOPPING:
        signal.signal(number, _leave_unless_deferred)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_note, args=(reader,), daemon=True).start()
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_uninstall)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within, whoever trains asks for `received` and stops in order.

    Raises:
        StoppedError: At the end, if a signal came too late for that.
    """
    _deferred.set()
    try:
        yield
    finally:
        _deferred.clear()
    if _received:
        raise StoppedError("stopped after the last step, which is saved")


def received() -> str | None:
    """Name of the first signal that asked to stop, or None."""
    return _received[0].name if _received else None


def pass_on(name: str) -> None:
    """Note a signal that another process of the job received."""
    if not _received:
        _received.append(signal.Signals[name])


def _note(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if number not in _STOPPING:
                continue
            _received.append(signal.Signals(number))
            if _received.count(signal.SIGINT) > 1:
                os._exit(128 + signal.SIGINT)
            if len(_received) == 1 and _deferred.is_set():
                line = f"{received()}: stopping after the next step, which is saved; Ctrl-C (again) stops at once\n"
                os.write(sys.stderr.fileno(), line.encode())


def _leave_unless_deferred(number: int, _frame: FrameType | None) -> None:
    if not _deferred.is_set():
        print(f"{signal.Signals(number).name}: stopped outside of training", file=sys.stderr)
        raise SystemExit(STOPPED)


def _block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def _uninstall() -> None:
    signal.set_wakeup_fd(-1)
    for number in _STOPPING:
        signal.signal(number, signal.SIG_DFL)
    _received.clear()
    _unblock()
