"""Runs on a task with real processes: what they leave, that they go on exactly, and what they refuse."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sklearn.metrics import matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dsdistill.training.telemetry import read_metrics
from tests.task.conftest import sentences
from tests.task.task_workers import RECIPES
from tests.workers import ROOT, run_workers

WORKERS = "tests.task.task_workers"
SCRIPT = ROOT / "launch" / "task_distill.py"
pytestmark = pytest.mark.multiprocess


def columns(path) -> dict[str, list[str]]:
    header, *lines = [line.split("\t") for line in path.read_text().splitlines()]
    return dict(zip(header, zip(*lines, strict=True), strict=True))


def test_a_run_on_two_processes_is_whole_at_zero_0_and_3(task_content, tmp_path):
    task_content["logging"] |= {"pictures": 6, "sentences": ["a good film"]}
    run_workers(f"{WORKERS}:run_all", 2, content=task_content, stages=[0, 3])
    runs = [tmp_path / f"run-{stage}" for stage in (0, 3)]
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    assert results[0]["scores"]["dev"]["matthews"] == pytest.approx(results[1]["scores"]["dev"]["matthews"], abs=1e-6)
    told, run = results[0], runs[0]
    assert told["scores"].keys() == told["baseline"].keys() == told["teacher_scores"].keys() == {"dev"}
    assert told["teacher_scores"]["dev"]["matthews"] > 0.5
    assert told["baseline"]["dev"]["matthews"] == 0
    assert told["training"]["steps"] == 12
    assert told["training"]["rows"] == 192
    predictions = columns(run / "predictions" / "dev.tsv")
    assert matthews_corrcoef(predictions["label"], predictions["prediction"]) == pytest.approx(
        told["scores"]["dev"]["matthews"], abs=1e-9
    )
    check_export(run, predictions)
    submission = columns(run / "submission" / "CoLA.tsv")
    assert submission["index"] == tuple(map(str, range(11)))
    assert set(submission["prediction"]) <= {"0", "1"}
    # one teacher for both runs, whose scores the last line of its metrics tells too
    (teacher,) = [p for p in (tmp_path / "teachers").iterdir() if p.name.startswith("cola-") and p.is_dir()]
    entries = read_metrics(teacher / "1-fine-tuning" / "metrics.jsonl")
    assert [e for e in entries if e["kind"] == "held_out"][-1]["score/dev/matthews"] == pytest.approx(
        told["teacher_scores"]["dev"]["matthews"], abs=1e-6
    )
    assert "dev matthews" in (run / "model" / "README.md").read_text()
    # pictures of both models, also where the teacher's logits came from disk; of the student alone where it is nobody's
    for stage in (
        *(run / name for run in runs for name in ("1-intermediate", "2-prediction")),
        teacher / "1-fine-tuning",
    ):
        drawn = sorted(path.name for path in stage.glob("pictures/*"))
        assert drawn == ["attention_1.png", *(["layers.png"] if stage.parent in runs else [])], stage


def check_export(run, predictions) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    assert model.config.id2label == {0: "unacceptable", 1: "acceptable"}
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    texts = [text for text, _ in sentences(37, 1)]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.numpy()
    told = np.array([predictions[f"output {name}"] for name in ("unacceptable", "acceptable")], float).T
    np.testing.assert_allclose(logits, told, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_stopped_in_both_stages_a_run_ends_with_the_same_weights(task_content, world_size):
    run_workers(f"{WORKERS}:check_resume", world_size, content=task_content, stages=[0, 2])


@pytest.mark.slow
def test_cached_signals_train_the_same_student(task_content):
    run_workers(f"{WORKERS}:check_caches", 1, content=task_content)


@pytest.mark.slow
def test_a_student_learns_the_same_wherever_its_teacher_lives(task_content, tmp_path):
    alone = [{"placement": name} for name in ("resident", "cpu", "zero3")]
    run_workers(f"{WORKERS}:run_placements", 2, content=task_content, placements=alone)
    beside = [{"placement": "ranks", "ranks": 1}]
    run_workers(f"{WORKERS}:run_placements", 3, content=task_content, placements=beside)
    weights = {
        name: load_file(tmp_path / f"run-{name}" / "model" / "model.safetensors")
        for name in ("resident", "cpu", "zero3", "ranks")
    }
    for name, tensors in weights.items():
        assert all(torch.equal(tensors[key], value) for key, value in weights["resident"].items()), name


REGRESSIONS = [path.stem for path in RECIPES.glob("*.yaml") if path.stem != "hid_cls_contrast"]  # which has none


@pytest.mark.parametrize(
    "regressions", [["att_kl", "vanilla_kd"], pytest.param(REGRESSIONS, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_every_shipped_recipe_and_kind_of_task_runs(regressions, task_content, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for split, seed in (("train", 3), ("dev", 4)):
        rows = [{"text": text, "label": ["good"] * label + ["any"]} for text, label in sentences(40, seed)]
        (own / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        lines = ["text,label", *(f"{text},{label}" for text, label in sentences(40, seed))]
        (own / f"{split}.csv").write_text("\n".join(lines) + "\n")
    task_content["own"] = {
        "several": {
            "train": f"{own}/train.jsonl",
            "dev": f"{own}/dev.jsonl",
            "problem": "multi_label",
            "max_length": 32,
        },
        "yes-no": {"train": f"{own}/train.csv", "dev": f"{own}/dev.csv", "max_length": 32},
    }
    shipped = str(tmp_path / "shipped")
    run_workers(f"{WORKERS}:run_recipes", 1, content=task_content, output=shipped, regressions=regressions)
    assert json.loads((tmp_path / "run-several" / "results.json").read_text())["primary"] == "f1_micro"
    augmented = json.loads((tmp_path / "run-augmented" / "results.json").read_text())
    assert augmented["training"]["rows"] == 2 * round(40 * 3 / 16) * 16
    assert augmented["teacher_signals"]["rows"] == 120
    found = {
        path.parent.parent.name + "/" + path.parent.name
        for task in ("cola", "stsb")
        for path in (tmp_path / "shipped" / task).glob("*/results.json")
    }
    assert found == {*(f"cola/{path.stem}" for path in RECIPES.glob("*.yaml")), *(f"stsb/{x}" for x in regressions)}


def job(content: dict, tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 0}}')
    command = [sys.executable, str(SCRIPT), "--ds_config", str(tmp_path / "ds.json"), "--recipe"]
    return subprocess.run(
        [*command, str(tmp_path / "recipe.yaml"), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.slow
def test_the_command_refuses_signals_of_another_teacher_and_tells_what_is_done(task_content, tmp_path):
    """One changed weight of the teacher, and a run that is done and is started again."""
    task_content["teacher"]["cache"] = "all"
    done = job(task_content, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "computed once" in done.stdout
    again = job(task_content, tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]
    assert "step" not in again.stderr
    exporter = [sys.executable, str(ROOT / "launch" / "export_student.py"), str(tmp_path / "run")]
    subprocess.run([*exporter, "--output", str(tmp_path / "again")], cwd=ROOT, check=True, timeout=120)
    exports = [load_file(path / "model.safetensors") for path in (tmp_path / "again", tmp_path / "run" / "model")]
    assert all(torch.equal(value, exports[1][name]) for name, value in exports[0].items())
    (weights,) = (tmp_path / "teachers").glob("cola-*/model/model.safetensors")
    changed = load_file(weights)
    name = next(name for name, value in changed.items() if value.ndim == 2)
    changed[name][0, 0] += 1e-3
    save_file(changed, weights, metadata={"format": "pt"})
    task_content["output"] = str(tmp_path / "other")
    refused = job(task_content, tmp_path)
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert "made with another teacher" in refused.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["task=nothing", "data.directory=null"], "is none of GLUE's tasks"),
        (["data.directory=/nowhere", "student.init=[1,9]"], "/nowhere"),
        (["data.directory=/nowhere", "student.init=[1,9]"], "outside 1..4"),
        (["data.max_length=65"], "takes 64 tokens"),
        (["student.init=[1,9]"], "outside 1..4"),
        (["stages.0.objectives.0.layer=last"], "stages[0].objectives[0].layer: unknown key (did you mean 'layers'?)"),
        (["stages.1.name=intermediate"], "appears twice"),
        (["stages.1.optimization.epoch=3"], "unknown key (did you mean 'epochs'?)"),
        (["task=stsb", "stages.1.objectives.0.divergence=reverse"], "is for classes"),
        (["stages.1.objectives.1.objective=mlm"], "mlm needs masked text"),
        (["student.init=upper", "student.num_layers=9"], "at least as deep"),
        (
            [*(f"stages.{i}.objectives=[{{objective: task}}]" for i in (0, 1)), "data.augment={copies: 2}"],
            "no objective asks one",
        ),
    ],
)
def test_bad_input_ends_with_code_2_and_a_sentence(task_content, tmp_path, monkeypatch, capsys, changes, message):
    import importlib.util

    spec = importlib.util.spec_from_file_location("task_distill_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(task_content))
    (tmp_path / "ds.json").write_text("{}")
    arguments = ["x", "--ds_config", str(tmp_path / "ds.json"), "--recipe", str(tmp_path / "recipe.yaml"), "--dry_run"]
    monkeypatch.setattr(sys, "argv", [*arguments, *(part for change in changes for part in ("--set", change))])
    code = module.main()
    shown = capsys.readouterr()
    assert code == 2, shown.err
    assert message in shown.err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "teachers").exists()
