"""What the rows of a corpus ask of models and objectives, checked before anything is read."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedConfig

from dsdistill.config.recipe import Recipe
from dsdistill.corpus.store import Corpus
from dsdistill.models.documents import isolation_problem
from dsdistill.models.families import max_length


class RowsOfCorpus(NamedTuple):
    """Tokens per row, and whether a row may hold several documents."""

    length: int
    packed: bool


def rows_of(recipe: Recipe) -> RowsOfCorpus:
    """How rows look, from the prepared corpus or from how it will be prepared.

    Raises:
        ValueError: If there is neither.
    """
    if recipe.corpus.prepare is not None:
        return RowsOfCorpus(recipe.corpus.prepare.length, recipe.corpus.prepare.rows == "packed")
    train, _ = (Corpus.open(recipe.corpus.directory, split) for split in ("train", "held_out"))
    return RowsOfCorpus(train.length, train.manifest.settings["rows"] == "packed")


def row_problems(
    recipe: Recipe, rows: RowsOfCorpus, teacher: PreTrainedConfig, student: PreTrainedConfig | None
) -> list[str]:
    """Why these models or objectives cannot take rows like these."""
    problems = []
    for whose, config in (("teacher", teacher), ("student", student)):
        longest = None if config is None else max_length(config)
        if longest is not None and rows.length > longest:
            problems.append(
                f"rows of {recipe.corpus.directory} have {rows.length} tokens, but the {whose} takes {longest}; "
                "prepare the corpus with a smaller length"
            )
    if recipe.corpus.isolate and not rows.packed:
        problems.append("corpus.isolate has no effect on a corpus with one document a row (rows: document); drop it")
    elif recipe.corpus.isolate:
        configs = [config for config in (teacher, student) if config is not None]
        problems += [problem for config in configs if (problem := isolation_problem(config)) is not None]
    return list(dict.fromkeys(problems))
