"""Signals on disk are those of the teacher, and of no other."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsdistill.core import Batch
from dsdistill.locate import Source
from dsdistill.models.loading import load_encoder
from dsdistill.models.teacher import ResidentTeacher
from dsdistill.training.dist import Place
from dsdistill.training.signal_cache import SignalCache

PLACE = Place(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
LENGTHS = np.array([3, 9, 1, 6, 9, 2, 7])
IDENTITY = {"teacher": "a", "rows": "b"}
WANTED = {"query": (1, 3), "key": (3,), "value": (2,), "hidden": (0, 4)}


def batch_of(rows: list[int], *, wider: int = 0) -> Batch:
    lengths = LENGTHS[rows]
    mask = torch.arange(int(lengths.max()) + wider)[None] < torch.tensor(lengths)[:, None]
    ids = torch.stack([torch.arange(mask.shape[1]) + 5 + row for row in rows])
    return Batch(input_ids=torch.where(mask, ids, 0), mask=mask, sample_ids=torch.tensor(rows))


@pytest.fixture
def teacher(teacher_directory):
    model = load_encoder(Source(model=str(teacher_directory)))
    return ResidentTeacher(model, WANTED, device=PLACE.device, dtype=torch.float32)


def filled(directory, teacher, *batches: list[int]) -> SignalCache:
    cache = SignalCache(directory, IDENTITY, LENGTHS)
    cache.fill(teacher, map(batch_of, batches), PLACE, first_alone=lambda _, work: work(), at=lambda _: None)
    return cache


def test_what_is_read_is_what_the_teacher_said(tmp_path, teacher):
    cache = filled(tmp_path, teacher, [6, 1], [4, 0, 2], [3, 5, 1])
    assert cache.missing(WANTED) == {}
    reader = SignalCache(tmp_path, IDENTITY, LENGTHS).teacher(WANTED, PLACE)
    for rows, wider in (([0, 1, 2], 0), ([6, 5], 4), ([2], 0), ([4, 3, 3], 1)):
        batch = batch_of(rows, wider=wider)
        ours, theirs = reader(batch), teacher(batch)
        assert ours.scaling[3] == theirs.scaling[3]
        for signal, layers in WANTED.items():
            for layer in layers:
                real = batch.mask[:, None, :, None] if signal != "hidden" else batch.mask[..., None]
                read, said = ours.at(signal, layer), theirs.at(signal, layer)
                torch.testing.assert_close(read * real, said * real, rtol=1e-4, atol=1e-5)
                assert not (read * ~real).any()


def test_missing_signals_are_added_and_the_others_stay(tmp_path, teacher, teacher_directory):
    filled(tmp_path, teacher, list(range(7)))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    cache = SignalCache(tmp_path, IDENTITY, LENGTHS)
    missing = cache.missing({**WANTED, "hidden": (0, 2, 4), "logits": (-1,)})
    assert missing == {"hidden": {2}, "logits": {-1}}
    model = load_encoder(Source(model=str(teacher_directory)))
    more = ResidentTeacher(model, {"hidden": {2}}, device=PLACE.device, dtype=torch.float32)
    cache.fill(more, [batch_of(list(range(7)))], PLACE, first_alone=lambda _, work: work(), at=lambda _: None)
    assert cache.missing({"hidden": (0, 2, 4)}) == {}
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {name for name in after if before.get(name) != after[name]} == {
        "hidden-2.bin",
        "hidden-2.json",
        "identity.json",
    }


@pytest.mark.parametrize(("key", "value"), [("teacher", "another"), ("rows", "others"), ("precision", "torch.float16")])
def test_signals_of_something_else_are_refused_by_name(tmp_path, teacher, key, value):
    filled(tmp_path, teacher, list(range(7)))
    with pytest.raises(ValueError, match=f"made with another {key}"):
        SignalCache(tmp_path, {**IDENTITY, key: value}, LENGTHS)


def test_a_damaged_file_is_refused(tmp_path, teacher):
    cache = filled(tmp_path, teacher, list(range(7)))
    content = bytearray((tmp_path / "key-3.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "key-3.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"key-3\.bin are damaged"):
        cache.teacher(WANTED, PLACE)


def test_a_kill_while_writing_leaves_nothing_that_counts(tmp_path, teacher):
    cache = SignalCache(tmp_path, IDENTITY, LENGTHS)

    def broken():
        yield batch_of([0, 1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(teacher, broken(), PLACE, first_alone=lambda _, work: work(), at=lambda _: None)
    assert cache.missing(WANTED) == {signal: set(layers) for signal, layers in WANTED.items()}
    filled(tmp_path, teacher, list(range(7)))
    assert cache.missing(WANTED) == {}


def test_the_size_is_known_before_anything_is_written(tmp_path, teacher, monkeypatch, capsys):
    filled(tmp_path / "a", teacher, list(range(7)))
    size = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.bin"))
    assert size == 4 * 32 * int(LENGTHS.sum()) * 6
    assert f"{size / 2**20:.1f} MiB will be written" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with pytest.raises(OSError, match=f"need {size:,} bytes"):
        filled(tmp_path / "b", teacher, list(range(7)))
    assert not list((tmp_path / "b").glob("*.partial"))
    assert json.loads((tmp_path / "a" / "identity.json").read_text())["teacher"] == "a"
