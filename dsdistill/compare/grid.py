"""The grid file: which recipes to run. Every cell is checked before anything starts, every problem in one error."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from dsdistill.compare.kinds import KINDS, RESULTS, Kind, find_object, kind_of
from dsdistill.config.problems import describe_problem, nearest, read_mapping
from dsdistill.config.strict import Strict
from dsdistill.training.run_directory import fingerprint

TASK, SEED = "task", "seed"
"""The two axes that the table knows: its columns, and what it averages over."""

Settings = dict[str, Any]
"""Recipe values by path: `student.init: lower`, `stages.*.optimization.epochs: 3`, or a whole section by its name."""

_LABEL = re.compile(r"[\w.,+-]+")


class ValuesAxis(Strict):
    """An axis of plain values of one recipe key."""

    key: str = Field(description="path of the recipe key")
    values: list[Any] = Field(min_length=1, description="its values; also their labels")


class Before(Strict):
    """A run that cells need: it is done once, first."""

    base: str = Field(description="recipe file; {axis} stands for the cell's label on that axis, {grid} for its output")
    set: Settings = Field(default={}, description="recipe values by path, same placeholders")
    only: dict[str, list[str]] = Field(default={}, description="labels by axis of the cells that need it; {} for all")


def _may_extend(schema: dict[str, Any]) -> None:
    """In the JSON schema: a grid that extends another need not repeat its keys."""
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["extends"]}]


class GridSettings(Strict):
    """A grid file. Paths in it are relative to the working directory, as in recipes."""

    model_config = ConfigDict(json_schema_extra=_may_extend)

    name: str = Field(pattern=r"^[\w.-]+$", description="short name, used in titles")
    source: str = Field(description="what the grid repeats, what is the same and what differs")
    extends: Path | None = Field(
        default=None, description="grid file beside this one whose keys hold unless this one has them"
    )
    output: Path = Field(description="directory of everything the grid writes")
    ds_config: Path | None = Field(default=None, description="DeepSpeed JSON; --ds_config goes first")
    base: Path | None = Field(default=None, description="recipe file that all cells start from")
    set: Settings = Field(default={}, description="recipe values by path, for all cells")
    axes: dict[str, ValuesAxis | dict[str, Settings]] = Field(
        min_length=1,
        description="axis: list of values of the key of that name; or {key, values}; or {label: {path: value}}",
    )
    only: dict[str, list[str]] = Field(default={}, description="labels by axis that are kept; {} for all")
    exclude: list[dict[str, str]] = Field(default=[], description="combinations of labels that are left out")
    before: list[Before] = Field(default=[], description="runs that cells need, such as a task-agnostic student")
    keep: Literal["results", "models", "all"] = Field(
        default="results",
        description="what stays of a finished cell: scores, predictions and metrics; exported models too; all",
    )
    best_over: list[str] = Field(
        default=[], description="axes of which the table shows the best value per task, as chosen on the dev set"
    )
    teacher_row: dict[str, str] | None = Field(
        default=None, description="labels of the row that stands for the teacher, where cells have none of their own"
    )
    cell_timeout_s: float | None = Field(default=None, gt=0, description="a cell that takes longer has failed")

    @field_validator(
        "axes", mode="before", json_schema_input_type=dict[str, list[Any] | ValuesAxis | dict[str, Settings]]
    )
    @classmethod
    def _understand_axes(cls, axes: Any) -> Any:
        if not isinstance(axes, dict):
            return axes
        return {name: _understand_axis(str(name), axis) for name, axis in axes.items()}

    @model_validator(mode="after")
    def _names_known_axes(self) -> GridSettings:
        """`exclude`, `before.only`, `teacher_row` and `best_over` name axes and labels of this grid.

        `best_over` is neither task nor seed.
        """
        for name, axis in self.axes.items():
            check_labels(name, axis)
        for combination in self.exclude:
            for name, label in combination.items():
                self.check_label(name, label, "exclude")
        for before in self.before:
            for name, labels in before.only.items():
                for label in labels:
                    self.check_label(name, label, "before.only")
        for name, label in (self.teacher_row or {}).items():
            self.check_label(name, label, "teacher_row")
        for name in self.best_over:
            self.check_axis(name, "best_over")
            if name in (TASK, SEED):
                raise ValueError(f"best_over: the best {name} cannot be chosen; name another axis")
        return self

    def labels(self, name: str) -> dict[str, Settings]:
        """The settings of each value of an axis by its label."""
        axis = self.axes[name]
        return {label_of(value): {axis.key: value} for value in axis.values} if isinstance(axis, ValuesAxis) else axis

    def check_axis(self, name: str, where: str) -> None:
        """Refuse an unknown axis.

        Raises:
            ValueError: With the nearest known name.
        """
        if name not in self.axes:
            raise ValueError(f"{where}: no axis {name!r}{nearest(name, self.axes)}; known: {', '.join(self.axes)}")

    def check_label(self, name: str, label: str, where: str) -> None:
        """Refuse an unknown axis or label.

        Raises:
            ValueError: With the nearest known name.
        """
        self.check_axis(name, where)
        known = self.labels(name)
        if label not in known:
            raise ValueError(f"{where}: axis {name} has no {label!r}{nearest(label, known)}; known: {', '.join(known)}")


def _understand_axis(name: str, axis: Any) -> Any:
    """An axis as `ValuesAxis` or labels with settings.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(axis, list):
        axis = {"key": name, "values": axis}
    if isinstance(axis, dict) and ("key" in axis or "values" in axis):
        try:
            return ValuesAxis.model_validate(axis)
        except ValidationError as error:
            raise ValueError("; ".join(describe_problem(e, ValuesAxis, name) for e in error.errors())) from None
    if isinstance(axis, dict) and axis and all(isinstance(settings, dict) for settings in axis.values()):
        return {str(label): settings for label, settings in axis.items()}
    raise ValueError(f"{name} must be a list of values, {{key, values}}, or {{label: {{path: value}}}}, got {axis!r}")


