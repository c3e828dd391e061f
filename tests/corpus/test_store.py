"""Opening and reading a finished corpus, whole and damaged."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dsdistill.corpus.manifest import read_manifest
from dsdistill.corpus.store import Corpus
from dsdistill.corpus.tokenizing import tokenizer_fingerprint


@pytest.fixture
def copy(corpus_dir, tmp_path):
    return shutil.copytree(corpus_dir, tmp_path / "copy")


def test_rows_in_any_order_across_shards(corpus_dir):
    corpus = Corpus.open(corpus_dir)
    assert len(corpus.manifest.splits["train"].shards) > 3
    whole = corpus.rows(np.arange(corpus.num_rows))
    order = np.random.default_rng(0).permutation(corpus.num_rows)
    some = corpus.rows(order)
    for one, other in zip(whole, some, strict=True):
        if one is not None:
            np.testing.assert_array_equal(one[order], other)
    assert whole.input_ids.dtype == np.int64
    assert whole.mask.dtype == bool
    assert corpus.rows(np.array([3, 3])).input_ids.shape == (2, 32)
    assert corpus.rows(np.array([], np.int64)).input_ids.shape == (0, 32)
    for bad in (-1, corpus.num_rows):
        with pytest.raises(IndexError, match="are not in"):
            corpus.rows(np.array([0, bad]))


def test_counts_agree_with_the_manifest(corpus_dir):
    for split in ("train", "held_out"):
        corpus = Corpus.open(corpus_dir, split)
        record = corpus.manifest.splits[split]
        assert record.tokens == corpus.rows(np.arange(corpus.num_rows)).mask.sum()
        assert record.rows == sum(shard.rows for shard in record.shards) == corpus.num_rows == len(corpus)
        assert not corpus.has_padding


def test_a_corpus_can_be_sent_to_another_process(corpus_dir):
    corpus = Corpus.open(corpus_dir, "held_out")
    numbers = np.arange(5)
    corpus.rows(numbers)
    other = pickle.loads(pickle.dumps(corpus))
    np.testing.assert_array_equal(other.rows(numbers).input_ids, corpus.rows(numbers).input_ids)


def test_cut_shard_is_refused(copy):
    path = copy / "train-00001.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"train-00001\.arrow: \d+ bytes, but the manifest says"):
        Corpus.open(copy)


def test_altered_shard_is_refused(copy):
    Corpus.open(copy)
    path = copy / "train-00002.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00002\.arrow: altered"):
        Corpus.open(copy)


def test_full_check_finds_what_changed_behind_the_file_systems_back(copy):
    Corpus.open(copy)
    path = copy / "train-00002.arrow"
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    Corpus.open(copy)
    with pytest.raises(ValueError, match=r"train-00002\.arrow: altered"):
        Corpus.open(copy, verify=True)


def test_missing_shard_and_manifest_are_refused(copy, tmp_path):
    (copy / "held_out-00001.arrow").unlink()
    with pytest.raises(ValueError, match=r"held_out-00001\.arrow: this shard of the corpus is missing"):
        Corpus.open(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="unfinished corpus"):
        Corpus.open(copy)
    with pytest.raises(ValueError, match="no such directory"):
        Corpus.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "version 2, but this program reads version 1"),
        (lambda m: m.pop("splits"), "damaged manifest"),
        (lambda m: m.pop("version"), "damaged manifest"),
        (lambda m: m["splits"]["train"]["shards"][0].update(file="../../etc/passwd"), "damaged manifest"),
    ],
)
def test_damaged_manifest_is_refused(copy, change, message):
    content = json.loads((copy / "manifest.json").read_text())
    change(content)
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Corpus.open(copy)


def test_cut_manifest_is_refused(copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="damaged manifest"):
        Corpus.open(copy)


def test_a_split_without_rows_is_refused(copy):
    content = json.loads((copy / "manifest.json").read_text())
    content["splits"]["held_out"] |= {"rows": 0, "shards": []}
    (copy / "manifest.json").write_text(json.dumps(content))
    assert Corpus.open(copy).num_rows
    with pytest.raises(ValueError, match="held_out split has no rows"):
        Corpus.open(copy, "held_out")


def test_tokenizer_must_be_the_corpus_own(corpus_dir, tokenizer_dirs, tmp_path):
    corpus = Corpus.open(corpus_dir)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dirs["wordpiece"])
    corpus.check_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path / "again")
    corpus.check_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "again"))
    corpus.check_tokenizer(Tokenizer.from_file(str(tokenizer_dirs["wordpiece"] / "tokenizer.json")))
    for kind in ("byte_level", "unigram"):
        with pytest.raises(ValueError, match="makes other tokens"):
            corpus.check_tokenizer(AutoTokenizer.from_pretrained(tokenizer_dirs[kind]))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["normalizer"].update(lowercase=False),
        lambda t: t.update(pre_tokenizer={"type": "WhitespaceSplit"}),
        lambda t: t.update(post_processor=None),
        lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 150, "content": "[NEW]"}),
    ],
)
def test_fingerprint_sees_every_difference_that_matters(wordpiece_dir, change):
    content = json.loads((wordpiece_dir / "tokenizer.json").read_text())
    before = tokenizer_fingerprint(Tokenizer.from_str(json.dumps(content)))
    content["truncation"], content["padding"] = None, None
    assert tokenizer_fingerprint(Tokenizer.from_str(json.dumps(content))) == before
    change(content)
    assert tokenizer_fingerprint(Tokenizer.from_str(json.dumps(content))) != before


def test_vocabulary_must_fit_the_model(corpus_dir):
    corpus = Corpus.open(corpus_dir)
    corpus.check_vocabulary(150, model="teacher")
    with pytest.raises(ValueError, match="teacher has embeddings for 149 tokens"):
        corpus.check_vocabulary(149, model="teacher")


def test_manifest_names_no_machine_paths(corpus_dir):
    assert all("/" not in name for name, _ in read_manifest(corpus_dir).sources)
