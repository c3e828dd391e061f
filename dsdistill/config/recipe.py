"""The recipe: what is learned. Checked whole before anything starts, every problem in one error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails

from dsdistill.config.strict import Strict
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.models.resize import Resize
from dsdistill.objectives.registry import Objective, find_objective


class TeacherSettings(Strict):
    """The model to distil from."""

    model: str = Field(description="local directory, hub name, or package:<import name> of a package with weights")
    revision: str | None = Field(default=None, description="hub revision")
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")
    placement: Literal["resident"] = Field(default="resident", description="where the teacher lives: a copy per device")


class StudentSettings(Strict):
    """The model to distil into, described by its difference from the teacher."""

    num_layers: int = Field(ge=1, description="layers of the student")
    init: Literal["lower", "upper", "uniform", "skip", "random"] | list[int] | None = Field(
        default=None,
        description="teacher layers whose weights it starts from: a name, or one layer (1..T) per student layer",
    )
    init_from: Path | None = Field(
        default=None, description="instead of `init`: directory of a student of this shape whose weights it starts from"
    )
    resize: Resize | None = Field(
        default=None,
        description="how the teacher's weights become those of a narrower student; null refuses other shapes",
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="replaces every dropout rate; null keeps the teacher's"
    )
    overrides: dict[str, Any] = Field(
        default={}, description="other config keys to change; new shapes need init: random, `init_from` or `resize`"
    )
    activation_checkpointing: bool = Field(default=False, description="recompute layers in backward to save memory")

    @model_validator(mode="after")
    def _starts_from_one_thing(self) -> StudentSettings:
        if (self.init is None) == (self.init_from is None):
            raise ValueError("give either `init` or `init_from`")
        if self.resize is not None and self.init in (None, "random"):
            raise ValueError(f"resize={self.resize!r} has no effect without teacher layers; name them in `init`")
        return self


class CorpusSection(Strict):
    """The prepared text."""

    directory: Path = Field(description="what prepare_corpus wrote, or will write if `prepare` is given")
    prepare: CorpusSettings | None = Field(default=None, description="how to make the directory if it is not there")

    @model_validator(mode="before")
    @classmethod
    def _prepares_into_its_directory(cls, section: Any) -> Any:
        if not isinstance(section, dict) or not isinstance(section.get("prepare"), dict):
            return section
        prepare = {"output": section.get("directory"), **section["prepare"]}
        if prepare["output"] != section.get("directory"):
            raise ValueError(f"prepare.output={prepare['output']!r} is not `directory`; leave it out")
        return {**section, "prepare": prepare}


class MaskingSettings(Strict):
    """Masked language modelling; 80 % [MASK], 10 % random, 10 % kept."""

    probability: float = Field(
        default=0.15, ge=0, lt=1, description="share of tokens chosen; 0 leaves the text as it is"
    )
    whole_word: bool = Field(default=False, description="choose whole words")
    targets: Literal["masked", "all"] = Field(
        default="masked", description="where logits are compared: positions chosen for masking, or all real ones"
    )


class Ramp(BaseModel):
    """A number that changes over training steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    start: float = Field(alias="from", description="value up to step `begin`")
    end: float = Field(alias="to", description="value from step `end_step` on")
    begin: int = Field(default=0, ge=0, description="first step of the change")
    end_step: int = Field(alias="until", ge=1, description="last step of the change")
    kind: Literal["linear", "step"] = Field(default="linear", description="straight line, or a jump at `until`")

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Ramp:
        if self.end_step <= self.begin:
            raise ValueError(f"until={self.end_step} must be greater than begin={self.begin}")
        return self

    def at(self, step: int) -> float:
        """The value at an optimizer step."""
        if step >= self.end_step:
            return self.end
        if self.kind == "step" or step <= self.begin:
            return self.start
        return self.start + (self.end - self.start) * (step - self.begin) / (self.end_step - self.begin)


