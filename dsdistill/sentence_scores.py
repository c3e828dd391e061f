"""How good sentence embeddings are: their order on pairs that people scored, and whom they call each other's nearest.

Letters in shapes: N texts, P pairs, E width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dsdistill.config.sections import SentenceEvaluation
from dsdistill.core import Batch, Features
from dsdistill.corpus.store import Corpus
from dsdistill.locate import Source
from dsdistill.models.capture import Captured
from dsdistill.models.families import encoder_of
from dsdistill.models.loading import load_encoder, load_tokenizer
from dsdistill.models.sentences import SentenceModules, read_sentence_modules, text_length
from dsdistill.objectives.sentences import Pooling, pool
from dsdistill.progress import each
from dsdistill.tasks.examples import Split, read_examples
from dsdistill.tasks.glue import GLUE
from dsdistill.tasks.labels import encode_labels
from dsdistill.tasks.metrics import scores
from dsdistill.tasks.rows import Rows, evaluation_batches, in_row_order, tokenize_rows
from dsdistill.tasks.spec import TaskSpec
from dsdistill.training.dist import Place
from dsdistill.training.loop import Teacher, answers, over_all_ranks, tell_rows

Array = NDArray[Any]
Embed = Callable[[Rows], Array]
"""The embeddings (N, E) of N rows, in their order."""

STS = TaskSpec(name="sts", problem="regression", labels=(), metrics=("spearman",))
COMPARED_AT_ONCE = 1024
EMBEDDED_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What sentence embeddings are judged by.

    Attributes:
        texts: N rows among which neighbours are sought, or None.
        neighbours: K.
        pairs: 2 P rows, the first texts of all pairs and then their second ones, or None.
        likeness: (P,) scores that people gave to the pairs, or None.
    """

    texts: Rows | None
    neighbours: int
    pairs: Rows | None
    likeness: Array | None

    def scores(self, student: Embed, teacher: Embed | None) -> dict[str, float]:
        """Spearman's correlation of cosines with people's scores, for both models, and how far neighbours agree."""
        found: dict[str, float] = {}
        if self.pairs is not None:
            found["sts_spearman"] = self._spearman(student(self.pairs))
            if teacher is not None:
                found["teacher_sts_spearman"] = self._spearman(teacher(self.pairs))
        if self.texts is not None and teacher is not None:
            shared = neighbour_agreement(student(self.texts), teacher(self.texts), self.neighbours)
            found[f"neighbours_at_{self.neighbours}"] = shared
        return found

    def _spearman(self, vectors: Array) -> float:
        assert self.likeness is not None
        first, second = np.split(unit(vectors), 2)
        return scores(STS, self.likeness, (first * second).sum(1, keepdims=True))["spearman"]


def in_training(
    settings: SentenceEvaluation,
    held_out: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    teacher: Teacher,
    sizes: EncoderSizes,
    place: Place,
    *,
    micro_batch: int,
) -> Callable[[DeepSpeedEngine], Mapping[str, float]]:
    """What scores a student while it trains; every process calls it, with the teacher's embeddings made once.

    Args:
        settings: From the recipe.
        held_out: Where the texts for neighbours are.
        tokenizer: Of both models.
        teacher: Gives the hidden states of its last layer among its signals.
        sizes: Layers and pooling of both models.
        place: This process.
        micro_batch: Rows per batch.
    """
    texts = corpus_rows(held_out, settings.rows)
    if texts.num_rows <= settings.neighbours + 1:
        raise ValueError(
            f"evaluation.sentences: {settings.neighbours} neighbours among the {texts.num_rows} held-out rows of "
            f"{held_out.directory}; prepare it with a larger held_out, or ask for fewer"
        )
    pairs, likeness = None, None
    if settings.sts is not None:
        pairs, likeness = read_pairs(settings.sts, tokenizer, max_length=sizes.text_length)
    probe = Probe(texts=texts, neighbours=settings.neighbours, pairs=pairs, likeness=likeness)

    def batches(rows: Rows) -> Iterator[Batch]:
        found = evaluation_batches(rows, micro_batch=micro_batch, rank=place.rank, world_size=place.world_size)
        return tell_rows(found, "sentence embeddings", rows.num_rows, place)

    def vectors_of(features: Features, layer: int, batch: Batch) -> Tensor:
        return pool(features.at("hidden", layer), batch.mask, sizes.pooling)

    @cache
    def of_teacher(rows: Rows) -> Array:
        def ask(batch: Batch) -> Tensor:
            return vectors_of(teacher(batch), sizes.teacher_layers, batch)

        return in_row_order(*over_all_ranks(ask, batches(rows), place), num_rows=rows.num_rows)

    def score(engine: DeepSpeedEngine) -> Mapping[str, float]:
        def of_student(rows: Rows) -> Array:
            def read(features: Features, batch: Batch) -> Tensor:
                return vectors_of(features, sizes.student_layers, batch)

            return in_row_order(*answers(engine, batches(rows), place, read), num_rows=rows.num_rows)

        return probe.scores(of_student, of_teacher)

    return score


