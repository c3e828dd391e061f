"""The main job with a teacher on a rank of its own, as real processes to which something happens."""

import signal

import pytest
import yaml

from tests.faults.jobs import LONG, Job

RANKS = ("teacher.placement=ranks", "teacher.ranks=1")


@pytest.fixture
def recipe(recipe_content, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content))
    return path


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_stop_on_request_reaches_the_teacher_and_the_run_goes_on_elsewhere(recipe, warm, tmp_path):
    job = Job(recipe, *LONG, *RANKS, f"output={tmp_path / 'run'}", world_size=2, warm=warm)
    metrics = tmp_path / "run" / "metrics.jsonl"
    job.wait_until(lambda: metrics.exists() and metrics.read_text().count('"train"') > 1)
    job.processes[1].send_signal(signal.SIGUSR1)  # to the teacher only
    assert job.codes() == [3, 3], job.tails()
    resumed = Job(recipe, *LONG, f"output={tmp_path / 'run'}", world_size=1, warm=warm)
    assert resumed.codes() == [0], resumed.tails()
    assert "resumed at step" in resumed.output(0)


@pytest.mark.multiprocess
def test_a_lost_teacher_is_named(recipe, warm, tmp_path):
    job = Job(recipe, *LONG, *RANKS, f"output={tmp_path / 'run'}", world_size=2, warm=warm)
    metrics = tmp_path / "run" / "metrics.jsonl"
    job.wait_until(lambda: metrics.exists() and '"train"' in metrics.read_text())
    job.kill_rank(1)
    assert job.processes[0].wait(60) == 1, job.tails()
    assert "rank 1 (teacher)" in job.output(0), job.tails()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_lost_student_is_named(recipe, warm, tmp_path):
    job = Job(recipe, *LONG, *RANKS, f"output={tmp_path / 'run'}", world_size=2, warm=warm)
    metrics = tmp_path / "run" / "metrics.jsonl"
    job.wait_until(lambda: metrics.exists() and '"train"' in metrics.read_text())
    job.kill_rank(0)
    assert job.processes[1].wait(60) == 1, job.tails()
    assert "rank 0" in job.output(1), job.tails()
