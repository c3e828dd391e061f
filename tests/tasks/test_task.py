"""Every task in every form opens to the same rows; settings without sense are refused."""

import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from dsdistill.tasks.rows import Rows
from dsdistill.tasks.settings import DataSettings
from dsdistill.tasks.task import Task, open_task, task_spec
from tests.tasks.glue_files import (
    FOLDERS,
    LABEL_COLUMNS,
    LABELLED,
    PARTS,
    TEXT_COLUMNS,
    sentences,
    table_rows,
    write_glue,
    write_tsv,
    written_labels,
)

NAMES = tuple(FOLDERS)
HUB_TEXTS = {"mrpc": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}
HUB_LABELS = {  # as the hub's `glue` gives them
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "stsb": (),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
}
PRIMARY = {"cola": "matthews", "mrpc": "f1", "qqp": "f1", "stsb": "spearman"}


def decoded(rows: Rows, tokenizer) -> list[str]:
    return [tokenizer.decode(rows.ids[a:b]) for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)]


def as_model_sees(texts: tuple[str, ...]) -> str:
    return "[CLS] " + " [SEP] ".join(texts) + " [SEP]"


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def own(directory: Path, *, number: int = 8, label=lambda i: "ab"[i % 2]) -> list[dict]:
    return [{"text": text, "label": label(i)} for i, text in enumerate(sentences(number, seed=3))]