def check_labels(name: str, axis: ValuesAxis | dict[str, Settings]) -> None:
    """Refuse labels that cannot stand in a file name, or are not told apart.

    Raises:
        ValueError: With the label.
    """
    labels = list(map(label_of, axis.values)) if isinstance(axis, ValuesAxis) else list(axis)
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise ValueError(f"axes.{name}: label {label!r} may hold letters, digits and . , + - _ only")
        if labels.count(label) > 1:
            raise ValueError(f"axes.{name}: {label!r} is there twice")


def label_of(value: Any) -> str:
    """How a plain value is called."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a grid: a cell, or something that cells need first.

    Attributes:
        id: A cell's labels, or the path of the run directory.
        kind: How it is checked and run.
        recipe: Checked.
        fingerprint: Of the recipe.
        axes: The cell's label on each axis; empty if it is no cell.
        needs: Run directories that must be done first.
        teacher: The one of them that makes the teacher.
    """

    id: str
    kind: Kind
    recipe: Any
    fingerprint: str
    axes: Mapping[str, str]
    needs: tuple[Path, ...] = ()
    teacher: Path | None = None

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return self.recipe.output


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A checked grid.

    Attributes:
        settings: As read, changes of the command line included.
        first: Runs that cells need, in the order in which cells need them.
        cells: In the order of the axes, the last axis fastest.
    """

    settings: GridSettings
    first: tuple[Run, ...]
    cells: tuple[Run, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """All of them, each after what it needs."""
        return (*self.first, *self.cells)


def read_grid(path: Path, *, output: Path | None = None, axes: Iterable[Sequence[str]] = ()) -> GridSettings:
    """Read a grid file.

    Args:
        path: YAML file.
        output: Replaces the file's.
        axes: `(axis, value, value, ...)`: other values (YAML) of an axis that lists values, or some of the labels of
            one that has labels.

    Raises:
        ValueError: With every problem found.
    """
    content = read_mapping(path, "grid")
    if isinstance(content.get("extends"), str):
        content = read_mapping(path.parent / content["extends"], "grid") | content
    if output is not None:
        content["output"] = str(output)
    try:
        settings = GridSettings.model_validate(content)
    except ValidationError as error:
        problems = [describe_problem(e, GridSettings) for e in error.errors()]
        raise ValueError(f"{path} has {len(problems)} problem(s):\n" + "\n".join(f"  {p}" for p in problems)) from None
    for name, labels in settings.only.items():
        settings = _change_axis(settings, name, *labels, where="only")
    for change in axes:
        settings = _change_axis(settings, *change, where=f"--axis {' '.join(change)}")
    return settings


def _change_axis(settings: GridSettings, name: str, *texts: str, where: str) -> GridSettings:
    """Other values for one axis, or some of its labels."""
    settings.check_axis(name, where)
    if not texts:
        raise ValueError(f"{where}: give at least one value")
    axis = settings.axes[name]
    if isinstance(axis, ValuesAxis):
        try:
            axis = ValuesAxis(key=axis.key, values=[yaml.safe_load(text) for text in texts])
        except yaml.YAMLError as error:
            raise ValueError(f"{where}: a value is no YAML") from error
    else:
        for label in texts:
            settings.check_label(name, label, where)
        axis = {label: axis[label] for label in texts}
    check_labels(name, axis)
    return settings.model_copy(update={"axes": {**settings.axes, name: axis}})


def make_grid(settings: GridSettings, changes: Iterable[str] = (), kinds: tuple[Kind, ...] = KINDS) -> Grid:
    """All runs of a grid, checked.

    Args:
        settings: The grid file.
        changes: `section.key=value` strings, values in YAML, for all cells; they go last.
        kinds: What recipes there are.

    Raises:
        ValueError: With every problem of every cell, equal ones once.
    """
    base = read_mapping(settings.base, "base") if settings.base is not None else {}
    read = cache(partial(read_mapping, what="before.base"))
    maker = _Maker(settings, base, dict(map(_parse_change, changes)), kinds, read)
    problems: dict[str, list[str]] = {}
    first: dict[Path, Run] = {}
    cells = []
    for labels in combinations(settings):
        try:
            cell, needed = maker.cell(labels)
            for run in needed:
                known = first.setdefault(run.directory, run)
                if known.fingerprint != run.fingerprint:
                    raise ValueError(f"{run.directory} is to hold two different runs; put an axis into its path")
            cells.append(cell)
        except ValueError as error:
            for line in _problem_lines(error):
                problems.setdefault(line, []).append(cell_id(labels))
    if problems:
        lines = [f"  {line} (cell {names[0]}{_others(names)})" for line, names in problems.items()]
        raise ValueError(f"grid {settings.name} has {len(lines)} problem(s):\n" + "\n".join(lines))
    if not cells:
        raise ValueError(f"grid {settings.name} has no cells: everything is excluded")
    return Grid(settings=settings, first=tuple(first.values()), cells=tuple(cells))


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _problem_lines(error: ValueError) -> list[str]:
    head, *lines = str(error).split("\n")
    return [line.strip() for line in lines] if lines and head.endswith("problem(s):") else [str(error)]


def _parse_change(change: str) -> tuple[str, Any]:
    path, separator, text = change.partition("=")
    if not separator or not path:
        raise ValueError(f"--set {change!r} must be section.key=value")
    try:
        return path, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {change!r}: the value is no YAML") from error


def combinations(settings: GridSettings) -> Iterator[dict[str, str]]:
    """The labels of every cell, the last axis fastest."""
    for labels in itertools.product(*map(settings.labels, settings.axes)):
        cell = dict(zip(settings.axes, labels, strict=True))
        if not any(out.items() <= cell.items() for out in settings.exclude):
            yield cell


def cell_id(labels: Mapping[str, str]) -> str:
    """A cell's name, also of its directory."""
    return "__".join(labels.values())


