"""The recipe: what is learned. Checked whole before anything starts, every problem in one error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Union

import yaml
from pydantic import Field, ValidationError, create_model, model_validator

from dsdistill.config.problems import apply_override, describe_problem, read_mapping, shown
from dsdistill.config.sections import (
    CheckpointSettings,
    CorpusSection,
    EpochCheckpointSettings,
    EpochEvaluationSettings,
    EvaluationSettings,
    FaultSettings,
    LoggingSettings,
    MaskingSettings,
    OptimizationSettings,
    Ramp,
    StageSettings,
    TaskStudentSettings,
    TaskTeacherSettings,
    Term,
    TextStudentSettings,
    TextTeacherSettings,
)
from dsdistill.config.strict import Strict
from dsdistill.objectives.parameters import PARAMETERS
from dsdistill.objectives.registry import Objective, find_objective
from dsdistill.tasks.settings import DataSettings

PLACEHOLDERS = ("task", "name", "seed")
"""What `output` of a task's recipe may hold in braces."""


class Pace(NamedTuple):
    """What the training loop follows in one stage, in steps.

    Attributes:
        seed: Of order and dropout.
        optimization: Steps, batch, learning rate.
        evaluation_every: Steps between evaluations.
        logging_every: Steps between lines in the metrics file.
        checkpoint: When checkpoints are written and how many stay.
        skipped_steps: fp16 overflows in a row that stop the run.
    """

    seed: int
    optimization: OptimizationSettings
    evaluation_every: int
    logging_every: int
    checkpoint: CheckpointSettings
    skipped_steps: int


class RunSettings(Strict):
    """What every run has."""

    name: str = Field(pattern=r"^[\w.-]+$", description="short name, used in titles")
    source: str | None = Field(default=None, description="paper or page the recipe follows, and what differs")
    seed: int = Field(default=0, ge=0, lt=2**32, description="order, masks, dropout, and weights that start random")
    output: Path = Field(description="run directory")
    logging: LoggingSettings = LoggingSettings()
    faults: FaultSettings = FaultSettings()

    def to_yaml(self) -> str:
        """The complete recipe, defaults included, as it can be read back."""
        return yaml.safe_dump(
            self.model_dump(mode="json", by_alias=True, serialize_as_any=True), sort_keys=False, allow_unicode=False
        )


class Recipe(RunSettings):
    """Task-agnostic distillation on a corpus."""

    teacher: TextTeacherSettings
    student: TextStudentSettings
    corpus: CorpusSection
    masking: MaskingSettings = MaskingSettings()
    objectives: list[Term] = Field(min_length=1, description="summands of the loss")
    optimization: OptimizationSettings
    evaluation: EvaluationSettings
    checkpoint: CheckpointSettings

    @model_validator(mode="after")
    def _labels_differ(self) -> Recipe:
        """Terms of the same objective have a `name` each."""
        _check_labels(self.objectives, "objectives")
        return self

    @property
    def asks_teacher(self) -> bool:
        """Whether an objective, or the scoring of sentences, reads signals of the teacher."""
        return self.evaluation.sentences is not None or any(term.asks_teacher for term in self.objectives)

    @property
    def pace(self) -> Pace:
        """What the loop follows."""
        return Pace(
            self.seed,
            self.optimization,
            self.evaluation.every_steps,
            self.logging.every_steps,
            self.checkpoint,
            self.faults.skipped_steps,
        )


class TaskRecipe(RunSettings):
    """Distillation, or plain fine-tuning, on a task with labels; stages follow one another with the same student."""

    task: str = Field(
        pattern=r"^[\w.-]+$", description="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, or a name of your own"
    )
    data: DataSettings = DataSettings()
    teacher: TaskTeacherSettings
    student: TaskStudentSettings
    stages: list[StageSettings] = Field(min_length=1, description="trained one after the other")
    evaluation: EpochEvaluationSettings = EpochEvaluationSettings()
    checkpoint: EpochCheckpointSettings = EpochCheckpointSettings()

    @model_validator(mode="after")
    def _names_differ(self) -> TaskRecipe:
        """Stages have different names; terms of the same objective in a stage have a `name` each."""
        names = [stage.name for stage in self.stages]
        for stage in self.stages:
            if names.count(stage.name) > 1:
                raise ValueError(f"stages: {stage.name!r} appears twice; give each a name of its own")
            _check_labels(stage.objectives, f"stages.{stage.name}.objectives")
        return self

    @property
    def asks_teacher(self) -> bool:
        """Whether an objective of any stage reads signals of the teacher."""
        return any(term.asks_teacher for stage in self.stages for term in stage.objectives)

    def pace(self, index: int, num_rows: int) -> Pace:
        """What the loop follows in a stage, for training data of `num_rows` rows.

        The first stage draws with the recipe's seed, the others with seeds made from it.
        """
        stage = self.stages[index].optimization

        def in_steps(epochs: float) -> int:
            return max(1, round(epochs * stage.steps_per_epoch(num_rows)))

        return Pace(
            (self.seed + index * 0x9E3779B1) % 2**32,
            stage.resolve(num_rows),
            in_steps(self.evaluation.every_epochs),
            self.logging.every_steps,
            CheckpointSettings(
                every_steps=in_steps(self.checkpoint.every_epochs),
                keep=self.checkpoint.keep,
                on_failure=self.checkpoint.on_failure,
            ),
            self.faults.skipped_steps,
        )


