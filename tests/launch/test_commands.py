"""Every command: help at once, with groups, defaults, examples that work and exit codes; what is wrong ends with 2."""

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest

from dsdistill.command import exit_code
from dsdistill.compare.grid import make_grid, read_grid
from dsdistill.config.deepspeed import read_deepspeed_json
from dsdistill.config.recipe import read_recipe, read_task_recipe
from dsdistill.training.signals import StoppedError
from dsdistill.training.watchdog import LostRankError
from tests.workers import ROOT

COMMANDS = sorted(path.stem for path in (ROOT / "launch").glob("*.py"))
RESUMABLE = {"compare", "prepare_corpus", "pretrain_distill", "task_distill"}
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "numpy")


def parser_of(name: str) -> argparse.ArgumentParser:
    return importlib.import_module(f"launch.{name}").parser()


def examples_of(name: str) -> list[list[str]]:
    """Words of each example, from the help as a person reads it."""
    shown = parser_of(name).format_help()
    text = re.search(r"^examples:\n(.*?)\n\nexit codes:", shown, re.DOTALL | re.MULTILINE)[1]
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


def test_help_imports_nothing_that_takes_long():
    code = (
        "import importlib, json, sys\n"
        f"for name in {COMMANDS!r}: importlib.import_module('launch.' + name).parser().format_help()\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & set(HEAVY)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_have_a_group_and_show_their_defaults(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    parser = parser_of(name)
    groups = [group for group in parser._action_groups[2:] if group._group_actions]
    grouped = {action.dest for group in groups for action in group._group_actions}
    shown = parser.format_help()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or action.dest == "help":
            continue
        assert action.dest in grouped
        assert action.help
        line = next(line for line in shown.splitlines() if action.help.replace("%%", "%") in line)
        assert ("(default: " in line) == (action.default not in (None, False, [])), line
    for group in groups:
        assert f"\n{group.title}:\n" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_exit_codes_are_documented(name):
    shown = parser_of(name).format_help().partition("exit codes:\n")[2]
    codes = [int(code) for code in re.findall(r"^  (\d+) ", shown, re.MULTILINE)]
    assert codes == [0, 1, 2, 3 if name in RESUMABLE else 130]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_two_or_more_and_are_understood(name):
    examples = examples_of(name)
    assert len(examples) >= 2
    for words in examples:
        at = words.index(f"launch/{name}.py")
        assert words[0] in ("python", "deepspeed")
        arguments = parser_of(name).parse_args(words[at + 1 :])
        for word in words[at:]:
            assert not word.startswith(("launch/", "ds_configs/")) or (ROOT / word).is_file(), word
        if name in ("pretrain_distill", "task_distill"):
            read = read_recipe if name == "pretrain_distill" else read_task_recipe
            read(ROOT / arguments.recipe, arguments.set)
            read_deepspeed_json(ROOT / arguments.ds_config)
        if name == "compare":
            settings = read_grid(ROOT / arguments.grid, output=arguments.output, axes=arguments.axis)
            assert make_grid(settings, arguments.set).cells


BAD = {
    "compare": ["--grid", "{there}/none.yaml"],
    "evaluate": ["{there}/none"],
    "export_student": ["{there}/none"],
    "prepare_corpus": ["--input", "{there}/none.txt", "--tokenizer", "{there}/none", "--output", "{there}/out"],
    "pretrain_distill": ["--ds_config", "{there}/none.json"],
    "report": ["{there}/none"],
    "task_distill": ["--ds_config", "{there}/none.json", "--recipe", "{there}/none.yaml"],
    "train_tokenizer": [
        *("--input", "{there}/none.txt", "--like", "{there}/none", "--output", "{there}/out"),
        *("--kind", "bpe", "--vocab_size", "100"),
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_arguments_end_with_2_and_a_sentence(name, capsys):
    with pytest.raises(SystemExit) as ended:
        parser_of(name).parse_args(["--none"])
    assert ended.value.code == 2
    assert re.search(r"error: .+\n$", capsys.readouterr().err)


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_ends_with_2_and_a_sentence(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [name, *(word.format(there=tmp_path) for word in BAD[name])])
    assert importlib.import_module(f"launch.{name}").main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert str(tmp_path / "none") in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_a_fault(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["recipe_schema", "--output", str(tmp_path / "file" / "schemas")])
    assert importlib.import_module("launch.recipe_schema").main() == 1
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "resumable"),
    [
        (None, 0, 0),
        (ValueError("x"), 2, 2),
        (OSError("x"), 1, 1),
        (FloatingPointError("x"), 1, 1),
        (LostRankError("x"), 1, 1),
        (StoppedError("x"), 3, 3),
        (KeyboardInterrupt(), 130, 3),
    ],
)
def test_errors_become_sentences_and_codes(error, code, resumable, capsys):
    def act() -> None:
        if error is not None:
            raise error

    assert (exit_code(act), exit_code(act, goes_on=True)) == (code, resumable)
    assert len(capsys.readouterr().err.splitlines()) == 2 * (error is not None)


def test_a_mistake_of_ours_is_not_hidden():
    def act() -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        exit_code(act)
