"""The table of objectives: a function with its signals, equation and paper under the name that recipes use."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from dsdistill.core import Batch, Features, LayerPairs, ModelShape, Problem, Signal

Signals = frozenset[Signal]
SUPPLIED = frozenset({"head", "gather", "num_examples", "problem"})
"""Keyword parameters that the `Distiller` supplies to objectives which name them; recipes cannot set them."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One entry of the table.

    Attributes:
        name: The name in recipes.
        function: `function(student, teacher, batch, pairs, *, ...)` returning named scalar terms. Its keyword-only
            parameters, with their annotations and defaults, are what a recipe can set.
        student: Signals read from the student, or a function of the parameters that tells.
        teacher: The same for the teacher; empty for hard-label objectives.
        head: Makes the term's own module (a projection, a memory bank), or None where these models need none;
            it lives in the `Distiller` and comes back as keyword `head`. Also the place to refuse models that cannot
            be compared, before anything runs.
        equation: One line, ASCII.
        paper: Where the equation is from.
    """

    name: str
    function: Callable[..., dict[str, Tensor]]
    student: Signals | Callable[..., Signals]
    teacher: Signals | Callable[..., Signals]
    head: Callable[..., nn.Module | None] | None
    equation: str
    paper: str

    def needs(self, params: Mapping[str, Any]) -> tuple[Signals, Signals]:
        """Signals wanted from (student, teacher) under these parameters."""
        values = self._filled(params)
        student = self.student(**values) if callable(self.student) else self.student
        teacher = self.teacher(**values) if callable(self.teacher) else self.teacher
        return student, teacher

    @cached_property
    def params(self) -> dict[str, inspect.Parameter]:
        """The parameters a recipe can set, in the order of the signature."""
        return {name: p for name, p in self._keywords.items() if name not in SUPPLIED}

    @cached_property
    def supplied(self) -> frozenset[str]:
        """Which of the `SUPPLIED` keywords the function takes."""
        return SUPPLIED & self._keywords.keys()

    @cached_property
    def _keywords(self) -> dict[str, inspect.Parameter]:
        signature = inspect.signature(self.function, eval_str=True)
        return {name: p for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}

    def __call__(
        self,
        student: Features,
        teacher: Features | None,
        batch: Batch,
        pairs: LayerPairs,
        params: Mapping[str, Any],
        **supplied: Any,
    ) -> dict[str, Tensor]:
        """Compute the terms; of `supplied` (head, gather, num_examples, problem), the function gets what it names."""
        wanted = {name: value for name, value in supplied.items() if name in self.supplied}
        return self.function(student, teacher, batch, pairs, **params, **wanted)

    def make_head(
        self,
        student: ModelShape,
        teacher: ModelShape,
        pairs: LayerPairs,
        params: Mapping[str, Any],
        *,
        num_examples: int | None = None,
        problem: Problem = "classification",
    ) -> nn.Module | None:
        """The term's own module, or None.

        Args:
            student: Sizes of the student.
            teacher: Sizes of the teacher.
            pairs: The term's layer pairs.
            params: What the recipe sets; defaults are filled in.
            num_examples: Rows of the training data, for memory banks; None where the head is made to be checked only.
            problem: What the labels are, for objectives on the logits of a task.

        Raises:
            ValueError: If the objective cannot compare these models or layers.
        """
        if self.head is None:
            return None
        return self.head(student, teacher, pairs, num_examples=num_examples, problem=problem, **self._filled(params))

    def _filled(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters with defaults where the recipe is silent."""
        return {name: p.default for name, p in self.params.items() if p.default is not p.empty} | dict(params)


OBJECTIVES: dict[str, Objective] = {}


def objective(
    name: str,
    *,
    student: Signals | set[Signal] | Callable[..., Signals],
    teacher: Signals | set[Signal] | Callable[..., Signals] = frozenset(),
    equation: str,
    paper: str,
    head: Callable[..., nn.Module | None] | None = None,
) -> Callable[[Callable[..., dict[str, Tensor]]], Callable[..., dict[str, Tensor]]]:
    """Enter a function into the table under `name`.

    Raises:
        ValueError: If the name is taken.
    """

    def enter(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        if name in OBJECTIVES:
            raise ValueError(f"objective {name!r} is defined twice; choose another name")
        OBJECTIVES[name] = Objective(
            name=name,
            function=function,
            student=student if callable(student) else frozenset(student),
            teacher=teacher if callable(teacher) else frozenset(teacher),
            head=head,
            equation=equation,
            paper=paper,
        )
        return function

    return enter


def find_objective(name: str) -> Objective:
    """Look an objective up by its name, or by `module:name` for one that lives outside this package.

    Raises:
        ValueError: If there is none; names those that exist.
    """
    module, _, short = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"objective {name!r}: module {module!r} cannot be imported ({error})") from error
    if short not in OBJECTIVES:
        raise ValueError(f"unknown objective {short!r}; known: {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[short]
