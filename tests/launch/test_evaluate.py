"""Speed and size, measured and written into the model card."""

import json
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from dsdistill.evaluate import BEGIN, END, evaluate, write_card
from dsdistill.speed import MOST_CALLS, WARM_UP, measure, seconds_of_calls
from tests.workers import ROOT

CARD = "---\nlibrary_name: transformers\n---\n# Mine\n\nText.\n\n## Recipe\n\n```yaml\nname: x\n```\n"


@pytest.fixture
def run_directory(tmp_path, teacher_directory):
    """A finished run of a one-layer student with a task's head."""
    config = BertConfig(
        vocab_size=150,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=3,
    )
    run = tmp_path / "run"
    BertForSequenceClassification(config).save_pretrained(run / "model")
    (run / "model" / "README.md").write_text(CARD)
    (run / "recipe.yaml").write_text(yaml.safe_dump({"teacher": {"model": str(teacher_directory), "cache": "none"}}))
    return run


@pytest.fixture
def command(monkeypatch):
    """The script's `main` in this process: exit code for some arguments."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "launch" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        return module.main()

    return call


def test_the_card_gets_one_table_however_often_it_is_measured(command, capsys, run_directory):
    model = run_directory / "model"
    short = ("--lengths", "8", "16", "--batches", "1", "4", "--device", "cpu", "--seconds", "0")
    assert command(run_directory, *short) == 0
    table = capsys.readouterr().out.strip()
    card = (model / "README.md").read_text()
    assert card == CARD.replace("\n## Recipe", f"\n{BEGIN}\n## Speed and size\n\n{table}\n{END}\n\n## Recipe")

    assert command(model, "--lengths", "8", "--batches", "1", "--device", "cpu", "--seconds", "0") == 0
    assert (model / "README.md").read_text().count(BEGIN) == 1
    assert "teacher" not in (model / "README.md").read_text(), "a model by itself has none"
    assert "| speed-up |" in table


def test_sizes_are_those_of_the_files_and_timings_agree_with_each_other(run_directory, teacher_directory):
    cpu = torch.device("cpu")
    table = evaluate(str(run_directory), teacher=None, lengths=[8, 16], batches=[1, 4], devices=[cpu], budget_s=0)
    measured = json.loads((run_directory / "model" / "speed.json").read_text())
    for who, directory in (("student", run_directory / "model"), ("teacher", teacher_directory)):
        file = directory / "model.safetensors"
        numbers = sum(tensor.numel() for tensor in load_file(file).values())
        assert (measured[who]["parameters"], measured[who]["bytes"]) == (numbers, file.stat().st_size)
        assert f"{numbers:,}" in table
        timings = measured[who]["timings"]
        assert [(t["batch"], t["length"]) for t in timings] == [(1, 8), (1, 16), (4, 8), (4, 16)]
        for t in timings:
            assert t["rows_per_s"] == pytest.approx(1000 * t["batch"] / t["median_ms"])
            assert 0 < t["median_ms"] <= t["p90_ms"]
            assert (t["device"], t["dtype"], t["threads"]) == ("cpu", "float32", torch.get_num_threads())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "model '/nowhere' cannot be read"),
        (["RUN", "--teacher", "package:nothing_here"], "package 'nothing_here' is not installed"),
        (["RUN", "--lengths", "65"], "takes rows of at most 64 tokens, not 65"),
        (["RUN", "--batches", "0"], "must be at least 1"),
    ],
)
def test_bad_input_ends_with_code_2_and_a_sentence(command, capsys, run_directory, arguments, message):
    filled = [str(run_directory) if argument == "RUN" else argument for argument in arguments]
    assert command(*filled, "--device", "cpu", "--seconds", "0") == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert message in text
    assert (run_directory / "model" / "README.md").read_text() == CARD


def test_a_run_without_an_export_is_refused(command, capsys, run_directory):
    (run_directory / "model" / "config.json").unlink()
    assert command(run_directory) == 2
    assert "without an exported model/" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_told(command, capsys, run_directory):
    assert command(run_directory, "--device", "cuda") == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_a_card_without_a_recipe_or_no_card_gets_the_table_last(tmp_path):
    card = tmp_path / "README.md"
    write_card(card, "one \\1")
    assert card.read_text() == f"{BEGIN}\n## Speed and size\n\none \\1\n{END}\n"
    card.write_text("# Mine\n")
    write_card(card, "one")
    write_card(card, "two \\1")
    assert card.read_text() == f"# Mine\n\n{BEGIN}\n## Speed and size\n\ntwo \\1\n{END}\n"


def test_calls_are_timed_one_by_one_after_a_warm_up():
    calls = []

    def call():
        calls.append(None)
        time.sleep(0.004 if len(calls) > WARM_UP else 0.1)

    seconds = seconds_of_calls(call, torch.device("cpu"), budget_s=0.05)
    assert len(calls) == len(seconds) + WARM_UP
    assert 5 <= len(seconds) <= 13
    assert min(seconds) >= 0.004
    assert sorted(seconds)[len(seconds) // 2] < 0.05, "the warm-up is not timed"
    assert len(seconds_of_calls(lambda: None, torch.device("cpu"), budget_s=5.0)) == MOST_CALLS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed_in_half_precision(run_directory):
    model = BertForSequenceClassification.from_pretrained(run_directory / "model").bert
    (timing,) = measure(model, torch.device("cuda"), lengths=[16], batches=[4], budget_s=0.1)
    assert (timing.device, timing.dtype, timing.threads) == (torch.cuda.get_device_name(), "float16", 0)
