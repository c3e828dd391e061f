"""What a person and a program see of a run: TensorBoard, a metrics file in JSON lines, a progress line.

Losses are added up on the device. Once per logging interval the sums of all ranks are gathered and read, which is
the only host-device sync of the loop.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] (protobuf makes it)
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from dsdistill import progress
from dsdistill.core import Losses
from dsdistill.training.dist import Place

PARTS = ("data", "teacher", "student", "backward", "step")
NEVER = float(2**53)
PICTURES = "pictures"
LAYOUT = {
    "objectives": {
        "training: every term beside the total": ["Multiline", ["loss/.*"]],
        "held-out rows": ["Multiline", ["held_out/.*"]],
        "scores": ["Multiline", ["score/.*"]],
    },
    "student and teacher": {
        "likeness of layers (CKA)": ["Multiline", ["likeness/cka_.*"]],
        "KL of attention, nats": ["Multiline", ["likeness/attention_kl_.*"]],
        "seconds of pictures": ["Multiline", ["time/pictures_s"]],
    },
    "a step": {
        "seconds by part": ["Multiline", [f"time/{part}_s" for part in PARTS]],
        "tokens per second": ["Multiline", ["throughput/tokens_per_s"]],
        "model FLOPs utilisation": ["Multiline", ["throughput/mfu"]],
        "memory, GiB": ["Multiline", ["memory/.*"]],
    },
    "optimizer": {
        "learning rate": ["Multiline", ["optimization/learning_rate"]],
        "gradient norm": ["Multiline", ["optimization/grad_norm"]],
        "gradient norm by layer": ["Multiline", ["grad_norm/.*"]],
        "loss scale, skipped steps": ["Multiline", ["optimization/loss_scale", "optimization/skipped_steps"]],
    },
}
"""What TensorBoard's tab Custom Scalars shows together, by regular expressions of tags."""


class Stopwatch:
    """Seconds per part of the step, on the device's own clock, read only when asked."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what happens inside under `name`."""
        start = self._now()
        yield
        self.spans.append((name, start, self._now()))

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds per part since the last reading; on a GPU only after a sync."""
        totals: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self.spans:
            totals[name] += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
        self.spans.clear()
        return totals


class LossSums:
    """Sums of every term on the device, and the first step at which one was not finite."""

    def __init__(self, device: torch.device):
        self.device = device
        self.names: tuple[str, ...] = ()
        self.sums = self.first_bad = torch.zeros(0, device=device)
        self.count = 0

    def add(self, losses: Losses, step: int) -> None:
        """Take one micro-batch's losses; no sync."""
        if not self.names:
            self.names = ("total", *losses.terms)
            self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
            self.first_bad = torch.full_like(self.sums, NEVER)
        values = torch.stack([losses.total.detach().double(), *(v.double() for v in losses.terms.values())])
        self.sums += values
        bad = torch.where(values.isfinite(), NEVER, float(step))
        self.first_bad = torch.minimum(self.first_bad, bad)
        self.count += 1

    def read(self) -> dict[str, float]:
        """Means over micro-batches and ranks since the last reading; every rank must call this.

        Raises:
            FloatingPointError: On all ranks alike, if any term of any rank was not finite; names term and step.
        """
        both = torch.cat([self.sums / max(self.count, 1), self.first_bad])
        ranks = [both]
        if dist.is_initialized() and dist.get_world_size() > 1:
            ranks = [torch.empty_like(both) for _ in range(dist.get_world_size())]
            dist.all_gather(ranks, both)
        table = torch.stack(ranks).cpu()  # sync
        means, bad = table[:, : len(self.names)].mean(0), table[:, len(self.names) :].min(0).values
        self.sums.zero_()
        self.count = 0
        if bad.min() < NEVER:
            # the sum is bad whenever a term is: name the term that was first
            order = sorted(range(len(self.names)), key=lambda i: (bad[i].item(), i == 0))
            name, step = self.names[order[0]], int(bad[order[0]])
            raise FloatingPointError(f"loss term {name!r} was not finite at step {step}; nothing after it was saved")
        return dict(zip(self.names, means.tolist(), strict=True))


