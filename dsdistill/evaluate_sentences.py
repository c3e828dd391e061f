"""Sentence embeddings of a student beside its teacher's, scored and written into the student's model card."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dsdistill.corpus.files import write_text
from dsdistill.corpus.lines import Meter, read_lines
from dsdistill.evaluate import CARD, find_models, write_card
from dsdistill.locate import Source
from dsdistill.sentence_scores import Array, Probe, embedder, neighbour_agreement, read_pairs
from dsdistill.tasks.rows import tokenize_rows

SENTENCES = "sentences.json"


def evaluate_sentences(
    target: str,
    *,
    teacher: str | None,
    sts: Path | None,
    texts: Path | None,
    neighbours: int,
    device: torch.device,
) -> str:
    """Score embeddings; a student in a local directory gets the table into its card, and sentences.json.

    Each model reads texts with its own tokenizer and pools as its own directory says, by the mean if it says nothing.

    Args:
        target: Run directory, model directory, hub name, or package:<import name>.
        teacher: The same for the teacher; by default the one of the run directory's recipe, else none.
        sts: GLUE's STS-B folder or a file with its columns, for Spearman's correlation of cosines with people's scores.
        texts: A file with one text a line, among which both models' nearest neighbours are compared.
        neighbours: How many of the nearest.
        device: Where the models run.

    Returns:
        The table, in Markdown.

    Raises:
        ValueError: If a model or file cannot be read, or neighbours are asked for without a teacher or enough texts.
    """
    student, of_recipe = find_models(target)
    source = Source(model=teacher) if teacher is not None else of_recipe
    sources = {"student": student} if source is None else {"teacher": source, "student": student}
    lines = distinct_lines(texts) if texts is not None else []
    if texts is not None and (source is None or len(lines) <= neighbours + 1):
        what = "no teacher to agree with" if source is None else f"{len(lines)} different texts"
        raise ValueError(f"{neighbours} nearest neighbours, but {what}; give --teacher, and more texts than neighbours")
    scores: dict[str, dict[str, float]] = {}
    vectors: dict[str, Array] = {}
    for who, model in sources.items():
        embed, tokenizer, length = embedder(model, device)
        scores[who] = {}
        if sts is not None:
            pairs, likeness = read_pairs(sts, tokenizer, max_length=length)
            probe = Probe(texts=None, neighbours=neighbours, pairs=pairs, likeness=likeness)
            scores[who] |= probe.scores(embed, None)
        if lines:
            vectors[who] = embed(tokenize_rows(lines, None, None, tokenizer, max_length=length))
    if lines:
        agreement = neighbour_agreement(vectors["student"], vectors["teacher"], neighbours)
        scores["student"][f"neighbours_at_{neighbours}"] = agreement
    table = describe(scores)
    directory = Path(student.model)
    if directory.is_dir():
        write_text(directory / SENTENCES, json.dumps(scores, indent=1) + "\n")
        write_card(directory / CARD, table, name="sentences", title="Sentence embeddings")
    return table


def distinct_lines(path: Path) -> list[str]:
    """The different lines of a text file that are not blank, in their order.

    Raises:
        ValueError: If it is no such file, or not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give one with a text in each line")
    return [line for line in dict.fromkeys(line.strip() for _, line in read_lines(path, Meter())) if line]


def describe(scores: dict[str, dict[str, float]]) -> str:
    """A line for each score, a column for each model."""
    names = dict.fromkeys(name for found in scores.values() for name in found)
    lines = [f"| | {' | '.join(scores)} |", f"|---|{'---|' * len(scores)}"]
    for name in names:
        cells = (f"{found[name]:.4f}" if name in found else "" for found in scores.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
