import numpy as np
import pytest
from transformers import AutoTokenizer

from dsdistill.corpus.masking import Masker, word_start_table

ROWS = np.arange(400)


@pytest.fixture(scope="module")
def tokenizers(tokenizer_dirs):
    return {name: AutoTokenizer.from_pretrained(path) for name, path in tokenizer_dirs.items()}


@pytest.fixture(scope="module")
def rows_of_tokens(tokenizers):
    """Random tokens between special tokens; the second half of each tenth row is padding."""
    tokenizer = tokenizers["wordpiece"]
    ids = np.random.default_rng(0).integers(5, len(tokenizer), (len(ROWS), 64))
    ids[:, 0], ids[:, 20], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.sep_token_id
    mask = np.ones(ids.shape, bool)
    mask[::10, 32:] = False
    ids[~mask] = tokenizer.pad_token_id
    return ids, mask


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_shares_are_15_and_80_10_10(tokenizers, rows_of_tokens, probability):
    ids, mask = rows_of_tokens
    masker = Masker.from_tokenizer(tokenizers["wordpiece"], probability=probability)
    masked, labels = masker(ids, mask, seed=0, epochs=0, rows=ROWS)
    chosen = labels != -100
    candidates = mask & ~masker.special[ids]
    number = candidates.sum()
    assert abs(chosen.sum() / number - probability) < 4 * np.sqrt(probability / number)
    became_mask = (masked == masker.mask_id)[chosen].mean()
    stayed = (masked == ids)[chosen].mean()
    assert abs(became_mask - 0.8) < 0.03
    assert abs(stayed - 0.1) < 0.025
    assert (labels[chosen] == ids[chosen]).all()
    assert (masked[~chosen] == ids[~chosen]).all()


def test_special_tokens_and_padding_are_left_alone(tokenizers, rows_of_tokens):
    ids, mask = rows_of_tokens
    masker = Masker.from_tokenizer(tokenizers["wordpiece"], probability=0.9)
    masked, labels = masker(ids, mask, seed=0, epochs=0, rows=ROWS)
    forbidden = masker.special[ids] | ~mask
    assert (labels[forbidden] == -100).all()
    assert (masked[forbidden] == ids[forbidden]).all()
    replaced = masked[(masked != ids) & (masked != masker.mask_id)]
    assert len(replaced) > 500
    assert not masker.special[replaced].any()
    assert len(np.unique(replaced)) > 0.9 * len(masker.replacements)


def test_masks_are_a_function_of_seed_epoch_row_and_position(tokenizers, rows_of_tokens):
    ids, mask = rows_of_tokens
    masker = Masker.from_tokenizer(tokenizers["wordpiece"])
    whole = masker(ids, mask, seed=1, epochs=np.arange(400) % 3, rows=ROWS)
    order = np.random.default_rng(1).permutation(400)
    for part in np.split(order, 8):
        again = masker(ids[part], mask[part], seed=1, epochs=part % 3, rows=part)
        np.testing.assert_array_equal(again[0], whole[0][part])
        np.testing.assert_array_equal(again[1], whole[1][part])
    shorter = masker(ids[:, :10], mask[:, :10], seed=1, epochs=np.arange(400) % 3, rows=ROWS)
    np.testing.assert_array_equal(shorter[1], whole[1][:, :10])


def test_every_epoch_seed_and_row_is_masked_differently(tokenizers):
    masker = Masker.from_tokenizer(tokenizers["wordpiece"])
    ids, mask = np.full((1, 512), 20), np.ones((1, 512), bool)
    seen = {
        masker(ids, mask, seed=seed, epochs=epoch, rows=np.array([row]))[1].tobytes()
        for seed in range(5)
        for epoch in range(5)
        for row in range(5)
    }
    assert len(seen) == 125


def test_over_epochs_every_position_is_chosen_equally_often(tokenizers):
    masker = Masker.from_tokenizer(tokenizers["wordpiece"])
    ids, mask = np.full((1000, 32), 20), np.ones((1000, 32), bool)
    _, labels = masker(ids, mask, seed=0, epochs=np.arange(1000), rows=np.zeros(1000, np.int64))
    counts = (labels != -100).sum(axis=0)
    assert (abs(counts - 150) < 5 * np.sqrt(1000 * 0.15 * 0.85)).all()


def test_probability_zero_changes_nothing(tokenizers, rows_of_tokens):
    ids, mask = rows_of_tokens
    masker = Masker.from_tokenizer(tokenizers["wordpiece"], probability=0)
    masked, labels = masker(ids, mask, seed=0, epochs=0, rows=ROWS)
    assert (masked == ids).all()
    assert masked is not ids
    assert (labels == -100).all()


@pytest.mark.parametrize("name", ["wordpiece", "byte_level", "unigram"])
def test_whole_words_are_chosen_together(tokenizers, name):
    tokenizer = tokenizers[name]
    text = " ".join(["walking", "knowledge", "bridge", "distillationally"] * 6)
    encoding = tokenizer(text, truncation=False, padding=False)
    row = np.array(encoding["input_ids"])
    words = np.array([-1 if word is None else word for word in encoding.word_ids()])
    assert (np.bincount(words[words >= 0]) > 1).any()
    number = 500
    ids, mask = np.tile(row, (number, 1)), np.ones((number, len(row)), bool)
    masker = Masker.from_tokenizer(tokenizer, whole_word=True)
    _, labels = masker(ids, mask, seed=0, epochs=0, rows=np.arange(number))
    chosen = labels != -100
    for word in range(words.max() + 1):
        of_word = chosen[:, words == word]
        assert (of_word.all(axis=1) == of_word.any(axis=1)).all()
    assert not chosen[:, words < 0].any()
    assert abs(chosen[:, words >= 0].mean() - 0.15) < 0.02


def test_vocabulary_without_word_marks_is_refused():
    with pytest.raises(ValueError, match="marks neither"):
        word_start_table({"a": 0, "b": 1})


def test_bad_probability_and_missing_mask_token_are_refused(tokenizers):
    with pytest.raises(ValueError, match="not in"):
        Masker.from_tokenizer(tokenizers["wordpiece"], probability=1.0)

    class Maskless:
        mask_token_id = None
        all_special_ids = (0,)

        def get_vocab(self):
            return {"<s>": 0, "a": 1}

    with pytest.raises(ValueError, match="no mask token"):
        Masker.from_tokenizer(Maskless())
    assert Masker.from_tokenizer(Maskless(), probability=0).probability == 0
