"""Scores of a task, by scikit-learn and scipy, and what the simplest guess would get.

Scores are fractions (1 is perfect), whatever GLUE's tables multiply by 100. A score that is undefined is 0, as
scikit-learn has it for Matthews and F1: the correlation of constant numbers, F1 without any positive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsdistill.tasks.spec import TaskSpec

Array = NDArray[Any]


def predict(spec: TaskSpec, outputs: Array) -> Array:
    """What the model's outputs mean.

    Args:
        spec: The task.
        outputs: (N, C) logits, or (N, 1) numbers for regression.

    Returns:
        classification int64 (N,), the largest logit (the first of equal ones); regression (N,) in the outputs' dtype;
        multi_label int64 (N, C), 1 where a logit is positive (a probability above one half).

    Raises:
        ValueError: If the shape is not the task's, or an output is not finite.
    """
    if outputs.ndim != 2 or outputs.shape[1] != spec.num_outputs:
        raise ValueError(f"outputs of shape {outputs.shape}, but task {spec.name} has (rows, {spec.num_outputs})")
    finite = np.isfinite(outputs).all(axis=1)
    if not finite.all():
        raise ValueError(f"the outputs of row {int(np.argmin(finite))} are not finite; nothing can be predicted")
    if spec.problem == "classification":
        return outputs.argmax(axis=1)
    if spec.problem == "multi_label":
        return (outputs > 0).astype(np.int64)
    return outputs[:, 0]


def scores(spec: TaskSpec, labels: Array, outputs: Array) -> dict[str, float]:
    """All metrics of a task.

    Args:
        spec: The task.
        labels: As in `Rows.labels`.
        outputs: (N, C) logits, or (N, 1) numbers for regression; row i belongs to label i.

    Raises:
        ValueError: If shapes do not fit, or an output is not finite.
    """
    return _scores_of(spec, labels, predict(spec, outputs))


def _scores_of(spec: TaskSpec, labels: Array, predictions: Array) -> dict[str, float]:
    if labels.shape != predictions.shape:
        raise ValueError(f"labels of shape {labels.shape} for predictions of shape {predictions.shape}")
    return {metric: float(_METRICS[metric](labels, predictions)) for metric in spec.metrics}


def majority_baseline(spec: TaskSpec, train_labels: Array, dev_labels: Array) -> dict[str, float]:
    """The scores of always guessing what is most frequent in train: a class, for each label yes or no, the mean.

    Correlations with a constant are undefined and given as 0.
    """
    if spec.problem == "classification":
        guess = np.bincount(train_labels, minlength=len(spec.labels)).argmax()
    elif spec.problem == "multi_label":
        guess = train_labels.mean(axis=0, dtype=np.float64) > 0.5
    else:
        guess = train_labels.mean(dtype=np.float64)
    return _scores_of(spec, dev_labels, np.broadcast_to(guess, dev_labels.shape).astype(dev_labels.dtype))


def _accuracy(labels: Array, predictions: Array) -> float:
    from sklearn.metrics import accuracy_score  # scikit-learn and scipy are slow to import

    return accuracy_score(labels, predictions)


def _matthews(labels: Array, predictions: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, predictions)


def _f1(average: str) -> Callable[[Array, Array], float]:
    def score(labels: Array, predictions: Array) -> float:
        from sklearn.metrics import f1_score

        return f1_score(labels, predictions, average=average, zero_division=0)  # pyright: ignore[reportArgumentType]

    return score


def _correlation(name: str) -> Callable[[Array, Array], float]:
    def score(labels: Array, predictions: Array) -> float:
        from scipy import stats

        if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return getattr(stats, name)(labels.astype(np.float64), predictions.astype(np.float64)).statistic

    return score


_METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": _accuracy,
    "subset_accuracy": _accuracy,
    "matthews": _matthews,
    "f1": _f1("binary"),
    "f1_micro": _f1("micro"),
    "f1_macro": _f1("macro"),
    "spearman": _correlation("spearmanr"),
    "pearson": _correlation("pearsonr"),
}
