"""Batches hold the right tokens in the right order on any number of ranks."""

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dsdistill.corpus.order import positions_to_rows
from dsdistill.tasks.rows import (
    Rows,
    evaluation_batches,
    in_row_order,
    no_labels_yet,
    tokenize_rows,
    train_batches,
)
from tests.tasks.glue_files import sentences


@pytest.fixture(scope="module")
def texts():
    return [*sentences(18, seed=1), "film", "good " * 50, "[SEP] the [MASK]"]


@pytest.fixture(scope="module")
def rows(texts, tokenizer):
    labels = np.arange(len(texts), dtype=np.int64) % 3
    return tokenize_rows(texts, None, labels, tokenizer, max_length=20)


@pytest.mark.parametrize("max_length", [9, 16, 64])
@pytest.mark.parametrize("paired", [False, True])
def test_tokens_are_those_of_the_tokenizer_object(texts, tokenizer, paired, max_length):
    plain = texts[:-1]  # the last has special tokens in its text
    pairs = plain[::-1] if paired else None
    rows = tokenize_rows(plain, pairs, None, tokenizer, max_length=max_length)
    wanted = tokenizer(plain, pairs, truncation="longest_first", max_length=max_length)
    assert [rows.ids[a:b].tolist() for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)] == wanted["input_ids"]
    assert rows.token_types is not None
    assert rows.token_types.tolist() == [kind for row in wanted["token_type_ids"] for kind in row]
    whole = tokenizer(plain, pairs)
    assert rows.num_cut == sum(len(row) > max_length for row in whole["input_ids"])


def test_special_tokens_in_a_text_are_text(rows, tokenizer):
    last = rows.ids[rows.offsets[-2] :].tolist()
    assert last.count(tokenizer.sep_token_id) == 1
    assert tokenizer.mask_token_id not in last


def test_models_without_token_types_get_none(texts, tokenizer):
    tokenizer = tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )
    rows = tokenize_rows(texts, None, None, tokenizer, max_length=20)
    batch = rows.batch(np.arange(4))
    assert (rows.token_types, batch.token_type_ids, batch.labels) == (None, None, None)


def test_what_cannot_be_tokenized_is_refused(texts, tokenizer):
    with pytest.raises(ValueError, match="max_length=4 has no room for 3 special tokens"):
        tokenize_rows(texts, texts, None, tokenizer, max_length=4)
    without = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no padding token"):
        tokenize_rows(texts, None, None, without, max_length=20)


