"""A task recipe that takes no time: what is under test is the grid around it, with real processes and real kills."""

import json
import os
import signal
import time
import zlib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from dsdistill.compare.kinds import Kind
from dsdistill.config.problems import describe_problem
from dsdistill.config.strict import Strict


class FakeRecipe(Strict):
    name: str
    seed: int = 0
    output: Path
    task: str
    objective: str = "plain"
    init: str | list[int] = "lower"
    learning_rate: float = 1e-4
    teacher: Path | None = None
    seconds: float = 0.0
    stages: tuple[dict[str, Any], ...] = ({"optimization": {"epochs": 3}}, {"optimization": {"epochs": 7}})
    trouble: Literal["none", "raise", "die", "die_once", "stop_once", "freeze", "no_results"] = "none"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"))


def check(content: dict[str, Any], where: str) -> FakeRecipe:
    try:
        return FakeRecipe.model_validate(content)
    except ValidationError as error:
        problems = [describe_problem(e, FakeRecipe) for e in error.errors()]
        raise ValueError(f"{where} has {len(problems)} problem(s):\n" + "\n".join(f"  {p}" for p in problems)) from None


def teacher_of(recipe: FakeRecipe) -> FakeRecipe | None:
    if recipe.teacher is None:
        return None
    return FakeRecipe(name="teacher", output=recipe.teacher, task=recipe.task, seconds=recipe.seconds)


def score_of(recipe: FakeRecipe) -> float:
    """A fixed number for each recipe, the same in every process."""
    text = f"{recipe.objective} {recipe.init} {recipe.task} {recipe.seed} {recipe.learning_rate}"
    return 0.5 + zlib.crc32(text.encode()) % 997 / 10000


def run(recipe: FakeRecipe, ds_json: dict[str, Any], *, resume: str, dry_run: bool) -> None:
    assert (resume, dry_run) == ("auto", False)
    assert "zero_optimization" in ds_json
    assert recipe.teacher is None or (recipe.teacher / "results.json").is_file(), "started before its teacher was done"
    recipe.output.mkdir(parents=True, exist_ok=True)
    (recipe.output / "recipe.yaml").write_text(recipe.to_yaml())
    with (recipe.output / "starts.txt").open("a") as file:
        print(os.getpid(), os.environ["OMP_NUM_THREADS"], file=file)
    print(f"working on {recipe.output.name}")
    time.sleep(recipe.seconds)
    trouble(recipe)
    (recipe.output / "checkpoints").mkdir(exist_ok=True)
    (recipe.output / "model").mkdir(exist_ok=True)
    config = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    (recipe.output / "model" / "config.json").write_text(
        json.dumps(config | {"intermediate_size": 8, "vocab_size": 99})
    )
    if recipe.trouble != "no_results":
        (recipe.output / "results.json").write_text(json.dumps(results_of(recipe)))


def trouble(recipe: FakeRecipe) -> None:
    if recipe.trouble == "raise":
        raise ValueError("the data\nis gone")
    first = len(starts_of(recipe.output)) == 1
    if recipe.trouble == "die" or (recipe.trouble == "die_once" and first):
        os.kill(os.getpid(), signal.SIGKILL)
    if recipe.trouble == "stop_once" and first:
        os.kill(os.getpid(), signal.SIGSTOP)
    if recipe.trouble == "freeze":
        time.sleep(1000)


def starts_of(directory: Path) -> list[int]:
    """The process of each attempt at a run."""
    file = directory / "starts.txt"
    return [int(line.split()[0]) for line in file.read_text().splitlines()] if file.is_file() else []


def results_of(recipe: FakeRecipe) -> dict[str, Any]:
    score = score_of(recipe)
    student = {"layers": 1, "width": 8, "parameters": 1000, "bytes": 4000}
    return {
        "name": recipe.name,
        "task": recipe.task,
        "seed": recipe.seed,
        "problem": "classification",
        "primary": "matthews" if recipe.task == "cola" else "accuracy",
        "labels": ["0", "1"],
        "scores": {"dev": {"accuracy": score, "matthews": score - 0.3}, "dev_other": {"accuracy": 0.1, "matthews": 0}},
        "baseline": {"dev": {"accuracy": 0.5, "matthews": 0.0}, "dev_other": {"accuracy": 0.5, "matthews": 0.0}},
        "teacher_scores": {"dev": {"accuracy": 0.9, "matthews": 0.6}} if recipe.teacher else None,
        "student": student,
        "teacher": {"model": "/nowhere", **student, "layers": 2},
        "training": {
            "seconds": 2.5,
            "stages": [{"name": "prediction", "steps": 10, "rows": 320, "seconds": 2.5}],
            "steps": 10,
            "rows": 320,
            "teacher_seconds": 1.0,
        },
        "device": "none",
        "git_commit": None,
    }


KINDS = (
    Kind(
        key="task",
        check="tests.compare.fake:check",
        run="tests.compare.fake:run",
        teacher="tests.compare.fake:teacher_of",
        last_file="results.json",
    ),
)
