"""Puts the teacher where the recipe, or the plan, wants it; everybody else only asks it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from dsdistill.core import Batch
from dsdistill.locate import Source
from dsdistill.models.capture import Wanted
from dsdistill.models.streamed import StreamedTeacher
from dsdistill.models.teacher import ResidentTeacher
from dsdistill.training.dist import Place
from dsdistill.training.sharded_teacher import ShardedTeacher
from dsdistill.training.teacher_ranks import RemoteTeacher, TeacherLine

Kind = Literal["resident", "zero3", "cpu", "nvme", "ranks"]
Placed = ResidentTeacher | StreamedTeacher | ShardedTeacher | RemoteTeacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the teacher lives.

    Attributes:
        kind: Of a recipe's placements, `auto` resolved.
        why: What decided, for people; empty if the recipe did.
        nvme: Directory on a local disk, for `nvme`.
        line: To the teacher's process, for `ranks`, once the run has begun.
    """

    kind: Kind = "resident"
    why: str = ""
    nvme: Path | None = None
    line: TeacherLine | None = None

    def place(
        self,
        source: Source,
        load: Callable[[], PreTrainedModel],
        wanted: Wanted,
        *,
        place: Place,
        dtype: torch.dtype,
    ) -> Placed:
        """The teacher, ready to be asked; every process must call this.

        Args:
            source: Which model it is.
            load: Reads it, on the CPU; not called where another process runs it.
            wanted: Signals to record.
            place: This process.
            dtype: Precision it runs in.
        """
        if self.kind == "ranks":
            assert self.line is not None
            return self.line.open(source, wanted, dtype)
        if self.kind == "cpu":
            return StreamedTeacher(load(), wanted, device=place.device, dtype=dtype)
        if self.kind in ("zero3", "nvme"):
            return ShardedTeacher(load(), wanted, place=place, dtype=dtype, nvme=self.nvme)
        return ResidentTeacher(load(), wanted, device=place.device, dtype=dtype)


def ahead(teacher: object, batches: Iterable[Batch]) -> Iterable[Batch]:
    """Batches to train on; a teacher on another process is sent each of them early."""
    return teacher.ahead(batches) if isinstance(teacher, RemoteTeacher) else batches


def at_once(teacher: Placed | None) -> Callable | None:
    """How to ask a teacher about a batch that it was not sent early."""
    return teacher.now if isinstance(teacher, RemoteTeacher) else teacher


@contextlib.contextmanager
def lines(place: Place, timeout_s: float) -> Iterator[TeacherLine | None]:
    """This process's line to its teacher, or None if it runs it itself."""
    if not place.teachers:
        yield None
        return
    with TeacherLine(place, timeout_s) as line:
        yield line