def open_own(tmp_path: Path, tokenizer, rows: list[dict], dev: list[dict] | None = None, **changes) -> Task:
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    dev_path = write_jsonl(tmp_path / "dev.jsonl", dev or rows)
    return open_task("own", DataSettings(train=train, dev=dev_path, **changes), tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_glue_folders_open(tmp_path, tokenizer, name):
    folder = write_glue(tmp_path, name)
    task = open_task(name, DataSettings(directory=tmp_path), tokenizer)
    parts = PARTS.get(name, ("",))
    assert list(task.dev) == [f"dev{part}" for part in parts]
    assert list(task.test) == [f"test{part}" for part in parts]
    assert (task.train.num_rows, *(rows.num_rows for rows in task.dev.values())) == (12, *[6] * len(parts))
    assert task.spec.labels == HUB_LABELS[name]
    assert task.spec.primary == PRIMARY.get(name, "accuracy")
    assert task.spec == task_spec(name, DataSettings(directory="nowhere"))
    expected = table_rows(name, LABELLED[name], 12, seed=1)
    assert decoded(task.train, tokenizer) == [
        as_model_sees(tuple(row[column] for column in TEXT_COLUMNS[name])) for row in expected
    ]
    if name == "stsb":
        assert task.train.labels is not None
        assert task.train.labels.dtype == np.float32
        assert task.train.labels.tolist() == pytest.approx([0, 5, 2.5, 3.8] * 3)
    else:
        assert task.train.labels is not None
        assert task.train.labels.tolist() == [i % len(HUB_LABELS[name]) for i in range(12)]
    assert all(rows.labels is None for rows in task.test.values())
    assert task.notes == ()
    alone = open_task(name, DataSettings(directory=folder), tokenizer)
    assert alone.train.fingerprint() == task.train.fingerprint()


def test_absent_test_and_mismatched_files_are_absent_splits(tmp_path, tokenizer):
    folder = write_glue(tmp_path, "mnli", test=0)
    (folder / "dev_mismatched.tsv").unlink()
    task = open_task("mnli", DataSettings(directory=tmp_path), tokenizer)
    assert (list(task.dev), list(task.test)) == (["dev_matched"], [])
    (folder / "dev_matched.tsv").unlink()
    with pytest.raises(ValueError, match=r"MNLI: no dev_matched\.tsv there"):
        open_task("mnli", DataSettings(directory=tmp_path), tokenizer)
    with pytest.raises(ValueError, match=r"nowhere: no train\.tsv there"):
        open_task("mnli", DataSettings(directory=tmp_path / "nowhere"), tokenizer)


def test_labels_may_be_written_by_name_or_number(tmp_path, tokenizer):
    folder = write_glue(tmp_path, "sst2")
    before = open_task("sst2", DataSettings(directory=folder), tokenizer)
    for path in (folder / "train.tsv", folder / "dev.tsv"):
        path.write_text(path.read_text().replace("\t0\n", "\tnegative\n").replace("\t1\n", "\tpositive\n"))
    after = open_task("sst2", DataSettings(directory=folder), tokenizer)
    assert after.train.fingerprint() == before.train.fingerprint()
    assert after.dev["dev"].fingerprint() == before.dev["dev"].fingerprint()


def write_hub(root: Path, name: str, config: str, labels: tuple[str, ...], *, test: bool = True) -> Path:
    """A local directory that `load_dataset(directory, config)` reads as it would read the hub's `glue`."""
    label = datasets.ClassLabel(names=list(labels)) if labels else datasets.Value("float32")
    columns = HUB_TEXTS.get(name, TEXT_COLUMNS[name])
    features = {**{column: datasets.Value("string") for column in columns}, "label": label}
    kinds = {"train": (12, 1)}
    for seed, part in enumerate(PARTS.get(name, ("",)), 2):
        kinds[f"validation{part}"] = (6, seed)
        if test:
            kinds[f"test{part}"] = (4, seed + 10)
    (root / config).mkdir(parents=True)
    listed = []
    for split, (count, seed) in kinds.items():
        rows = table_rows(name, LABELLED[name], count, seed)
        content: dict = {new: [row[old] for row in rows] for new, old in zip(columns, TEXT_COLUMNS[name], strict=True)}
        written = [row[LABEL_COLUMNS.get(name, "label")] for row in rows]
        numbers = [float(x) if name == "stsb" else written_labels(name).index(x) for x in written]
        content["label"] = [-1] * count if split.startswith("test") else numbers
        table = datasets.Dataset.from_dict(content, features=datasets.Features(features))
        table.to_parquet(root / config / f"{split}.parquet")
        listed.append({"split": split, "path": f"{config}/{split}.parquet"})
    configs = json.dumps([{"config_name": config, "data_files": listed}])
    (root / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    return root


@pytest.fixture(autouse=True)
def _hub_cache_of_this_test(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", ["sst2", "stsb", "mnli"])
def test_hub_gives_the_same_rows_as_the_folder(tmp_path, tokenizer, name):
    write_glue(tmp_path, name)
    hub = write_hub(tmp_path / "hub", name, name, HUB_LABELS[name])
    from_files = open_task(name, DataSettings(directory=tmp_path), tokenizer)
    from_hub = open_task(name, DataSettings(hub=str(hub)), tokenizer)
    assert from_hub.spec == from_files.spec
    assert from_hub.train.fingerprint() == from_files.train.fingerprint()
    for mine, theirs in ((from_hub.dev, from_files.dev), (from_hub.test, from_files.test)):
        assert {k: v.fingerprint() for k, v in mine.items()} == {k: v.fingerprint() for k, v in theirs.items()}


def test_another_label_order_on_the_hub_is_refused(tmp_path, tokenizer):
    hub = write_hub(tmp_path / "hub", "sst2", "sst2", ("positive", "negative"))
    with pytest.raises(ValueError, match="labels are positive, negative, not negative, positive, in order"):
        open_task("sst2", DataSettings(hub=str(hub)), tokenizer)


def test_own_hub_data_set_keeps_its_label_order(tmp_path, tokenizer):
    hub = write_hub(tmp_path / "hub", "sst2", "plain", ("worse", "better"))
    settings = DataSettings(hub=str(hub), hub_config="plain", text="sentence")
    task = open_task("reviews", settings, tokenizer)
    assert task.spec.labels == task_spec("reviews", settings).labels == ("worse", "better")
    assert task.test["test"].labels is None
    scored_on_train = open_task("reviews", settings.model_copy(update={"hub_dev": "train"}), tokenizer)
    assert scored_on_train.dev["dev"].fingerprint() == task.train.fingerprint()
    with pytest.raises(ValueError, match="no split nothing; there are train, validation, test"):
        open_task("reviews", settings.model_copy(update={"hub_dev": "nothing"}), tokenizer)
    with pytest.raises(ValueError, match="no column 'text'; the columns are 'sentence', 'label'"):
        open_task("reviews", settings.model_copy(update={"text": None}), tokenizer)
    with pytest.raises(ValueError, match="is not readable as a hub data set"):
        open_task("reviews", DataSettings(hub=str(tmp_path / "absent")), tokenizer)
    with pytest.raises(ValueError, match="configuration other, is not readable"):
        open_task("reviews", settings.model_copy(update={"hub_config": "other"}), tokenizer)


def test_own_files_of_all_formats_give_the_same_rows(tmp_path, tokenizer):
    rows = own(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        lines = [delimiter.join(("label", "text")), *(delimiter.join((r["label"], r["text"])) for r in rows)]
        (tmp_path / f"a.{suffix}").write_text("\n".join(lines))
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress((tmp_path / "a.tsv").read_bytes()))
    prints = set()
    for suffix in ("jsonl", "parquet", "csv", "tsv", "tsv.gz"):
        path = tmp_path / f"a.{suffix}"
        task = open_task("own", DataSettings(train=path, dev=[path], test=path), tokenizer)
        assert task.spec.labels == ("a", "b")
        prints |= {task.train.fingerprint(), task.dev["dev"].fingerprint(), task.test["test"].fingerprint()}
    assert len(prints) == 1


def test_own_pairs_in_several_files(tmp_path, tokenizer):
    lines = ["a\tb\tc", *(f"the film {w}\tthe story {w}\t{i}" for i, w in enumerate(("good", "bad", "great")))]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    settings = DataSettings(
        train=[tmp_path / "a.tsv", tmp_path / "a.tsv"], dev=tmp_path / "a.tsv", text="a", text_pair="b", label="c"
    )
    task = open_task("own", settings, tokenizer)
    assert task.train.num_rows == 6
    assert decoded(task.train, tokenizer)[4] == "[CLS] the film bad [SEP] the story bad [SEP]"
    assert task.train.token_types is not None
    assert task.train.token_types[: task.train.offsets[1]].tolist() == [0] * 5 + [1] * 4
    assert task.pairs == ["the story good", "the story bad", "the story great"] * 2


def test_the_right_one_of_several_files_is_named(tmp_path, tokenizer):
    rows = own(tmp_path)
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", rows) for i in range(3)]
    write_jsonl(paths[1], [*rows[:4], {"text": "film", "label": "c"}])
    with pytest.raises(ValueError, match=r"1\.jsonl: line 5: label 'c'"):
        open_task("own", DataSettings(train=paths[0], dev=paths), tokenizer)


def test_own_test_files_with_and_without_labels(tmp_path, tokenizer):
    rows = own(tmp_path)
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    for test, labels in (
        ([{"text": r["text"]} for r in rows], None),
        ([{"text": r["text"], "label": None} for r in rows], None),
        (rows, [0, 1] * 4),
    ):
        other = write_jsonl(tmp_path / "test.jsonl", test)
        found = open_task("own", DataSettings(train=path, dev=path, test=other), tokenizer).test["test"].labels
        assert (found if found is None else found.tolist()) == labels
    write_jsonl(other, [*rows, {"text": "the end"}])
    with pytest.raises(ValueError, match=r"test\.jsonl: line 9: no 'label', but other rows have one"):
        open_task("own", DataSettings(train=path, dev=path, test=other), tokenizer)


def test_labels_are_sorted_numbers_by_value(tmp_path, tokenizer):
    task = open_own(tmp_path, tokenizer, own(tmp_path, number=24, label=lambda i: i % 12))
    assert task.spec.labels == tuple(map(str, range(12)))
    assert task.spec.metrics == ("accuracy", "f1_macro", "matthews")
    task = open_own(tmp_path, tokenizer, own(tmp_path, label=lambda i: bool(i % 2)))
    assert task.spec.labels == ("false", "true")
    assert task.spec.metrics == ("accuracy", "f1", "matthews")


def test_given_label_order_is_kept_and_numbers_follow_it(tmp_path, tokenizer):
    rows = own(tmp_path)
    settings = {"labels": ["b", "a", "never"]}
    by_name = open_own(tmp_path, tokenizer, rows, **settings)
    assert by_name.spec.labels == ("b", "a", "never")
    assert by_name.train.labels is not None
    assert by_name.train.labels.tolist() == [1, 0] * 4
    by_number = open_own(tmp_path, tokenizer, [{**r, "label": "ba".index(r["label"])} for r in rows], **settings)
    assert by_number.train.fingerprint() == by_name.train.fingerprint()
    with pytest.raises(ValueError, match=r"train\.jsonl: line 1: label '0' is not one of task own: 1, 2"):
        open_own(tmp_path, tokenizer, own(tmp_path, label=lambda i: i % 2), labels=["1", "2"])


def test_labels_that_train_does_not_know_are_refused(tmp_path, tokenizer):
    rows = own(tmp_path)
    dev = [*rows[:3], {"text": "a film", "label": "c"}]
    with pytest.raises(ValueError, match=r"dev\.jsonl: line 4: label 'c' is not one of task own: a, b"):
        open_own(tmp_path, tokenizer, rows, dev)
    with pytest.raises(ValueError, match=r"line 1 and all others have the labels \['a'\]; 2 are needed"):
        open_own(tmp_path, tokenizer, rows[:1], rows[:1])


def test_multi_label_by_list_and_by_text(tmp_path, tokenizer):
    lists = [["x", "y"], [], ["y"], ["z", "x"], None]
    rows = [{"text": t, "label": label} for t, label in zip(sentences(5), lists, strict=True)]
    task = open_own(tmp_path, tokenizer, rows, problem="multi_label")
    expected = [[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]]
    assert task.spec.labels == ("x", "y", "z")
    assert task.spec.num_outputs == 3
    assert task.train.labels is not None
    assert task.train.labels.tolist() == expected
    assert task.train.batch(np.array([3])).labels is not None
    assert task.train.labels.dtype == np.float32
    text = [{**r, "label": " | ".join(label or [])} for r, label in zip(rows, lists, strict=True)]
    assert open_own(tmp_path, tokenizer, text, problem="multi_label").train.fingerprint() == task.train.fingerprint()
    with pytest.raises(ValueError, match=r"line 1: label 'x\|y' holds '\|'"):
        open_own(tmp_path, tokenizer, [{"text": "a", "label": ["x|y"]}], problem="multi_label")
    with pytest.raises(ValueError, match="labels 3 are neither a list nor text"):
        open_own(tmp_path, tokenizer, [{"text": "a", "label": 3}], problem="multi_label")


def test_regression(tmp_path, tokenizer):
    task = open_own(tmp_path, tokenizer, own(tmp_path, label=lambda i: i / 4), problem="regression")
    assert (task.spec.labels, task.spec.num_outputs, task.spec.primary) == ((), 1, "spearman")
    assert task.train.labels is not None
    assert task.train.labels.tolist() == [i / 4 for i in range(8)]
    with pytest.raises(ValueError, match=r"label 'much' is not a number"):
        open_own(tmp_path, tokenizer, own(tmp_path, label=lambda i: "much"), problem="regression")
    for rows in (own(tmp_path, label=lambda i: i / 4), own(tmp_path, label=lambda i: str(i / 4))):
        with pytest.raises(ValueError, match="problem: regression"):
            open_own(tmp_path, tokenizer, rows)


def test_train_rows_takes_the_first_rows_of_train_only(tmp_path, tokenizer):
    write_glue(tmp_path, "mrpc")
    whole = open_task("mrpc", DataSettings(directory=tmp_path), tokenizer)
    few = open_task("mrpc", DataSettings(directory=tmp_path, train_rows=5), tokenizer)
    assert few.train.fingerprint() == whole.train.first(5).fingerprint()
    assert (len(few.texts), len(few.pairs or ()), few.dev["dev"].num_rows) == (5, 5, 6)
    all_rows = open_task("mrpc", DataSettings(directory=tmp_path, train_rows=500), tokenizer)
    assert all_rows.train.fingerprint() == whole.train.fingerprint()


def test_own_files_for_a_glue_task_have_the_hubs_columns(tmp_path, tokenizer):
    rows = [{"sentence": r["text"], "label": r["label"]} for r in own(tmp_path, label=lambda i: i % 2)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    task = open_task("cola", DataSettings(train=path, dev=path), tokenizer)
    assert task.spec.primary == "matthews"
    assert task.train.num_rows == 8
    renamed = DataSettings(train=path, dev=path, text="sentence", text_pair="sentence")
    with pytest.raises(ValueError, match=r"GLUE's cola has 1 text\(s\) in a row"):
        open_task("cola", renamed, tokenizer)


def test_broken_rows_are_refused_or_left_out_and_counted(tmp_path, tokenizer):
    folder = write_glue(tmp_path, "qqp")
    train = folder / "train.tsv"
    before = open_task("qqp", DataSettings(directory=folder), tokenizer)
    lines = train.read_text().splitlines()
    broken = [
        *lines[:3],
        "9\tq\tr\ta question that goes on",
        "in the next line\t?\t1",
        *lines[3:],
        "9\tq\tr\t \tfilm\t1",
    ]
    train.write_text("\n".join(broken) + "\n")
    with pytest.raises(ValueError, match=r"train\.tsv: line 4: 4 fields, but the header has 6"):
        open_task("qqp", DataSettings(directory=folder), tokenizer)
    task = open_task("qqp", DataSettings(directory=folder, skip_broken=True), tokenizer)
    assert task.train.fingerprint() == before.train.fingerprint()
    assert task.notes == (f"train: 3 broken rows left out; the first: {train}: line 4: 4 fields, but the header has 6",)
    assert task_spec("qqp", DataSettings(directory=folder)) == task.spec


def test_no_row_of_a_test_split_is_left_out(tmp_path, tokenizer):
    folder = write_glue(tmp_path, "qqp")
    test = folder / "test.tsv"
    test.write_text("id\tquestion1\tquestion2\n0\tthe film\t\n1\tthe story\tthe plot\n")
    with pytest.raises(ValueError, match=r"test\.tsv: line 2: column 'question2' has no text"):
        open_task("qqp", DataSettings(directory=folder), tokenizer)
    task = open_task("qqp", DataSettings(directory=folder, skip_broken=True), tokenizer)
    assert decoded(task.test["test"], tokenizer)[0] == "[CLS] the film [SEP] [SEP]"
    assert "test: 1 broken rows without text kept" in task.notes[0]
    test.write_text("id\tquestion1\tquestion2\n0\tthe film\n1\tthe story\tthe plot\n")
    with pytest.raises(ValueError, match=r"test\.tsv: line 2: 2 fields"):
        open_task("qqp", DataSettings(directory=folder, skip_broken=True), tokenizer)


def test_long_rows_are_cut_and_counted(tmp_path, tokenizer):
    folder = write_glue(tmp_path, "rte")
    rows = table_rows("rte", LABELLED["rte"], 3, seed=5)
    rows[1]["sentence1"] = "film " * 30
    rows[2] |= {"sentence1": "film " * 5, "sentence2": "story " * 8}  # exactly 16 tokens
    write_tsv(folder / "train.tsv", LABELLED["rte"], [rows[1], rows[2]])
    task = open_task("rte", DataSettings(directory=folder, max_length=16), tokenizer)
    assert task.train.num_cut == 1
    assert task.notes[0] == "train: 1 of 2 rows are longer than max_length=16 tokens and were cut"
    assert np.diff(task.train.offsets).tolist() == [16, 16]
    with pytest.raises(ValueError, match="max_length"):
        DataSettings(directory=folder, max_length=4)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cola", {"problem": "regression"}, "data.problem has no effect on GLUE's cola"),
        ("cola", {"labels": ["a", "b"]}, "data.labels has no effect"),
        ("cola", {"text": "sentence"}, "data.text has no effect on GLUE's own columns"),
        ("cola", {"metrics": ["pearson"]}, "'pearson' is not one of accuracy, matthews"),
        ("mnli", {"metrics": ["f1"]}, "mnli has 3; use 'f1_macro'"),
        ("own", {}, "none of GLUE's tasks"),
        ("own", {"directory": "x"}, "data.directory is for GLUE's tasks"),
        ("own", {"train": "a.txt", "dev": "a.csv"}, "a.txt"),
        ("own", {"train": "a.csv", "dev": "a.csv", "metrics": ["bleu"]}, "'bleu' is not one of"),
        ("own", {"train": "a.csv", "dev": "a.csv", "labels": ["a"]}, "two at least"),
        ("own", {"train": "a.csv", "dev": "a.csv", "labels": ["a", "b\t"]}, "separate"),
        ("own", {"train": "a.csv", "dev": "a.csv", "labels": ["a"], "problem": "regression"}, "no effect on regres"),
        ("own", {"train": "missing.csv", "dev": "a.csv"}, "missing.csv: no such file"),
    ],
)
def test_settings_that_do_not_fit_the_task_are_refused(name, settings, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the text is compared below
        task_spec(name, DataSettings(**settings))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directory": "x", "hub": "y"}, "directory and hub are both given"),
        ({"directory": "x", "train": "a.csv", "dev": "a.csv"}, "directory and train/dev are both given"),
        ({"train": "a.csv"}, "dev is missing"),
        ({"test": "a.csv"}, "train is missing"),
        ({"train": []}, "train"),
        ({"hub_config": "x"}, "no effect without hub"),
        ({"text_pair": "b"}, "name both"),
        ({"labels": ["a", "a"]}, "twice"),
        ({"metrics": ["f1", "f1"]}, "twice"),
        ({"train_rows": 0}, "train_rows"),
        ({"augment": {"copies": 0}}, "copies"),
        ({"augment": {"probability": 0}}, "probability"),
        ({"sort": True}, "sort"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DataSettings(**settings)
