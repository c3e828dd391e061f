"""The comparison as a person starts it: real supervisors and workers, real kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.compare.fake import starts_of
from tests.workers import ROOT

SCRIPT = ROOT / "launch" / "compare.py"


@pytest.fixture
def grid_file(tmp_path) -> Path:
    content = {
        "name": "small",
        "source": "Nothing.",
        "output": str(tmp_path / "grid"),
        "set": {"seconds": 0.15, "teacher": "{grid}/teachers/{task}"},
        "axes": {
            "objective": ["kd", "minilm", "hid_seq"],
            "init": ["lower", "upper"],
            "task": ["cola"],
            "seed": [0, 1],
        },
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    while STARTED:
        STARTED.pop().kill()


def start(grid_file: Path, *more: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--grid", str(grid_file), "--kinds", "tests.compare.fake:KINDS", *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    STARTED.append(process)
    return process


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


def wait_until(happened: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def cells(output: Path) -> list[str]:
    file = output / "results.jsonl"
    return [json.loads(line)["cell"] for line in file.read_text().splitlines()] if file.is_file() else []


def processes(output: Path) -> dict[str, list[int]]:
    return {path.name: starts_of(path) for path in (output / "cells").iterdir() if path.is_dir()}


@pytest.mark.multiprocess
@pytest.mark.slow  # test_compare_for_real kills a grid too
def test_a_grid_is_killed_restarted_stopped_and_finished(compare, grid_file, tmp_path):
    output = tmp_path / "grid"
    killed = start(grid_file, "--jobs", "2")
    wait_until(lambda: len(cells(output)) >= 3)
    killed.kill()
    finish(killed)
    before = cells(output)
    workers = {process for starts in processes(output).values() for process in starts}
    assert workers
    wait_until(lambda: not any(map(is_alive, workers)), timeout=10)
    done = {name for name in processes(output) if (output / "cells" / name / "results.json").is_file()}
    assert set(before) <= done
    assert len(done) < 12

    stopped = start(grid_file, "--jobs", "1")
    wait_until(lambda: len(cells(output)) >= 6)
    stopped.send_signal(signal.SIGTERM)
    code, told = finish(stopped)
    assert code == 3, told
    assert "the same command goes on from there" in told
    assert len(cells(output)) < 12

    code, told = finish(start(grid_file, "--jobs", "2"))
    assert code == 0, told
    assert sorted(cells(output)) == sorted(processes(output))
    assert len(cells(output)) == 12
    for name in done:
        assert len(processes(output)[name]) == 1, "what was done is not done again"
    assert len(starts_of(output / "teachers" / "cola")) == 1
    check_report(compare, output, told)


def check_report(compare: Callable[..., int], output: Path, told: str) -> None:
    for name in ("results.jsonl", "table.md", "scores.png", "score_by_speed.png"):
        assert f"{output / name}\n" in told
    page = (output / "table.md").read_text()
    assert "12 cells done, 0 failed, 0 to do." in page
    assert "| student 1 x 8 | 1,000 | 0.0 | " in page
    assert re.search(r"\| student 1 x 8 \|.*rows/s|\(32 x 128, cpu\)", page)
    (output / "table.md").unlink()
    assert compare("--report") == 0
    assert (output / "table.md").read_text() == page


@pytest.mark.multiprocess
def test_array_tasks_share_a_teacher_and_a_results_file(grid_file, tmp_path):
    output = tmp_path / "grid"
    tasks = [start(grid_file, "--cell", str(cell), "--set", "seconds=0.5") for cell in (1, 10)]
    for code, told in map(finish, tasks):
        assert code == 0, told
    assert cells(output) == ["kd__lower__cola__1", "hid_seq__upper__cola__0"]
    assert len(starts_of(output / "teachers" / "cola")) == 1
    assert not (output / "table.md").exists()


@pytest.fixture
def compare(monkeypatch, grid_file):
    """The script's `main` in this process: exit code for some arguments."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: str) -> int:
        command = [str(SCRIPT), "--grid", str(grid_file), "--kinds", "tests.compare.fake:KINDS", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        return module.main()

    return call


def test_a_dry_run_lists_the_cells_and_writes_nothing(compare, capsys, tmp_path):
    assert compare("--dry_run", "--axis", "seed", "4", "5", "6") == 0
    text = capsys.readouterr().out
    assert "small: 3 objective x 2 init x 1 task x 3 seed, 18 cells in" in text
    assert "19 to do" in text
    assert "epochs of a cell, all stages: 10 (18 cells)" in text
    assert f"  to do   {tmp_path}/grid/teachers/cola" in text
    assert "17  to do   hid_seq__upper__cola__6" in text
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "secnds=1"), "secnds: unknown key (did you mean 'seconds'?)"),
        (("--axis", "sed", "1"), "no axis 'sed'"),
        (("--cell", "12"), "--cell 12: the grid has cells 0 to 11"),
        (("--jobs", "0"), "--jobs 0 must be at least 1"),
        (("--ds_config", "/nowhere.json"), "DeepSpeed JSON /nowhere.json cannot be read"),
    ],
)
def test_bad_input_ends_with_code_2_and_a_sentence(compare, capsys, tmp_path, arguments, message):
    assert compare(*arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert message in text
    assert not (tmp_path / "grid" / "cells").exists()


@pytest.mark.multiprocess
def test_failed_cells_end_with_code_1_until_they_are_retried(compare, capsys, tmp_path):
    small = ("--axis", "objective", "kd", "--axis", "init", "lower", "--axis", "seed", "0", "--set", "teacher=null")
    broken = tmp_path / "broken"
    broken.write_text("")
    trouble = ("--output", str(broken / "grid"))  # a file is where the directory should be
    assert compare(*small, *trouble) == 1
    assert "Not a directory" in capsys.readouterr().err
    assert compare(*small, "--set", "trouble=raise") == 1
    assert "1 failed" not in capsys.readouterr().out
    assert compare(*small, "--set", "trouble=raise") == 1
    assert len(starts_of(tmp_path / "grid" / "cells" / "kd__lower__cola__0")) == 1
    assert compare(*small, "--set", "trouble=raise", "--retry_failed") == 1
    assert len(starts_of(tmp_path / "grid" / "cells" / "kd__lower__cola__0")) == 2
