"""Preparation as a whole: what lies on disk after it, for any tokenizer, number of processes and interruption."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from dsdistill.corpus.manifest import read_manifest
from dsdistill.corpus.packing import RowBuilder
from dsdistill.corpus.prepare import prepare
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.store import Corpus
from dsdistill.corpus.tokenizing import plain_backend
from dsdistill.corpus.worker import TokenizerPool
from tests.corpus.conftest import make_documents, write_documents

KINDS = ("wordpiece", "byte_level", "unigram")


def settings_for(tokenizer: Path, text: Path, output: Path, **changes) -> CorpusSettings:
    values = {"length": 32, "held_out": 0.0, "processes": 1, "shard_mb": 1.0} | changes
    return CorpusSettings(input=(str(text),), tokenizer=str(tokenizer), output=output, **values)


def shard_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.arrow"))}


def all_rows(directory: Path, split="train"):
    corpus = Corpus.open(directory, split)
    return corpus.rows(np.arange(corpus.num_rows))


def tokens_of(tokenizer, documents: list[str]) -> list[list[int]]:
    return [tokenizer(d, add_special_tokens=False, truncation=False, padding=False)["input_ids"] for d in documents]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [1, 2])
def test_packed_rows_hold_every_document_in_order(tokenizer_dirs, text_file, tmp_path, kind, processes):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dirs[kind])
    out = prepare(settings_for(tokenizer_dirs[kind], text_file, tmp_path / "c", processes=processes), progress=False)
    rows = all_rows(out)
    ids = rows.input_ids
    assert rows.mask.all()
    assert (ids[:, 0] == tokenizer.cls_token_id).all()
    assert (ids[:, -1] == tokenizer.sep_token_id).all()
    assert (ids[:, 1] != tokenizer.sep_token_id).all()
    content = ids[(ids != tokenizer.cls_token_id) & (ids != tokenizer.sep_token_id)]
    expected = np.concatenate(tokens_of(tokenizer, make_documents(200)))
    dropped = read_manifest(out).splits["train"].dropped_tokens
    assert 0 <= dropped < 32
    np.testing.assert_array_equal(content, expected[: len(expected) - dropped])


def test_segments_number_the_documents_of_a_row(wordpiece_dir, text_file, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(wordpiece_dir)
    rows = all_rows(prepare(settings_for(wordpiece_dir, text_file, tmp_path / "c", length=64), progress=False))
    documents = tokens_of(tokenizer, make_documents(200))
    number_of_token = np.repeat(np.arange(200), [len(document) for document in documents])
    at = 0
    for ids, segments in zip(rows.input_ids, rows.segments, strict=True):
        content = (ids != tokenizer.cls_token_id) & (ids != tokenizer.sep_token_id)
        wanted = number_of_token[at : at + content.sum()]
        np.testing.assert_array_equal(segments[content], wanted - wanted[0])
        assert segments[0] == 0
        separators = np.flatnonzero(ids == tokenizer.sep_token_id)
        assert (segments[separators] == segments[separators - 1]).all()
        at += content.sum()
    assert rows.segments.max() >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_document_rows_are_what_the_tokenizer_makes(tokenizer_dirs, text_file, tmp_path, kind):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dirs[kind])
    settings = settings_for(tokenizer_dirs[kind], text_file, tmp_path / "c", rows="document", long_documents="truncate")
    rows = all_rows(prepare(settings, progress=False))
    wanted = tokenizer(make_documents(200), truncation=True, max_length=32, padding="max_length")
    np.testing.assert_array_equal(rows.input_ids, wanted["input_ids"])
    np.testing.assert_array_equal(rows.mask, np.array(wanted["attention_mask"], bool))
    assert rows.segments is None
    assert rows.token_type_ids is None


def test_split_documents_lose_nothing(wordpiece_dir, text_file, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(wordpiece_dir)
    out = prepare(settings_for(wordpiece_dir, text_file, tmp_path / "c", rows="document"), progress=False)
    rows = all_rows(out)
    special = np.isin(rows.input_ids, tokenizer.all_special_ids)
    assert rows.input_ids[~special].tolist() == list(chain(*tokens_of(tokenizer, make_documents(200))))
    split = read_manifest(out).splits["train"]
    assert split.dropped_tokens == 0
    assert split.tokens == rows.mask.sum()
    assert Corpus.open(out).has_padding


@pytest.mark.parametrize("rows", ["packed", "document"])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_the_tokenizers_pairs(tokenizer_dirs, text_file, tmp_path, kind, rows):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dirs[kind])
    settings = settings_for(tokenizer_dirs[kind], text_file, tmp_path / "c", rows=rows, pairs=True, max_documents=60)
    result = all_rows(prepare(settings, progress=False))
    backend = plain_backend(tokenizer)
    template = backend.encode("a", "a")
    special_in_template = [i for i, s in zip(template.ids, template.sequence_ids, strict=True) if s is None]
    for ids, mask, types in zip(result.input_ids, result.mask, result.token_type_ids, strict=True):
        real = ids[mask]
        assert (types[~mask] == 0).all()
        special = [i for i in real.tolist() if i in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
        assert special[0] == special_in_template[0]
        if rows == "document":
            assert special == special_in_template
        if max(template.type_ids) == 1:
            first = int(types.argmax())
            assert types[mask].tolist() == [0] * first + [1] * (mask.sum() - first)
            assert ids[first - 1] == tokenizer.sep_token_id
            assert 1 < first < mask.sum() - 1
        else:
            assert types.max() == 0
    if kind == "wordpiece":
        ends = result.token_type_ids.argmax(axis=1) - 2
        last_of_first = np.take_along_axis(result.input_ids, ends[:, None], axis=1)
        assert (last_of_first == tokenizer.convert_tokens_to_ids(".")).mean() > 0.7


def test_special_tokens_written_in_a_text_stay_text(wordpiece_dir, tmp_path):
    text = write_documents(tmp_path / "t.txt", ["The [SEP] and [MASK] of [CLS] walking"] * 30)
    rows = all_rows(prepare(settings_for(wordpiece_dir, text, tmp_path / "c", rows="document"), progress=False))
    tokenizer = AutoTokenizer.from_pretrained(wordpiece_dir)
    assert (rows.input_ids == tokenizer.sep_token_id).sum() == len(rows.input_ids)
    assert not (rows.input_ids == tokenizer.mask_token_id).any()


@pytest.mark.parametrize("rows", ["packed", "document"])
def test_shards_are_byte_identical_for_any_number_of_processes(wordpiece_dir, text_file, tmp_path, rows, monkeypatch):
    monkeypatch.setattr("dsdistill.corpus.prepare._CHUNK_BYTES", 3000)
    shards = []
    for processes in (1, 2, 3):
        settings = settings_for(
            wordpiece_dir,
            text_file,
            tmp_path / str(processes),
            processes=processes,
            shard_mb=0.02,
            held_out=0.2,
            rows=rows,
        )
        shards.append(shard_bytes(prepare(settings, progress=False)))
    assert len(shards[0]) > 4
    assert shards[0] == shards[1] == shards[2]


def test_rows_do_not_depend_on_the_shards(wordpiece_dir, text_file, tmp_path):
    parts = [
        all_rows(prepare(settings_for(wordpiece_dir, text_file, tmp_path / str(mb), shard_mb=mb), progress=False))
        for mb in (0.005, 1.0)
    ]
    for one, other in zip(*parts, strict=True):
        np.testing.assert_array_equal(one, other)


def test_long_documents_are_tokenized_in_pieces_without_a_trace(wordpiece_dir, tmp_path, monkeypatch):
    text = write_documents(tmp_path / "t.txt", ["\n".join(make_documents(100))])
    whole = all_rows(prepare(settings_for(wordpiece_dir, text, tmp_path / "a"), progress=False))
    monkeypatch.setattr("dsdistill.corpus.worker._PIECE_CHARACTERS", 100)
    pieces = all_rows(prepare(settings_for(wordpiece_dir, text, tmp_path / "b"), progress=False))
    np.testing.assert_array_equal(whole.input_ids, pieces.input_ids)


def test_held_out_documents_are_apart_and_chosen_by_their_text(wordpiece_dir, tmp_path):
    documents = list(dict.fromkeys(" ".join(document.split()[:8]) for document in make_documents(300)))
    common = {"rows": "document", "held_out": 0.1}
    texts = []
    for name, order in (("a", documents), ("b", documents[::-1])):
        text = write_documents(tmp_path / f"{name}.txt", order + order[:50])
        out = prepare(settings_for(wordpiece_dir, text, tmp_path / name, **common), progress=False)
        manifest = read_manifest(out)
        assert manifest.splits["train"].documents + manifest.splits["held_out"].documents == len(documents) + 50
        texts.append([{row.tobytes() for row in all_rows(out, split).input_ids} for split in ("train", "held_out")])
    assert texts[0] == texts[1]
    train, held_out = texts[0]
    assert not train & held_out
    assert 10 < len(held_out) < 60


def test_duplicates_are_dropped_when_asked(wordpiece_dir, tmp_path):
    text = write_documents(tmp_path / "t.txt", make_documents(40) + make_documents(50))
    settings = settings_for(wordpiece_dir, text, tmp_path / "c", drop_duplicates=True)
    assert read_manifest(prepare(settings, progress=False)).splits["train"].documents == 50


def test_a_single_short_document_is_one_padded_row(wordpiece_dir, tmp_path):
    text = write_documents(tmp_path / "t.txt", ["walking under the bridge"])
    out = prepare(settings_for(wordpiece_dir, text, tmp_path / "c", length=64), progress=False)
    rows = all_rows(out)
    assert len(rows.input_ids) == 1
    assert not rows.mask.all()
    assert read_manifest(out).splits["train"].padded_rows == 1


def test_large_vocabularies_are_stored_in_32_bits(wordpiece_dir, text_file, tmp_path):
    directory = shutil.copytree(wordpiece_dir, tmp_path / "tokenizer")
    content = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"token{number}": number for number in range(len(vocabulary), 70_000)}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    text = write_documents(tmp_path / "t.txt", ["walking token69999 under"] * 20)
    rows = all_rows(prepare(settings_for(directory, text, tmp_path / "c"), progress=False))
    assert rows.input_ids.max() > 2**16


def test_datasets_opens_the_shards(corpus_dir):
    corpus = Corpus.open(corpus_dir)
    shards = [datasets.Dataset.from_file(str(path)) for path in sorted(corpus_dir.glob("train-*.arrow"))]
    together = datasets.concatenate_datasets(shards)
    assert len(together) == corpus.num_rows
    np.testing.assert_array_equal(together["input_ids"], corpus.rows(np.arange(corpus.num_rows)).input_ids)


def test_a_finished_corpus_is_reused_and_never_mixed(wordpiece_dir, text_file, tmp_path):
    settings = settings_for(wordpiece_dir, text_file, tmp_path / "c")
    prepare(settings, progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*.arrow")}
    prepare(settings.model_copy(update={"processes": 2}), progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*.arrow")}
    other = settings.model_copy(update={"length": 64})
    with pytest.raises(ValueError, match=r"settings\.length"):
        prepare(other, progress=False)
    assert Corpus.open(prepare(other, overwrite=True, progress=False)).length == 64


def test_a_directory_with_other_things_is_refused(wordpiece_dir, text_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        prepare(settings_for(wordpiece_dir, text_file, tmp_path), progress=False)


def test_tokenizer_without_special_tokens_is_refused(tokenizer_dirs, text_file, tmp_path):
    directory = tmp_path / "plain"
    AutoTokenizer.from_pretrained(tokenizer_dirs["wordpiece"]).save_pretrained(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["post_processor"] = None
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="adds no special tokens"):
        prepare(settings_for(directory, text_file, tmp_path / "c"), progress=False)


def run_cli(*arguments: str, limit_bytes: int | None = None, **options) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
    }

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, str(root / "launch" / "prepare_corpus.py"), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, preexec_fn=limit, **options)


def cli_arguments(tokenizer: Path, text: Path, output: Path) -> list[str]:
    return (
        f"--input {text} --tokenizer {tokenizer} --output {output} --length 32 --held_out 0.2 --processes 2 --quiet"
    ).split()


def test_full_disk_is_reported_and_leaves_nothing_finished(wordpiece_dir, text_file, tmp_path):
    arguments = cli_arguments(wordpiece_dir, text_file, tmp_path / "c")
    process = run_cli(*arguments, limit_bytes=10_000)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "train-00000.arrow could not be written beyond" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "c").glob("*.arrow*"))
    with pytest.raises(ValueError, match="unfinished corpus"):
        Corpus.open(tmp_path / "c")
    settings = settings_for(wordpiece_dir, text_file, tmp_path / "c", held_out=0.2, shard_mb=32)
    assert Corpus.open(prepare(settings, progress=False)).num_rows > 100


@pytest.mark.multiprocess
def test_killed_preparation_goes_on_and_gives_the_same_bytes(wordpiece_dir, tmp_path):
    text = write_documents(tmp_path / "t.txt", make_documents(6_000))
    arguments = [*cli_arguments(wordpiece_dir, text, tmp_path / "killed"), "--shard_mb", "0.1"]
    kills = 0
    for parts in (2, 5):
        process = run_cli(*arguments)
        while process.poll() is None and len(list((tmp_path / "killed").glob("part-*.json"))) < parts:
            time.sleep(0.01)
        if process.poll() is None:
            kills += 1
            process.send_signal(signal.SIGKILL)
        process.communicate()
        with pytest.raises(ValueError, match="unfinished corpus"):
            Corpus.open(tmp_path / "killed")
    assert kills == 2
    first_shard = tmp_path / "killed" / "train-00000.arrow"
    made = first_shard.stat().st_mtime_ns
    process = run_cli(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert first_shard.stat().st_mtime_ns == made
    arguments[arguments.index(str(tmp_path / "killed"))] = str(tmp_path / "unbroken")
    process = run_cli(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "unbroken")
    assert read_manifest(tmp_path / "killed").splits == read_manifest(tmp_path / "unbroken").splits
    assert not list((tmp_path / "killed").glob("part-*"))


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("crash_at", [1, 2, 3, 4, 5])
def test_interruption_between_any_two_writes(wordpiece_dir, text_file, tmp_path, monkeypatch, crash_at):
    """A stop at each cut, the last one after the final part but before the manifest."""
    settings = settings_for(wordpiece_dir, text_file, tmp_path / "c", shard_mb=0.05, held_out=0.1)
    unbroken = shard_bytes(prepare(settings.model_copy(update={"output": tmp_path / "u"}), progress=False))
    cut, calls = RowBuilder.cut, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        return cut(*args, **kwargs)

    with monkeypatch.context() as patch:
        if crash_at == 5:
            patch.setattr("dsdistill.corpus.prepare.write_manifest", interrupt)
        else:
            patch.setattr(RowBuilder, "cut", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, progress=False)
    assert shard_bytes(prepare(settings, progress=False)) == unbroken


def test_changed_input_is_noticed_on_resuming(wordpiece_dir, tmp_path, monkeypatch):
    text = write_documents(tmp_path / "t.txt", make_documents(200))
    settings = settings_for(wordpiece_dir, text, tmp_path / "c", shard_mb=0.02)
    with monkeypatch.context() as patch:
        patch.setattr("dsdistill.corpus.prepare.write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, progress=False)
    text.write_text(text.read_text().replace("walking", "wandern"))
    for path in sorted((tmp_path / "c").glob("part-*.json"))[2:]:
        path.unlink()
    with pytest.raises(ValueError, match="input has changed"):
        prepare(settings, progress=False)
    prepare(settings, overwrite=True, progress=False)


def test_a_lost_tokenizer_process_is_reported(wordpiece_dir):
    backend = plain_backend(AutoTokenizer.from_pretrained(wordpiece_dir))

    def items():
        yield ["walking"]
        yield ["under"]
        while not pool._workers:
            time.sleep(0.01)
        for worker in pool._workers:
            worker.kill()
        yield from (["bridge"] for _ in range(200))

    with TokenizerPool(backend, 2) as pool, pytest.raises(RuntimeError, match="a tokenizer process ended"):
        list(pool.map(items(), lambda item: item))


@pytest.mark.multiprocess
def test_processes_that_prepare_the_same_corpus_at_once_get_the_same(wordpiece_dir, text_file, tmp_path):
    arguments = cli_arguments(wordpiece_dir, text_file, tmp_path / "c")
    processes = [run_cli(*arguments, stdout=subprocess.PIPE) for _ in range(2)]
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