def _check_labels(terms: Iterable[Term], where: str) -> None:
    labels = [term.label for term in terms]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{where}: {label!r} appears twice; give each a `name` of its own")


AnyRecipe = TypeVar("AnyRecipe", Recipe, TaskRecipe)


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The plain settings of a recipe file, or of a run directory, with overrides applied.

    Args:
        path: YAML file, or run directory.
        overrides: `section.key=value` strings, values in YAML.

    Raises:
        ValueError: If there is no such file or it is no YAML mapping, or an override leads nowhere.
    """
    path = Path(path)
    content = read_mapping(path / "recipe.yaml" if path.is_dir() else path, "recipe")
    for override in overrides:
        apply_override(content, override)
    return content


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check the recipe of a task-agnostic run; a run directory stands for the recipe in it.

    Raises:
        ValueError: With every problem found, each with its path in the file.
    """
    return check_recipe(read_settings(path, overrides), str(path))


def read_task_recipe(path: str | Path, overrides: Iterable[str] = ()) -> TaskRecipe:
    """Read and check the recipe of a task; a run directory stands for the recipe in it.

    Raises:
        ValueError: With every problem found, each with its path in the file.
    """
    return check_task_recipe(read_settings(path, overrides), str(path))


def check_recipe(content: dict[str, Any], where: str) -> Recipe:
    """Turn plain settings into the checked recipe of a task-agnostic run.

    Raises:
        ValueError: With every problem found.
    """
    return _check(Recipe, content, where)


def check_task_recipe(content: dict[str, Any], where: str) -> TaskRecipe:
    """Turn plain settings into the checked recipe of a task, placeholders in `output` filled.

    Raises:
        ValueError: With every problem found.
    """
    output = content.get("output")
    if isinstance(output, str):
        for name in PLACEHOLDERS:
            output = output.replace(f"{{{name}}}", str(content.get(name, 0 if name == "seed" else "")))
        content = {**content, "output": output}
    return _check(TaskRecipe, content, where)


def _check(kind: type[AnyRecipe], content: dict[str, Any], where: str) -> AnyRecipe:
    problems: list[str] = []
    content = _with_checked_terms(content, problems)
    try:
        recipe = kind.model_validate(content)
    except ValidationError as error:
        known = [e for e in error.errors() if not _is_inside_a_term(e["loc"])]
        problems = [describe_problem(e, kind) for e in known] + problems
        recipe = None
    if problems or recipe is None:
        raise ValueError(f"{where} has {len(problems)} problem(s):\n" + "\n".join(f"  {p}" for p in problems))
    return recipe


def _with_checked_terms(content: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The settings with every list of objectives, at the top or in stages, made of the models they ask for."""
    content = dict(content)
    for place, where in _places_of_terms(content):
        if isinstance(place.get("objectives"), list):
            terms = enumerate(place["objectives"])
            place["objectives"] = [_check_term(term, f"{where}objectives[{i}]", problems) for i, term in terms]
    return content


def _places_of_terms(content: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Sections that hold objectives, and their paths; stages are copied before they are changed."""
    yield content, ""
    if isinstance(content.get("stages"), list):
        content["stages"] = [dict(stage) if isinstance(stage, dict) else stage for stage in content["stages"]]
        for index, stage in enumerate(content["stages"]):
            if isinstance(stage, dict):
                yield stage, f"stages[{index}]."


def _is_inside_a_term(location: tuple[str | int, ...]) -> bool:
    """Whether a problem was found in an objective's own settings, which `_check_term` has told already."""
    return "objectives" in location[:-1]


def _check_term(term: Any, where: str, problems: list[str]) -> Any:
    """One entry of `objectives` as the model its objective asks for; problems are appended."""
    if not isinstance(term, dict) or not isinstance(term.get("objective"), str):
        problems.append(f"{where}: must be a mapping with the key 'objective', got {shown(term)}")
        return term
    try:
        model = term_model(term["objective"])
    except ValueError as error:
        problems.append(f"{where}.objective: {error}")
        return term
    try:
        return model.model_validate(term)
    except ValidationError as error:
        problems += [describe_problem(e, model, where) for e in error.errors()]
        return term


@cache
def term_model(name: str) -> type[Term]:
    """The settings of one objective: `Term` and the keyword parameters of its function.

    Raises:
        ValueError: If there is no such objective.
    """
    entry: Objective = find_objective(name)
    given = {
        key: (
            _scheduled(p.annotation),
            Field(default=... if p.default is p.empty else p.default, description=PARAMETERS.get(key)),
        )
        for key, p in entry.params.items()
    }
    return create_model("Term_" + re.sub(r"\W", "_", name), __base__=Term, **given)  # type: ignore[call-overload]


def _scheduled(annotation: Any) -> Any:
    return Union[float, Ramp] if annotation is float else annotation  # noqa: UP007 (built at run time)
