"""Scores against loops written from the definitions, and the cases where a score is undefined."""

import json

import numpy as np
import pytest

from dsdistill.tasks.glue import GLUE
from dsdistill.tasks.metrics import majority_baseline, predict, scores
from dsdistill.tasks.settings import DataSettings
from dsdistill.tasks.spec import METRICS, TaskSpec, output_columns
from dsdistill.tasks.task import task_spec
from tests.tasks import oracles


def spec_of(problem, num_labels, metrics=None) -> TaskSpec:
    labels = tuple(f"l{i}" for i in range(num_labels))
    return TaskSpec(name="own", problem=problem, labels=labels, metrics=metrics or METRICS[problem])


@pytest.mark.parametrize("seed", range(5))
def test_two_classes(seed):
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(50, 2)).astype(np.float32)
    labels = rng.integers(0, 2, 50)
    predicted = [int(b > a) for a, b in outputs.tolist()]
    found = scores(spec_of("classification", 2), labels, outputs)
    assert found == pytest.approx(
        {
            "accuracy": oracles.accuracy(labels, predicted),
            "matthews": oracles.matthews(labels.tolist(), predicted),
            "f1": oracles.f1(labels.tolist(), predicted),
            "f1_macro": oracles.f1_macro(labels.tolist(), predicted),
        },
        abs=1e-12,
    )
    assert all(type(value) is float for value in found.values())


def test_many_classes():
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(60, 5)), rng.integers(0, 5, 60)
    predicted = [row.index(max(row)) for row in outputs.tolist()]
    found = scores(spec_of("classification", 5, ("f1_macro", "accuracy")), labels, outputs)
    assert list(found) == ["f1_macro", "accuracy"]
    assert found["f1_macro"] == pytest.approx(oracles.f1_macro(labels.tolist(), predicted), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_regression(ties):
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 5, 40).astype(np.float32)
    outputs = labels[:, None] + rng.normal(size=(40, 1)).astype(np.float32)
    if ties:
        labels, outputs = np.round(labels), np.round(outputs)
    x, y = labels.tolist(), outputs[:, 0].tolist()
    found = scores(spec_of("regression", 0), labels, outputs)
    assert found == pytest.approx({"spearman": oracles.spearman(x, y), "pearson": oracles.pearson(x, y)}, abs=1e-9)


def test_multi_label():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(50, 4)).astype(np.float32)
    labels = (rng.uniform(size=(50, 4)) < 0.3).astype(np.float32)
    predicted = [tuple(int(x > 0) for x in row) for row in outputs.tolist()]
    micro, macro, subset = oracles.multi_label([tuple(map(int, row)) for row in labels.tolist()], predicted)
    found = scores(spec_of("multi_label", 4), labels, outputs)
    assert found == pytest.approx({"f1_micro": micro, "f1_macro": macro, "subset_accuracy": subset}, abs=1e-12)


def test_undefined_scores_are_zero_and_json(recwarn):
    constant = np.tile(np.array([[2.0, 1.0]]), (6, 1))
    labels = np.array([0, 1, 0, 1, 1, 1])
    found = scores(spec_of("classification", 2), labels, constant)
    assert (found["matthews"], found["f1"]) == (0, 0)
    numbers = scores(spec_of("regression", 0), labels.astype(np.float32), np.ones((6, 1)))
    assert numbers == {"spearman": 0, "pearson": 0}
    assert scores(spec_of("regression", 0), np.ones(1), np.ones((1, 1))) == {"spearman": 0, "pearson": 0}
    assert scores(spec_of("multi_label", 2), np.zeros((6, 2)), -constant)["f1_micro"] == 0
    json.dumps([found, numbers], allow_nan=False)
    assert not recwarn


def test_the_baseline_knows_train_only():
    train, dev = np.array([2, 2, 1, 0]), np.array([0, 2, 2, 1])
    found = majority_baseline(spec_of("classification", 3, ("accuracy", "matthews")), train, dev)
    assert found == {"accuracy": 0.5, "matthews": 0}
    train = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    dev = np.array([[1, 0], [1, 1], [0, 1], [0, 1]], np.float32)
    assert majority_baseline(spec_of("multi_label", 2), train, dev)["subset_accuracy"] == 0.25
    numbers = majority_baseline(spec_of("regression", 0), np.array([1.0, 2.0]), np.array([1.0, 3.0]))
    assert numbers == {"spearman": 0, "pearson": 0}


def test_outputs_that_say_nothing_are_refused():
    spec = spec_of("classification", 2)
    with pytest.raises(ValueError, match=r"\(3, 4\), but task own has \(rows, 2\)"):
        predict(spec, np.zeros((3, 4)))
    with pytest.raises(ValueError, match="row 1 are not finite"):
        predict(spec, np.array([[0, 1], [np.nan, 1]]))
    with pytest.raises(ValueError, match=r"labels of shape \(2,\) for predictions of shape \(3,\)"):
        scores(spec, np.zeros(2, np.int64), np.zeros((3, 2)))


def test_glues_metrics():
    primary = {name: task_spec(name, DataSettings()).primary for name in GLUE}
    assert {name for name, metric in primary.items() if metric == "accuracy"} == {"sst2", "mnli", "qnli", "rte", "wnli"}
    assert task_spec("mrpc", DataSettings()).metrics == task_spec("qqp", DataSettings()).metrics == ("f1", "accuracy")
    assert task_spec("stsb", DataSettings()).metrics == ("spearman", "pearson")
    assert task_spec("cola", DataSettings(metrics=["accuracy"])).primary == "accuracy"


def test_the_label_order_of_a_model_is_compared_with_the_tasks():
    spec = task_spec("mnli", DataSettings())
    same = {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert output_columns(spec, same, "m") == (0, 1, 2)
    assert output_columns(spec, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, "m") == (0, 1, 2)
    assert output_columns(spec, {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}, "m") == (2, 1, 0)
    with pytest.raises(ValueError, match="m has the labels negative, neutral, positive, but task mnli has"):
        output_columns(spec, {0: "negative", 1: "neutral", 2: "positive"}, "m")
    with pytest.raises(ValueError, match="m has 2 outputs, but task mnli needs 3"):
        output_columns(spec, {0: "a", 1: "b"}, "m")
    assert output_columns(task_spec("stsb", DataSettings()), {0: "score"}, "m") == (0,)
