"""What watching costs per step: the vote about stopping, the watchdog's note and its thread.

    python benchmarks/votes.py --processes 2 --steps 2000 --work_ms 20

Every step does arithmetic for `--work_ms` between `Vote.cast` and `Vote.count`, as a training step does, so that the
vote can travel meanwhile. Prints microseconds per step; `soak.md` holds what it printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from dsdistill.training.dist import Vote, find_place, free_port
from dsdistill.training.engine import start_processes, stop_processes
from dsdistill.training.watchdog import Watchdog

NOTES_PER_STEP = 5
"""Parts of a step that the loop tells the watchdog of: data, teacher, student, backward, step."""


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--work_ms", type=float, default=20.0, help="of each step")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.steps, arguments.work_ms / 1000)
        return
    world = {"WORLD_SIZE": str(arguments.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    world |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **world, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(arguments.processes)
    ]
    sys.exit(max(rank.wait() for rank in ranks))


def measure(steps: int, work_s: float) -> None:
    """Print, on the first rank, microseconds of each part: median, mean, and 99th percentile."""
    place = find_place()
    start_processes(place)
    spent: dict[str, list[float]] = {"cast": [], "count": [], f"{NOTES_PER_STEP} notes": []}
    with Watchdog(place, 600.0) as watchdog:
        vote = Vote(place)
        vote.cast(False)
        vote.count()
        cpu_began = time.thread_time(), time.process_time()
        for step in range(steps):
            moments = [time.perf_counter()]
            vote.cast(False)
            moments.append(time.perf_counter())
            work(work_s)
            moments.append(time.perf_counter())
            vote.count()
            moments.append(time.perf_counter())
            for part in range(NOTES_PER_STEP):
                watchdog.at(f"step {step}, part {part}")
            moments.append(time.perf_counter())
            for name, start, end in (("cast", 0, 1), ("count", 2, 3), (f"{NOTES_PER_STEP} notes", 3, 4)):
                spent[name].append((moments[end] - moments[start]) * 1e6)
        others = (time.process_time() - cpu_began[1]) - (time.thread_time() - cpu_began[0])
    if place.is_first:
        print(f"| {place.world_size} process(es), steps of {work_s * 1e3:g} ms | median | mean | 99 % |")
        print("|---|---|---|---|")
        for name, values in spent.items():
            late = statistics.quantiles(values, n=100)[98]
            print(f"| {name}, us | {statistics.median(values):.1f} | {statistics.fmean(values):.1f} | {late:.1f} |")
        print(f"| CPU of all other threads, us per step | | {others / steps * 1e6:.1f} | |", flush=True)
    stop_processes()


def work(seconds: float) -> None:
    """Keep one core busy."""
    end, numbers = time.perf_counter() + seconds, torch.ones(64, 64)
    while time.perf_counter() < end:
        numbers = numbers @ numbers * 1e-3


if __name__ == "__main__":
    main()
