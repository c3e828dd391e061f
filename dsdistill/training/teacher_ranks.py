"""A teacher on processes of its own: the last ranks of the job answer what those that train ask.

Those that train are a world of their own, which knows nothing of the others: DeepSpeed, votes, checkpoints and the
order of the data see only them. Each of them has a line to one teacher. Questions go over the network between CPUs,
signals come from device to device. A batch is sent when the one before it begins to be trained on, so that its answer
is there, or nearly, when its turn comes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from dsdistill.core import Batch, Features, Signal
from dsdistill.locate import Source
from dsdistill.models.capture import Wanted
from dsdistill.models.teacher import ResidentTeacher
from dsdistill.training import signals
from dsdistill.training.dist import Place
from dsdistill.training.watchdog import LostRankError, Watchdog

FOREVER = timedelta(days=30)
"""Patience of the lines: who hangs is noticed by the watchdog, and who is gone by the line itself."""

LAST_WORDS = timedelta(seconds=5)
"""How long a teacher that fails waits for somebody to hear why."""

IN_FLIGHT = 2
"""Answers that a student has not taken yet, at most: to a batch sent ahead, and to one in between."""

_ERRORS = (ValueError, FloatingPointError, OSError, LostRankError, signals.StoppedError)


Sent = tuple[Any, Tensor]
"""What is on its way, and what must be kept until it has arrived."""


class Line:
    """A line between one process that trains and its teacher.

    Args:
        place: This process.
        student: Rank of the process that trains.
        timeout_s: How long the other may take to come.
    """

    def __init__(self, place: Place, student: int, timeout_s: float):
        patience = timedelta(seconds=timeout_s)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # all of these are documented or built for use, but not in __all__
        store = dist.TCPStore(address, port, is_master=False, timeout=patience)  # pyright: ignore[reportPrivateImportUsage]
        self.mine, self.other = (1, 0) if place.is_teacher else (0, 1)

        def pair(name: str) -> Any:
            prefixed = dist.PrefixStore(f"dsdistill/line/{student}/{name}", store)  # pyright: ignore[reportPrivateImportUsage]
            group = dist.ProcessGroupGloo(prefixed, self.mine, 2, patience)  # pyright: ignore[reportPrivateImportUsage]
            return group, prefixed

        try:
            self.questions, _ = pair("questions")
            self.answers, prefixed = pair("answers")
            self.questions._set_default_timeout(FOREVER)
            self.answers._set_default_timeout(FOREVER)
            self.data: Any = self.answers
            if place.device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()  # pyright: ignore[reportPrivateImportUsage]
                options._timeout = FOREVER
                self.data = dist.ProcessGroupNCCL(prefixed, self.mine, 2, options)  # pyright: ignore[reportPrivateImportUsage]
        except RuntimeError as error:
            raise LostRankError(f"rank {place.rank}: no line to the teacher of rank {student} ({error})") from error

    def send(self, group: Any, told: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> list[Sent]:
        """Send a message; the other side may take it whenever it likes."""
        message = pack(told, tensors or {})
        return [(group.send([part], self.other, 0), part) for part in (torch.tensor([message.numel()]), message)]

    def receive(self, group: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Wait for a message.

        Raises:
            RuntimeError: If the other process is gone.
        """
        size = torch.zeros(1, dtype=torch.int64)
        group.recv([size], self.other, 0).wait()
        message = torch.empty(int(size), dtype=torch.uint8)
        group.recv([message], self.other, 0).wait()
        return unpack(message)


