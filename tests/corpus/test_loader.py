"""Batches: the same for any number of ranks, micro-batches and workers, and after any resume."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dsdistill.core import Batch, document_borders
from dsdistill.corpus.loader import held_out_batches, train_batches
from dsdistill.corpus.masking import Masker
from dsdistill.corpus.prepare import prepare
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.store import Corpus

FIELDS = ("input_ids", "mask", "sample_ids", "segments", "labels")


@pytest.fixture(scope="module")
def masker(wordpiece_dir):
    return Masker.from_tokenizer(AutoTokenizer.from_pretrained(wordpiece_dir))


@pytest.fixture(scope="module")
def corpus(corpus_dir):
    return Corpus.open(corpus_dir)


def load(corpus, masker, *, world_size=1, micro_batch=12, ranks=None, **changes) -> list[list[Batch]]:
    """Batches of each rank."""
    arguments = {
        "seed": 3,
        "global_batch": 24,
        "first_step": 0,
        "last_step": 4,
        "num_workers": 0,
        "isolate": True,
    } | changes
    return [
        list(train_batches(corpus, masker, micro_batch=micro_batch, rank=rank, world_size=world_size, **arguments))
        for rank in (range(world_size) if ranks is None else ranks)
    ]


def global_batches(per_rank: list[list[Batch]], rows_per_step=24) -> dict[str, torch.Tensor]:
    """(steps, rows, ...) of all ranks together."""
    in_order = [batch for batches in zip(*per_rank, strict=True) for batch in batches]
    joined = {name: torch.cat([getattr(batch, name) for batch in in_order]) for name in FIELDS}
    return {name: tensor.unflatten(0, (-1, rows_per_step)) for name, tensor in joined.items()}


def assert_equal_batches(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in (*FIELDS, "targets"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)
        assert a.padded is b.padded is not bool(a.mask.all())


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 24), (1, 1), (2, 12), (2, 3), (3, 4), (8, 3), (24, 1)])
def test_global_batches_are_the_same_for_any_world(corpus, masker, world_size, micro_batch):
    wanted = global_batches(load(corpus, masker))
    got = global_batches(load(corpus, masker, world_size=world_size, micro_batch=micro_batch))
    for name in FIELDS:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=0)


def test_batches_hold_what_they_say(corpus, masker):
    (batches,) = load(corpus, masker)
    assert len(batches) == 8
    for batch in batches:
        original = corpus.rows(batch.sample_ids.numpy())
        assert batch.input_ids.dtype == batch.labels.dtype == batch.targets.dtype == torch.int64
        assert batch.mask.dtype == torch.bool
        assert torch.equal(batch.targets, torch.nonzero(batch.labels.flatten() != -100).flatten())
        chosen = batch.labels != -100
        assert torch.equal(batch.labels[chosen], torch.from_numpy(original.input_ids)[chosen])
        assert torch.equal(batch.input_ids[~chosen], torch.from_numpy(original.input_ids)[~chosen])
        assert torch.equal(batch.segments, torch.from_numpy(original.segments))
        assert torch.equal(batch.borders, document_borders(batch.segments, batch.mask))
        assert batch.token_type_ids is None


def test_documents_are_told_apart_only_if_they_are_to_be_isolated(corpus, masker):
    for apart, together in zip(load(corpus, masker)[0], load(corpus, masker, isolate=False)[0], strict=True):
        assert together.segments is None
        assert together.borders is None
        assert torch.equal(apart.input_ids, together.input_ids)


def test_an_epoch_has_every_row_once_and_the_next_one_other_masks(corpus, masker):
    steps = -(-2 * corpus.num_rows // 24)
    rows = global_batches(load(corpus, masker, last_step=steps))
    numbers = rows["sample_ids"].flatten()
    first, second = numbers[: corpus.num_rows], numbers[corpus.num_rows : 2 * corpus.num_rows]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(corpus.num_rows))
    labels = rows["labels"].flatten(0, 1)
    differ = (labels[first.argsort()] != labels[corpus.num_rows + second.argsort()]).any(dim=1)
    assert differ.float().mean() > 0.9


def test_resuming_is_starting_later(corpus, masker):
    whole = load(corpus, masker, last_step=60)[0]
    assert_equal_batches(load(corpus, masker, first_step=37, last_step=60)[0], whole[2 * 37 :])
    at_other_size = global_batches(load(corpus, masker, world_size=4, micro_batch=2, first_step=37, last_step=60))
    for name in FIELDS:
        torch.testing.assert_close(at_other_size[name], global_batches([whole[2 * 37 :]])[name], rtol=0, atol=0)
    assert load(corpus, masker, first_step=60, last_step=60) == [[]]


def test_far_positions_cost_nothing(corpus, masker):
    assert len(load(corpus, masker, first_step=10**12, last_step=10**12 + 2)[0]) == 4


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.multiprocess)])
def test_workers_change_nothing(corpus, masker, start_method):
    alone = load(corpus, masker)[0]
    assert_equal_batches(load(corpus, masker, num_workers=2, start_method=start_method)[0], alone)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_state_is_not_touched(corpus, masker, num_workers):
    before = torch.get_rng_state()
    load(corpus, masker, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_labels_inputs_are_masked_all_the_same(corpus, masker):
    with_labels, without = load(corpus, masker)[0], load(corpus, masker, with_labels=False, num_workers=1)[0]
    for one, other in zip(with_labels, without, strict=True):
        assert other.labels is None
        assert other.targets is None
        assert torch.equal(one.input_ids, other.input_ids)


def test_all_real_positions_can_be_targets_while_labels_stay(corpus, masker):
    """Special tokens are among them, as in DistilBERT, which goes by the attention mask."""
    for masked, every in zip(load(corpus, masker)[0], load(corpus, masker, all_targets=True)[0], strict=True):
        assert torch.equal(every.targets, torch.nonzero(every.mask.flatten()).flatten())
        assert torch.equal(every.labels, masked.labels)
        assert len(masked.targets) < len(every.targets)


def test_unmasked_input(corpus, wordpiece_dir):
    masker = Masker.from_tokenizer(AutoTokenizer.from_pretrained(wordpiece_dir), probability=0)
    for batch in load(corpus, masker)[0]:
        np.testing.assert_array_equal(batch.input_ids, corpus.rows(batch.sample_ids.numpy()).input_ids)
        assert batch.targets.shape == (0,)


def test_unequal_micro_batches_are_refused(corpus, masker):
    with pytest.raises(ValueError, match="global_batch=24 is not a multiple"):
        load(corpus, masker, micro_batch=5)


def test_pairs_and_padding_reach_the_batch(text_file, wordpiece_dir, tmp_path, masker):
    settings = CorpusSettings(
        input=(str(text_file),),
        tokenizer=str(wordpiece_dir),
        output=tmp_path / "c",
        length=48,
        rows="document",
        pairs=True,
        processes=1,
    )
    corpus = Corpus.open(prepare(settings, progress=False))
    for num_workers in (0, 1):
        batch = load(corpus, masker, num_workers=num_workers)[0][0]
        assert batch.segments is None
        assert set(batch.token_type_ids.unique().tolist()) == {0, 1}
        assert not batch.mask.all()
        assert (batch.input_ids[~batch.mask] == 0).all()
        assert (batch.labels[~batch.mask] == -100).all()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_held_out_rows_are_the_same_for_every_world(corpus_dir, masker, world_size):
    corpus = Corpus.open(corpus_dir, "held_out")

    def rows(world_size: int, micro_batch: int) -> dict[int, list[int]]:
        per_rank = [
            list(held_out_batches(corpus, masker, rows=64, micro_batch=micro_batch, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        assert len({tuple(len(batch.input_ids) for batch in batches) for batches in per_rank}) == 1
        batches = [batch for batches in per_rank for batch in batches]
        ids = torch.cat([batch.input_ids for batch in batches]).tolist()
        return dict(zip(torch.cat([batch.sample_ids for batch in batches]).tolist(), ids, strict=True))

    wanted = rows(1, 64)
    assert len(wanted) == 64
    assert rows(world_size, 16) == wanted
    assert rows(world_size, 4) == wanted
    assert len(rows(world_size, 12)) == 64 // (12 * world_size) * 12 * world_size
    with pytest.raises(ValueError, match="larger held_out"):
        next(held_out_batches(corpus, masker, rows=2, micro_batch=4, rank=0, world_size=3))


def test_few_held_out_rows_make_one_smaller_batch(corpus_dir, masker):
    corpus = Corpus.open(corpus_dir, "held_out")
    (batch,) = held_out_batches(corpus, masker, rows=7, micro_batch=64, rank=1, world_size=2)
    assert len(batch.input_ids) == 3
