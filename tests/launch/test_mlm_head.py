"""A teacher without a masked-LM head gets one, and only then its logits can be learned."""

import importlib.util
import json
import signal
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from dsdistill.training.telemetry import read_metrics
from tests.faults.jobs import Job, assert_same_weights
from tests.workers import ROOT


@pytest.fixture
def headless_recipe(tmp_path, recipe_content, teacher_directory):
    """A headless teacher whose logits are wanted."""
    headless = tmp_path / "headless"
    AutoModel.from_pretrained(teacher_directory).save_pretrained(headless)
    AutoTokenizer.from_pretrained(teacher_directory).save_pretrained(headless)
    fit = {
        "steps": 30,
        "warmup_steps": 2,
        "global_batch": 8,
        "learning_rate": 0.01,
        "directory": str(tmp_path / "heads"),
    }
    recipe_content["teacher"] = {"model": str(headless), "mlm_head": fit}
    recipe_content["objectives"] = [{"objective": "kd"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def job(monkeypatch, tmp_path, headless_recipe):
    """The command: its exit code."""
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 8}))
    spec = importlib.util.spec_from_file_location("pretrain_distill", ROOT / "launch" / "pretrain_distill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*more: str) -> int:
        given = ["--ds_config", str(tmp_path / "ds.json"), "--recipe", str(headless_recipe)]
        monkeypatch.setattr(sys, "argv", ["pretrain_distill", *given, *more])
        return module.main()

    return call


def test_a_head_is_fitted_on_the_frozen_encoder_kept_and_bound_to_it(job, tmp_path, capsys):
    assert job() == 2
    assert (
        "has no masked-LM head, but an objective reads logits (kd, mlm): add --fit_mlm_head" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    assert job("--fit_mlm_head") == 0
    (fit,) = (tmp_path / "heads").glob("mlm-head-headless-*/")
    told = [e["held_out/mlm"] for e in read_metrics(fit / "metrics.jsonl") if e["kind"] == "held_out"]
    assert told[-1] < told[0] - 0.2
    encoder, fitted = (
        AutoModel.from_pretrained(tmp_path / "headless"),
        AutoModelForMaskedLM.from_pretrained(fit / "model"),
    )
    weights = fitted.bert.state_dict()
    assert all(torch.equal(tensor, weights[n]) for n, tensor in encoder.state_dict().items() if "pooler" not in n)
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    done = (fit / "metrics.jsonl").stat().st_mtime_ns
    assert job("--fit_mlm_head", "--set", f"output={tmp_path / 'second'}") == 0
    assert (fit / "metrics.jsonl").stat().st_mtime_ns == done
    changed = load_file(tmp_path / "headless" / "model.safetensors")
    changed["embeddings.word_embeddings.weight"][7] += 1.0
    save_file(changed, tmp_path / "headless" / "model.safetensors", metadata={"format": "pt"})
    assert job("--fit_mlm_head", "--set", f"output={tmp_path / 'third'}") == 2
    assert "was fitted to another encoder" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_a_head_that_only_the_config_claims_is_told_by_the_dry_run(job, tmp_path, capsys):
    """As of all-mpnet-base-v2, whose config is that of the model it was trained from."""
    config = json.loads((tmp_path / "headless" / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config))
    assert job("--dry_run") == 2
    assert "has no masked-LM head, but an objective reads logits" in capsys.readouterr().err
    assert job("--dry_run", "--fit_mlm_head") == 0
    assert "mlm-head" in capsys.readouterr().out
    assert job("--dry_run", "--set", "objectives=[{objective: hid_seq}]") == 0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_jobs_that_want_the_same_head_wait_for_each_other_but_not_for_the_dead(headless_recipe, tmp_path, warm):
    """The second goes on with the head of the killed first, which then finds it done; two processes each."""

    def start(name: str, *more: str) -> Job:
        settings = (f"output={tmp_path / name}", "teacher.mlm_head.steps=60", "logging.every_steps=1", *more)
        return Job(headless_recipe, *settings, world_size=2, warm=warm, flags=("--fit_mlm_head",))

    first = start("first")
    first.wait_until(lambda: "step 20/60  loss" in first.output(0))
    for process in first.processes:
        process.send_signal(signal.SIGSTOP)  # holds the lock
    second = start("second")
    second.wait_until(lambda: "waiting for another job" in second.output(0))
    assert "/60  loss" not in second.output(0)
    first.kill()
    second.wait_until(lambda: "resumed at step 15" in second.output(0))
    third = start("first")
    third.wait_until(lambda: "waiting for another job" in third.output(0))
    assert second.codes() == [0, 0], second.tails()
    assert third.codes() == [0, 0], third.tails()
    assert "/60  loss" not in third.output(0)
    assert_same_weights(tmp_path / "first", tmp_path / "second", 6)
    apart = start("apart", "teacher.placement=ranks", "teacher.ranks=1")  # the head is there
    assert apart.codes() == [0, 0], apart.tails()
    assert (tmp_path / "apart" / "model" / "config.json").is_file()


def test_a_head_is_not_fitted_while_processes_are_kept_apart(job, capsys):
    assert job("--fit_mlm_head", "--set", "teacher.placement=ranks", "--set", "teacher.ranks=1") == 2
    assert "teacher.placement=ranks keeps some apart" in capsys.readouterr().err
