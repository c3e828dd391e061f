"""Several worker processes and the runs they are given: what is ready goes first, the dead are replaced."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsdistill.compare.grid import Run
from dsdistill.compare.kinds import plain
from dsdistill.training import signals

SILENCE_S = 120.0
"""A worker that was not heard of for so long is killed, its run counts as lost."""

PATIENCE_S = 60.0
"""How long workers may take to save when everything is to stop."""

ATTEMPTS = 2
"""A run whose worker died is tried once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: The run.
        error: Why it failed; None if it is done.
        seconds: How long it took; 0 if it was not tried.
        log: What it printed; None if it was not tried.
    """

    run: Run
    error: str | None
    seconds: float = 0.0
    log: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where workers run.

    Attributes:
        jobs: Workers at a time.
        gpus: What CUDA_VISIBLE_DEVICES may name, given to workers in turn; empty on a CPU.
        threads: OMP_NUM_THREADS of each.
    """

    jobs: int
    gpus: tuple[str, ...]
    threads: int

    def environment(self, slot: int) -> dict[str, str]:
        """Of the worker in a slot: a single process of its own."""
        own = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.gpus:
            own["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        # the port of a job that we are part of is taken; each process finds a free one
        return {name: value for name, value in os.environ.items() if name != "MASTER_PORT"} | own


def find_machine(jobs: int | None) -> Machine:
    """This machine's cores and GPUs.

    Args:
        jobs: Workers at a time; by default one for two cores, at least one per GPU, at most four per GPU, since small
            models wait for the host more than for the device.

    Raises:
        ValueError: If `jobs` is below 1.
    """
    import torch

    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs {jobs} must be at least 1")
    cores = len(os.sched_getaffinity(0))
    count = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else 0
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = tuple(visible[:count] or map(str, range(count)))
    default = max(1, cores // 2)
    jobs = jobs or (max(count, min(default, 4 * count)) if count else default)
    return Machine(jobs=jobs, gpus=gpus, threads=int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // jobs)))


class Worker:
    """One process; everything it says goes into a queue as `(worker, message)`, and `(worker, None)` at its end."""

    def __init__(self, slot: int, environment: dict[str, str], log: Path, said: queue.SimpleQueue):
        self.slot, self.said = slot, said
        self.run: Run | None = None
        self.log = log
        self.heard_s = self.since_s = time.monotonic()
        self.working = False
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dsdistill.compare.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                start_new_session=True,  # Ctrl-C in a terminal is for us; we tell them
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.put((self, json.loads(line)))
        self.process.wait()
        self.said.put((self, None))

    def give(self, run: Run, ds_json: dict[str, Any], log: Path) -> None:
        """Start a run; a worker that is already dead is noticed by its end."""
        self.run, self.log, self.working = run, log, False
        self.heard_s = self.since_s = time.monotonic()
        order = {"id": run.id, "kind": asdict(run.kind), "recipe": plain(run.recipe), "ds_json": ds_json}
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(order | {"log": str(log)}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def ended_by(self) -> str:
        """How the process ended."""
        code = self.process.returncode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class Workers:
    """Does runs, several at a time.

    Args:
        machine: Where.
        ds_json: DeepSpeed JSON of all runs.
        logs: Directory of what workers and runs print.
        cell_timeout_s: How long a run may take, the wait for its lock not counted; None for any time.
    """

    def __init__(self, machine: Machine, ds_json: dict[str, Any], logs: Path, cell_timeout_s: float | None):
        self.machine, self.ds_json, self.logs, self.cell_timeout_s = machine, ds_json, logs, cell_timeout_s
        self.said: queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self.workers: dict[int, Worker] = {}
        self.attempts: dict[str, int] = {}
        self.waiting: list[Run] = []
        self.failed: dict[Path, str] = {}

    def do(self, runs: Iterable[Run], tell: Callable[[Outcome], None]) -> None:
        """Do all runs, each after what it needs; a failure is told and the rest goes on.

        Args:
            runs: In the order in which they should start.
            tell: Called with each outcome, as soon as it is known.

        Raises:
            StoppedError: If a signal asked to stop; running runs were asked to save first.
        """
        self.waiting = list(runs)
        try:
            while self.waiting or self._busy():
                if signals.received():
                    self._stop()
                    raise signals.StoppedError("stopped; what was running is saved")
                for outcome in (*self._skip_unreachable(), *self._give_out(), *self._listen(), *self._watch()):
                    if outcome.error is not None:
                        self.failed[outcome.run.directory] = outcome.error
                    tell(outcome)
        finally:
            self._kill()

    def _busy(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.run is not None]

    def _skip_unreachable(self) -> Iterable[Outcome]:
        """Runs that need a failed one."""
        for run in list(self.waiting):
            missing = next((need for need in run.needs if need in self.failed), None)
            if missing is not None:
                self.waiting.remove(run)
                yield Outcome(run=run, error=f"not started: {missing}, which it needs, failed: {self.failed[missing]}")

    def _give_out(self) -> Iterable[Outcome]:
        """Give idle workers what is ready; start workers where there are none."""
        pending = {run.directory for run in self.waiting} | {w.run.directory for w in self._busy() if w.run}
        ready = [run for run in self.waiting if not pending.intersection(run.needs)]
        for slot in range(self.machine.jobs):
            worker = self.workers.get(slot)
            if not ready or (worker is not None and worker.run is not None):
                continue
            run = ready.pop(0)
            if worker is None:
                worker = Worker(slot, self.machine.environment(slot), self.logs / f"worker-{slot}.log", self.said)
                self.workers[slot] = worker
            self.waiting.remove(run)
            self.attempts[run.id] = self.attempts.get(run.id, 0) + 1
            worker.give(run, self.ds_json, self.logs / f"{run.id.replace(os.sep, '_')}.log")
        return ()

    def _listen(self) -> Iterable[Outcome]:
        """What one worker says, if one says something soon."""
        try:
            worker, message = self.said.get(timeout=0.5)
        except queue.Empty:
            return
        worker.heard_s = time.monotonic()
        if message is None:
            yield from self._buried(worker)
        elif message["event"] == "started":
            worker.since_s, worker.working = worker.heard_s, True
        elif message["event"] in ("done", "failed"):
            run, worker.run = worker.run, None
            assert run is not None
            if message["event"] == "failed":
                self.workers.pop(worker.slot, None)  # it leaves
            seconds = worker.heard_s - worker.since_s
            yield Outcome(run=run, error=message.get("error"), seconds=seconds, log=worker.log)

    def _buried(self, worker: Worker) -> Iterable[Outcome]:
        """A worker has ended: its run is tried again, or has failed."""
        if self.workers.get(worker.slot) is worker:
            del self.workers[worker.slot]
        run, worker.run = worker.run, None
        if run is None:
            return
        if self.attempts[run.id] < ATTEMPTS:
            self.waiting.insert(0, run)
            return
        error = f"its process ended {ATTEMPTS} times, at last by {worker.ended_by()}; out of memory? see {worker.log}"
        yield Outcome(run=run, error=error, seconds=time.monotonic() - worker.since_s, log=worker.log)

    def _watch(self) -> Iterable[Outcome]:
        """Kill what is silent or takes too long."""
        now = time.monotonic()
        for worker in self._busy():
            run = worker.run
            assert run is not None
            if self.cell_timeout_s is not None and worker.working and now - worker.since_s > self.cell_timeout_s:
                worker.run = None
                worker.process.kill()
                self.workers.pop(worker.slot)
                error = f"took longer than cell_timeout_s={self.cell_timeout_s:g}"
                yield Outcome(run=run, error=error, seconds=now - worker.since_s, log=worker.log)
            elif now - worker.heard_s > SILENCE_S:
                worker.process.kill()

    def _stop(self) -> None:
        """Ask all workers to save and leave, and wait for them a while."""
        for worker in self.workers.values():
            worker.process.terminate()
        deadline = time.monotonic() + PATIENCE_S
        for worker in self.workers.values():
            try:
                worker.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()

    def _kill(self) -> None:
        for worker in self.workers.values():
            worker.process.kill()  # what is idle has nothing to save, what is busy was told before
            worker.process.wait()
