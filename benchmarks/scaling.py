"""Fixed work per GPU on 1, 2, ... GPUs of one host: `python -m benchmarks.scaling --out runs/scaling --gpus 1 2`.

Starts itself once per number of GPUs with one process each (torchrun) and trains a few steps at every ZeRO stage: by
default 12 x 768 into 6 x 768, `minilm`, fp16, micro-batches of 256 x 128 tokens, accumulation 4. Reports tokens/s over
all GPUs, the peak memory of the fullest, and the efficiency: tokens/s of N GPUs / (N x tokens/s of one). One GPU is
measured with and without `overlap_comm`, which only costs there, and the faster of the two counts. With several GPUs
the collectives that ZeRO uses are timed alone too; `scaling_model.py` predicts more GPUs from all this.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.speed import OPTIMIZATION as ONE_GPU
from benchmarks.speed import Cell, Clock, build, engine_config, random_batches
from dsdistill.training.dist import Place, barrier, find_place
from dsdistill.training.engine import backward, start_engine, start_processes, stop_processes
from dsdistill.training.optimizer_state import elements

ROUNDS = 3
BUCKETS = (2**20, 50_000_000)
"""Elements of the messages whose collectives are timed: a small one, and a reduction bucket of `ds_configs`."""


def measure(cell: Cell, place: Place, *, steps: int, overlap: bool) -> dict[str, Any]:
    """Train on this rank's share and report; every rank must call this.

    Args:
        cell: Model, rows per GPU and ZeRO stage.
        place: This process.
        steps: Optimizer steps in each of `ROUNDS` rounds.
        overlap: ZeRO's `overlap_comm`.

    Returns:
        The median round's tokens/s over all ranks, and the largest peak memory of any rank, in GiB.
    """
    batches = random_batches(cell, 4)
    probe = batches[0]._replace(**{k: v[:2] for k, v in batches[0]._asdict().items() if isinstance(v, torch.Tensor)})
    module, ask, _ = build(cell, place.device, probe.to(place.device))
    config = engine_config(cell)
    config["train_batch_size"] *= place.world_size
    config["zero_optimization"]["overlap_comm"] = overlap
    config["timers"] = {"throughput": {"enabled": False}}  # as runs have it: it waits for the device twice a step
    engine = start_engine(module, ONE_GPU, config, place)
    engine.train()
    stream, clock = itertools.cycle(batches), Clock()

    def train_step() -> None:
        for _ in range(cell.accumulation):
            clock.mark("forward")
            batch = next(stream).to(place.device)
            total = engine(batch, ask(batch), 0).total
            clock.mark("backward")
            backward(engine, total)
            clock.mark("step" if engine.is_gradient_accumulation_boundary() else "hooks")
            engine.step()

    for _ in range(3):
        train_step()
    torch.cuda.reset_peak_memory_stats()
    clock.marks.clear()
    seconds = [slowest(lambda: [train_step() for _ in range(steps)], place) for _ in range(ROUNDS)]
    tokens = steps * cell.accumulation * cell.micro_batch * cell.length * place.world_size
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30, device=place.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    report = {
        "gpus": place.world_size,
        "zero": cell.zero,
        "overlap_comm": overlap,
        "variant": cell.variant,
        "tokens_per_s": tokens / statistics.median(seconds),
        "rounds_s": seconds,
        "step_s": statistics.median(seconds) / steps,
        "parts_ms": clock.medians_ms(),
        "peak_gib": float(peak),
        "trained_parameters": sum(elements(p) for p in engine.parameters() if p.requires_grad),
    }
    engine.destroy()
    return report


def slowest(work: Callable[[], object], place: Place) -> float:
    """Seconds until every rank has done its work, from when all have begun."""
    barrier()
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - began, device=place.device, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def collectives(place: Place) -> dict[str, float]:
    """Bus bandwidth in GB/s of all-reduce and all-gather in fp16: bytes that each GPU must move per second."""
    told, n = {}, place.world_size
    for size in BUCKETS:
        whole = torch.ones(size // n * n, device=place.device, dtype=torch.float16)
        part = whole[: len(whole) // n].clone()
        for name, factor, call in (
            ("all_reduce", 2, lambda whole=whole: dist.all_reduce(whole, dist.ReduceOp.MAX)),
            ("all_gather", 1, lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part)),
        ):
            for _ in range(5):
                call()
            seconds = slowest(lambda call=call: [call() for _ in range(20)], place) / 20
            told[f"{name}_{2 * len(whole) // 10**6}MB"] = factor * (n - 1) / n * 2 * len(whole) / seconds / 1e9
    return told


def work(arguments: argparse.Namespace) -> None:
    """All measurements with this number of GPUs; rank 0 writes them."""
    place = find_place()
    start_processes(place)
    reports: list[dict[str, Any]] = []
    variant = "fused+compile" if arguments.compile else "fused"
    teacher, student = arguments.teacher, arguments.student
    for zero in arguments.zero:
        tokens = arguments.micro_batch, arguments.accumulation
        cell = Cell(variant, "minilm", teacher, student, arguments.length, *tokens, "fp16", zero)
        for overlap in (True, False) if place.world_size == 1 else (True,):
            try:
                reports.append(measure(cell, place, steps=arguments.steps, overlap=overlap))
            except torch.OutOfMemoryError:
                if place.world_size > 1:
                    raise  # the others are in a collective by now
                traceback.print_exc()
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            if place.is_first and reports:
                print({k: v for k, v in reports[-1].items() if k not in ("rounds_s", "parts_ms")}, flush=True)
    links = collectives(place) if place.world_size > 1 else {}
    if place.is_first:
        told = {"cells": reports, "links_gb_per_s": links, "gpu": torch.cuda.get_device_name(), **versions()}
        (arguments.out / f"gpus-{place.world_size}.json").write_text(json.dumps(told, indent=1) + "\n")
    stop_processes()


def versions() -> dict[str, str]:
    """What was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {"torch": torch.__version__, "commit": commit.strip() or "-"}


