"""A long run under observation: does memory, the number of open files, step time or disk use grow?

    python benchmarks/soak.py --recipe launch/recipes/quickstart.yaml --set optimization.steps=2000 --processes 2

Starts the main job with a checkpoint every few steps, looks at every rank once a second, and prints Markdown: slopes
of a straight line over the second half of the run, per 1000 steps, beside the mean. `soak.md` holds what it printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from dsdistill.training.dist import free_port

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run, watch, print."""
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        ranks = start(arguments, run)
        samples = watch(ranks, run)
        if any(rank.wait() for rank in ranks):
            sys.exit("a rank failed")
        print(report(samples, read_train(run)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "launch/recipes/quickstart.yaml")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs/zero2.json")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--checkpoint_every", type=int, default=50)
    return parser


def start(arguments: argparse.Namespace, run: Path) -> list[psutil.Popen]:
    """One process per rank."""
    settings = [f"output={run}", f"checkpoint.every_steps={arguments.checkpoint_every}", *arguments.set]
    command = [sys.executable, str(ROOT / "launch/pretrain_distill.py"), "--ds_config", str(arguments.ds_config)]
    command += ["--recipe", str(arguments.recipe), *(part for setting in settings for part in ("--set", setting))]
    port = free_port()
    world = {"WORLD_SIZE": str(arguments.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        psutil.Popen(
            command,
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(arguments.processes)
    ]


def watch(ranks: list[psutil.Popen], run: Path) -> list[dict[str, float]]:
    """Once a second while training: step reached, memory and open files of each rank with its workers, disk use."""
    samples = []
    while all(rank.poll() is None for rank in ranks):
        time.sleep(1)
        done = read_train(run)
        if not done or (run / "model.partial").exists() or (run / "model").exists():
            continue
        sample: dict[str, float] = {"step": done[-1]["step"], "disk_mib": size_of(run) / 2**20}
        try:
            for number, rank in enumerate(ranks):
                family = [rank, *rank.children(recursive=True)]
                sample[f"rank {number} memory_mib"] = rank.memory_info().rss / 2**20
                sample[f"rank {number} handles"] = sum(process.num_fds() for process in family)
                sample[f"rank {number} processes"] = len(family)
        except psutil.Error:
            continue
        samples.append(sample)
    return samples


def read_train(run: Path) -> list[dict[str, float]]:
    """Entries of the metrics file about training, as far as they are written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if entry["kind"] == "train"]


def size_of(directory: Path) -> int:
    """Bytes of all files, which may come and go."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def report(samples: list[dict[str, float]], entries: list[dict[str, float]]) -> str:
    """Mean and slope of every quantity over the second half of the run."""
    last = entries[-1]["step"]
    series = {name: [(s["step"], s[name]) for s in samples] for name in samples[0] if name != "step"}
    series["step_time_s"] = [(entry["step"], entry["time/step_time_s"]) for entry in entries]
    rows = ["| second half of the run | mean | largest | slope per 1000 steps |", "|---|---|---|---|"]
    for name, points in series.items():
        steps, values = np.array([point for point in points if point[0] > last / 2]).T
        slope = np.polyfit(steps, values, 1)[0] * 1000
        rows.append(f"| {name} | {values.mean():.4g} | {values.max():.4g} | {slope:+.4g} |")
    return f"{last:.0f} steps\n\n" + "\n".join(rows)


if __name__ == "__main__":
    main()
