import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dsdistill.config.recipe import check_recipe
from dsdistill.training import run_directory
from dsdistill.training.checkpoint import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    STUDENT,
    checkpoint_name,
    seal,
    verify,
    whole_checkpoints,
)
from dsdistill.training.dist import Place

PLACE = Place(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
CONFIG = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}


def make_checkpoint(directory, recipe, step: int):
    path = directory / run_directory.CHECKPOINTS / checkpoint_name(step)
    (path / OPTIMIZER).mkdir(parents=True)
    (path / OPTIMIZER / "moments.safetensors").write_bytes(bytes(range(256)) * 8)
    save_file({"weight": torch.arange(4.0)}, path / STUDENT)
    state = run_directory.state_of(step, recipe, CONFIG, PLACE) | {"skipped_steps": 0, "loss_scaling": None}
    (path / STATE).write_text(json.dumps(state))
    seal(path)
    return path


@pytest.fixture
def recipe(recipe_content):
    return check_recipe(recipe_content, "test")


def test_names_sort_like_steps_and_unfinished_ones_do_not_count(tmp_path, recipe):
    paths = [make_checkpoint(tmp_path, recipe, step) for step in (900, 1000, 100)]
    (paths[1] / MANIFEST).unlink()
    (tmp_path / "checkpoints" / "partial-step-00002000").mkdir()
    assert [p.name for p in whole_checkpoints(tmp_path / "checkpoints")] == ["step-00000100", "step-00000900"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: flip(c / OPTIMIZER / "moments.safetensors"), r"moments\.safetensors has changed"),
        (lambda c: (c / STUDENT).write_bytes(b"short"), r"student\.safetensors is missing or truncated"),
        (lambda c: (c / OPTIMIZER / "moments.safetensors").unlink(), "missing or truncated"),
        (lambda c: (c / "planted.pt").write_bytes(b"x"), "not in its manifest"),
        (lambda c: (c / MANIFEST).write_text("{"), "never finished"),
        (lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text().replace(STATE, "../../" + STATE)), "leads out"),
    ],
)
def test_damage_is_found_and_named(tmp_path, recipe, damage, message):
    checkpoint = make_checkpoint(tmp_path, recipe, 5)
    verify(checkpoint)
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        verify(checkpoint)


def test_a_damaged_checkpoint_is_told_and_the_one_before_used(tmp_path, recipe, capsys):
    whole, *damaged = (make_checkpoint(tmp_path, recipe, step) for step in (3, 6, 9))
    leftover = tmp_path / "checkpoints" / "partial-step-00000012"
    leftover.mkdir()
    (damaged[0] / STUDENT).write_bytes(b"short")
    flip(damaged[1] / OPTIMIZER / "moments.safetensors")
    assert run_directory.enter(tmp_path, recipe, CONFIG, PLACE, "auto", data_sha256="d") == whole
    shown = capsys.readouterr().err
    assert "step-00000009: optimizer/moments.safetensors has changed" in shown
    assert "step-00000006: student.safetensors is missing or truncated" in shown
    assert "going back to step-00000003" in shown
    assert not leftover.exists()
    assert whole_checkpoints(tmp_path / "checkpoints") == [whole]


def test_a_run_is_never_started_again_in_silence(tmp_path, recipe):
    for step in (3, 6):
        flip(make_checkpoint(tmp_path, recipe, step) / STUDENT)
    with pytest.raises(ValueError, match=r"(?s)no checkpoint .* is whole.*00000006.*00000003.*--resume never"):
        run_directory.enter(tmp_path, recipe, CONFIG, PLACE, "auto", data_sha256="d")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(tmp_path, recipe):
    make_checkpoint(tmp_path, recipe, 3)
    asked = make_checkpoint(tmp_path, recipe, 6)
    flip(asked / STUDENT)
    with pytest.raises(ValueError, match=r"student\.safetensors has changed"):
        run_directory.enter(tmp_path, recipe, CONFIG, PLACE, asked, data_sha256="d")


