"""Predictions on disk: a table from which every score can be computed again, and GLUE's submission format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsdistill.corpus.files import write_text
from dsdistill.tasks.glue import GLUE
from dsdistill.tasks.labels import SEPARATOR
from dsdistill.tasks.metrics import predict
from dsdistill.tasks.spec import TaskSpec


def write_predictions(
    path: Path,
    spec: TaskSpec,
    sample_ids: NDArray[np.integer],
    labels: NDArray[Any] | None,
    outputs: NDArray[np.floating],
) -> None:
    """Table with a header: row, label, prediction, and one column per output.

    Classes are written by name, several of one row with `|` between them, numbers in full precision. The label is
    empty where there is none. Fields are separated by tabs and never quoted.

    Args:
        path: The file; its folder is made if needed.
        spec: The task.
        sample_ids: (N,), row numbers.
        labels: As in `Rows.labels`, or None.
        outputs: (N, C), or (N, 1) for regression.

    Raises:
        ValueError: If shapes do not fit, or an output is not finite.
    """
    predicted = _written(spec, predict(spec, outputs))
    known = [""] * len(predicted) if labels is None else _written(spec, labels)
    columns = [f"output {label}" for label in spec.labels] or ["output"]
    lines = ["\t".join(("row", "label", "prediction", *columns))]
    for number, label, prediction, output in zip(sample_ids.tolist(), known, predicted, outputs.tolist(), strict=True):
        lines.append("\t".join((str(number), label, prediction, *map(repr, output))))
    _write(path, lines)


def _written(spec: TaskSpec, values: NDArray[Any]) -> list[str]:
    """Labels or predictions as text."""
    if spec.problem == "classification":
        return [spec.labels[number] for number in values.tolist()]
    if spec.problem == "multi_label":
        return [
            SEPARATOR.join(label for label, chosen in zip(spec.labels, row, strict=True) if chosen)
            for row in values.tolist()
        ]
    return [repr(number) for number in values.tolist()]


def write_submission(path: Path, spec: TaskSpec, predictions: NDArray[Any]) -> None:
    """Predictions of a test split as GLUE takes them: a header, then index and prediction, separated by a tab.

    GLUE wants class numbers for some tasks and names for others, and STS-B's scores between 0 and 5; own tasks get
    names.

    Args:
        path: The file (`submission_name`); its folder is made if needed.
        spec: The task.
        predictions: From `predict`, in the order of the test rows.
    """
    glue = GLUE.get(spec.name)
    if glue is not None and glue.problem == "classification" and glue.numbers:
        written = [str(number) for number in predictions.tolist()]
    elif spec.bounds is not None:
        written = [f"{number:.5f}" for number in np.clip(predictions, *spec.bounds).tolist()]
    else:
        written = _written(spec, predictions)
    _write(path, ["index\tprediction", *(f"{index}\t{value}" for index, value in enumerate(written))])


def submission_name(spec: TaskSpec, split: str) -> str:
    """File name of a test split's submission: GLUE's own, or that of the task and the split."""
    glue = GLUE.get(spec.name)
    if glue is None:
        return f"{spec.name}-{split}.tsv"
    return glue.submissions[glue.parts.index(split.removeprefix("test"))]


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")