def pack(told: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """A message as bytes, uint8 (N,): the length of its head, the head as JSON, the tensors."""
    shapes = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
    head = torch.frombuffer(bytearray(json.dumps([told, shapes]).encode()), dtype=torch.uint8)
    parts = [t.contiguous().flatten().view(torch.uint8) for t in tensors.values() if t.numel()]
    return torch.cat([torch.tensor([head.numel()]).view(torch.uint8), head, *parts])


def unpack(message: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `pack` was given."""
    at = 8 + int(message[:8].view(torch.int64))
    told, shapes = json.loads(message[8:at].numpy().tobytes())
    tensors = {}
    for name, kind, shape in shapes:
        tensor = torch.empty(shape, dtype=getattr(torch, kind))
        flat = message[at : at + tensor.nbytes]
        tensor.view(-1).view(torch.uint8).copy_(flat) if tensor.numel() else None
        tensors[name] = tensor
        at += tensor.nbytes
    return told, tensors


def in_order(wanted: Wanted) -> dict[str, list[int]]:
    """Layers by signal, as JSON has them."""
    return {signal: sorted(layers) for signal, layers in wanted.items()}


def order_of(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions by falling stride: how a tensor lies in memory, which the other side should repeat."""
    return tuple(sorted(range(tensor.ndim), key=lambda i: -tensor.stride(i)))


def teacher_of(student: int, place: Place) -> int:
    """Rank of the teacher that answers a process that trains; neighbours share one."""
    return place.world_size + student * place.teachers // place.world_size


class TeacherLine(contextlib.AbstractContextManager):
    """A student's end of its line; at the end of `with` the teacher learns how the run ended, and leaves with it."""

    def __init__(self, place: Place, timeout_s: float):
        self.place = place
        self.line = Line(place, place.rank, timeout_s)
        self.asked, self.taken = 0, 0
        self.kept: dict[int, Features] = {}

    def open(self, source: Source, wanted: Wanted, dtype: torch.dtype) -> RemoteTeacher:
        """A teacher on the other end."""
        told = {
            "do": "open",
            "source": [source.model, source.revision, source.trust_remote_code],
            "wanted": in_order(wanted),
            "dtype": str(dtype).removeprefix("torch."),
        }
        self.send(told)
        return RemoteTeacher(self)

    def send(self, told: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Ask for something."""
        for work, _ in self.line.send(self.line.questions, told, tensors):
            work.wait()  # a teacher always listens

    def ask(self, batch: Batch, wanted: Wanted | None = None) -> int:
        """Send a batch, and what is wanted of it if that is not what the teacher was opened for.

        Returns:
            The number of the answer.
        """
        tensors = {name: value.cpu() for name, value in batch._asdict().items() if isinstance(value, Tensor)}
        told = {"do": "ask", "padded": batch.padded, "wanted": None if wanted is None else in_order(wanted)}
        self.send(told, tensors)
        self.asked += 1
        return self.asked

    def answer(self, number: int) -> Features:
        """An answer; those before it are kept until they are wanted."""
        while number not in self.kept:
            self.taken += 1
            self.kept[self.taken] = self._take()
        return self.kept.pop(number)

    def checksum(self) -> str:
        """Of the teacher's weights."""
        self.send({"do": "checksum"})
        return self._told()["checksum"]

    def _told(self) -> dict[str, Any]:
        told, _ = self.line.receive(self.line.answers)
        if "error" in told:
            raise LostRankError(f"rank {teacher_of(self.place.rank, self.place)} (teacher): {told['error']}")
        if told.get("stop"):
            signals.pass_on(told["stop"])
        return told

    def _take(self) -> Features:
        told = self._told()
        found: dict[Signal, dict[int, Tensor]] = {}
        for signal, layer, kind, shape, order in told["signals"]:
            laid = torch.empty([shape[i] for i in order], dtype=getattr(torch, kind), device=self.place.device)
            self.line.data.recv([laid], self.line.other, 1).wait()
            found.setdefault(cast(Signal, signal), {})[layer] = laid.permute(
                [order.index(i) for i in range(len(order))]
            )
        scaling, windows = ({int(layer): value for layer, value in told[key].items()} for key in ("scaling", "windows"))
        return Features(signals=found, scaling=scaling, windows=windows)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with contextlib.suppress(RuntimeError):  # a teacher that is gone needs no farewell
            if error is None or isinstance(error, signals.StoppedError):
                while self.taken < self.asked:
                    self.taken += 1
                    self._take()
            name = next(
                (k.__name__ for k in _ERRORS if isinstance(error, k)), None if error is None else "LostRankError"
            )
            text = str(error) if name != "LostRankError" else f"rank {self.place.rank}: {error}"
            self.send({"do": "end", "error": [name, text]})


class RemoteTeacher:
    """A teacher on another process; see `ResidentTeacher`."""

    def __init__(self, line: TeacherLine):
        self.line = line
        self.sent: deque[int] = deque()

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, each sent to the teacher before the one before it is trained on."""
        before = None
        for batch in batches:
            self.sent.append(self.line.ask(batch))
            if before is not None:
                yield before
            before = batch
        if before is not None:
            yield before

    def __call__(self, batch: Batch) -> Features:
        """The wanted signals of the next of the batches sent ahead, which `batch` must be."""
        return self.line.answer(self.sent.popleft())

    def now(self, batch: Batch) -> Features:
        """The wanted signals of a batch that was not sent ahead."""
        return self.line.answer(self.line.ask(batch))

    def look(self, batch: Batch, wanted: Wanted) -> Features:
        """Other signals of a batch that was not sent ahead, of the layers that run."""
        return self.line.answer(self.line.ask(batch, wanted))

    def compile_forward(self) -> None:
        """Compile the teacher's forward, where it is."""
        self.line.send({"do": "compile"})

    def checksum(self) -> str:
        """SHA-256 of all weights and buffers."""
        return self.line.checksum()


class _Student:
    """A teacher's end of one line."""

    def __init__(self, place: Place, rank: int, timeout_s: float, asked: queue.SimpleQueue):
        self.rank = rank
        self.line = Line(place, rank, timeout_s)
        self.on_the_way: deque[list[Sent]] = deque()
        threading.Thread(target=self._listen, args=(asked,), daemon=True).start()

    def _listen(self, asked: queue.SimpleQueue) -> None:
        told: dict[str, Any] = {}
        while told.get("do") != "end":
            try:
                told, tensors = self.line.receive(self.line.questions)
            except RuntimeError as error:
                told, tensors = {"do": "end", "error": ["LostRankError", f"rank {self.rank} is gone ({error})"]}, {}
            asked.put((self, told, tensors))

    def reply(self, features: Features) -> None:
        """Send an answer; the device goes on meanwhile."""
        described, tensors = [], []
        for signal, layers in features.signals.items():
            for layer, tensor in layers.items():
                order = order_of(tensor)
                kind = str(tensor.dtype).removeprefix("torch.")
                described.append([signal, layer, kind, list(tensor.shape), order])
                tensors.append(tensor.permute(order).contiguous())
        told = {"signals": described, "scaling": features.scaling, "windows": features.windows}
        sent = self.tell(told | {"stop": signals.received()})
        sent += [(self.line.data.send([tensor], self.line.other, 1), tensor) for tensor in tensors]

    def tell_end(self, error: BaseException) -> None:
        """Say why there will be no more answers, if anybody listens."""
        with contextlib.suppress(RuntimeError):
            for work, _ in self.line.send(self.line.answers, {"error": " ".join(str(error).split())}):
                work.wait(LAST_WORDS)

    def tell(self, told: dict[str, Any]) -> list[Sent]:
        """Send a message; the list of what is on its way with it, to which more may be added."""
        while len(self.on_the_way) >= IN_FLIGHT:  # then the student has taken the first
            for work, _ in self.on_the_way.popleft():
                work.wait()
        sent = self.line.send(self.line.answers, told)
        self.on_the_way.append(sent)
        return sent


def serve(load: Callable[[Source], PreTrainedModel], place: Place, timeout_s: float) -> None:
    """Answer the processes that train until all of them have ended; what a teacher's process does.

    Args:
        load: Reads a teacher.
        place: This process.
        timeout_s: The watchdog's.

    Raises:
        StoppedError: If they stopped on request; so with the other errors that they may end with.
        LostRankError: If one of them is gone.
    """
    asked: queue.SimpleQueue = queue.SimpleQueue()
    mine = [rank for rank in range(place.world_size) if teacher_of(rank, place) == place.rank]
    students = [_Student(place, rank, 2 * timeout_s, asked) for rank in mine]
    with Watchdog(place, timeout_s) as watchdog:
        _answer(students, asked, load, place, watchdog)


def _answer(
    students: list[_Student],
    asked: queue.SimpleQueue,
    load: Callable[[Source], PreTrainedModel],
    place: Place,
    watchdog: Watchdog,
) -> None:
    teacher, opened = None, None
    ended: dict[int, list[str]] = {}
    while len(ended) < len(students):
        watchdog.at("waiting for batches")
        try:
            student, told, tensors = asked.get(timeout=watchdog.period_s)
        except queue.Empty:
            continue
        try:
            if told["do"] == "open" and told != opened:
                watchdog.at("loading the teacher")
                teacher, opened = None, told
                teacher = _open(load, told, place)
            elif told["do"] == "ask":
                assert teacher is not None
                watchdog.at(f"a batch of rank {student.rank}")
                batch = Batch(**tensors, padded=told["padded"]).to(place.device)
                student.reply(teacher(batch) if told["wanted"] is None else teacher.look(batch, told["wanted"]))
            elif told["do"] == "compile" and student is students[0]:
                assert teacher is not None
                teacher.compile_forward()
            elif told["do"] == "checksum":
                assert teacher is not None
                student.tell({"checksum": teacher.checksum()})
            elif told["do"] == "end":
                ended[student.rank] = told["error"]
                _raise(*told["error"], unless=(None, "StoppedError"))
        except BaseException as error:
            for other in students:
                if other.rank not in ended:
                    other.tell_end(error)
            raise
    for name, text in ended.values():
        _raise(name, text)


def _open(load: Callable[[Source], PreTrainedModel], told: dict[str, Any], place: Place) -> ResidentTeacher:
    model, revision, trusted = told["source"]
    loaded = load(Source(model=model, revision=revision, trust_remote_code=trusted))
    return ResidentTeacher(loaded, told["wanted"], device=place.device, dtype=getattr(torch, told["dtype"]))


def _raise(name: str | None, text: str, *, unless: tuple[str | None, ...] = (None,)) -> None:
    if name not in unless:
        raise next(kind for kind in _ERRORS if kind.__name__ == name)(text)
