"""The batch scripts on a real SLURM of two nodes, and where processes stand in its steps."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsdistill.training import dist
from dsdistill.training.dist import find_place, rendezvous
from tests.faults.jobs import assert_same_weights, patience
from tests.faults.test_kills import training_losses
from tests.launch.slurm import Cluster, why_not
from tests.workers import ROOT

SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
STEPS = 200
TASK = {
    "DS_ACCELERATOR": "cpu",
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "n[2-3]",
}


@pytest.fixture(autouse=True)
def hosts(monkeypatch):
    monkeypatch.setattr(dist, "_first_host", lambda nodes: {"n[2-3]": "n2"}[nodes])


def test_a_task_of_a_step_is_a_rank():
    place = find_place(TASK)
    assert (place.rank, place.local_rank, place.world_size) == (3, 1, 4)
    told = rendezvous(place, TASK)
    assert told == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "n2",
        "MASTER_PORT": str(20000 + 2345 + 97),
    }


def test_what_is_set_wins_over_slurm():
    launched = {**TASK, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "7"}
    told = rendezvous(find_place(launched), launched)
    assert list(told.values()) == ["0", "0", "2", "h", "7"]


def test_a_batch_script_is_no_rank():
    batch = {name: value for name, value in TASK.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    place = find_place(batch)
    assert (place.rank, place.world_size) == (0, 1)
    assert rendezvous(place, batch)["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "launch/slurm/steps.sh"], ids=lambda p: p.name)
def test_scripts_are_bash_and_name_no_site(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", "-s", "bash", script], check=True, cwd=ROOT)
    text = script.read_text()
    assert not re.search(r"#SBATCH.*--(partition|account|qos|constraint|reservation|nodelist)", text)
    assert not re.search(r"\bssh\b", text) or script.stem == "tensorboard"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_tasks_of_a_real_step_on_two_nodes_are_four_ranks(cluster, tmp_path, monkeypatch):
    """The variables are SLURM's own; a batch script has some of them too."""
    monkeypatch.setattr(
        dist, "_first_host", lambda nodes: cluster.run("scontrol", "show", "hostnames", nodes).split()[0]
    )
    told = [sys.executable, "-S", "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    options = ("--nodes=2", "--ntasks-per-node=2", f"--output={tmp_path}/%t.json")
    cluster.run("srun", *options, *told, DS_ACCELERATOR="cpu")
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(4)]
    tasks = [{k: v for k, v in task.items() if k.startswith(("SLURM", "DS_"))} for task in found]
    places = [find_place(task) for task in tasks]
    assert [(p.rank, p.local_rank, p.world_size) for p in places] == [(0, 0, 4), (1, 1, 4), (2, 0, 4), (3, 1, 4)]
    meeting = {tuple(rendezvous(p, t).values())[3:] for p, t in zip(places, tasks, strict=True)}
    assert len(meeting) == 1
    assert meeting.pop()[0] == "n1"


@pytest.fixture
def pretrain(cluster, recipe_file, tmp_path):
    """Submits `pretrain.sbatch` on two nodes with a task on each, and gives the job's number."""

    def submit(run: str, *options: str, **variables: str) -> str:
        arguments = f"--set optimization.steps={STEPS} --set checkpoint.every_steps=1000 --set logging.every_steps=1"
        arguments += " --set evaluation.every_steps=1000"
        return cluster.submit(
            *("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/{run}.log", *options),
            "launch/slurm/pretrain.sbatch",
            RECIPE=str(recipe_file),
            OUTPUT=str(tmp_path / run),
            ARGS=arguments,
            PYTHON=sys.executable,
            DS_ACCELERATOR="cpu",
            **variables,
        )

    return submit


