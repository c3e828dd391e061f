"""The page of `--dry_run`, and what is refused before anything starts."""

import re

import pytest
import torch

from dsdistill import preflight as module
from dsdistill.config.recipe import check_recipe
from dsdistill.config.sections import TeacherSettings
from dsdistill.placing import choose_placement, placement_problems
from dsdistill.plan import make_plan
from dsdistill.preflight import preflight
from dsdistill.training.dist import Place

JSON = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}


def place(device: str = "cuda", world_size: int = 1) -> Place:
    return Place(rank=0, local_rank=0, world_size=world_size, device=torch.device(device))


@pytest.fixture
def plan(recipe_content, monkeypatch):
    """A plan for a GPU that is not there."""
    monkeypatch.setattr(module, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(module, "gpu_bytes", lambda _: 2**30)
    monkeypatch.setattr(
        "dsdistill.placing.torch.cuda.get_device_properties", lambda _: type("P", (), {"total_memory": 2**30})
    )
    recipe_content["objectives"].pop()
    return make_plan(check_recipe(recipe_content, "test"), JSON, place())


def test_the_page_tells_weights_signals_memory_and_hours(plan):
    page = preflight(plan, place())
    heads = [line.split()[0] for line in page.splitlines() if not line.startswith(" ")]
    assert heads == ["placement", "weights", "signals", "memory", "work", "in"]
    trained, frozen = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:trained|frozen)", page)[:2])
    assert trained > frozen > 0
    assert "hid_seq" in page
    assert "of 1.0 on each GPU" in page
    assert re.search(r"6 steps, [\d,]+ tokens at most, \S+ FLOP", page)


def test_a_stage_that_cannot_fit_is_refused_with_what_can_be_done(plan, monkeypatch):
    monkeypatch.setattr(module, "gpu_bytes", lambda _: 2**20)
    with pytest.raises(
        ValueError, match=r"peak of .* GiB is more than the GPU's 0\.0; use a smaller train_micro_batch"
    ):
        preflight(plan, place())


@pytest.mark.parametrize(
    ("settings", "json", "world_size", "needs_teacher", "message"),
    [
        ({"placement": "cpu"}, {"torch_compile": True}, 1, True, "cannot wait for"),
        ({"placement": "zero3"}, {"torch_compile": True}, 2, True, "cannot wait for"),
        ({"placement": "ranks", "ranks": 1}, {}, 1, True, "would leave none to train"),
        ({"placement": "ranks", "ranks": 1}, {}, 2, False, "no objective asks a teacher"),
        ({"placement": "ranks", "ranks": 3}, {}, 4, True, "the others would idle"),
        ({"placement": "nvme", "nvme_path": "/nowhere"}, {}, 1, True, "no directory that can be written"),
    ],
)
def test_placements_that_cannot_be_are_refused_with_the_reason(settings, json, world_size, needs_teacher, message):
    teacher = TeacherSettings(model="m", **settings)
    there = place("cpu", world_size)
    if teacher.ranks is not None:
        there = there.with_teachers(teacher.ranks)
    (problem,) = placement_problems(teacher, json, there, needs_teacher=needs_teacher)
    assert message in problem


def test_nvme_without_libaio_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("dsdistill.training.sharded_teacher.async_io_problem", lambda: "libaio is not here; install it")
    teacher = TeacherSettings(model="m", placement="nvme", nvme_path=tmp_path)
    (problem,) = placement_problems(teacher, {}, place("cpu"), needs_teacher=True)
    assert problem == "teacher.placement=nvme: libaio is not here; install it, or use placement cpu"


@pytest.mark.parametrize(
    ("peaks", "fixed", "world_size", "chosen"),
    [
        ({"resident": 5, "cpu": 4, "zero3": 3}, False, 1, "resident"),
        ({"resident": 50, "cpu": 4, "zero3": 3}, False, 1, "cpu"),
        ({"resident": 50, "cpu": 4, "zero3": 3}, True, 1, "resident"),
        ({"resident": 50, "cpu": 4, "zero3": 3}, False, 2, "zero3"),
    ],
)
def test_auto_takes_a_copy_where_it_fits_and_else_what_the_host_has_room_for(
    monkeypatch, peaks, fixed, world_size, chosen
):
    properties = type("Properties", (), {"total_memory": 10 * 2**30})
    monkeypatch.setattr("dsdistill.placing.torch.cuda.get_device_properties", lambda _: properties)
    monkeypatch.setattr("dsdistill.placing.torch.cuda.device_count", lambda: 1)
    memory = {kind: type("Memory", (), {"peak": gib * 2**30}) for kind, gib in peaks.items()}
    found = choose_placement(
        TeacherSettings(model="m"), place(world_size=world_size), memory.__getitem__, size=lambda: 2**60, fixed=fixed
    )
    assert found.kind == chosen
    assert "predicted peaks in GiB: resident" in found.why