class Term(Strict):
    """One summand of the loss. The objective's own parameters stand beside these keys."""

    objective: str = Field(description="name in the table of objectives, or module:name for one of your own")
    name: str | None = Field(default=None, description="label in logs; the objective's name unless given")
    weight: float | Ramp = Field(default=1.0, description="factor, or {from, to, until} to change it over steps")
    layers: str | list[tuple[int, int]] = Field(
        default="last", description="layers compared: a mapping's name, or [student layer, teacher layer] pairs"
    )
    embeddings: bool = Field(default=False, description="compare the embedding outputs too (hidden states only)")

    @property
    def label(self) -> str:
        """Name in logs."""
        return self.name or self.objective.rpartition(":")[2]

    @property
    def params(self) -> dict[str, Any]:
        """The objective's own parameters, as given or by default."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in Term.model_fields}


class OptimizationSettings(Strict):
    """How the student is updated. A step is an optimizer step over `global_batch` rows."""

    steps: int = Field(ge=1, description="optimizer steps")
    global_batch: int = Field(ge=1, description="rows per optimizer step, over all processes")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="decay after warm-up")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW decay; biases and norms are exempt")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW")
    eps: float = Field(default=1e-6, gt=0, description="AdamW")
    gradient_clipping: float = Field(default=0.0, ge=0, description="largest gradient norm; 0 switches it off")

    @model_validator(mode="after")
    def _warmup_fits(self) -> OptimizationSettings:
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be smaller than steps={self.steps}")
        return self


class EvaluationSettings(Strict):
    """The objectives on held-out text."""

    every_steps: int = Field(ge=1, description="also before the first step and after the last")
    rows: int = Field(ge=1, description="held-out rows, over all processes")


class LoggingSettings(Strict):
    """What is written while training."""

    every_steps: int = Field(default=10, ge=1, description="one device sync and one line in the metrics file")


class CheckpointSettings(Strict):
    """What is kept to go on from."""

    every_steps: int = Field(ge=1, description="also after the last step")
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept")
    on_failure: Literal["stop", "continue"] = Field(
        default="stop", description="if one cannot be written (disk full); the last one must be in any case"
    )


class FaultSettings(Strict):
    """When a run gives up."""

    hang_timeout_s: float = Field(
        default=600.0, ge=1, description="a rank that does one thing for so long is named, and all ranks leave"
    )
    skipped_steps: int = Field(
        default=50, ge=1, description="steps in a row whose gradients overflow in fp16; the search of a scale needs 20"
    )


class Recipe(Strict):
    """A whole run."""

    name: str = Field(pattern=r"^[\w.-]+$", description="short name, used in titles")
    source: str | None = Field(default=None, description="paper or page the recipe follows, and what differs")
    seed: int = Field(default=0, ge=0, lt=2**32, description="order, masks, dropout, and weights that start random")
    output: Path = Field(description="run directory")
    teacher: TeacherSettings
    student: StudentSettings
    corpus: CorpusSection
    masking: MaskingSettings = MaskingSettings()
    objectives: list[Term] = Field(min_length=1, description="summands of the loss")
    optimization: OptimizationSettings
    evaluation: EvaluationSettings
    logging: LoggingSettings = LoggingSettings()
    checkpoint: CheckpointSettings
    faults: FaultSettings = FaultSettings()

    @model_validator(mode="after")
    def _labels_differ(self) -> Recipe:
        labels = [term.label for term in self.objectives]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"objectives: {label!r} appears twice; give each a `name` of its own")
        return self

    def to_yaml(self) -> str:
        """The complete recipe, defaults included, as it can be read back."""
        return yaml.safe_dump(
            self.model_dump(mode="json", by_alias=True, serialize_as_any=True), sort_keys=False, allow_unicode=False
        )


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe file; a run directory stands for the recipe in it.

    Args:
        path: YAML file, or run directory.
        overrides: `section.key=value` strings, values in YAML.

    Raises:
        ValueError: With every problem found, each with its path in the file.
    """
    path = Path(path)
    path = path / "recipe.yaml" if path.is_dir() else path
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} holds no settings; it must be a YAML mapping")
    for override in overrides:
        _override(content, override)
    return check_recipe(content, str(path))


def check_recipe(content: dict[str, Any], where: str) -> Recipe:
    """Turn plain settings into a checked recipe.

    Raises:
        ValueError: With every problem found.
    """
    content = dict(content)
    problems: list[str] = []
    terms = content.get("objectives")
    if isinstance(terms, list):
        content["objectives"] = [_check_term(term, i, problems) for i, term in enumerate(terms)]
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        known = [e for e in error.errors() if not (e["loc"][:1] == ("objectives",) and len(e["loc"]) > 1)]
        problems = [describe_problem(e, Recipe) for e in known] + problems
        recipe = None
    if problems or recipe is None:
        raise ValueError(f"{where} has {len(problems)} problem(s):\n" + "\n".join(f"  {p}" for p in problems))
    return recipe


def _check_term(term: Any, index: int, problems: list[str]) -> Any:
    """One entry of `objectives` as the model its objective asks for; problems are appended."""
    where = f"objectives[{index}]"
    if not isinstance(term, dict) or not isinstance(term.get("objective"), str):
        problems.append(f"{where}: must be a mapping with the key 'objective', got {term!r}")
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
        key: (_scheduled(p.annotation), ... if p.default is p.empty else p.default) for key, p in entry.params.items()
    }
    return create_model("Term_" + re.sub(r"\W", "_", name), __base__=Term, **given)  # type: ignore[call-overload]


def _scheduled(annotation: Any) -> Any:
    return Union[float, Ramp] if annotation is float else annotation  # noqa: UP007 (built at run time)


def describe_problem(error: ErrorDetails, model: type[BaseModel], prefix: str = "") -> str:
    """One line: path, what is wrong, what is allowed."""
    path = ".".join([prefix, *map(str, error["loc"])]).strip(".")
    if error["type"] == "extra_forbidden":
        names = _names_at(model, error["loc"][:-1])
        return f"{path}: unknown key{nearest(str(error['loc'][-1]), names)}; known here: {', '.join(sorted(names))}"
    if error["type"] == "missing":
        return f"{path}: is required and missing"
    got = "" if error["type"] == "value_error" else f", got {error['input']!r}"
    return f"{path}: {error['msg'].removeprefix('Value error, ')}{got}"


def _names_at(model: Any, location: tuple) -> list[str]:
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    fields: Mapping[str, Any] = getattr(model, "model_fields", {})
    return [field.alias or name for name, field in fields.items()]


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` if a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _override(content: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value`; numbers in the path index lists.

    Raises:
        ValueError: If it has no `=`, or the path leads through something that is no section.
    """
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ValueError(f"--set {override!r} must be section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {override!r}: the value is no YAML") from error
    *parents, last = path.split(".")
    place: Any = content
    for part in parents:
        place = _step_into(place, part, override)
    _entry(place, last, override)(value)


def _step_into(place: Any, part: str, override: str) -> Any:
    if isinstance(place, list) and part.isdigit() and int(part) < len(place):
        return place[int(part)]
    if isinstance(place, dict):
        if place.get(part) is None:
            place[part] = {}
        return place[part]
    raise ValueError(f"--set {override!r}: there is no section {part!r} to set something in")


def _entry(place: Any, last: str, override: str) -> Callable[[Any], None]:
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        return lambda value: place.__setitem__(int(last), value)
    if isinstance(place, dict):
        return lambda value: place.__setitem__(last, value)
    raise ValueError(f"--set {override!r}: there is nothing with keys at that place")