class EncoderSizes(NamedTuple):
    """What is asked of both models for their embeddings: the last layers' numbers, and what makes vectors of texts."""

    student_layers: int
    teacher_layers: int
    pooling: Pooling
    text_length: int


def embedder(source: Source, device: torch.device) -> tuple[Embed, PreTrainedTokenizerFast, int]:
    """A saved sentence encoder, or any encoder by the mean of its states.

    Returns:
        What gives embeddings, the tokenizer, and how many tokens of a text are read.

    Raises:
        ValueError: If it cannot be read, or its embeddings cannot be had from the encoder alone.
    """
    modules = read_sentence_modules(source) or SentenceModules()
    if modules.problem is not None:
        raise ValueError(modules.problem)
    model = encoder_of(load_encoder(source))
    layers = model.config.num_hidden_layers
    captured = Captured(model, {"hidden": (layers,)}).to(device).eval()
    tokenizer = load_tokenizer(source)

    @torch.no_grad()
    def embed(rows: Rows) -> Array:
        ids, vectors = [], []
        batches = evaluation_batches(rows, micro_batch=EMBEDDED_AT_ONCE, rank=0, world_size=1)
        what = f"sentence embeddings of {source.model}"
        for batch in each(batches, what, rows.num_rows, unit="row", size=lambda batch: len(batch.input_ids)):
            batch = batch.to(device)
            ids.append(batch.sample_ids)
            vectors.append(pool(captured(batch).at("hidden", layers), batch.mask, modules.pooling))
        numbers, table = (torch.cat(parts).cpu().numpy() for parts in (ids, vectors))
        return in_row_order(numbers, table, num_rows=rows.num_rows)

    return embed, tokenizer, text_length(modules, model.config, tokenizer)


def unit(vectors: Array) -> Array:
    """Vectors (N, E) divided by their length, in float32; those of length 0 stay."""
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def neighbour_agreement(student: Array, teacher: Array, count: int) -> float:
    """Share of each text's nearest texts by the teacher's cosines that are among its nearest by the student's.

    Args:
        student: (N, E).
        teacher: (N, E'), of the same texts.
        count: K, the nearest texts that are compared, the text itself left out; K < N.

    Returns:
        Mean over texts, between 0 and 1; K / (N - 1) is chance.
    """
    ours, theirs = (nearest(vectors, count) for vectors in (student, teacher))
    return float(np.mean([len(np.intersect1d(a, b)) / count for a, b in zip(ours, theirs, strict=True)]))


def nearest(vectors: Array, count: int) -> NDArray[np.intp]:
    """Numbers of the `count` nearest other rows by cosine, in no order, (N, K)."""
    vectors = unit(vectors)
    found = []
    for start in range(0, len(vectors), COMPARED_AT_ONCE):
        cosines = vectors[start : start + COMPARED_AT_ONCE] @ vectors.T
        own = np.arange(len(cosines))
        cosines[own, start + own] = -np.inf
        found.append(np.argpartition(-cosines, count - 1, axis=1)[:, :count])
    return np.concatenate(found)


def read_pairs(path: Path, tokenizer: PreTrainedTokenizerFast, *, max_length: int) -> tuple[Rows, Array]:
    """Scored pairs of sentences, tokenized one by one.

    Args:
        path: GLUE's folder, its `STS-B` folder, or a file with columns `sentence1`, `sentence2` and `score`.
        tokenizer: The teacher's and the student's.
        max_length: Tokens of a sentence.

    Returns:
        2 P rows, first sentences and then second ones, and P scores.

    Raises:
        ValueError: If there is no such file, or a row is broken.
    """
    glue = GLUE["stsb"]
    examples = read_examples(Split(name="dev", files=(pairs_file(path),), texts=glue.texts, label=glue.label))
    likeness = encode_labels(STS, examples)
    assert examples.pairs is not None
    assert likeness is not None
    texts = [text.strip() for text in (*examples.texts, *examples.pairs)]
    return tokenize_rows(texts, None, None, tokenizer, max_length=max_length), likeness


def pairs_file(path: Path) -> Path:
    """The file of scored pairs that a folder of GLUE means, or a file itself.

    Raises:
        ValueError: If there is none.
    """
    inside = [path / folder / "dev.tsv" for folder in (GLUE["stsb"].folder, "")] if path.is_dir() else [path]
    file = next((candidate for candidate in inside if candidate.is_file()), None)
    if file is None:
        raise ValueError(f"no scored sentence pairs in {path}: give GLUE's STS-B folder, or a file with its columns")
    return file


def corpus_rows(corpus: Corpus, count: int) -> Rows:
    """Some rows of a corpus, or all if there are fewer, spread over all of it, as they are."""
    numbers = np.linspace(0, corpus.num_rows - 1, min(count, corpus.num_rows)).astype(np.int64)
    arrays = corpus.rows(numbers)
    lengths = arrays.mask.sum(1)
    types = arrays.token_type_ids
    return Rows(
        ids=arrays.input_ids[arrays.mask].astype(np.int32),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        token_types=None if types is None else types[arrays.mask].astype(np.uint8),
        labels=None,
        is_augmented=np.zeros(len(numbers), np.bool_),
        max_length=corpus.length,
        pad_id=corpus.manifest.tokenizer.pad_id,
    )
