"""Runs on a task under faults: in a stage, in the teacher's fine-tuning, while its signals are written, in the lock."""

import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.faults.jobs import TASK, Job
from tests.task.conftest import sentences

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]
ROWS = 480
LIMIT = 20_000


@pytest.fixture
def recipe(tmp_path, task_content) -> Path:
    """A teacher that is fine-tuned first, all of its signals on disk, and two stages; all long enough to be met."""
    folder = tmp_path / "data" / "CoLA"
    folder.mkdir(parents=True)
    for split, count, seed in (("train", ROWS, 0), ("dev", 37, 1)):
        lines = [f"src\t{label}\t\t{text}" for text, label in sentences(count, seed)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    task_content["data"]["directory"] = str(folder.parent)
    task_content["teacher"]["cache"] = "all"
    task_content["teacher"]["fine_tuning"]["epochs"] = 1.0
    task_content["checkpoint"] = {"every_epochs": 0.2}
    task_content["logging"] = {"every_steps": 1}
    task_content["faults"] = {"hang_timeout_s": 30.0}
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(task_content))
    return path


@pytest.fixture
def start(recipe, warm) -> Callable[..., Job]:
    """Starts a job whose teacher lies beside its run."""

    def start_job(run: Path, *settings: str, world_size: int = 1, stage: int = 2) -> Job:
        where = (f"output={run}", f"teacher.directory={run.parent / 'teachers'}")
        return Job(recipe, *where, *settings, script=TASK, world_size=world_size, stage=stage, warm=warm)

    return start_job


def teacher_of(run: Path) -> Path:
    (found,) = [path for path in run.parent.glob("teachers/cola-*") if path.is_dir()]
    return found


def assert_same_models(one: Path, other: Path) -> None:
    """Students, teachers and predictions of two runs are equal bit for bit."""
    for pair in ((one, other), (teacher_of(one), teacher_of(other))):
        weights = [load_file(run / "model" / "model.safetensors") for run in pair]
        assert weights[0].keys() == weights[1].keys()
        different = [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])]
        assert not different, f"{pair[1]}: {different[0]} and {len(different) - 1} others differ"
    assert (one / "predictions" / "dev.tsv").read_bytes() == (other / "predictions" / "dev.tsv").read_bytes()


def wait_for_steps(job: Job, directory: Path, stage: str) -> None:
    """Until some steps of a stage are done, of the run or the teacher that lie in a directory."""
    job.wait_until(lambda: any(len(job.steps(found)) > 8 for found in directory.glob(f"**/*-{stage}")))


def wait_for_signals(job: Job) -> None:
    """Until the first are being written."""
    job.wait_until(lambda: "MiB will be written to" in job.output(0))


def stop(job: Job, number: signal.Signals) -> None:
    """Ask one rank to stop; all do, in order."""
    job.processes[-1].send_signal(number)
    assert job.codes() == [3] * len(job.processes), job.tails()
    assert "the same command goes on from there" in job.output(0)
    assert "Traceback" not in job.tails()


def fill_disk(job: Job, run: Path) -> None:
    """Let the first rank write no more than a few bytes into a file when the teacher is done."""
    job.wait_until(lambda: any(run.parent.glob("teachers/cola-*/results.json")))
    resource.prlimit(job.processes[0].pid, resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
    assert job.codes() == [1] * len(job.processes), job.tails()
    for rank in range(len(job.processes)):  # told on all ranks, though only one had the problem
        assert "teacher signals (" in job.output(rank)
        assert f" bytes in {run.parent / 'teachers'}" in job.output(rank)
        assert "make room" in job.output(rank)
        assert "Traceback" not in job.output(rank)
    assert not list(run.parent.glob("teachers/signals/*/*/*.partial"))


def flip_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "student.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


LONG = [pytest.param(2, stage, marks=pytest.mark.slow) for stage in (0, 2, 3)]


@pytest.mark.parametrize(("world_size", "stage"), [(1, 2), *LONG])
def test_a_run_on_a_task_survives_a_fault_in_each_of_its_parts(start, tmp_path, world_size, stage):
    """Signals, kills, a full disk and a damaged checkpoint, one after the other; the end is that of an unbroken run."""
    whole, run = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    unbroken = start(whole, world_size=world_size, stage=stage)

    def job() -> Job:
        return start(run, world_size=world_size, stage=stage)

    now = job()
    wait_for_steps(now, run.parent, "fine-tuning")
    stop(now, signal.SIGTERM)
    assert "of 30 steps are done and saved" in now.output(0)
    assert len(list(teacher_of(run).glob("1-fine-tuning/checkpoints/step-*"))) == 1
    fill_disk(job(), run)
    now = job()
    wait_for_signals(now)
    now.kill()
    now = job()
    wait_for_signals(now)
    stop(now, signal.SIGUSR1)
    assert not (run / "1-intermediate" / "metrics.jsonl").exists() or "0 of 30 steps" in now.output(0)
    now = job()
    wait_for_steps(now, run.parent, "intermediate")
    now.kill()
    (damaged,) = (run / "1-intermediate" / "checkpoints").glob("step-*")
    flip_a_bit(damaged)
    now = job()
    wait_for_steps(now, run.parent, "prediction")
    assert f"{damaged.name}: student.safetensors has changed" in now.output(0)
    assert "going back to the beginning" in now.output(0)
    stop(now, signal.SIGTERM)
    assert "of 30 steps are done and saved" in now.output(0)
    now = job()
    assert now.codes() == [0] * world_size, now.tails()
    assert "resumed at step" in now.output(0)
    assert unbroken.codes() == [0] * world_size, unbroken.tails()
    assert_same_models(whole, run)


@pytest.mark.slow
def test_jobs_that_want_the_same_teacher_wait_for_each_other_but_not_for_the_dead(start, tmp_path):
    """The second job is stopped while it waits, started again, and goes on with the teacher of a killed first."""
    runs = [tmp_path / "shared" / name for name in ("one", "other")]
    first = start(runs[0])
    wait_for_steps(first, runs[0].parent, "fine-tuning")
    first.processes[0].send_signal(signal.SIGSTOP)  # holds the lock
    second = start(runs[1], "faults.hang_timeout_s=2")
    second.wait_until(lambda: "waiting for another job" in second.output(0))
    time.sleep(3)  # longer than a rank may do one thing
    stop(second, signal.SIGTERM)
    assert "stopped while waiting for another job" in second.output(0)
    assert not runs[1].exists()
    second = start(runs[1])
    second.wait_until(lambda: "waiting for another job" in second.output(0))
    first.kill()
    second.wait_until(lambda: "resumed at step" in second.output(0))
    first = start(runs[0])
    first.wait_until(lambda: "waiting for another job" in first.output(0))
    assert second.codes() == [0], second.tails()
    assert first.codes() == [0], first.tails()
    assert "stage fine-tuning" not in first.output(0)
    assert_same_models(*runs)
