"""Ranks that hang or die: the others say who it was and leave, and nothing is left running."""

import os
import signal
import time

import pytest

from tests.faults.jobs import LONG, STEPS, Job, assert_nobody_stays, assert_same_weights

pytestmark = pytest.mark.multiprocess


LONG_KILL = pytest.param(1, (signal.SIGKILL, signal.SIGSTOP), marks=pytest.mark.slow)
LONG_FIRST = pytest.param(0, (signal.SIGSTOP, signal.SIGKILL), marks=pytest.mark.slow)


@pytest.mark.parametrize(("lost", "numbers"), [(1, (signal.SIGSTOP,)), LONG_KILL, LONG_FIRST])
def test_ranks_that_stand_still_or_die_are_named_and_nobody_stays(recipe_file, tmp_path, unbroken, lost, numbers):
    run = tmp_path / "run"
    settings = (*LONG, f"output={run}", "checkpoint.every_steps=10", "faults.hang_timeout_s=8")
    for number in numbers:
        job = Job(recipe_file, *settings, "logging.every_steps=1", world_size=2)
        job.wait_until(lambda job=job: job.steps(run))
        job.processes[lost].send_signal(number)
        start = time.monotonic()
        left = job.processes[1 - lost].wait(40)
        assert left == 1, job.tails()
        message = next(line for line in job.output(1 - lost).splitlines() if line.startswith("error: "))
        assert f"rank {1 - lost} " in message
        assert f"rank {lost}" in message.partition(" at ")[2]
        assert "silent" in message, message
        assert lost == 0 or "step " in message
        print(f"{number.name}: {time.monotonic() - start:.1f} s: {message}")
        os.killpg(job.processes[lost].pid, signal.SIGKILL)
        assert_nobody_stays(str(recipe_file), 15)
    if len(numbers) == 1:
        return  # kills of one rank, and how runs go on after them, are in test_kills.py
    job = Job(recipe_file, *settings, world_size=2)
    assert job.codes() == [0, 0], job.tails()
    assert_same_weights(unbroken(recipe_file, 2), run, STEPS)
