"""What a task's data is and how it is read: the recipe's section `data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from dsdistill.config.strict import Strict
from dsdistill.core import Problem

HUB_GLUE = "glue"


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str | Path) else value


Files = Annotated[tuple[Path, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class AugmentSettings(Strict):
    """More training rows by replacing words; Jiao et al. 2020 (TinyBERT, arXiv:1909.10351), algorithm 1."""

    masked_lm: str | None = Field(
        default=None,
        description="masked language model (directory or hub name) that replaces words of one token; "
        "null: they are replaced by neighbours too",
    )
    embeddings: Path | None = Field(
        default=None,
        description="word vectors in GloVe's text format whose neighbours replace the other words; "
        "null: the teacher's word embeddings",
    )
    copies: int = Field(default=20, ge=1, description="rows made of each row (the paper's N_a)")
    probability: float = Field(default=0.4, gt=0, le=1, description="chance that a word is replaced (p_t)")
    candidates: int = Field(default=15, ge=1, description="words among which a replacement is drawn (K)")


class DataSettings(Strict):
    """Where the labelled rows come from, and what is learned from them.

    The nine GLUE tasks come from `directory`, from the hub (if nothing is given) or from own files; every other task
    from own files (`train`, `dev`, `test`) or from a hub data set.
    """

    directory: Path | None = Field(
        default=None,
        description="GLUE's TSV files: the folder with CoLA/ SST-2/ ..., or the task's own folder with train.tsv",
    )
    train: Files | None = Field(default=None, description="own files: CSV, TSV, JSON lines or Parquet (.gz .xz .zst)")
    dev: Files | None = Field(default=None, description="own files that are scored")
    test: Files | None = Field(default=None, description="own files to predict; the label column may be missing")
    hub: str | None = Field(
        default=None, description=f"hub data set, or a local directory of one; GLUE tasks: `{HUB_GLUE}` by default"
    )
    hub_config: str | None = Field(default=None, description="own task: configuration of the hub data set")
    hub_dev: str | None = Field(default=None, description="own task: hub split that is scored; `validation` if null")
    text: str | None = Field(default=None, description="column of the (first) text; own tasks: `text` if null")
    text_pair: str | None = Field(default=None, description="column of the second text; null: there is none")
    label: str | None = Field(
        default=None,
        description="column of the label, `label` if null; multi_label: a list of names, or names separated by `|`",
    )
    problem: Problem | None = Field(default=None, description="own task: what is learned; classification if null")
    labels: list[str] | None = Field(
        default=None, min_length=1, description="own task: class names in order; null: those in train, sorted"
    )
    metrics: list[str] | None = Field(
        default=None, min_length=1, description="scores, the primary one first; null: GLUE's, or the problem's"
    )
    max_length: int = Field(default=128, ge=8, le=65535, description="tokens per row; longer rows are cut")
    train_rows: int | None = Field(default=None, ge=1, description="at most so many rows of train, the first ones")
    skip_broken: bool = Field(
        default=False,
        description="leave out (and count) rows of train and dev that have no text or not as many fields as the "
        "header, instead of refusing the file",
    )
    augment: AugmentSettings | None = Field(default=None, description="more training rows; null: none")

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        """Rows come from one of `directory`, own files (`train` and `dev` together) and `hub`.

        `text_pair` needs `text`; `hub_config` and `hub_dev` need `hub`; `labels` and `metrics` name nothing twice.
        """
        files = {"train": self.train, "dev": self.dev, "test": self.test}
        given = [name for name, value in files.items() if value]
        kinds = {"directory": self.directory, "/".join(given) or "train": given, "hub": self.hub}
        chosen = [name for name, value in kinds.items() if value]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are both given; the rows come from one of them")
        missing = [name for name in ("train", "dev") if given and name not in given]
        if missing:
            raise ValueError(f"own files need train and dev; {missing[0]} is missing")
        for name in ("hub_config", "hub_dev"):
            if getattr(self, name) and not self.hub:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect without hub")
        if self.text_pair is not None and self.text is None:
            raise ValueError("text_pair is given, but text is not; name both columns")
        for name in ("labels", "metrics"):
            values = getattr(self, name) or []
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values} names something twice")
        return self
