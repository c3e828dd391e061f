"""What a task asks of a model: the kind of problem, the classes in order, the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsdistill.core import Problem

METRICS: dict[Problem, tuple[str, ...]] = {
    "classification": ("accuracy", "matthews", "f1", "f1_macro"),
    "regression": ("spearman", "pearson"),
    "multi_label": ("f1_micro", "f1_macro", "subset_accuracy"),
}
"""Metrics that are defined for each kind of problem; `f1` for two classes only, the second being the positive one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """A task without its data.

    Attributes:
        name: One of GLUE's nine, or an own name.
        problem: What is learned.
        labels: Class names in the order of the model's outputs; empty for regression.
        metrics: Names of the scores, the primary one first.
        bounds: Smallest and largest label of regression, where known.
    """

    name: str
    problem: Problem
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    bounds: tuple[float, float] | None = None

    @property
    def primary(self) -> str:
        """The score by which models are compared."""
        return self.metrics[0]

    @property
    def num_outputs(self) -> int:
        """Outputs of the model for one row: one per class, one for regression."""
        return len(self.labels) or 1


def default_metrics(problem: Problem, num_labels: int) -> tuple[str, ...]:
    """The metrics of an own task that names none, the primary one first."""
    if problem == "classification":
        return ("accuracy", "f1" if num_labels == 2 else "f1_macro", "matthews")
    return METRICS[problem]


def check_metrics(spec: TaskSpec) -> TaskSpec:
    """The spec itself, if its metrics are defined for it.

    Raises:
        ValueError: If a metric is unknown or has no meaning for the problem.
    """
    known = METRICS[spec.problem]
    for metric in spec.metrics:
        if metric not in known:
            raise ValueError(f"metric {metric!r} is not one of {', '.join(known)}, which {spec.problem} has")
        if metric == "f1" and len(spec.labels) != 2:
            raise ValueError(f"metric 'f1' is for two classes, but {spec.name} has {len(spec.labels)}; use 'f1_macro'")
    return spec


def output_columns(spec: TaskSpec, id2label: Mapping[int, str], where: str) -> tuple[int, ...]:
    """Which output of a given model stands for which label of the task.

    Args:
        spec: The task.
        id2label: From the model's config; names like LABEL_0 say nothing and are taken to be in the task's order.
        where: The model, for messages.

    Returns:
        For each label of the task the model's output; (0, 1, 2, ...) if the orders agree.

    Raises:
        ValueError: If the model has another number of outputs or other label names.
    """
    if len(id2label) != spec.num_outputs:
        raise ValueError(f"{where} has {len(id2label)} outputs, but task {spec.name} needs {spec.num_outputs}")
    outputs = sorted(id2label)
    if tuple(id2label[output] for output in outputs) == spec.labels:
        return tuple(outputs)
    names = [_plain(str(id2label[output])) for output in outputs]
    generic = [f"label_{output}" for output in outputs]
    if spec.problem == "regression" or names in (generic, [str(output) for output in outputs]):
        return tuple(outputs)
    wanted = [_plain(label) for label in spec.labels]
    if sorted(names) != sorted(wanted) or len(set(wanted)) < len(wanted):
        raise ValueError(f"{where} has the labels {', '.join(names)}, but task {spec.name} has {', '.join(wanted)}")
    return tuple(outputs[names.index(label)] for label in wanted)


def _plain(label: str) -> str:
    return label.strip().lower().replace(" ", "_").replace("-", "_")
