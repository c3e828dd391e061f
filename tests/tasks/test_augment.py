"""Augmentation follows the paper's algorithm and depends on (seed, row, copy) only."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from dsdistill import task_teacher
from dsdistill.tasks.augment import MaskedLM, WordFinder, augment_rows
from dsdistill.tasks.rows import Rows
from dsdistill.tasks.settings import AugmentSettings, DataSettings
from dsdistill.tasks.task import Task, open_task
from dsdistill.tasks.vectors import WordVectors, model_vectors, read_vectors
from dsdistill.training.dist import Place
from dsdistill.training.signals import StoppedError
from tests.conftest import WORDS
from tests.tasks.glue_files import write_glue


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    model = BertForMaskedLM(config).eval()
    for parameter in model.parameters():  # random weights as small as BERT's would not tell words apart
        parameter.data.add_(torch.randn_like(parameter) * 0.5)
    return model


@pytest.fixture(scope="module")
def masked_lm(model, tokenizer):
    return MaskedLM(model, tokenizer, max_length=64)


@pytest.fixture(scope="module")
def vectors():
    """Neighbours in the order of the list, as on a quarter of a circle."""
    angles = np.linspace(0, np.pi / 2, len(WORDS))
    table = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return WordVectors(list(WORDS), table, lambda word: table[WORDS.index(word)] if word in WORDS else None)


@pytest.fixture
def task(tmp_path, tokenizer):
    write_glue(tmp_path, "sst2", train=30)
    return open_task("sst2", DataSettings(directory=tmp_path), tokenizer)


def words_of(rows: Rows, tokenizer, number: int) -> list[str]:
    ids = rows.ids[rows.offsets[number] : rows.offsets[number + 1]]
    return tokenizer.decode(ids, skip_special_tokens=True).split()


def test_copies_replace_words_by_candidates_with_the_given_chance(task: Task, tokenizer, vectors):
    settings = AugmentSettings(copies=10, probability=0.4, candidates=3)
    rows = augment_rows(task, tokenizer, settings, seed=1, vectors=vectors)
    assert rows.num_rows == 300
    assert rows.is_augmented.all()
    assert rows.labels is not None
    assert rows.labels.tolist() == [-100] * 300
    nearest = vectors.neighbours(WORDS, 3)
    kept, total, used = 0, 0, {word: set() for word in WORDS}
    for number in range(300):
        original = task.texts[number // 10].split()
        changed = words_of(rows, tokenizer, number)
        assert len(original) == len(changed)
        for before, after in zip(original, changed, strict=True):
            assert after == before or after in nearest[before]
            kept += before == after
            total += 1
            used[before].add(after)
    assert 0.37 < 1 - kept / total < 0.43
    assert all(used[word] >= {word, *nearest[word]} for word in WORDS)
    assert task.train.extended(rows).is_augmented.sum() == 300


def test_copies_depend_on_seed_row_and_copy_only(task: Task, tmp_path, tokenizer, vectors, monkeypatch):
    settings = AugmentSettings(copies=4)
    rows = augment_rows(task, tokenizer, settings, seed=1, vectors=vectors)
    monkeypatch.setattr("dsdistill.tasks.augment._CHUNK_ROWS", 7)
    assert augment_rows(task, tokenizer, settings, seed=1, vectors=vectors).fingerprint() == rows.fingerprint()
    few = open_task("sst2", DataSettings(directory=tmp_path, train_rows=9), tokenizer)
    some = augment_rows(few, tokenizer, settings, seed=1, vectors=vectors)
    assert some.fingerprint() == rows.first(36).fingerprint()
    less = augment_rows(few, tokenizer, AugmentSettings(copies=2), seed=1, vectors=vectors)
    assert [words_of(less, tokenizer, i) for i in (0, 1, 2, 3)] == [words_of(rows, tokenizer, i) for i in (0, 1, 4, 5)]
    assert augment_rows(task, tokenizer, settings, seed=2, vectors=vectors).fingerprint() != rows.fingerprint()


def test_words_of_one_token_get_the_models_most_probable_words(model, masked_lm, tokenizer):
    texts = ["the film, never good!", "a great scene"]
    encodings, words = masked_lm.finder(texts)
    assert [texts[w.text][w.start : w.end] for w in words] == ["the", "film", "never", "good", "a", "great", "scene"]
    found = masked_lm.candidates(encodings, words, 4)
    whole = {number: token for token, number in tokenizer.get_vocab().items() if token.isalnum()}
    for word, candidates in zip(words, found, strict=True):
        ids = torch.tensor(tokenizer(texts[word.text])["input_ids"])
        ids[word.token] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, word.token].tolist()
        assert candidates == [whole[number] for number in sorted(whole, key=logits.__getitem__, reverse=True)[:4]]


def test_masked_rows_see_no_padding(masked_lm):
    texts = ["the film", "never good never bad never great never poor never long"]
    encodings, words = masked_lm.finder(texts)
    together = masked_lm.candidates(encodings, words, 5)
    alone = [masked_lm.candidates(encodings, [word], 5)[0] for word in words]
    assert together == alone


def test_model_and_vectors_share_the_words(task: Task, tokenizer, vectors, masked_lm):
    """Known words ask the model, others their vectors, and words that neither knows stay."""
    asked = []
    watching = WordVectors(
        ["begin"],
        np.ones((1, 2), np.float32),
        lambda w: asked.append(w) or (vectors.vectors[0] if w == "goodend" else None),
    )
    texts = ["goodend film qqq"] * len(task.texts)
    changed = Task(**{name: getattr(task, name) for name in Task.__slots__ if name != "texts"}, texts=texts)
    settings = AugmentSettings(copies=5, probability=1, candidates=2, masked_lm="m")
    rows = augment_rows(changed, tokenizer, settings, seed=0, vectors=watching, masked_lm=masked_lm)
    assert sorted(asked) == ["goodend", "qqq"]
    first = "".join(words_of(rows, tokenizer, 0)).replace("##", "")
    assert first.startswith("begin")
    encodings, words = masked_lm.finder(texts[:1])
    film = next(word for word in words if word.number == 1)
    assert any(candidate in first for candidate in masked_lm.candidates(encodings, [film], 2)[0])


def test_pairs_are_replaced_independently(tmp_path, tokenizer, vectors):
    write_glue(tmp_path, "mrpc", train=20)
    task = open_task("mrpc", DataSettings(directory=tmp_path), tokenizer)
    same = Task(**{n: getattr(task, n) for n in Task.__slots__ if n != "pairs"}, pairs=task.texts)
    rows = augment_rows(same, tokenizer, AugmentSettings(copies=2), seed=0, vectors=vectors)
    halves = [
        tokenizer.decode(rows.ids[a:b]).split(" [SEP]") for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)
    ]
    assert sum(first.removeprefix("[CLS]") != second for first, second, _ in halves) > 30
    assert rows.token_types is not None


@pytest.mark.parametrize(("name", "waiting"), [("stsb", np.nan), ("mnli", -100)])
def test_labels_wait_for_the_teacher(tmp_path, tokenizer, vectors, name, waiting):
    write_glue(tmp_path, name)
    task = open_task(name, DataSettings(directory=tmp_path), tokenizer)
    rows = augment_rows(task, tokenizer, AugmentSettings(copies=1), seed=0, vectors=vectors)
    both = task.train.extended(rows)
    assert both.labels is not None
    np.testing.assert_array_equal(both.labels[12:], np.full(12, waiting, both.labels.dtype))
    numbers = np.flatnonzero(both.is_augmented)
    filled = both.with_labels(numbers, np.ones(12, both.labels.dtype))
    assert filled.labels is not None
    assert filled.labels[12:].tolist() == [1] * 12
    assert filled.labels[:12].tolist() == task.train.labels.tolist()


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As RoBERTa's: a word in running text begins with a space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<pad>", "<mask>"], initial_alphabet=alphabet)
    backend.train_from_iterator([" " + " ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", mask_token="<mask>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As XLM-R's: punctuation belongs to the word before it."""
    pieces = [("<pad>", 0.0), ("<mask>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -2.0) for word in WORDS)]
    pieces += [(character, -9.0) for character in ("\u2581", ",", "!", *"defilmngotsory")]
    backend = Tokenizer(models.Unigram(pieces, 2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", mask_token="<mask>", unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
def test_words_of_other_kinds_of_tokenizers(make):
    text = "the film story, never goodend!"
    encodings, words = WordFinder(make(), max_length=64)([text])
    assert [text[w.start : w.end] for w in words] == ["the", "film", "story", "never", "goodend"]
    single = [w for w in words if w.token is not None and w.number]
    assert [text[w.start : w.end] for w in single] == ["film", "story", "never"]
    assert [encodings[0].tokens[w.token].strip("\u0120\u2581") for w in single] == ["film", "story", "never"]
    vectors = model_vectors(torch.randn(len(make()), 8), make())
    assert set(WORDS) <= set(vectors.words)
    assert not any(" " in word for word in vectors.words)


def test_words_that_are_cut_off_are_left_alone(tokenizer):
    finder = WordFinder(tokenizer, max_length=5)
    text = "film story plot great end"
    _, words = finder([text])
    assert [text[w.start : w.end] for w in words] == ["film", "story"]  # the third may have lost its end


def test_vector_files(tmp_path):
    path = tmp_path / "v.txt"
    path.write_text("2 3\nfilm 1 0 0\nmovie 0.9 0.1 0\nstory 0 1 0\n, 1 0 0\nnew york 1 0 0\nFILM 1 0 0.1\n")
    vectors = read_vectors(path)
    assert vectors.words == ["film", "movie", "story", "FILM"]
    assert vectors.neighbours(["film", "Movie", "unknown"], 2) == {
        "film": ["FILM", "movie"],
        "Movie": ["film", "FILM"],
        "unknown": [],
    }
    for content, message in (
        ("film 1 2\nstory 1\n", "line 2: not a word and 2 numbers"),
        ("film 1 2\nstory 1 x\n", "line 2: not a word"),
        ("film 1 2\nstory 1 nan\n", "line 2: not a word"),
        ("film\n", "line 1: not a word and some numbers"),
        (", 1 2\n", "no word found"),
        ("", "empty"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_vectors(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="no such file of word vectors"):
        read_vectors(tmp_path / "missing.txt")


def test_a_models_word_embeddings(tokenizer):
    vocabulary = tokenizer.get_vocab()
    table = torch.eye(len(vocabulary)) + 0.01
    table[vocabulary["good"]] = table[vocabulary["bad"]] + 0.1
    vectors = model_vectors(table.half(), tokenizer)
    assert set(WORDS) <= set(vectors.words)
    assert not any(word.startswith(("##", "[")) for word in vectors.words)
    assert vectors.neighbours(["good"], 1) == {"good": ["bad"]}
    pieces = tokenizer.tokenize("goodend")
    assert len(pieces) > 1
    found = vectors.find("goodend")
    assert found is not None
    mean = table.half().float()[tokenizer.convert_tokens_to_ids(pieces)].mean(0).numpy()
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), rtol=1e-6)
    assert vectors.find("\u4e2d") is None
    with pytest.raises(ValueError, match="larger than the model's, which is 20"):
        model_vectors(table[:20], tokenizer)


def test_settings_and_model_must_agree(task: Task, tokenizer, vectors, masked_lm, model):
    with pytest.raises(ValueError, match="masked_lm='m', but no model is given"):
        augment_rows(task, tokenizer, AugmentSettings(masked_lm="m"), seed=0, vectors=vectors)
    with pytest.raises(ValueError, match="masked_lm=None, but a model is given"):
        augment_rows(task, tokenizer, AugmentSettings(), seed=0, vectors=vectors, masked_lm=masked_lm)
    with pytest.raises(ValueError, match="training mode"):
        MaskedLM(BertForMaskedLM(model.config).train(), tokenizer, max_length=64)
    without = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    with pytest.raises(ValueError, match="no mask token"):
        MaskedLM(model, without, max_length=64)


def test_a_signal_stops_augmentation_between_rows_and_the_watchdog_hears_of_it(task, tokenizer, model, monkeypatch):
    monkeypatch.setattr("dsdistill.tasks.augment._CHUNK_ROWS", 10)
    heard: list[str] = []
    monkeypatch.setattr(task_teacher, "received", lambda: "SIGTERM" if len(heard) == 2 else None)
    recipe = SimpleNamespace(data=SimpleNamespace(augment=AugmentSettings(copies=1), max_length=16), seed=0)
    place = Place(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    run = SimpleNamespace(
        recipe=recipe, place=place, watchdog=SimpleNamespace(at=heard.append), task=task, tokenizer=tokenizer
    )
    with pytest.raises(StoppedError, match="after augmentation of 10 rows"):
        task_teacher.augment(run, model)
    assert heard[1:] == [f"augmentation from row {row}" for row in (0, 10)]
