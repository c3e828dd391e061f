"""A whole grid as in CI: teachers fine-tuned, students distilled and scored, killed once, the table computed apart."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from tests.compare.test_table import first_table
from tests.conftest import WORDS
from tests.workers import ROOT


def write_task(directory: Path, name: str, rows: dict[str, int]) -> dict:
    """A task on made-up sentences, which a model can learn: is `good` in it, or what share of its words is `good`?"""
    draw = random.Random(name)
    for split, count in rows.items():
        with (directory / f"{name}_{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            for _ in range(count):
                words = draw.choices([word for word in WORDS if word != "good"], k=draw.randint(4, 12))
                words += ["good"] * draw.choice([0, 1, 3]) + ["bad"] * draw.choice([0, 1, 3])
                share = words.count("good") / len(words)
                table.writerow([" ".join(words), share if name == "share" else "with" if share else "without"])
    files = {f"data.{split}": str(directory / f"{name}_{split}.csv") for split in rows}
    return {"task": name, "data.problem": "regression" if name == "share" else "classification", **files}


@pytest.fixture
def grid_file(tmp_path, teacher_directory) -> Path:
    """2 objectives x 2 tasks x 2 seeds."""
    optimization = {"epochs": 1, "global_batch": 16, "learning_rate": 0.001}
    prediction = [{"objective": "kd", "weight": 0.5}, {"objective": "task", "weight": 0.5}]
    content = {
        "name": "real",
        "source": "A test.",
        "output": str(tmp_path / "grid"),
        "ds_config": str(ROOT / "ds_configs" / "zero0.json"),
        "set": {
            "data": {"max_length": 32},
            "teacher": {
                "model": str(teacher_directory),
                "directory": "{grid}/teachers",
                "fine_tuning": {**optimization, "epochs": 3},
            },
            "student": {"num_layers": 2, "init": "lower"},
            "stages": [
                {"name": "intermediate", "objectives": [], "optimization": optimization},
                {"name": "prediction", "objectives": prediction, "optimization": optimization},
            ],
        },
        "axes": {
            "objective": {
                name: {"stages.0.objectives": [{"objective": name, "layers": "init"}]} for name in ("att_kl", "hid_seq")
            },
            "task": {name: write_task(tmp_path, name, {"train": 96, "dev": 32}) for name in ("praise", "share")},
            "seed": [0, 1],
        },
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def start():
    """Starts the grid; nothing is left running afterwards."""
    started = []

    def call(grid_file: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "compare.py"), "--grid", str(grid_file), "--jobs", "1"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()


@pytest.mark.multiprocess
def test_a_grid_of_two_tasks_two_objectives_and_two_seeds(start, grid_file, tmp_path):
    output = tmp_path / "grid"
    killed = start(grid_file)
    deadline = time.monotonic() + 120
    while not list(output.glob("cells/*/1-intermediate/metrics.jsonl")):
        assert killed.poll() is None, killed.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()

    done = start(grid_file)
    told = done.communicate(timeout=200)[0]
    assert done.returncode == 0, told[-3000:]
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["done"] * 8
    assert len({line["cell"] for line in lines}) == 8
    assert len(list(output.glob("teachers/*/results.json"))) == 2
    check_scores_against_predictions(lines)
    check_table(lines, (output / "table.md").read_text())
    for picture in ("scores.png", "score_by_speed.png"):
        assert (output / picture).stat().st_size > 10_000
    for line in lines:
        assert not list(Path(line["directory"]).rglob("*.safetensors"))


def check_scores_against_predictions(lines: list[dict]) -> None:
    """Scores by formula from the predictions that stay in the run directories."""
    for line in lines:
        with (Path(line["directory"]) / "predictions" / "dev.tsv").open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        assert len(rows) == 32
        labels, predictions = ([row[column] for row in rows] for column in ("label", "prediction"))
        if line["axes"]["task"] == "praise":
            agreed = np.mean([label == prediction for label, prediction in zip(labels, predictions, strict=True)])
            assert line["scores"]["dev"]["accuracy"] == pytest.approx(agreed)
        else:
            expected = stats.spearmanr(np.array(labels, float), np.array(predictions, float)).statistic
            assert line["scores"]["dev"]["spearman"] == pytest.approx(expected, nan_ok=True)


def check_table(lines: list[dict], page: str) -> None:
    assert "Equal budgets: all rows had the same number" in page
    assert "praise 12 steps, 192 rows; share 12 steps, 192 rows" in page
    for row in first_table(page, "## Scores")[:-2]:
        of_row = [line for line in lines if line["axes"]["objective"] == row["objective"]]
        scores = np.array(
            [
                [100 * line["scores"]["dev"][line["primary"]] for line in of_row if line["task"] == task]
                for task in ("praise", "share")
            ]
        )
        fields = [value for name, value in row.items() if name.partition(" ")[0] in ("praise", "share")]
        assert fields == [f"{values.mean():.2f} +- {values.std(ddof=1):.2f}" for values in scores]
        averages = scores.mean(axis=0)
        assert row["average"] == f"{averages.mean():.2f} +- {averages.std(ddof=1):.2f}"