class Telemetry:
    """Writes on rank 0, keeps quiet elsewhere.

    Args:
        directory: Run directory.
        place: This process.
        first_step: Steps done before; later entries of an earlier attempt are dropped.
        last_step: Steps of the whole run.
        tokens_at_peak: Tokens per second that the job's devices could compute at best; None if that is not known.
    """

    def __init__(
        self, directory: Path, place: Place, *, first_step: int, last_step: int, tokens_at_peak: float | None = None
    ):
        self.place = place
        self.tokens_at_peak = tokens_at_peak
        self.directory, self.last_step = directory, last_step
        self.steps: progress.Progress | None = None
        self.writer: SummaryWriter | None = None
        self.unwritable: set[str] = set()
        self.stopwatch = Stopwatch(place.device)
        self.sums = LossSums(place.device)
        self.since = time.perf_counter()
        if place.is_first:
            self.metrics = directory / "metrics.jsonl"
            keep_entries(self.metrics, first_step)
            with self._going_on("TensorBoard"):
                self.writer = tensorboard_writer(directory / "tensorboard", first_step)
                self.writer.add_custom_scalars(LAYOUT)

    def training(self, step: int, tokens: int, steps: int, extra: Mapping[str, float]) -> dict[str, float]:
        """Report an interval of training; every rank must call this.

        Args:
            step: Steps done.
            tokens: Tokens of the interval, over all ranks.
            steps: Steps of the interval.
            extra: Other scalars by tag.

        Returns:
            All scalars by tag.
        """
        losses = self.sums.read()
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        scalars = {f"loss/{name}": value for name, value in losses.items()}
        scalars |= {f"time/{name}_s": value / steps for name, value in self.stopwatch.read().items()}
        scalars |= {"throughput/tokens_per_s": tokens / seconds, "time/step_time_s": seconds / steps, **extra}
        if self.tokens_at_peak is not None:
            scalars["throughput/mfu"] = scalars["throughput/tokens_per_s"] / self.tokens_at_peak
        scalars |= memory_scalars(self.place.device)
        self._write("train", step, scalars)
        rate = scalars["throughput/tokens_per_s"]
        self.step(step, f"loss {progress.figure(scalars['loss/total'])}, {rate:,.0f} tokens/s")
        return scalars

    def step(self, done: int, numbers: str | None = None) -> None:
        """Show how far training is; the clock starts at the first step that is done, which takes longer than others."""
        if self.steps is None:
            self.steps = progress.Progress(
                "training", self.last_step, unit="step", start=done, shown=self.place.is_first
            )
        self.steps.to(done, numbers)
        if done == self.last_step:
            self.steps.close()

    def evaluation(self, step: int, losses: Mapping[str, float], scores: Mapping[str, float]) -> None:
        """Report the objectives on held-out rows, and a task's scores."""
        scalars = {f"held_out/{name}": value for name, value in losses.items()}
        self._write("held_out", step, scalars | {f"score/{name}": value for name, value in scores.items()})
        if self.place.is_first:
            terms = ", ".join(f"{name} {progress.figure(value)}" for name, value in losses.items() if name != "total")
            told = "".join(f"  {name} {progress.figure(value)}" for name, value in scores.items())
            self.note(
                f"step {step}/{self.last_step}  held-out objective {progress.figure(losses['total'])} ({terms}){told}"
            )
        self.since = time.perf_counter()

    def numbers(self, kind: str, step: int, scalars: Mapping[str, float]) -> None:
        """Report other scalars by tag."""
        self._write(kind, step, scalars)

    def pictures(self, step: int, drawn: Mapping[str, bytes]) -> None:
        """Show PNGs, and keep the newest of each name in the run directory."""
        if not self.place.is_first:
            return
        with self._going_on("TensorBoard"):
            if self.writer is not None:
                self.writer._get_file_writer().add_summary(Summary(value=[_image(*one) for one in drawn.items()]), step)
        with self._going_on(PICTURES):
            self.directory.joinpath(PICTURES).mkdir(exist_ok=True)
            for name, png in drawn.items():
                self.directory.joinpath(PICTURES, f"{name}.png").write_bytes(png)

    def text(self, tag: str, content: str) -> None:
        """Keep a text in TensorBoard."""
        with self._going_on("TensorBoard"):
            if self.writer is not None:
                self.writer.add_text(tag, f"```\n{content}\n```")

    def note(self, line: str) -> None:
        """A line for people, without breaking the bar."""
        if self.place.is_first:
            progress.note(line)

    def pause(self) -> None:
        """Leave out of the step time what happened since the last report (evaluation, checkpoints)."""
        self.stopwatch.spans.clear()
        self.since = time.perf_counter()

    def _write(self, kind: str, step: int, scalars: Mapping[str, float]) -> None:
        if not self.place.is_first:
            return
        with self._going_on("TensorBoard"):
            if self.writer is not None:
                for tag, value in scalars.items():
                    self.writer.add_scalar(tag, value, step)
        entry = {"kind": kind, "step": step, "time": time.time(), **scalars}
        entry = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}
        with self._going_on(self.metrics.name), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @contextlib.contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """Training is worth more than its records: what cannot be written is told once, and left out."""
        try:
            yield
        except OSError as error:
            if what == "TensorBoard":
                self.writer = None
            if what not in self.unwritable:
                self.unwritable.add(what)
                self.note(f"WARNING: {what} cannot be written ({error}); training goes on without it")

    def close(self) -> None:
        """Flush everything."""
        with self._going_on("TensorBoard"):
            if self.writer is not None:
                self.writer.close()
        if self.steps is not None:
            self.steps.close()


def _image(name: str, png: bytes) -> Any:
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    return Summary.Value(tag=f"{PICTURES}/{name}", image=image)


def tensorboard_writer(directory: Path, first_step: int) -> SummaryWriter:
    """A writer that drops what an earlier attempt wrote after `first_step`; its file is not named after the host."""
    plain = event_file_writer.socket
    event_file_writer.socket = SimpleNamespace(gethostname=lambda: "run")
    try:
        return SummaryWriter(str(directory), purge_step=first_step + 1)
    finally:
        event_file_writer.socket = plain


def memory_scalars(device: torch.device) -> dict[str, float]:
    """Peak memory of this process since the last call, in GiB."""
    if device.type == "cuda":
        peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"memory/max_allocated_gib": peaks[0] / 2**30, "memory/max_reserved_gib": peaks[1] / 2**30}
    import resource

    return {"memory/max_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Entries of a metrics file; a last line cut short by a kill is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def keep_entries(path: Path, last_step: int) -> None:
    """Drop entries after `last_step`, which a resumed run will write again."""
    kept = [entry for entry in read_metrics(path) if entry["step"] <= last_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    temporary.replace(path)
