"""What a sentence encoder asks of a run: pooling as the teacher's, one text a row, a last layer that is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from dsdistill.locate import Source
from dsdistill.models.sentences import read_sentence_modules, sentence_problem
from dsdistill.training.distiller import BoundTerm

POOLED = "pooled"


def follow_pooling(terms: Iterable[BoundTerm], source: Source, teacher_layers: int) -> list[BoundTerm]:
    """The terms, those on sentence embeddings with the teacher's pooling.

    Args:
        terms: All summands of the loss.
        source: The teacher.
        teacher_layers: Its layers. The embedding is made of the last; inner ones may be pooled in another way.

    Raises:
        ValueError: If the teacher's embeddings cannot be had from its encoder, or a term wants another pooling.
    """
    terms = list(terms)
    if not any(term.objective.name == POOLED for term in terms):
        return terms
    modules = read_sentence_modules(source)
    if modules is None:
        return terms
    if modules.problem is not None:
        raise ValueError(f"{POOLED}: {modules.problem}; use objectives on hidden states and relations instead")
    return [
        _with_pooling(term, modules.pooling, teacher_layers) if term.objective.name == POOLED else term
        for term in terms
    ]


def _with_pooling(term: BoundTerm, pooling: str, teacher_layers: int) -> BoundTerm:
    asked = term.params.get("pooling")
    if asked is not None and (asked == pooling or teacher_layers not in term.pairs.teacher):
        return term
    if asked is not None:
        raise ValueError(
            f"{term.label}: pooling is {asked}, but the teacher's is {pooling}, and so will be the exported student's; "
            "leave it out"
        )
    return replace(term, params={**term.params, "pooling": pooling})


def packing_problem(terms: Iterable[BoundTerm], source: Source) -> str | None:
    """Why these objectives cannot take rows of several documents, or None if they can.

    The first positions of an encoder that is no sentence encoder are compared as in PKD, whatever the row holds.
    """
    for term in terms:
        patient = term.params.get("pooling") == "first" and read_sentence_modules(source) is None
        if term.objective.name == POOLED and not patient:
            return (
                f"{term.label} compares one embedding a row, but a row of this corpus holds several documents; prepare "
                "it with rows: document (and documents: line where each line is a text of its own)"
            )
    return None


def scoring_problem(read: Collection[int], num_layers: int, source: Source) -> str | None:
    """Why sentence embeddings cannot be scored, or None if they can.

    Args:
        read: Layers of the student whose hidden states an objective reads.
        num_layers: Of the student.
        source: The teacher.
    """
    problem = sentence_problem(source)
    if problem is not None:
        return f"evaluation.sentences: {problem}; drop it"
    if num_layers not in read:
        return (
            f"evaluation.sentences: no objective reads the output of the student's last layer, {num_layers}, which is "
            "what its embeddings are made of, so that it would not be trained; add pooled or hid_seq"
        )
    return None