def test_batches_are_padded_to_a_multiple_of_eight_within_max_length(rows, tokenizer):
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 21):
        for _ in range(10):
            numbers = rng.choice(rows.num_rows, size, replace=False)
            batch = rows.batch(numbers)
            lengths = np.diff(rows.offsets)[numbers]
            expected = min(-(-max(lengths) // 8) * 8, 20)
            assert batch.input_ids.shape == batch.mask.shape == (size, expected)
            assert batch.padded == bool((lengths < expected).any())
            assert batch.sample_ids.tolist() == numbers.tolist()
            assert batch.labels is not None
            assert batch.labels.tolist() == (numbers % 3).tolist()
            assert (batch.input_ids.dtype, batch.mask.dtype) == (torch.int64, torch.bool)
            assert batch.token_type_ids is not None
            assert batch.token_type_ids.dtype == batch.labels.dtype == torch.int64
            for i, number in enumerate(numbers):
                row = rows.ids[rows.offsets[number] : rows.offsets[number + 1]].tolist()
                assert batch.input_ids[i].tolist() == row + [tokenizer.pad_token_id] * (expected - len(row))
                assert batch.mask[i].tolist() == [True] * len(row) + [False] * (expected - len(row))


def test_token_types_of_padding_are_zero(texts, tokenizer):
    first, second = texts[:10], texts[5:15]
    batch = tokenize_rows(first, second, None, tokenizer, max_length=40).batch(np.arange(10))
    wanted = tokenizer(first, second, max_length=40, padding="longest", truncation="longest_first")
    assert batch.token_type_ids is not None
    width = len(wanted["token_type_ids"][0])
    assert batch.token_type_ids[:, :width].tolist() == wanted["token_type_ids"]
    assert not batch.token_type_ids[:, width:].any()


def test_a_batch_does_not_share_memory_with_the_rows(rows):
    before = rows.fingerprint()
    batch = rows.batch(np.arange(5))
    for tensor in (batch.input_ids, batch.labels, batch.token_type_ids):
        assert tensor is not None
        tensor.zero_()
    assert rows.fingerprint() == before


@pytest.mark.parametrize(("num_rows", "global_batch"), [(21, 12), (5, 12), (1, 4)])
def test_train_order_is_the_corpus_order_on_any_number_of_ranks(rows, num_rows, global_batch, monkeypatch):
    rows = rows.first(num_rows)
    monkeypatch.setattr("dsdistill.tasks.rows._STEPS_AT_ONCE", 2)

    def read(world_size: int, micro_batch: int, first_step: int = 0) -> list[list[int]]:
        sizes = {"global_batch": global_batch, "micro_batch": micro_batch, "world_size": world_size}
        ranks = [
            list(train_batches(rows, seed=7, rank=rank, first_step=first_step, last_step=5, **sizes))
            for rank in range(world_size)
        ]
        flat = [x for parts in zip(*ranks, strict=True) for batch in parts for x in batch.sample_ids.tolist()]
        return [flat[i : i + global_batch] for i in range(0, len(flat), global_batch)]

    _, expected = positions_to_rows(np.arange(5 * global_batch), num_rows=num_rows, seed=7)
    one = read(1, global_batch)
    assert [x for step in one for x in step] == expected.tolist()
    for world_size, micro_batch in ((1, 2), (2, 1), (2, global_batch // 2), (4, 1)):
        assert read(world_size, micro_batch) == one
        assert read(world_size, micro_batch, first_step=3) == one[3:]
    counts = Counter(x for step in one for x in step)
    assert set(counts) == set(range(num_rows))
    assert max(counts.values()) - min(counts.values()) <= 1
    with pytest.raises(ValueError, match="multiple"):
        train_batches(
            rows, seed=7, rank=0, world_size=3, micro_batch=5, global_batch=global_batch, first_step=0, last_step=1
        )


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8, 21])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4, 5, 64])
def test_evaluation_reads_every_row_and_ranks_stay_together(rows, num_rows, world_size, micro_batch):
    rows = rows.first(num_rows)
    ranks = [
        list(evaluation_batches(rows, micro_batch=micro_batch, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    sizes = {len(batch.sample_ids) for batches in ranks for batch in batches}
    assert len(sizes) == 1
    assert sizes.pop() <= micro_batch
    assert len({len(batches) for batches in ranks}) == 1
    seen = np.concatenate([batch.sample_ids.numpy() for batches in ranks for batch in batches])
    assert set(seen.tolist()) == set(range(num_rows))
    assert len(seen) < num_rows + world_size * min(micro_batch, num_rows)
    outputs = np.stack([seen * 10.0, -seen], axis=1)
    assert in_row_order(seen, outputs, num_rows=num_rows).tolist() == [[i * 10.0, -i] for i in range(num_rows)]


def test_evaluation_puts_rows_of_similar_length_together(rows):
    batches = list(evaluation_batches(rows, micro_batch=4, rank=0, world_size=1))
    lengths = [length for batch in batches for length in batch.mask.sum(1).tolist()][: rows.num_rows]
    assert lengths == sorted(np.diff(rows.offsets), reverse=True)


def test_missing_outputs_are_noticed():
    with pytest.raises(ValueError, match=r"1 of 4 rows have no output, the first is \[2\]"):
        in_row_order(np.array([3, 1, 0, 1]), np.zeros((4, 2)), num_rows=4)
    with pytest.raises(ValueError, match="rows have no output"):
        in_row_order(np.array([0, 1, 2]), np.zeros((3, 2)), num_rows=2)


def changed(rows: Rows) -> dict[str, Rows]:
    """The rows with one thing changed in each."""
    ids, offsets, labels, augmented = (x.copy() for x in (rows.ids, rows.offsets, rows.labels, rows.is_augmented))
    assert rows.token_types is not None
    types = rows.token_types.copy()
    ids[3] += 1
    offsets[1] += 1
    labels[0] += 1
    augmented[2] = True
    types[2] = 1
    return {
        "ids": replace(rows, ids=ids),
        "offsets": replace(rows, offsets=offsets),
        "labels": replace(rows, labels=labels),
        "labels of another kind": replace(rows, labels=rows.labels.view(np.float64)),
        "no labels": replace(rows, labels=None),
        "is_augmented": replace(rows, is_augmented=augmented),
        "token_types": replace(rows, token_types=types),
        "no token types": replace(rows, token_types=None),
        "max_length": replace(rows, max_length=24),
        "pad_id": replace(rows, pad_id=1),
        "fewer rows": rows.first(20),
    }


def test_the_fingerprint_changes_with_every_change(rows):
    variants = changed(rows)
    named = {name for name in variants if name in {field.name for field in fields(Rows)}}
    assert named == {field.name for field in fields(Rows)} - {"num_cut"}
    prints = {rows.fingerprint(), *(variant.fingerprint() for variant in variants.values())}
    assert len(prints) == len(variants) + 1
    assert rows.first(21).fingerprint() == rows.fingerprint() == replace(rows, num_cut=99).fingerprint()


def test_first_and_extended_undo_each_other(rows, texts, tokenizer):
    front = rows.first(8)
    back = tokenize_rows(texts[8:15], None, rows.labels[8:15], tokenizer, max_length=20)
    last = tokenize_rows(texts[15:], None, rows.labels[15:], tokenizer, max_length=20)
    assert front.extended(back, last).fingerprint() == rows.fingerprint()
    assert front.extended(back, last).num_cut == rows.num_cut + front.num_cut
    other = replace(last, labels=None)
    with pytest.raises(ValueError, match="cannot be joined"):
        front.extended(other)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_labels_are_filled_in_later(rows, shape):
    kind = np.float32 if shape else np.int64
    waiting = no_labels_yet(np.zeros((4, *shape), kind), rows.num_rows)
    assert waiting is not None
    assert np.isnan(waiting).all() if shape else (waiting == -100).all()
    some = replace(rows, labels=waiting)
    filled = some.with_labels(np.array([2, 5]), np.ones((2, *shape), kind))
    assert filled.labels is not None
    assert_close(torch.from_numpy(filled.labels[[2, 5]]), torch.ones(2, *shape, dtype=torch.from_numpy(waiting).dtype))
    assert filled.labels.dtype == kind
    assert some.fingerprint() != filled.fingerprint()
    with pytest.raises(ValueError, match="labels of shape"):
        some.with_labels(np.array([2, 5]), np.ones(3, kind))
    with pytest.raises(ValueError, match="labels of shape None"):
        replace(rows, labels=None).with_labels(np.array([2]), np.ones(1))
    assert no_labels_yet(None, 3) is None
