"""A disk that is full while a checkpoint is written, made by a limit on the size of one rank's files."""

import resource

import pytest

from dsdistill.training.checkpoint import verify
from tests.faults.jobs import LONG, STEPS, Job, assert_same_weights

pytestmark = pytest.mark.multiprocess
LIMIT = 40_000


def test_a_full_disk_costs_no_checkpoint_and_stops_or_not_as_the_recipe_says(recipe_file, tmp_path, unbroken, warm):
    run = tmp_path / "run"
    settings = (*LONG, f"output={run}", "checkpoint.every_steps=10", "checkpoint.keep=100")
    job = Job(recipe_file, *settings, world_size=2, warm=warm)
    job.wait_until(lambda: (run / "checkpoints" / "step-00000010").exists())
    limit(job, LIMIT)
    assert job.codes() == [1, 1], job.tails()
    for rank in (0, 1):  # told on both ranks, though only one had the problem
        assert "moments-00001.safetensors: " in job.output(rank)
        assert "File too large" in job.output(rank)
        assert "are free there)" in job.output(rank)
        assert "Traceback" not in job.output(rank)
    kept = sorted((run / "checkpoints").iterdir())
    for checkpoint in kept:
        verify(checkpoint)

    job = Job(
        recipe_file, *settings, "checkpoint.on_failure=continue", "logging.every_steps=1", world_size=2, warm=warm
    )
    job.wait_until(lambda: "resumed at step" in job.output(0))
    limit(job, LIMIT)
    job.wait_until(lambda: "training goes on" in job.output(0))
    limit(job, resource.RLIM_INFINITY)
    assert job.codes() == [0, 0], job.tails()
    after = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept[-1].name in after
    assert len(kept) < len(after) < STEPS // 10
    assert_same_weights(unbroken(recipe_file, 2), run, STEPS)


def limit(job: Job, size: int) -> None:
    pid = job.processes[1].pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
