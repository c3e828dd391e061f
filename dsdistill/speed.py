"""How fast a model answers and how large it is: synchronised, warmed up, medians over repeated calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from dsdistill.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP = 2
LEAST_CALLS, MOST_CALLS = 5, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One measurement.

    Attributes:
        device: `cpu` or the GPU's name.
        dtype: `float32` or `float16`.
        threads: CPU threads; 0 on a GPU.
        length: Tokens per row.
        batch: Rows per call.
        calls: How many calls were timed.
        median_ms: Latency of a call.
        p90_ms: Latency that nine of ten calls do not exceed.
        rows_per_s: Throughput at the median.
    """

    device: str
    dtype: str
    threads: int
    length: int
    batch: int
    calls: int
    median_ms: float
    p90_ms: float
    rows_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Size and speed of one model.

    Attributes:
        name: Where it came from.
        layers: Of the encoder.
        width: Of its hidden states.
        parameters: As saved, heads included.
        bytes: Of the files that hold them, or would.
        timings: One for each device, batch and length.
    """

    name: str
    layers: int | None
    width: int | None
    parameters: int
    bytes: int
    timings: list[Timing]


def seconds_of_calls(call: Callable[[], object], device: torch.device, *, budget_s: float) -> list[float]:
    """Time single calls after a warm-up, the device synchronised before and after each.

    Args:
        call: What is timed.
        device: Where it runs.
        budget_s: No new call starts after so much time, but at least `LEAST_CALLS` do and at most `MOST_CALLS`.

    Returns:
        Seconds of each call.
    """
    for _ in range(WARM_UP):
        call()
    seconds: list[float] = []
    _synchronize(device)
    end = time.perf_counter() + budget_s
    while len(seconds) < LEAST_CALLS or (len(seconds) < MOST_CALLS and time.perf_counter() < end):
        start = time.perf_counter()
        call()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # sync


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    device: torch.device,
    *,
    lengths: Sequence[int],
    batches: Iterable[int],
    budget_s: float = 2.0,
) -> list[Timing]:
    """Time a model's forward pass on rows without padding, float32 on a CPU and float16 on a GPU.

    Args:
        model: Moved to the device and there to stay, in eval mode.
        device: Where.
        lengths: Tokens per row.
        batches: Rows per call.
        budget_s: About how long each setting may take.
    """
    cuda = device.type == "cuda"
    dtype = torch.float16 if cuda else torch.float32
    model = model.to(device=device, dtype=dtype).eval()  # pyright: ignore[reportCallIssue] (transformers' stub)
    timings = []
    settings = [(batch, length) for batch in batches for length in lengths]
    with Progress(f"measuring speed, {device.type}", len(settings), unit="setting", beats=True) as progress:
        for batch, length in settings:
            ids = torch.arange(batch * length, device=device).view(batch, length) % 1000 % model.config.vocab_size
            mask = torch.ones_like(ids)
            seconds = seconds_of_calls(partial(model, input_ids=ids, attention_mask=mask), device, budget_s=budget_s)
            median = statistics.median(seconds)
            timings.append(
                Timing(
                    device=torch.cuda.get_device_name(device) if cuda else "cpu",
                    dtype=str(dtype).removeprefix("torch."),
                    threads=0 if cuda else torch.get_num_threads(),
                    length=length,
                    batch=batch,
                    calls=len(seconds),
                    median_ms=1000 * median,
                    p90_ms=1000 * statistics.quantiles(seconds, n=10, method="inclusive")[-1],
                    rows_per_s=batch / median,
                )
            )
            progress.add()
    return timings
