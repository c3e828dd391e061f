"""Signals that ask a run to stop: one saved step, an exit code of its own, and the same weights in the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.jobs import LONG, STEPS, Job, assert_nobody_stays, assert_same_weights
from tests.workers import ROOT

pytestmark = pytest.mark.multiprocess
RARELY_SAVED = (*LONG, "checkpoint.every_steps=1000", "logging.every_steps=1")


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("world_size", "numbers"),
    [
        (2, (signal.SIGTERM,)),
        pytest.param(2, (signal.SIGINT, signal.SIGUSR1), marks=pytest.mark.slow),
        pytest.param(1, (signal.SIGUSR1, signal.SIGINT), marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_a_step_and_the_run_goes_on_to_the_same_weights(
    recipe_file, tmp_path, unbroken, warm, world_size, numbers
):
    whole = unbroken(recipe_file, world_size)
    run = tmp_path / "stopped"
    settings = (*RARELY_SAVED, f"output={run}")
    for number in numbers:
        job = Job(recipe_file, *settings, world_size=world_size, warm=warm)
        job.wait_until(lambda job=job: job.steps(run))
        os.killpg(job.processes[-1].pid, number)  # one rank and its workers, as a launcher does
        assert job.codes() == [3] * world_size, job.tails()
        assert number.name in job.output(world_size - 1)
        assert f"of {STEPS} steps are done and saved" in job.output(0)
        assert "Traceback" not in job.tails()
        assert checkpoints(run)
    job = Job(recipe_file, *settings, world_size=world_size, warm=warm)
    assert not any(job.codes()), job.tails()
    assert "resumed at step" in job.output(0)
    assert_same_weights(whole, run, STEPS)


def test_a_second_ctrl_c_stops_at_once(recipe_file, tmp_path):
    job = Job(recipe_file, *RARELY_SAVED, "optimization.global_batch=4096", world_size=1)
    job.wait_until(lambda: "held-out" in job.output(0))
    for _ in range(2):
        job.processes[0].send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert job.codes(timeout=2) == [130]
    assert_nobody_stays(str(recipe_file), 5)  # its workers have full pipes
    assert checkpoints(tmp_path / "run") == []


def test_a_signal_during_the_imports_ends_the_run_with_the_same_code(recipe_file, tmp_path):
    job = Job(recipe_file)
    caught = Path(f"/proc/{job.processes[0].pid}/status")
    mask = 1 << (signal.SIGTERM - 1)
    job.wait_until(lambda: any(int(line.split()[1], 16) & mask for line in caught.open() if line.startswith("SigCgt")))
    job.processes[0].send_signal(signal.SIGTERM)
    assert job.codes(timeout=20) == [3]
    assert not (tmp_path / "run").exists()


def test_processes_forked_from_the_run_start_with_the_default_handlers():
    code = (
        "import os, signal, time; from dsdistill.training import signals; signals.install(); child = os.fork()\n"
        "if child == 0: time.sleep(20); os._exit(0)\n"
        "os.kill(child, signal.SIGTERM); print(os.waitpid(child, 0)[1], signals.received())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(signal.SIGTERM.value), "None"]
