"""The main job as a person starts it: real launcher, real processes, real kills."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from dsdistill.training.dist import free_port
from tests.workers import ROOT

SCRIPT = ROOT / "launch" / "pretrain_distill.py"
JSONS = ROOT / "ds_configs"


def command(recipe_file: Path, *more: str, stage: int = 2) -> list[str]:
    return [str(SCRIPT), "--ds_config", str(JSONS / f"zero{stage}.json"), "--recipe", str(recipe_file), *more]


@pytest.mark.multiprocess
def test_the_deepspeed_command_on_two_processes_leaves_a_whole_run(recipe_file, tmp_path):
    launcher = Path(sys.executable).with_name("deepspeed")
    done = subprocess.run(
        [str(launcher), "--num_accelerators", "2", "--master_port", free_port(), *command(recipe_file)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{launcher.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "objective on held-out text" in done.stdout
    run = tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    batch = tokenizer(["a great film", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert AutoModel.from_pretrained(run / "model")(**batch).last_hidden_state.shape[-1] == 32
        logits = AutoModelForMaskedLM.from_pretrained(run / "model")(**batch).logits
    assert logits.shape[-1] == len(tokenizer)
    assert "dsdistill" not in (run / "model" / "config.json").read_text()
    assert (run / "model" / "README.md").read_text().startswith("---\n")
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    check_metrics(run)


def check_metrics(run: Path) -> None:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e["kind"] == "held_out"] == [0, 3, 6]
    last = [e for e in entries if e["kind"] == "train"][-1]
    for tag in (
        *("loss/total", "loss/minilmv2.query_query", "loss/att_kl", "loss/hid_seq", "loss/mlm"),
        *("optimization/learning_rate", "optimization/grad_norm", "optimization/loss_scale"),
        *("optimization/skipped_steps", "throughput/tokens_per_s", "time/data_s", "time/teacher_s"),
        *("time/student_s", "time/backward_s", "time/step_s"),
    ):
        assert last[tag] is not None, tag
    assert last["optimization/grad_norm"] > 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert {"loss/total", "held_out/total", "throughput/tokens_per_s"} <= set(tags)
    assert [event.step for event in events.Scalars("held_out/total")] == [0, 3, 6]


@pytest.fixture
def job(monkeypatch):
    """The script's `main` in this process: exit code for some arguments."""
    spec = importlib.util.spec_from_file_location("pretrain_distill", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", list(arguments))
        return module.main()

    return call


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("student.layers=3", "unknown key"),
        ("student.init=[1,2,3,4,5,6]", "names 6 layers for 2"),
        ("student.init=[1,9]", "outside 1..4"),
        ("student.overrides.hidden_siz=3", "'hidden_siz' is no config key of bert"),
        ("teacher.model=/nowhere", "cannot be read"),
        ("teacher.model=package:nothing_here", "package"),
        ("objectives.0.relation_heads=7", "relation_heads=7"),
        ("corpus.directory=/nowhere", "/nowhere"),
        ("masking.probability=0", "masking.probability is 0"),
    ],
)
def test_bad_input_ends_with_code_2_and_a_sentence(job, capsys, recipe_file, tmp_path, change, message):
    code = job(*command(recipe_file, "--set", change, "--dry_run"))
    text = capsys.readouterr()
    assert code == 2
    assert text.err.startswith("error: ")
    assert message in text.err
    assert not (tmp_path / "run").exists()


def test_problems_of_recipe_and_json_are_told_together(job, capsys, recipe_file, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimizaton": {"stage": 2}}')
    changes = ["--set", "student.layers=3", "--set", "seed=x", "--dry_run"]
    assert job("x", "--ds_config", str(tmp_path / "ds.json"), "--recipe", str(recipe_file), *changes) == 2
    text = capsys.readouterr().err
    for problem in ("zero_optimizaton", "student.layers", "seed"):
        assert problem in text


def test_problems_of_models_text_and_batches_are_told_together(job, capsys, recipe_file):
    changes = ("student.init=[9,1]", "corpus.directory=/nowhere", "optimization.global_batch=9")
    (recipe_file.parent / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 2}')
    arguments = ["x", "--ds_config", str(recipe_file.parent / "ds.json"), "--recipe", str(recipe_file), "--dry_run"]
    assert job(*arguments, *(part for change in changes for part in ("--set", change))) == 2
    text = capsys.readouterr().err
    for problem in ("outside 1..4", "/nowhere", "does not divide the 9 rows"):
        assert problem in text


def test_dry_run_prints_the_plan_and_writes_nothing(job, capsys, recipe_file, tmp_path):
    assert job(*command(recipe_file), "--dry_run") == 0
    text = capsys.readouterr().out
    assert "4 layers of the teacher run" in text
    assert "starting from teacher layers [2, 4]" in text
    assert "trains in float32 instead" in text or torch.cuda.is_available()
    assert not (tmp_path / "run").exists()