class _Maker(NamedTuple):
    """What the runs of all cells are made of.

    Attributes:
        settings: The grid file.
        base: Plain settings that cells start from.
        changes: Those of the command line.
        kinds: What recipes there are.
        read: Reads the recipe file of a run that cells need, once.
    """

    settings: GridSettings
    base: dict[str, Any]
    changes: Settings
    kinds: tuple[Kind, ...]
    read: Callable[[Path], dict[str, Any]]

    def cell(self, labels: dict[str, str]) -> tuple[Run, list[Run]]:
        """A cell and the runs it needs."""
        name, settings = cell_id(labels), self.settings
        words = {**labels, "grid": str(settings.output)}
        content = copy.deepcopy(self.base)
        chosen = [settings.labels(axis)[label] for axis, label in labels.items()]
        for some in (settings.set, *chosen, self.changes):
            apply(content, some)
        content["name"] = settings.name
        content["output"] = str(settings.output / "cells" / name)
        kind = kind_of(content, self.kinds, "base and set")
        if kind.last_file != RESULTS:
            raise ValueError("cells must be task recipes, which have scores; other recipes go into `before`")
        recipe = find_object(kind.check)(fill(content, words), name)
        wanted = [b for b in settings.before if all(labels[axis] in some for axis, some in b.only.items())]
        needed = [self.first(before, words) for before in wanted]
        teacher = find_object(kind.teacher)(recipe) if kind.teacher else None
        if teacher is not None:
            needed.append(_first_run(teacher, kind))
        run = Run(
            id=name,
            kind=kind,
            recipe=recipe,
            fingerprint=fingerprint(recipe),
            axes=labels,
            needs=tuple(run.directory for run in needed),
            teacher=teacher.output if teacher is not None else None,
        )
        return run, needed

    def first(self, before: Before, words: Mapping[str, str]) -> Run:
        """A run that a cell needs."""
        path = Path(fill(before.base, words))
        content = copy.deepcopy(self.read(path))
        apply(content, before.set)
        kind = kind_of(content, self.kinds, str(path))
        return _first_run(find_object(kind.check)(fill(content, words), str(path)), kind)


