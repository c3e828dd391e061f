"""Tiny files in the column layouts that GLUE publishes."""

import random
from pathlib import Path

from tests.conftest import WORDS

_PARSES = ("sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse")
_MNLI = ("index", "promptID", "pairID", "genre", *_PARSES, "sentence1", "sentence2")
_STSB = ("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

FOLDERS = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "qqp": "QQP",
    "stsb": "STS-B",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
    "wnli": "WNLI",
}
LABELLED = {
    "cola": ("source", "label", "mark", "sentence"),
    "sst2": ("sentence", "label"),
    "mrpc": ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    "qqp": ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
    "stsb": (*_STSB, "score"),
    "mnli": (*_MNLI, "label1", "gold_label"),
    "qnli": ("index", "question", "sentence", "label"),
    "rte": ("index", "sentence1", "sentence2", "label"),
    "wnli": ("index", "sentence1", "sentence2", "label"),
}
UNLABELLED = {
    "cola": ("index", "sentence"),
    "sst2": ("index", "sentence"),
    "mrpc": ("index", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    "qqp": ("id", "question1", "question2"),
    "stsb": _STSB,
    "mnli": _MNLI,
    "qnli": ("index", "question", "sentence"),
    "rte": ("index", "sentence1", "sentence2"),
    "wnli": ("index", "sentence1", "sentence2"),
}
TEXT_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("#1 String", "#2 String"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
WRITTEN = {
    "stsb": ("0.000", "5.000", "2.500", "3.8"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": _ENTAILMENT,
    "rte": _ENTAILMENT,
}
PARTS = {"mnli": ("_matched", "_mismatched")}
LABEL_COLUMNS = {"mrpc": "Quality", "qqp": "is_duplicate", "stsb": "score", "mnli": "gold_label"}


def written_labels(name: str) -> tuple[str, ...]:
    return WRITTEN.get(name, ("0", "1"))


def sentences(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 12))) for _ in range(number)]


def table_rows(name: str, columns: tuple[str, ...], count: int, seed: int) -> list[dict[str, str]]:
    """Rows by column name; the i-th row has the i-th label, in turns."""
    texts = sentences(2 * count, seed)
    rows = []
    for i in range(count):
        row = dict.fromkeys(columns, f"x{i}")
        row |= {column: texts[2 * i + at] for at, column in enumerate(TEXT_COLUMNS[name])}
        label = LABEL_COLUMNS.get(name, "label")
        if label in columns:
            row[label] = written_labels(name)[i % len(written_labels(name))]
        rows.append(row)
    return rows


def write_tsv(path: Path, columns: tuple[str, ...], rows: list[dict[str, str]], *, header: bool = True) -> Path:
    lines = ["\t".join(columns)] * header + ["\t".join(row[column] for column in columns) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_glue(root: Path, name: str, *, train: int = 12, dev: int = 6, test: int = 4) -> Path:
    """One task's folder under `root`; no test files if `test` is 0."""
    folder = root / FOLDERS[name]
    folder.mkdir(parents=True)
    has_header = name != "cola"
    columns = LABELLED[name]
    write_tsv(folder / "train.tsv", columns, table_rows(name, columns, train, seed=1), header=has_header)
    if name == "mnli":
        columns = (*_MNLI, *(f"label{i}" for i in range(1, 6)), "gold_label")
    for seed, part in enumerate(PARTS.get(name, ("",)), 2):
        write_tsv(folder / f"dev{part}.tsv", columns, table_rows(name, columns, dev, seed), header=has_header)
        if test:
            rows = table_rows(name, UNLABELLED[name], test, seed + 10)
            write_tsv(folder / f"test{part}.tsv", UNLABELLED[name], rows)
    return folder
