"""Every command of the README and the guides is one that its program takes, with files and keys that are there.

Runs are planned (with their memory and hours where a page says --dry_run), text is prepared and tokenizers are trained
for real, all in this process. `test_commands_for_real.py` runs the same commands as they stand.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsdistill.config.deepspeed import read_deepspeed_json
from dsdistill.config.recipe import check_recipe, check_task_recipe, read_recipe, read_settings, read_task_recipe
from dsdistill.models.loading import load_config
from dsdistill.models.student import student_config
from dsdistill.plan import make_plan
from dsdistill.task_distill import prepare as prepare_task
from dsdistill.training.dist import find_place
from tests.docs.blocks import Block, Command, blocks, commands, guides
from tests.docs.stand_ins import TEACHER, shorten_grid, workspace
from tests.workers import ROOT

TRAINING = ("pretrain_distill", "task_distill")
STUBS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "python": 'printf "%s\\n" "$@" >"$TOLD"',
}
"""Programs that batch scripts call, in bash."""


class ParsedError(Exception):
    """Carries what a parser accepted."""


class Reader:
    """Follows the guides in a workspace, without training anything.

    Attributes:
        root: The workspace, which is the working directory.
        patch: Undone after the test.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch):
        self.root, self.patch = root, patch

    def follow(self, page: str) -> None:
        """Check every block of a page, in order."""
        for block in blocks(page, self.root):
            if block.language == "sh":
                for command in commands(block):
                    self.check(command)
            elif block.language == "python":
                self.check_python(block)
            elif block.language == "yaml":
                check_yaml(block)

    def check(self, command: Command) -> None:
        """One command.

        Raises:
            AssertionError: Naming page and line, if it cannot work.
        """
        program, *arguments = command.words
        known = {
            "source": self.source,
            "bash": self.shell,
            "make": self.make,
            "python": self.python,
            "deepspeed": self.deepspeed,
            "tensorboard": self.tensorboard,
            "sbatch": self.sbatch,
        }
        assert program in known, f"{command.place}: nothing is known of {program!r}; teach this test to check it"
        try:
            known[program](arguments, command.variables)
        except (AssertionError, SystemExit) as error:
            raise AssertionError(f"{command.place}: {command.text}\n{error}") from error

    def files(self, arguments: list[str], variables: dict[str, str]) -> None:
        for path in arguments:
            assert Path(path).exists(), f"{path} is not there"

    def source(self, arguments: list[str], variables: dict[str, str]) -> None:
        assert arguments == [".venv/bin/activate"], "make puts the environment into .venv"

    def make(self, arguments: list[str], variables: dict[str, str]) -> None:
        done = subprocess.run(["make", "-n", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if arguments == ["quickstart"]:
            self.made(check_recipe(read_settings("launch/recipes/quickstart.yaml"), "quickstart"))

    def deepspeed(self, arguments: list[str], variables: dict[str, str]) -> None:
        from deepspeed.launcher.runner import parse_args

        given = parse_args(arguments)
        if given.hostfile != parse_args(["x"]).hostfile:
            self.files([given.hostfile], {})
        self.script(given.user_script, given.user_args)

    def python(self, arguments: list[str], variables: dict[str, str]) -> None:
        self.script(arguments[0], arguments[1:])

    def tensorboard(self, arguments: list[str], variables: dict[str, str]) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--logdir", required=True)
        self.files([parser.parse_args(arguments).logdir], {})

    def shell(self, arguments: list[str], variables: dict[str, str]) -> None:
        """A script outside of a job, with a Python that only tells its arguments; then what it would run."""
        told = self.run_script(arguments[0], variables)
        self.script(told[0], told[1:])

    def sbatch(self, arguments: list[str], variables: dict[str, str]) -> None:
        """The batch script with an srun and a Python that only tell their arguments; then what they would run."""
        parser = argparse.ArgumentParser()
        for option in ("--nodes", "--ntasks-per-node", "--gpus-per-node"):
            parser.add_argument(option, type=int)
        parser.add_argument("script")
        told = self.run_script(parser.parse_args(arguments).script, {**variables, "SLURM_JOB_ID": "1"})
        if "tensorboard.main" in told:
            self.files([told[told.index("--logdir") + 1]], {})
        else:
            self.script(told[0], told[1:])

    def run_script(self, script: str, variables: dict[str, str]) -> list[str]:
        """The arguments that a batch script gives to Python."""
        stubs = self.root / "stubs"
        stubs.mkdir(exist_ok=True)
        for name, text in STUBS.items():
            (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
            (stubs / name).chmod(0o755)
        inside = {name: value.replace("/shared/", "shared/") for name, value in variables.items()}
        path = f"{stubs}:{os.environ['PATH']}"
        known = Path(script).read_text() + Path("launch/slurm/steps.sh").read_text()
        for name in variables:
            assert name in known, f"{script} knows no variable {name}"
        done = subprocess.run(
            ["bash", script],
            env={**os.environ, **inside, "PATH": path, "USER": "me", "TOLD": str(self.root / "told")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return (self.root / "told").read_text().splitlines()

    def script(self, script: str, arguments: list[str]) -> None:
        """A launch script, or a module after `-m`."""
        if script == "-m":
            assert importlib.util.find_spec(arguments[0]), arguments[0]
            return
        self.files([script], {})
        name = Path(script).stem
        assert script == f"launch/{name}.py", f"{script}: only launch scripts are known here"
        given = self.parse(script, arguments)
        if name in TRAINING:
            self.train(script, arguments, given)
        elif name == "prepare_corpus":
            self.run(script, [*arguments, "--processes", "1", "--quiet"])
        elif name == "train_tokenizer":
            self.run(script, arguments)
        elif name == "compare":
            self.run(script, arguments if given.dry_run else [*arguments, "--dry_run"])
        else:
            brought = {"evaluate": ("model", "sts", "texts"), "report": ("runs",), "export_student": ("run",)}
            for key in brought[name]:
                value = getattr(given, key)
                self.files([str(v) for v in (value if isinstance(value, list) else [value]) if v is not None], {})

    def train(self, script: str, arguments: list[str], given: argparse.Namespace) -> None:
        """Plan a run, and leave what a later command needs of it."""
        if given.dry_run or getattr(given, "fit_mlm_head", False):
            self.run(script, [*arguments, "--dry_run"])
            return
        assert given.resume in ("auto", "never"), given.resume
        ds_json, place = read_deepspeed_json(given.ds_config), find_place()
        if script == "launch/pretrain_distill.py":
            recipe = make_plan(read_recipe(given.recipe, given.set), ds_json, place).recipe
        else:
            recipe = prepare_task(read_task_recipe(given.recipe, given.set), ds_json, place)[2].recipe
        self.made(recipe)

    def made(self, recipe: Any) -> None:
        """The directories of a finished run: its recipe, and the student's config and tokenizer."""
        output, student = recipe.output, recipe.student
        model = output / "model"
        shutil.rmtree(output, ignore_errors=True)
        (output / "tensorboard").mkdir(parents=True)
        (output / "recipe.yaml").write_text(recipe.to_yaml())
        teacher = load_config(recipe.teacher.source)
        student_config(teacher, student.num_layers, None, overrides=student.overrides).save_pretrained(model)
        for file in Path(getattr(student, "tokenizer", None) or TEACHER).glob("tokenizer*"):
            shutil.copy(file, model)

    def parse(self, script: str, arguments: list[str]) -> argparse.Namespace:
        """What the script's own parser makes of the arguments."""

        def stop(parser: argparse.ArgumentParser, given: Any = None, namespace: Any = None) -> argparse.Namespace:
            raise ParsedError(real(parser, given, namespace))

        real = argparse.ArgumentParser.parse_args
        with self.patch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            try:
                self.run(script, arguments)
            except ParsedError as accepted:
                return accepted.args[0]
        raise AssertionError(f"{script} parses nothing")

    def run(self, script: str, arguments: list[str]) -> None:
        """A script's `main` in this process."""
        main = importlib.import_module(f"launch.{Path(script).stem}").main
        with self.patch.context() as patch:
            patch.setattr(sys, "argv", [script, *arguments])
            code = main()
        assert not code, f"exit code {code}"

    def check_python(self, block: Block) -> None:
        """Code compiles, imports what is there, and names directories that are there."""
        tree = ast.parse(block.text, block.place)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Constant) and str(node.value).startswith("runs/"):
                path = Path(str(node.value))
                assert (path if path.suffix == "" else path.parent).exists(), f"{block.place}: {path} is not there"


def check_yaml(block: Block) -> None:
    """A part of a recipe: with the rest of a shipped one around it, it is a recipe."""
    part = yaml.safe_load(block.text)
    for term in part.get("objectives", []):
        if ":" in term["objective"]:
            return  # its module is written by the reader; test_extending in the slow part has it
    name, check = ("glue/att_kl", check_task_recipe) if "task" in part else ("minilm", check_recipe)
    check({**read_settings(ROOT / f"launch/recipes/{name}.yaml"), **part}, block.place)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    made = workspace(tmp_path_factory.mktemp("reader"))
    shorten_grid(made)
    return made


@pytest.mark.parametrize("page", guides())
def test_commands_can_be_typed(page, root, monkeypatch, capsys):
    """In the order of the guides: what one makes, later ones use."""
    monkeypatch.chdir(root)
    if page == "README.md":
        Path("shared/data").symlink_to(root / "data")
    elif page == guides()[1]:  # the README stands by itself, and so do the guides together
        Path("shared/data").unlink()
        for made in ("runs", "data/mine"):
            shutil.rmtree(made)
    Reader(root, monkeypatch).follow(page)


BROKEN = {
    "unknown program": "wget https://example.org/model",
    "unknown option": "python launch/prepare_corpus.py --input texts/ --tokeniser path/or/hub-name --output data/x",
    "missing option": "deepspeed launch/pretrain_distill.py --recipe launch/recipes/minilmv2.yaml",
    "unknown key": "python launch/pretrain_distill.py --ds_config ds_configs/zero0.json --set student.layer=3",
    "missing recipe": "python launch/task_distill.py --ds_config ds_configs/zero1.json --recipe launch/recipes/x.yaml",
    "missing JSON": "python launch/pretrain_distill.py --ds_config ds_configs/zero4.json --dry_run",
    "missing model": "deepspeed launch/pretrain_distill.py --ds_config ds_configs/zero0.json --set teacher.model=./x",
    "missing run": "python launch/report.py runs/never_made",
    "missing target": "make everything",
    "unknown variable": "RECIPES=x OUTPUT=y sbatch launch/slurm/pretrain.sbatch",
    "unknown launcher option": "deepspeed --gpus 2 launch/pretrain_distill.py --ds_config ds_configs/zero0.json",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_command_that_cannot_work_is_found(what, root, monkeypatch):
    monkeypatch.chdir(root)
    block = Block(page="page.md", line=7, language="sh", text=BROKEN[what] + "\n")
    (command,) = commands(block)
    with pytest.raises((AssertionError, ValueError)):
        Reader(root, monkeypatch).check(command)


def test_lines_variables_and_comments_are_read_as_a_shell_does():
    text = "A=1 B=\"x y\" run --one \\\n    --two 'c d'  # not this\n\n# nor this\nnext\n"
    first, second = commands(Block(page="p.md", line=1, language="sh", text=text))
    assert first.variables == {"A": "1", "B": "x y"}
    assert first.words == ("run", "--one", "--two", "c d")
    assert (second.words, second.place) == (("next",), "p.md:6")