def _first_run(recipe: Any, kind: Kind) -> Run:
    return Run(id=str(recipe.output), kind=kind, recipe=recipe, fingerprint=fingerprint(recipe), axes={})


def apply(content: Any, settings: Settings) -> None:
    """Set recipe values by path in plain settings; a number in a path indexes a list, `*` means all its entries.

    Raises:
        ValueError: If a path leads through something that has no keys.
    """
    for path, value in settings.items():
        _set(content, path.split("."), value, path)


def _set(place: Any, parts: list[str], value: Any, path: str) -> None:
    part, *rest = parts
    for key in _keys(place, part, path):
        if not rest:
            place[key] = copy.deepcopy(value)
            continue
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        _set(place[key], rest, value, path)


def _keys(place: Any, part: str, path: str) -> list[Any]:
    """The keys or indices of `place` that a part of a path means."""
    if isinstance(place, dict) and part != "*":
        return [part]
    if isinstance(place, list) and part == "*":
        return list(range(len(place)))
    if isinstance(place, list) and part.isdigit() and int(part) < len(place):
        return [int(part)]
    raise ValueError(f"{path}: there is no place {part!r} to set something in")


def fill(value: Any, words: Mapping[str, str]) -> Any:
    """Replace `{word}` in every string of a value; other braces stay."""
    if isinstance(value, str):
        return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), value)
    if isinstance(value, dict):
        return {key: fill(inner, words) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, words) for inner in value]
    return value
