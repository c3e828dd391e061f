"""Broken task files through the command line: exit code 2, one sentence with file and line, no traceback."""

import importlib.util
import json
import sys

import pytest
import yaml

from tests.task.conftest import glue_directory, task_content  # noqa: F401 (fixtures)
from tests.tasks.test_broken import BROKEN, BROKEN_IN_DEV, JSONL
from tests.workers import ROOT

FILES = {**BROKEN, **BROKEN_IN_DEV}


@pytest.fixture
def dry_run(task_content, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The command with other data; its exit code and what it said on standard error."""
    spec = importlib.util.spec_from_file_location("task_distill_script", ROOT / "launch" / "task_distill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(task: str, data: dict) -> tuple[int, str]:
        task_content.update(task=task, data={"max_length": 32, **data})
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(task_content))
        command = ["task_distill.py", "--ds_config", str(ROOT / "ds_configs/zero0.json"), "--recipe"]
        monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "recipe.yaml"), "--dry_run"])
        code = module.main()
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", FILES)
def test_broken_files_end_with_code_2_and_a_sentence(dry_run, tmp_path, name):
    content, expected = FILES[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(JSONL)
    code, told = dry_run("own", {"train": str(tmp_path / "good.jsonl"), "dev": str(tmp_path / name)})
    assert code == 2
    assert told.startswith(f"error: {tmp_path / name}: ")
    assert expected in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_positions_are_refused(dry_run, tmp_path):
    lines = [json.dumps({"text": "good film " * length, "label": label}) for length, label in ((2, "a"), (40, "b"))]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    files = {"train": str(tmp_path / "long.jsonl"), "dev": str(tmp_path / "long.jsonl")}
    code, told = dry_run("own", {**files, "max_length": 65})  # the model has 64
    assert code == 2
    assert "data.max_length=65" in told
    assert "takes 64 tokens" in told
    code, told = dry_run("own", {**files, "max_length": 32})
    assert (code, told) == (0, "")
