"""The nine tasks of GLUE (Wang et al. 2019, arXiv:1804.07461): one table of files, columns, labels and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from dsdistill.core import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class GlueTask:
    """One task as GLUE publishes it.

    Attributes:
        folder: Of its TSV files, and stem of its submission.
        texts: Columns of the texts in the TSV files.
        hub_texts: The same on the hub; the label is `label` there.
        label: Column of the label in the TSV files.
        problem: What is learned.
        labels: Class names in GLUE's (and the hub's) order; empty for regression.
        metrics: The primary one first.
        numbers: Whether files and submissions hold the label's number instead of its name.
        header: Names of the columns if the training and development files have no header line; test files have one.
        parts: What follows `dev` and `test` in the names of splits.
        submissions: File names, one for each part.
        bounds: Smallest and largest label of regression.
    """

    folder: str
    texts: tuple[str, ...]
    hub_texts: tuple[str, ...]
    label: str = "label"
    problem: Problem = "classification"
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    numbers: bool = True
    header: tuple[str, ...] | None = None
    parts: tuple[str, ...] = ("",)
    submissions: tuple[str, ...]
    bounds: tuple[float, float] | None = None


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(
        folder="CoLA",
        texts=("sentence",),
        hub_texts=("sentence",),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews", "accuracy"),
        header=("source", "label", "mark", "sentence"),
        submissions=("CoLA.tsv",),
    ),
    "sst2": GlueTask(
        folder="SST-2",
        texts=("sentence",),
        hub_texts=("sentence",),
        labels=("negative", "positive"),
        submissions=("SST-2.tsv",),
    ),
    "mrpc": GlueTask(
        folder="MRPC",
        texts=("#1 String", "#2 String"),
        hub_texts=_PAIR,
        label="Quality",
        labels=("not_equivalent", "equivalent"),
        metrics=("f1", "accuracy"),
        submissions=("MRPC.tsv",),
    ),
    "qqp": GlueTask(
        folder="QQP",
        texts=("question1", "question2"),
        hub_texts=("question1", "question2"),
        label="is_duplicate",
        labels=("not_duplicate", "duplicate"),
        metrics=("f1", "accuracy"),
        submissions=("QQP.tsv",),
    ),
    "stsb": GlueTask(
        folder="STS-B",
        texts=_PAIR,
        hub_texts=_PAIR,
        label="score",
        problem="regression",
        metrics=("spearman", "pearson"),
        submissions=("STS-B.tsv",),
        bounds=(0.0, 5.0),
    ),
    "mnli": GlueTask(
        folder="MNLI",
        texts=_PAIR,
        hub_texts=("premise", "hypothesis"),
        label="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        numbers=False,
        parts=("_matched", "_mismatched"),
        submissions=("MNLI-m.tsv", "MNLI-mm.tsv"),
    ),
    "qnli": GlueTask(
        folder="QNLI",
        texts=("question", "sentence"),
        hub_texts=("question", "sentence"),
        labels=_ENTAILMENT,
        numbers=False,
        submissions=("QNLI.tsv",),
    ),
    "rte": GlueTask(
        folder="RTE", texts=_PAIR, hub_texts=_PAIR, labels=_ENTAILMENT, numbers=False, submissions=("RTE.tsv",)
    ),
    "wnli": GlueTask(
        folder="WNLI",
        texts=_PAIR,
        hub_texts=_PAIR,
        labels=("not_entailment", "entailment"),
        submissions=("WNLI.tsv",),
    ),
}
