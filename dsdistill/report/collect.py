"""What a run directory tells, read as far as it can be; what is missing or broken is named and left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from dsdistill.evaluate import SPEED
from dsdistill.speed import Measured
from dsdistill.summary import SUMMARY, Summary
from dsdistill.task_summary import RESULTS
from dsdistill.training.run_directory import CHECKPOINTS, CIRCUMSTANCES, EXPORT, RECIPE, SKELETON
from dsdistill.training.telemetry import PICTURES, read_metrics

Found = TypeVar("Found")

METRICS, CONFIG, DS_CONFIG = "metrics.jsonl", "config.json", "ds_config.json"
PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The metrics of one stage.

    Attributes:
        stage: Its name; empty for task-agnostic distillation.
        train: Entries while training, in the order of steps.
        held_out: Entries of evaluations.
    """

    stage: str
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]

    def series(self, tag: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number, where it was told and finite."""
        entries = self.held_out if tag.startswith(("held_out/", "score/")) else self.train
        found = [(entry["step"], entry[tag]) for entry in entries if isinstance(entry.get(tag), int | float)]
        return [step for step, _ in found], [value for _, value in found]

    def tags(self, prefix: str) -> list[str]:
        """Numbers under a prefix that were told at least once, in the order they first were."""
        names = dict.fromkeys(tag for entry in (*self.train, *self.held_out) for tag in entry if tag.startswith(prefix))
        return [tag for tag in names if self.series(tag)[0]]


@dataclass(slots=True, kw_only=True)
class Run:
    """What was found of a run.

    Attributes:
        directory: Where.
        recipe: Plain settings, as resolved; empty if unreadable.
        ds_config: The filled DeepSpeed JSON.
        circumstances: Versions, command, hardware.
        curves: Of each stage, in order.
        results: Scores of a task.
        summary: What the end of a run measured; None if that is not known.
        models: Teacher and student, size and speed: as `launch/evaluate.py` measured them, else as the run did.
        student: Config of the student.
        parameters: Of the exported student, or None.
        checkpoints: Steps of those that are kept.
        pictures: PNGs that training drew last, by stage and name.
        problems: What could not be read, a sentence each.
    """

    directory: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    ds_config: dict[str, Any] = field(default_factory=dict)
    circumstances: dict[str, Any] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    summary: Summary | None = None
    models: dict[str, Measured] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    checkpoints: list[int] = field(default_factory=list)
    pictures: dict[tuple[str, str], bytes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For titles."""
        return str(self.recipe.get("name") or self.directory.name)

    def setting(self, *path: str) -> Any:
        """A value of the recipe, or None."""
        value: Any = self.recipe
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def collect(directory: Path) -> Run:
    """Read a run directory.

    Raises:
        ValueError: If it is no directory, or nothing in it looks like a run.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; give the output directory of a run")
    run = Run(directory=directory)
    run.recipe = _read(run, RECIPE, yaml.safe_load, "what was learned and how to repeat it")
    run.circumstances = _read(run, CIRCUMSTANCES, json.loads, "versions, command and hardware")
    run.ds_config = _read(run, DS_CONFIG, json.loads, "how it ran", needed=not run.setting("stages"))
    run.results = _read(run, RESULTS, json.loads, "scores", needed=bool(run.setting("task")))
    run.student = _read(run, f"{SKELETON}/{CONFIG}", json.loads, "the student's shape")
    run.summary = _valid(run, SUMMARY, TypeAdapter(Summary), "sizes, speeds and cosines")
    run.models = _models(run)
    run.curves = _curves(run)
    run.pictures = _pictures(run)
    run.checkpoints = sorted(
        int(path.name.removeprefix("step-"))
        for path in (directory / CHECKPOINTS).glob("step-*")
        if path.name.removeprefix("step-").isdigit()
    )
    run.parameters = _parameters(run)
    if not (run.recipe or run.curves):
        raise ValueError(f"{directory} holds neither {RECIPE} nor {METRICS}; give the output directory of a run")
    return run


def _read(run: Run, name: str, parse: Callable[[str], Any], what: str, *, needed: bool = True) -> dict[str, Any]:
    path = run.directory / name
    try:
        content = parse(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        problem = f"holds no mapping but {type(content).__name__}"
    except FileNotFoundError:
        if not needed:
            return {}
        problem = "is missing"
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = f"cannot be read ({str(error).splitlines()[0][:120]})"
    run.problems.append(f"{name} {problem}: {what} cannot be told")
    return {}


def _valid(run: Run, name: str, adapter: TypeAdapter[Found], what: str) -> Found | None:
    """A file that need not be there, checked."""
    content = _read(run, name, json.loads, what, needed=False)
    if not content:
        return None
    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        run.problems.append(f"{name} is not what is written there ({where}): {what} cannot be told")
        return None


def _models(run: Run) -> dict[str, Measured]:
    measured = _valid(run, f"{EXPORT}/{SPEED}", TypeAdapter(dict[str, Measured]), "speeds")
    if measured is not None:
        return measured
    if run.summary is not None:
        return {"teacher": run.summary.teacher, "student": run.summary.student}
    found = {}
    for who in ("teacher", "student"):
        told = run.results.get(who)
        if not isinstance(told, dict):
            continue
        size: dict[str, Any] = {name: told.get(name) for name in ("layers", "width", "parameters", "bytes")}
        if all(isinstance(value, int) for value in size.values()):
            found[who] = Measured(name=str(told.get("model", EXPORT)), **size, timings=[])
    return found


def _stages(run: Run) -> list[tuple[str, Path]]:
    """Name and directory of each stage."""
    stages = run.setting("stages")
    if not stages:
        return [("", run.directory)]
    names = [str(stage.get("name", "")) for stage in stages if isinstance(stage, dict)]
    return [(name, run.directory / f"{number}-{name}") for number, name in enumerate(names, 1)]


def _pictures(run: Run) -> dict[tuple[str, str], bytes]:
    found = {}
    for stage, directory in _stages(run):
        for path in sorted((directory / PICTURES).glob("*.png")):
            try:
                content = path.read_bytes()
            except OSError as error:
                run.problems.append(f"{path.relative_to(run.directory)} cannot be read ({error})")
                continue
            if content.startswith(PNG) and content.endswith(PNG_END):
                found[stage, path.stem] = content
            else:
                run.problems.append(f"{path.relative_to(run.directory)} is no whole PNG: it is not shown")
    return found


def _curves(run: Run) -> list[Curve]:
    found = []
    for name, directory in _stages(run):
        path = directory / METRICS
        try:
            entries = [e for e in read_metrics(path) if isinstance(e, dict) and isinstance(e.get("step"), int)]
        except (OSError, ValueError) as error:
            run.problems.append(f"{path.relative_to(run.directory)} cannot be read ({error}): no curves")
            continue
        lines = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
        if not entries:
            run.problems.append(
                f"{path.relative_to(run.directory)} is missing or empty: no curves of {name or 'training'}"
            )
            continue
        if len(entries) < lines:
            run.problems.append(f"{path.relative_to(run.directory)}: {lines - len(entries)} line(s) are unreadable")
        kinds = {kind: [entry for entry in entries if entry.get("kind") == kind] for kind in ("train", "held_out")}
        found.append(Curve(stage=name, **kinds))
    return found


def _parameters(run: Run) -> int | None:
    files = sorted((run.directory / EXPORT).glob("*.safetensors"))
    if not files:
        run.problems.append(f"{EXPORT}/ holds no weights: the run is not finished, or its student was moved")
        return None
    total = 0
    for path in files:
        try:
            with safe_open(path, framework="numpy") as weights:
                total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            run.problems.append(f"{EXPORT}/{path.name} cannot be read ({error}): the student's size cannot be told")
            return None
    return total