def test_resume_finds_the_newest_checkpoint_of_the_same_recipe(tmp_path, recipe, recipe_content):
    assert run_directory.enter(tmp_path, recipe, CONFIG, PLACE, "auto", data_sha256="d") is None
    make_checkpoint(tmp_path, recipe, 3)
    newest = make_checkpoint(tmp_path, recipe, 6)
    assert run_directory.enter(tmp_path, recipe, CONFIG, PLACE, "auto", data_sha256="d") == newest
    logs_more = check_recipe({**recipe_content, "logging": {"every_steps": 1}}, "test")
    assert run_directory.enter(tmp_path, logs_more, CONFIG, PLACE, "auto", data_sha256="d") == newest


def test_another_recipe_is_refused_and_the_difference_named(tmp_path, recipe, recipe_content):
    run_directory.enter(tmp_path, recipe, CONFIG, PLACE, "auto", data_sha256="d")
    make_checkpoint(tmp_path, recipe, 3)
    recipe_content["optimization"]["learning_rate"] = 0.5
    other = check_recipe(recipe_content, "test")
    with pytest.raises(ValueError, match=r"optimization\.learning_rate was 0\.001, now 0\.5"):
        run_directory.enter(tmp_path, other, CONFIG, PLACE, "auto", data_sha256="d")


def test_other_data_is_refused(tmp_path, recipe):
    run_directory.enter(tmp_path, recipe, CONFIG, PLACE, "auto", data_sha256="before")
    checkpoint = make_checkpoint(tmp_path, recipe, 3)
    assert run_directory.enter(tmp_path, recipe, CONFIG, PLACE, "auto", data_sha256="before") == checkpoint
    with pytest.raises(ValueError, match="the training data has changed"):
        run_directory.enter(tmp_path, recipe, CONFIG, PLACE, "auto", data_sha256="after")


@pytest.mark.parametrize(
    ("place", "config", "told"),
    [
        (PLACE, CONFIG, []),
        (replace(PLACE, world_size=2), CONFIG, ["saved with 1 process(es), now 2: same", "dropout is drawn anew"]),
        (PLACE, {**CONFIG, "zero_optimization": {"stage": 3}}, ["saved with 2 as ZeRO stage, now 3: same"]),
        (PLACE, {**CONFIG, "train_micro_batch_size_per_gpu": 2}, ["saved with 4 row(s) at once, now 2", "dropout"]),
    ],
)
def test_another_layout_goes_on_and_is_told(tmp_path, recipe, place, config, told):
    checkpoint = make_checkpoint(tmp_path, recipe, 3)
    assert run_directory.choose_checkpoint(tmp_path, recipe, config, place, "auto") == checkpoint
    changes = run_directory.changes(checkpoint, config, place)
    assert len(changes) == len(told)
    assert all(part in line for part, line in zip(told, changes, strict=True))


def test_never_moves_the_earlier_run_aside(tmp_path, recipe):
    run = tmp_path / "run"
    run_directory.enter(run, recipe, CONFIG, PLACE, "auto", data_sha256="d")
    make_checkpoint(run, recipe, 3)
    assert run_directory.enter(run, recipe, CONFIG, PLACE, "never", data_sha256="d") is None
    aside = [p for p in tmp_path.iterdir() if p.name.startswith("run.")]
    assert len(aside) == 1
    assert whole_checkpoints(aside[0] / "checkpoints")
    assert not whole_checkpoints(run / "checkpoints")


def test_a_run_directory_tells_how_it_was_made_but_not_where(tmp_path, recipe):
    run_directory.enter(tmp_path / "run", recipe, CONFIG, PLACE, "auto", data_sha256="d")
    text = (tmp_path / "run" / "run.json").read_text()
    assert '"torch"' in text
    assert os.uname().nodename not in text
