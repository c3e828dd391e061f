"""SIGKILL of one rank or of all at random moments, also in the middle of saving."""

import json
import random
import time
from pathlib import Path

import pytest

from tests.faults.jobs import LONG, STEPS, Job, assert_same_weights, patience
from tests.faults.warm import Warm

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]
OFTEN = (*LONG, "checkpoint.every_steps=2")


def kill_at(job: Job, step: int, draw: random.Random, checkpoints: Path, while_saving: bool, one_rank: bool) -> None:
    """Wait for training to begin and for a step, then for a moment, and kill."""
    job.wait_until(lambda: max(job.steps(checkpoints.parent), default=0) >= max(1, step))
    time.sleep(draw.uniform(0, 0.1))
    if while_saving:
        finished = lambda: any(process.poll() is not None for process in job.processes)  # noqa: E731
        while not (finished() or any(checkpoints.glob("partial-*"))):
            pass
        time.sleep(draw.uniform(0, 0.03))
    if one_rank:
        job.kill_rank(draw.randrange(len(job.processes)))
        job.codes(60)
    job.kill()


def survive(
    recipe: Path, run: Path, draw: random.Random, kills: list[tuple[bool, bool]], stage: int, warm: Warm | None
) -> str:
    """Kill a run again and again at random steps, then let it end; all it said."""
    said = ""
    settings = (*OFTEN, f"output={run}", f"faults.hang_timeout_s={patience(20):.0f}")
    steps = sorted(draw.sample(range(STEPS - 15), len(kills)))
    for step, (while_saving, one_rank) in zip(steps, kills, strict=True):
        job = Job(recipe, *settings, world_size=2, stage=stage, warm=warm)
        kill_at(job, step, draw, run / "checkpoints", while_saving, one_rank)
        said += job.output(0)
        assert not (run / "model").exists()
    job = Job(recipe, *settings, world_size=2, stage=stage, warm=warm)
    assert job.codes() == [0, 0], job.tails()
    return said + job.output(0)


def test_five_kills_cost_no_step_and_a_run_directory_repeats_its_run(recipe_file, tmp_path, unbroken, warm):
    """The killed run is started from the directory of the unbroken one, which so repeats it."""
    whole = unbroken(recipe_file, 2)
    run = tmp_path / "killed"
    kills = [(True, False), (False, True), (False, False), (True, True), (True, False)]
    said = survive(whole, run, random.Random(time.time_ns()), kills, 2, warm)
    assert said.count("resumed at step") >= 4  # a kill while the first checkpoint is saved leaves none
    assert_same_weights(whole, run, STEPS)
    assert training_losses(whole) == training_losses(run)
    assert not list((run / "checkpoints").glob("partial-*"))
    assert len(list((run / "checkpoints").iterdir())) == 2


def training_losses(run: Path) -> list[tuple[int, float]]:
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(entry["step"], entry["loss/total"]) for entry in entries if entry["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_thirty_kills_cost_no_step(recipe_file, tmp_path, warm, stage):
    """Ten kills per ZeRO stage, in two runs."""
    seed = time.time_ns()
    draw = random.Random(seed)
    print(f"seed {seed}")
    whole = tmp_path / "whole"
    settings = (*LONG, "checkpoint.every_steps=1000", f"output={whole}", f"faults.hang_timeout_s={patience(20):.0f}")
    job = Job(recipe_file, *settings, world_size=2, stage=stage, warm=warm)
    assert job.codes() == [0, 0], job.tails()
    for number in range(2):
        kills = [(draw.random() < 0.5, draw.random() < 0.5) for _ in range(5)]
        survive(recipe_file, tmp_path / f"killed-{number}", draw, kills, stage, warm)
        assert_same_weights(whole, tmp_path / f"killed-{number}", STEPS)
