"""Grids run by real worker processes that fail, die, stop, or take too long."""

import json
import os
from pathlib import Path

import pytest
import yaml

from dsdistill.compare import results, workers
from dsdistill.compare.grid import make_grid, read_grid
from dsdistill.compare.run import describe, run_cell, run_first, run_grid
from dsdistill.compare.workers import Machine, find_machine
from tests.compare.fake import KINDS, results_of, starts_of

MACHINE = Machine(jobs=2, gpus=(), threads=3)
DS_JSON = {"zero_optimization": {"stage": 0}}


@pytest.fixture(autouse=True)
def no_speed_measurement(monkeypatch):
    """Covered by test_speed.py."""
    monkeypatch.setattr("dsdistill.compare.run.measure_speeds", lambda grid: None)


@pytest.fixture
def grid_of(tmp_path):
    def make(axes: dict, **settings):
        content = {"name": "g", "source": "s", "output": str(tmp_path / "grid"), "axes": axes, **settings}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return make_grid(read_grid(tmp_path / "grid.yaml"), (), KINDS)

    return make


def lines_of(grid) -> dict[str, dict]:
    text = (grid.settings.output / "results.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in text]
    assert len({line["cell"] for line in lines}) == len(lines)
    return {line["cell"]: line for line in lines}


TROUBLES = {
    "fine": {},
    "raise": {"trouble": "raise"},
    "die": {"trouble": "die"},
    "die_once": {"trouble": "die_once"},
    "stop_once": {"trouble": "stop_once"},
    "freeze": {"trouble": "freeze"},
    "no_results": {"trouble": "no_results"},
    "bad_teacher": {"teacher": "{grid}/teachers/bad"},
}


@pytest.mark.multiprocess
def test_failures_are_recorded_and_the_rest_goes_on(grid_of, monkeypatch, capsys):
    monkeypatch.setattr(workers, "SILENCE_S", 4.0)
    monkeypatch.setattr("tests.compare.fake.teacher_of", lambda recipe: recipe.teacher and bad_teacher(recipe))
    grid = grid_of({"what": TROUBLES, "task": ["cola"], "seed": [0]}, cell_timeout_s=5)
    grid.settings.output.mkdir()
    assert run_grid(grid, DS_JSON, MACHINE, retry_failed=False) == 5
    lines = lines_of(grid)
    assert list(lines) == [cell.id for cell in grid.cells]
    told = {name: lines[f"{name}__cola__0"] for name in TROUBLES}
    assert [name for name in TROUBLES if told[name]["status"] == "done"] == ["fine", "die_once", "stop_once"]
    assert told["raise"]["error"] == "the data is gone"
    assert "ended 2 times, at last by SIGKILL; out of memory?" in told["die"]["error"]
    assert told["freeze"]["error"] == "took longer than cell_timeout_s=5"
    assert told["no_results"]["error"].startswith("RuntimeError: the run ended without results.json")
    assert "teachers/bad, which it needs, failed: the data is gone" in told["bad_teacher"]["error"]
    assert "Traceback" in Path(told["raise"]["log"]).read_text()
    assert "working on die__cola__0" in Path(told["die"]["log"]).read_text()
    starts = {cell.id: starts_of(cell.directory) for cell in grid.cells}
    counts = {name: len(starts[f"{name}__cola__0"]) for name in TROUBLES}
    assert counts == dict.fromkeys(TROUBLES, 1) | {"die": 2, "die_once": 2, "stop_once": 2, "bad_teacher": 0}
    check_everything_else(grid, capsys.readouterr())

    assert run_grid(grid, DS_JSON, MACHINE, retry_failed=False) == 5
    assert {cell.id: starts_of(cell.directory) for cell in grid.cells} == starts, "nothing is run again"


def bad_teacher(recipe):
    return recipe.model_copy(
        update={"output": recipe.teacher, "teacher": None, "trouble": "raise", "task": "t", "seed": 0}
    )


def check_everything_else(grid, printed) -> None:
    fine = grid.cells[0]
    assert lines_of(grid)[fine.id] == {
        "cell": "fine__cola__0",
        "axes": {"what": "fine", "task": "cola", "seed": "0"},
        "recipe_sha256": fine.fingerprint,
        "directory": str(fine.directory),
        "teacher_directory": None,
        "status": "done",
        **results_of(fine.recipe),
    }
    assert sorted(path.name for path in fine.directory.iterdir()) == ["recipe.yaml", "results.json", "starts.txt"]
    assert (fine.directory / "starts.txt").read_text().split()[1] == "3"
    assert "[1/9]" in printed.err
    assert "raise__cola__0: FAILED, the data is gone" in printed.err
    table = (grid.settings.output / "table.md").read_text()
    assert "3 cells done, 5 failed, 0 to do." in table
    assert "- `raise__cola__0`: the data is gone" in table
    assert "5 failed" in describe(grid)


@pytest.mark.multiprocess
def test_cells_are_shared_out_and_each_is_done_once_after_its_teacher(grid_of):
    axes = {"objective": ["a", "b"], "task": ["cola", "rte"], "seed": [0, 1]}
    grid = grid_of(axes, set={"teacher": "{grid}/teachers/{task}", "seconds": 0.2}, keep="models")
    assert run_first(grid, DS_JSON, MACHINE) == 0
    assert not (grid.settings.output / "cells").exists()
    teachers = [starts_of(run.directory) for run in grid.first]
    assert run_grid(grid, DS_JSON, MACHINE, retry_failed=False) == 0
    assert [starts_of(run.directory) for run in grid.first] == teachers
    starts = [starts_of(cell.directory) for cell in grid.cells]
    assert {len(processes) for processes in starts} == {1}
    assert len({processes[0] for processes in starts}) == 2, "two workers take all cells"
    assert all((cell.directory / "model").is_dir() for cell in grid.cells)
    assert not any((cell.directory / "checkpoints").exists() for cell in grid.cells)
    assert all(line["teacher_directory"].endswith(line["axes"]["task"]) for line in lines_of(grid).values())


@pytest.mark.multiprocess
def test_the_results_file_follows_the_run_directories(grid_of):
    grid = grid_of({"task": ["cola"], "seed": [0, 1, 2]})
    file = grid.settings.output / results.FILE
    assert run_grid(grid, DS_JSON, MACHINE, retry_failed=False) == 0
    whole = file.read_bytes()

    file.unlink()  # as if killed before the lines were written
    assert results.collect(file, grid, grid.cells) == []
    assert file.read_bytes() == whole

    file.write_text("\n".join(whole.decode().splitlines()[:1]) + "\n")
    results.add_missing(file, grid)
    assert file.read_bytes() == whole

    (grid.cells[1].directory / "results.json").unlink()
    assert results.collect(file, grid, grid.cells) == [grid.cells[1]]
    assert list(lines_of(grid)) == [grid.cells[0].id, grid.cells[2].id]

    outcome = workers.Outcome(run=grid.cells[1], error="no")
    results.record(file, grid, outcome)
    assert results.collect(file, grid, grid.cells) == []
    assert results.collect(file, grid, grid.cells, retry_failed=True) == [grid.cells[1]]
    assert run_cell(grid, 1, DS_JSON, MACHINE, retry_failed=True) == 0
    assert file.read_bytes() == whole
    with pytest.raises(ValueError, match="--cell 3: the grid has cells 0 to 2"):
        run_cell(grid, 3, DS_JSON, MACHINE, retry_failed=True)

    check_refusals(grid_of, file)


def check_refusals(grid_of, file: Path) -> None:
    other = grid_of({"task": ["cola"], "seed": [0, 1, 2]}, set={"seconds": 0.25})
    with pytest.raises(ValueError, match=r"3 run.* have another recipe, first .*\(seconds has changed\)"):
        results.collect(file, other, other.cells)
    wider = grid_of({"init": ["lower"], "task": ["cola"], "seed": [0]})
    with pytest.raises(ValueError, match="has cells of other axes"):
        results.collect(file, wider, wider.cells)
    more = grid_of({"task": ["cola", "rte"], "seed": [0, 7]})
    assert [cell.id for cell in results.collect(file, more, more.cells)] == ["cola__7", "rte__0", "rte__7"]
    assert len(results.read(file)) == 3, "lines of cells that are not in this grid stay"
    file.write_text(file.read_text() + '{"cell": ')
    with pytest.raises(ValueError, match=r"results.jsonl:4 is no JSON"):
        results.read(file)


def test_devices_are_given_to_workers_in_turn(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    machine = Machine(jobs=4, gpus=("2", "5"), threads=1)
    assert [machine.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["2", "5", "2", "5"]
    assert machine.environment(0)["WORLD_SIZE"] == "1"
    assert "MASTER_PORT" not in machine.environment(0)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_machine(None) == Machine(jobs=4, gpus=("0",), threads=4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert find_machine(12) == Machine(jobs=12, gpus=("3", "1"), threads=1)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert find_machine(None) == Machine(jobs=8, gpus=(), threads=2)
    assert "CUDA_VISIBLE_DEVICES" not in set(find_machine(None).environment(0)) - set(os.environ)
    with pytest.raises(ValueError, match="--jobs 0 must be at least 1"):
        find_machine(0)
