"""The main job as real processes whose output is read while they run."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dsdistill.training.dist import free_port
from dsdistill.training.telemetry import read_metrics
from tests.faults.warm import Warm
from tests.workers import ROOT, environment, run_workers

STEPS = 100
LONG = (f"optimization.steps={STEPS}", "evaluation.every_steps=1000")
"""A run that takes a few seconds, so that something can happen to it."""

PRETRAIN, TASK = (ROOT / "launch" / name for name in ("pretrain_distill.py", "task_distill.py"))


def patience(seconds: float) -> float:
    """How long to wait for what takes so long on free cores, while others use them too."""
    return seconds * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def run_warm(warm: Warm | None, function: str, world_size: int, **arguments: Any) -> str:
    """`tests.workers.run_workers` without the imports, if there is a warm process; all output."""
    if warm is None:
        return run_workers(function, world_size, **arguments)
    port = free_port()
    logs = [tempfile.TemporaryFile("w+") for _ in range(world_size)]  # noqa: SIM115 (read at the end)
    order = [function, json.dumps(arguments)]
    started = [warm.start(order, environment(rank, world_size, port), logs[rank]) for rank in range(world_size)]
    deadline = time.monotonic() + patience(100)
    codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in started]
    for log in logs:
        log.seek(0)
    outputs = [log.read() for log in logs]
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(output[-4000:] for output in outputs)
    return "\n".join(outputs)


class Job:
    """One process per rank; output goes to files, so that nobody waits for a reader.

    With `warm` the processes are forked from one that has imported everything, which saves most of a short job's time;
    their command line is then not their own. `stage` is what follows zero in the name of a shipped JSON, or the path of
    another; `flags` are more arguments of the command.
    """

    def __init__(
        self,
        recipe: Path,
        *settings: str,
        script: Path = PRETRAIN,
        world_size: int = 1,
        stage: int | str = 2,
        warm: Warm | None = None,
        flags: Sequence[str] = (),
    ):
        config = stage if str(stage).endswith(".json") else ROOT / "ds_configs" / f"zero{stage}.json"
        command = [str(script), "--ds_config", str(config)]
        command += ["--recipe", str(recipe), *(part for setting in settings for part in ("--set", setting))]
        command += flags
        port = free_port()
        self.began = time.time()
        self.logs = [tempfile.TemporaryFile("w+") for _ in range(world_size)]  # noqa: SIM115 (read until the end)
        self.processes = [
            warm.start(command, environment(rank, world_size, port), self.logs[rank])
            if warm is not None
            else subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment(rank, world_size, port),
                stdout=self.logs[rank],
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank in range(world_size)
        ]

    def output(self, rank: int) -> str:
        self.logs[rank].seek(0)
        return self.logs[rank].read()

    def steps(self, directory: Path) -> list[int]:
        """Steps that this job, and no earlier one, has logged in the directory of a run or of a stage."""
        entries = read_metrics(directory / "metrics.jsonl")
        return [entry["step"] for entry in entries if entry["kind"] == "train" and entry["time"] > self.began]

    def wait_until(self, happened: Callable[[], bool], timeout: float = 100) -> None:
        deadline = time.monotonic() + patience(timeout)
        while not happened():
            assert time.monotonic() < deadline, self.tails()
            assert all(process.poll() is None for process in self.processes), self.tails()
            time.sleep(0.01)

    def codes(self, timeout: float = 100) -> list[int]:
        deadline = time.monotonic() + patience(timeout)
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError("still running:\n" + self.tails()) from None

    def kill_rank(self, rank: int) -> None:
        """One rank with its workers."""
        if self.processes[rank].poll() is None:
            os.killpg(self.processes[rank].pid, signal.SIGKILL)
            self.processes[rank].wait()

    def kill(self) -> None:
        """All processes of the job."""
        for rank in range(len(self.processes)):
            self.kill_rank(rank)

    def tails(self) -> str:
        return "\n".join(f"--- rank {i}\n{self.output(i)[-3000:]}" for i in range(len(self.processes)))


def assert_same_weights(one: Path, other: Path, step: int) -> None:
    """The students of two run directories are equal bit for bit."""
    name = f"checkpoints/step-{step:08d}/student.safetensors"
    weights = [load_file(run / name) for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    different = [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])]
    assert not different, f"{different[0]} and {len(different) - 1} others differ"


def processes_with(text: str) -> list[str]:
    """Numbers of the processes whose command line holds a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_bytes().decode(errors="replace"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def assert_nobody_stays(text: str, limit_s: float) -> None:
    """All processes with this text in their command line end within the limit."""
    deadline = time.monotonic() + limit_s
    while processes_with(text):
        assert time.monotonic() < deadline, processes_with(text)
        time.sleep(0.2)
