"""What is written can be read back: by scikit-learn, and by GLUE."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, matthews_corrcoef

from dsdistill.tasks.metrics import predict, scores
from dsdistill.tasks.predictions import submission_name, write_predictions, write_submission
from dsdistill.tasks.settings import DataSettings
from dsdistill.tasks.spec import TaskSpec
from dsdistill.tasks.task import task_spec
from tests.tasks.glue_files import FOLDERS, written_labels

RNG = np.random.default_rng(0)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_scores_can_be_computed_again_from_the_file_alone(tmp_path):
    spec = task_spec("cola", DataSettings())
    outputs, labels = RNG.normal(size=(40, 2)).astype(np.float32), RNG.integers(0, 2, 40)
    path = tmp_path / "predictions" / "dev.tsv"
    write_predictions(path, spec, np.arange(40), labels, outputs)
    rows = read(path)
    assert list(rows[0]) == ["row", "label", "prediction", "output unacceptable", "output acceptable"]
    again = matthews_corrcoef([r["label"] for r in rows], [r["prediction"] for r in rows])
    assert again == pytest.approx(scores(spec, labels, outputs)["matthews"], abs=1e-12)
    columns = [[float(r[f"output {label}"]) for label in spec.labels] for r in rows]
    assert (np.array(columns, np.float32) == outputs).all()


def test_numbers_are_written_in_full(tmp_path):
    spec = task_spec("stsb", DataSettings())
    outputs, labels = RNG.normal(size=(30, 1)).astype(np.float32), RNG.uniform(0, 5, 30).astype(np.float32)
    write_predictions(tmp_path / "dev.tsv", spec, np.arange(30), labels, outputs)
    rows = read(tmp_path / "dev.tsv")
    assert list(rows[0]) == ["row", "label", "prediction", "output"]
    again = pearsonr([float(r["label"]) for r in rows], [float(r["prediction"]) for r in rows]).statistic
    assert again == pytest.approx(scores(spec, labels, outputs)["pearson"], abs=1e-12)


def test_several_labels_and_none(tmp_path):
    spec = TaskSpec(name="own", problem="multi_label", labels=("x", "y", 'z"'), metrics=("f1_micro",))
    outputs, labels = RNG.normal(size=(30, 3)), (RNG.uniform(size=(30, 3)) < 0.4).astype(np.float32)
    write_predictions(tmp_path / "dev.tsv", spec, np.arange(30), labels, outputs)
    rows = read(tmp_path / "dev.tsv")
    back = [[[label in r[key].split("|") for label in spec.labels] for r in rows] for key in ("label", "prediction")]
    assert f1_score(*back, average="micro") == pytest.approx(scores(spec, labels, outputs)["f1_micro"], abs=1e-12)
    write_predictions(tmp_path / "test.tsv", spec, np.arange(5, 35), None, outputs)
    assert {r["label"] for r in read(tmp_path / "test.tsv")} == {""}
    assert read(tmp_path / "test.tsv")[0]["row"] == "5"
    with pytest.raises(ValueError, match="not finite"):
        write_predictions(tmp_path / "nan.tsv", spec, np.arange(30), None, outputs * np.nan)
    assert not (tmp_path / "nan.tsv").exists()


@pytest.mark.parametrize("name", FOLDERS)
def test_submissions_are_in_glues_format(tmp_path, name):
    spec = task_spec(name, DataSettings())
    outputs = RNG.normal(size=(20, spec.num_outputs)) * 4
    predictions = predict(spec, outputs)
    write_submission(tmp_path / "s.tsv", spec, predictions)
    text = (tmp_path / "s.tsv").read_text()
    assert text.startswith("index\tprediction\n0\t")
    assert text.endswith("\n")
    rows = read(tmp_path / "s.tsv")
    assert [r["index"] for r in rows] == list(map(str, range(20)))
    if name == "stsb":
        found = [float(r["prediction"]) for r in rows]
        assert found == pytest.approx(np.clip(outputs[:, 0], 0, 5).tolist(), abs=1e-5)
    else:  # the very words of the training files
        assert [r["prediction"] for r in rows] == [written_labels(name)[i] for i in outputs.argmax(axis=1)]


def test_submission_names():
    spec = {name: task_spec(name, DataSettings()) for name in FOLDERS}
    assert submission_name(spec["mnli"], "test_matched") == "MNLI-m.tsv"
    assert submission_name(spec["mnli"], "test_mismatched") == "MNLI-mm.tsv"
    assert {submission_name(spec[n], "test") for n in FOLDERS if n != "mnli"} == {
        *("CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "QQP.tsv", "STS-B.tsv", "QNLI.tsv", "RTE.tsv", "WNLI.tsv")
    }
    own = TaskSpec(name="own", problem="classification", labels=("a", "b"), metrics=("accuracy",))
    assert submission_name(own, "test") == "own-test.tsv"


def test_own_tasks_get_names(tmp_path):
    own = TaskSpec(name="own", problem="classification", labels=("a", "b"), metrics=("accuracy",))
    write_submission(tmp_path / "s.tsv", own, np.array([1, 0]))
    assert (tmp_path / "s.tsv").read_text() == "index\tprediction\n0\tb\n1\ta\n"
