"""What takes longer than two seconds says how far it is: on standard error, by the first process of a job alone.

A terminal sees a bar, a file plain lines: the first after two seconds, then at growing intervals of up to a minute.
What is quick says nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

from tqdm import tqdm

FIRST_S = 2.0
"""How long something takes in silence."""

MOST_S = 60.0
"""How long a file waits for its next line."""

BEAT_S = 0.5

Item = TypeVar("Item")


def is_first_process() -> bool:
    """Whether no other process of this job tells people what happens; launchers and SLURM number them."""
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0"


def note(line: str) -> None:
    """A line for people, without breaking a bar."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def figure(value: float) -> str:
    """A loss or a score for people: four decimals, or three digits where those would be zeros."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


class Progress(contextlib.AbstractContextManager["Progress"]):
    """Tells how far something is, at what rate, and how long it will take, from `with` to its end.

    Args:
        what: What is being done.
        total: Where it ends; None if nobody knows.
        unit: What is counted; empty if nothing is, and only the time is told. `B` for bytes.
        start: Where it begins, if some was done before.
        shown: Whether it is told at all.
        beats: Whether it is told while nobody calls, by a thread: for what cannot say how far it is. Not around
            anything that forks.
    """

    def __init__(
        self,
        what: str,
        total: float | None = None,
        *,
        unit: str = "",
        start: float = 0,
        shown: bool = True,
        beats: bool = False,
    ):
        self.what, self.total, self.unit, self.start, self.done, self.numbers = what, total, unit, start, start, ""
        self.began_s = time.monotonic()
        self.pause_s, self.due_s = FIRST_S, self.began_s + FIRST_S
        if not (shown and is_first_process()):
            self.due_s = math.inf
        self.bar: tqdm[Any] | None = None
        self.told: tuple[float, str] | None = None
        self.beats, self.ended, self.lock = beats and self.due_s < math.inf, threading.Event(), threading.Lock()

    def __enter__(self) -> Self:
        if self.beats:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it ended, or tell where that was."""
        self.ended.set()
        with self.lock:
            if self.bar is not None:
                self._draw(self.bar)
                self.bar.close()
            elif self.told not in (None, (self.done, self.numbers)):
                self._print()
            self.due_s = math.inf

    def to(self, done: float, numbers: str | None = None) -> None:
        """It is here now.

        Args:
            done: Of `total`.
            numbers: Those that matter, for people; those of the last call unless given.
        """
        self.done = done
        if numbers is not None:
            self.numbers = numbers
        if time.monotonic() >= self.due_s:
            with self.lock:
                self._show()

    def add(self, more: float = 1, numbers: str | None = None) -> None:
        """It is so much further now."""
        self.to(self.done + more, numbers)

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_S):
            self.to(self.done)

    def _show(self) -> None:
        now = time.monotonic()
        if now < self.due_s:  # another thread was faster, or it is over
            return
        if sys.stderr.isatty():
            self.due_s = now + BEAT_S
            if self.bar is None:
                # the delay keeps it from drawing before its clock is set back
                look: dict[str, Any] = {"total": self.total, "initial": self.start, "leave": None, **self._look()}
                self.bar = tqdm(desc=self.what, dynamic_ncols=True, delay=1e-9, **look)
                self.bar.start_t -= now - self.began_s
            self._draw(self.bar)
            return
        self._print()
        self.due_s, self.pause_s = now + self.pause_s, min(2 * self.pause_s, MOST_S)

    def _draw(self, bar: tqdm[Any]) -> None:
        bar.n = self.done
        bar.set_postfix_str(self.numbers)

    def _print(self) -> None:
        """The same as a bar of no width, as a line."""
        look: dict[str, Any] = {"ncols": 0, "prefix": self.what, "postfix": self.numbers, **self._look()}
        elapsed, total = time.monotonic() - self.began_s, self.total
        line = tqdm.format_meter(self.done, total, elapsed, initial=self.start, **look)  # pyright: ignore[reportArgumentType] (as above)
        print(line, file=sys.stderr, flush=True)
        self.told = (self.done, self.numbers)

    def _look(self) -> dict[str, Any]:
        if not self.unit:
            return {"bar_format": "{desc}: {elapsed}{postfix}"}
        return {"unit": self.unit, "unit_scale": self.unit == "B"}


def waiting(what: str) -> Progress:
    """For something that cannot say how far it is: how long it has taken."""
    return Progress(what, beats=True)


def each(
    items: Iterable[Item],
    what: str,
    total: float | None,
    *,
    unit: str,
    size: Callable[[Item], float] = lambda item: 1,
) -> Iterator[Item]:
    """The same items, and how far they are.

    Args:
        items: To go through.
        what: What is being done with them.
        total: Sum of their sizes; None if nobody knows.
        unit: Of sizes.
        size: Of an item.
    """
    with Progress(what, total, unit=unit) as progress:
        for item in items:
            yield item
            progress.to(min(progress.done + size(item), math.inf if total is None else total))
