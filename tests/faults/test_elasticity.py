"""A run moves: stopped on so many processes at one ZeRO stage, it goes on with others at another, on the same rows."""

import itertools
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from dsdistill.corpus.order import positions_to_rows
from dsdistill.corpus.store import Corpus
from tests.faults.jobs import TASK, Job
from tests.faults.test_kills import training_losses
from tests.faults.test_task_runs import stop, wait_for_steps
from tests.faults.warm import Warm
from tests.workers import ROOT

pytestmark = pytest.mark.multiprocess
STEPS = 40
ROWS = 12
"""Per step: divisible by one, two and three processes."""
TOLERANCE = 1e-5
"""Relative, of any step's loss: gradients are summed in another order."""


@pytest.fixture
def elastic_recipe(tmp_path, recipe_content) -> Path:
    """Without dropout, and without objectives that mean something else when a batch is cut elsewhere."""
    recipe_content["student"]["dropout"] = 0.0
    kept = [term for term in recipe_content["objectives"] if term["objective"] != "mlm"]
    records = {"objective": "tests.training.toy_objectives:records", "file": str(tmp_path / "rows")}
    recipe_content["objectives"] = [*kept, records]
    recipe_content["optimization"].update(global_batch=ROWS, steps=STEPS)
    recipe_content["evaluation"]["every_steps"] = recipe_content["checkpoint"]["every_steps"] = 1000
    recipe_content["logging"]["every_steps"] = 1
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_content))
    return path


def move(recipe: Path, run: Path, layouts: list[tuple[int, int | str]], warm: Warm | None) -> str:
    """Stop the run in each layout but the last after some steps; what the first process said."""
    said = ""
    for number, (world_size, stage) in enumerate(layouts):
        moved = Job(recipe, f"output={run}", world_size=world_size, stage=stage, warm=warm)
        if number < len(layouts) - 1:
            seen = STEPS * (number + 1) // (len(layouts) + 1)
            moved.wait_until(lambda moved=moved, seen=seen: max(moved.steps(run), default=0) >= seen)
            os.killpg(moved.processes[-1].pid, signal.SIGTERM)
            assert moved.codes() == [3] * world_size, moved.tails()
        else:
            assert not any(moved.codes()), moved.tails()
        said += moved.output(0)
    return said


def check_moves(recipe: Path, tmp_path: Path, layouts: list[tuple[int, int | str]], warm: Warm | None) -> None:
    """The moved run reads each row once, and its losses are those of a run that is where it ends from the start."""
    move(recipe, tmp_path / "unbroken", layouts[-1:], warm)
    rows = (tmp_path / "rows").rename(tmp_path / "unbroken-rows")
    said = move(recipe, tmp_path / "moved", layouts, warm)
    assert said.count("resumed at step") == len(layouts) - 1
    for (before, old), (now, new) in itertools.pairwise(layouts):
        assert before == now or f"it was saved with {before} process(es), now {now}" in said
        assert str(old)[0] == str(new)[0] or f"{str(old)[0]} as ZeRO stage, now {str(new)[0]}" in said
    whole, moved = (dict(training_losses(tmp_path / name)) for name in ("unbroken", "moved"))
    assert list(moved) == list(whole) == list(range(1, STEPS + 1))
    differences = [abs(moved[step] / whole[step] - 1) for step in whole]
    assert max(differences) < TOLERANCE, differences
    print(f"largest relative difference of a loss: {max(differences):.1e}")
    assert trained_rows(rows) == trained_rows(tmp_path / "rows") == rows_of_stream(recipe)


def trained_rows(record: Path) -> Counter[int]:
    """How often each row was trained on; lines of two are the probes at the start."""
    lines = [line.split() for line in record.read_text().splitlines()]
    return Counter(int(row) for line in lines if len(line) != 2 for row in line)


def rows_of_stream(recipe: Path) -> Counter[int]:
    content = yaml.safe_load(recipe.read_text())
    corpus = Corpus.open(Path(content["corpus"]["directory"]), "train")
    _, rows = positions_to_rows(np.arange(STEPS * ROWS), num_rows=corpus.num_rows, seed=content["seed"])
    return Counter(rows.tolist())


def test_a_run_goes_on_with_other_processes_at_another_stage(elastic_recipe, tmp_path, warm):
    check_moves(elastic_recipe, tmp_path, [(2, 3), (1, 0)], warm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [
        [(2, 2), (1, 3), (3, "2_offload"), (2, 0)],
        [(2, 2), (1, 2), (2, 2)],
        [(2, 3), (3, 3)],
        [(2, 1), (2, 2), (2, 3), (2, 0), (2, 1)],
        [(1, 0), (3, "3_offload"), (2, "2_offload"), (1, 1)],
    ],
)
def test_more_moves(elastic_recipe, tmp_path, warm, layouts):
    check_moves(elastic_recipe, tmp_path, layouts, warm)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_a_task_moves_in_each_of_its_parts(task_content, teacher_directory, tmp_path, warm):
    """In the teacher's fine-tuning, and in the first stage; rows are padded, so micro-batches stay what they are."""
    teacher = shutil.copytree(teacher_directory, tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (teacher / "config.json").write_text(json.dumps(config))
    task_content["teacher"]["model"] = str(teacher)
    task_content["student"]["dropout"] = 0.0
    task_content["logging"]["every_steps"] = 1
    for stage in task_content["stages"]:
        stage["optimization"] |= {"epochs": 4.0}
    recipe = tmp_path / "task.yaml"
    recipe.write_text(yaml.safe_dump(task_content))
    parts = ["fine-tuning", "intermediate", ""]
    runs = {"unbroken": [(2, "2", "")], "moved": list(zip((2, 1, 2), ("2", "3_offload", "0"), parts, strict=True))}
    for name, layouts in runs.items():
        for world_size, stage, part in layouts:
            where = (f"output={tmp_path / name / 'run'}", f"teacher.directory={tmp_path / name / 'teachers'}")
            json_file = small_batches(stage, tmp_path)
            job = Job(recipe, *where, script=TASK, world_size=world_size, stage=str(json_file), warm=warm)
            if part:
                wait_for_steps(job, tmp_path / name, part)
                stop(job, signal.SIGTERM)
            else:
                assert not any(job.codes()), job.tails()
    one, other = (load_file(tmp_path / name / "run" / "model" / "model.safetensors") for name in runs)
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4
    assert (tmp_path / "unbroken/run/predictions/dev.tsv").exists()


def small_batches(stage: str, directory: Path) -> Path:
    """A shipped JSON with eight rows at once."""
    content = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    path = directory / f"zero{stage}.json"
    path.write_text(json.dumps(content | {"train_micro_batch_size_per_gpu": 8}))
    return path