def table(runs: list[dict[str, Any]]) -> str:
    """The measurements of all numbers of GPUs as Markdown, with efficiencies against the faster run on one."""
    cells = [cell for run in runs for cell in run["cells"]]
    alone = {
        zero: max((c["tokens_per_s"] for c in cells if c["gpus"] == 1 and c["zero"] == zero), default=None)
        for zero in {c["zero"] for c in cells}
    }
    lines = [
        "| ZeRO | GPUs | overlap_comm | tokens/s | efficiency | ms per step | peak GiB per GPU |",
        "|---" * 7 + "|",
    ]
    for c in sorted(cells, key=lambda c: (c["zero"], c["gpus"], not c["overlap_comm"])):
        one = alone[c["zero"]]
        efficiency = f"{c['tokens_per_s'] / (c['gpus'] * one):.1%}" if one else "-"
        lines.append(
            f"| {c['zero']} | {c['gpus']} | {str(c['overlap_comm']).lower()} | {c['tokens_per_s'] / 1e3:.0f} k "
            f"| {efficiency} | {1e3 * c['step_s']:.1f} | {c['peak_gib']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse; start the workers, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for scaling.json and scaling.md")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--zero", nargs="+", type=int, default=[1, 2, 3], choices=[0, 1, 2, 3])
    parser.add_argument("--teacher", default="12x768", help="layers x width")
    parser.add_argument("--student", default="6x768")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro_batch", type=int, default=256, help="rows per GPU")
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps per round")
    parser.add_argument("--compile", action="store_true", help="graphs of both models; ZeRO 0, 1, 2")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile and 3 in arguments.zero:
        parser.error("--compile cannot be used with ZeRO 3; add --zero 1 2")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.worker:
        work(arguments)
        return
    runs = []
    for gpus in arguments.gpus:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        subprocess.run([*command, "-m", "benchmarks.scaling", "--worker", *sys.argv[1:]], check=True)
        runs.append(json.loads((arguments.out / f"gpus-{gpus}.json").read_text()))
    shape = f"{arguments.teacher} to {arguments.student}, {arguments.micro_batch} x {arguments.length} tokens, "
    shape += f"accumulation {arguments.accumulation}, {'compiled' if arguments.compile else 'eager'}"
    page = f"{runs[0]['gpu']}, torch {runs[0]['torch']}, commit {runs[0]['commit']}; {shape}\n\n{table(runs)}\n"
    for run in runs:
        page += "".join(f"\n{name}: bus bandwidth {rate:.1f} GB/s" for name, rate in run["links_gb_per_s"].items())
    print(page)
    (arguments.out / "scaling.md").write_text(page + "\n")
    (arguments.out / "scaling.json").write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