def text_of(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def wait_for_step(cluster: Cluster, job: str, log: Path, step: int) -> None:
    def happened() -> bool:
        assert cluster.field(job, "JobState") in ("PENDING", "RUNNING", "COMPLETING"), text_of(log)
        return max((int(n) for n in re.findall(rf"step (\d+)/{STEPS}  loss", text_of(log))), default=0) >= step

    cluster.wait_until(happened, f"step {step}", patience(120))


def wait_for_start(cluster: Cluster, job: str, restarts: int) -> None:
    """Of the attempt after so many restarts, with its step."""

    def happened() -> bool:
        steps = cluster.run("squeue", "--noheader", "--steps", "--jobs", job)
        return cluster.field(job, "Restarts") == str(restarts) and f"{job}.0" in steps

    cluster.wait_until(happened, f"restart {restarts}", patience(120))


def wait_for_end(cluster: Cluster, job: str) -> str:
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    cluster.wait_until(lambda: cluster.field(job, "JobState") in ended, "end of the job", patience(200))
    return cluster.field(job, "JobState")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(1500)
def test_a_job_on_two_nodes_that_is_stopped_and_requeued_trains_what_an_unbroken_one_does(cluster, pretrain, tmp_path):
    """Twice before its time limit (USR1 to the step, as --signal sends it), twice preempted (TERM, then requeued)."""
    whole, broken, log = pretrain("whole"), pretrain("broken"), tmp_path / "broken.log"
    for number, preempted in enumerate([False, True, True, False]):
        wait_for_start(cluster, broken, number)
        wait_for_step(cluster, broken, log, 40 * number + 5)
        command = ("scontrol", "requeue", broken) if preempted else ("scancel", "--signal=USR1", broken)
        assert not cluster.run(*command)
    assert [wait_for_end(cluster, job) for job in (whole, broken)] == ["COMPLETED"] * 2, text_of(log)
    assert cluster.field(broken, "Restarts") == "4"
    said = text_of(log)
    assert said.count("resumed at step") == 4, said
    assert said.count("are done and saved") >= 4
    assert "2 process(es)" in said
    assert_same_weights(tmp_path / "whole", tmp_path / "broken", STEPS)
    losses = training_losses(tmp_path / "broken")
    assert losses == training_losses(tmp_path / "whole")
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_cancelled_job_is_saved_and_not_requeued(cluster, pretrain, tmp_path):
    job = pretrain("run")
    wait_for_step(cluster, job, tmp_path / "run.log", 3)
    cluster.run("scancel", job)
    assert wait_for_end(cluster, job) == "CANCELLED"
    cluster.wait_until(lambda: "are done and saved" in text_of(tmp_path / "run.log"), "saved step", 30)
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
@pytest.mark.multiprocess
def test_signals_that_come_before_the_first_step_do_not_requeue_for_ever(cluster, pretrain, tmp_path):
    job = pretrain("run", FRUITLESS="2")
    for number in range(2):
        wait_for_start(cluster, job, number)
        cluster.run("scancel", "--signal=USR1", job)
    assert wait_for_end(cluster, job) == "FAILED"
    assert "stopped 2 times in a row before a step was saved" in text_of(tmp_path / "run.log")
    assert not list((tmp_path / "run").rglob("step-*"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_bad_recipe_ends_the_job_with_its_reason(cluster, pretrain, tmp_path):
    job = pretrain("run", DS_CONFIG="nowhere.json")
    assert wait_for_end(cluster, job) == "FAILED"
    assert cluster.field(job, "ExitCode") == "2:0"
    assert "nowhere.json cannot be read" in text_of(tmp_path / "run.log")


@pytest.fixture
def stopped_once(tmp_path) -> Path:
    """Stands for a Python whose every job says that it was asked to stop at first, and is done the second time."""
    path = tmp_path / "python"
    job = "${SLURM_ARRAY_TASK_ID:-0}"
    path.write_text(
        f'#!/bin/bash\necho "told: $*"\n[[ -e {tmp_path}/{job} ]] || {{ touch {tmp_path}/{job}; exit 3; }}\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "variables", "told"),
    [
        ("task_array", ("--array=0-1",), {"GRID": "g.yaml", "OFFSET": "7"}, "--grid g.yaml --cell {7}"),
        ("task_array", (), {"GRID": "g.yaml", "STEP": "report"}, "--grid g.yaml --report"),
        ("prepare_corpus", (), {"INPUT": "a b", "TOKENIZER": "t", "OUTPUT": "o"}, "--input a b --tokenizer t"),
    ],
)
def test_other_jobs_that_are_stopped_come_back(cluster, stopped_once, tmp_path, script, options, variables, told):
    log = tmp_path / "job-%a.log" if options else tmp_path / "job-0.log"
    job = cluster.submit(
        *(f"--output={log}", "--cpus-per-task=1", *options, f"launch/slurm/{script}.sbatch"),
        **{"PYTHON": str(stopped_once), **variables},
    )
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader", "--jobs", job).strip(), "end", patience(90))
    for number in range(2 if options else 1):
        said = text_of(tmp_path / f"job-{number}.log")
        assert said.count(told.replace("{7}", str(7 + number))) == 2, said


@pytest.mark.slow
@pytest.mark.multiprocess
def test_tensorboard_answers_on_the_loopback_and_says_how_to_reach_it(cluster, tmp_path):
    variables = {"LOGDIR": str(tmp_path), "PYTHON": sys.executable, "LOGIN": "login.example.org", "USER": "me"}
    log = tmp_path / "job.log"
    job = cluster.submit(f"--output={log}", "launch/slurm/tensorboard.sbatch", **variables)
    cluster.wait_until(lambda: "Press CTRL+C to quit" in text_of(log), "TensorBoard", patience(90))
    (port,) = re.findall(r"ssh -N -L (\d+):127\.0\.0\.1:\1 -J me@login\.example\.org me@n1", text_of(log))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
        assert answer.status == 200
    cluster.run("scancel", job)
    assert wait_for_end(cluster, job) == "CANCELLED"
