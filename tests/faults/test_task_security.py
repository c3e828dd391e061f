"""Files that a task or a comparison reads, planted: nothing in them runs, and a sentence says what is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dsdistill.compare import results
from dsdistill.compare.grid import make_grid, read_grid
from dsdistill.core import Batch
from dsdistill.locate import Source
from dsdistill.models.loading import load_encoder, load_masked_lm
from dsdistill.models.teacher import ResidentTeacher
from dsdistill.task_summary import RESULTS, finished_results
from dsdistill.training.dist import Place
from dsdistill.training.signal_cache import IDENTITY, SignalCache
from tests.faults.jobs import TASK, Job
from tests.faults.test_security import mark, plant  # noqa: F401 (fixture)

CPU = torch.device("cpu")
PLACE = Place(rank=0, local_rank=0, world_size=1, device=CPU)
NO_OBJECT = [b"", b"[]", b"{", b'"x"', b"null", b"NaN", b"[" * 100_000, b"\xff\xfe{}", b'{"a": "\\ud800', b"\x80\x04N."]


@pytest.fixture
def planted(teacher_directory, tmp_path, mark) -> Path:  # noqa: F811
    """A model whose weights are a pickle with code."""
    model = tmp_path / "planted"
    shutil.copytree(teacher_directory, model)
    (model / "model.safetensors").unlink()
    plant(model / "pytorch_model.bin", mark)
    return model


@pytest.mark.multiprocess
def test_weights_with_code_end_a_task_with_a_sentence(task_content, tmp_path, planted, mark, warm):  # noqa: F811
    """As the teacher, and as the student that is fine-tuned."""
    task_content["stages"] = [{**task_content["stages"][1], "objectives": [{"objective": "task"}]}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(task_content))
    student = (f"student.init_from={planted}", "student.init=null", "student.num_layers=4")
    jobs = [
        Job(tmp_path / "recipe.yaml", f"output={tmp_path / str(number)}", *settings, script=TASK, warm=warm)
        for number, settings in enumerate([(f"teacher.model={planted}",), student])
    ]
    for job in jobs:
        assert job.codes() == [2], job.tails()
        assert "may run code; use a model saved as safetensors" in job.output(0)
        assert "Traceback" not in job.output(0)
    assert not mark.exists()


def test_a_masked_lm_with_code_is_refused(planted, mark):  # noqa: F811
    with pytest.raises(ValueError, match="may run code"):
        load_masked_lm(Source(model=str(planted)), device=CPU)
    assert not mark.exists()


LENGTHS = np.array([3, 5])
WANTED = {"query": (1,), "hidden": (4,)}


def open_cache(directory: Path) -> SignalCache:
    return SignalCache(directory, {"teacher": "a"}, LENGTHS)


@pytest.fixture
def signals(tmp_path, teacher_directory) -> Path:
    teacher = ResidentTeacher(
        load_encoder(Source(model=str(teacher_directory))), WANTED, device=CPU, dtype=torch.float32
    )
    mask = torch.arange(5)[None] < torch.from_numpy(LENGTHS)[:, None]
    batch = Batch(input_ids=torch.full((2, 5), 7), mask=mask, sample_ids=torch.arange(2))
    cache = open_cache(tmp_path / "signals")
    cache.fill(teacher, [batch], PLACE, first_alone=lambda _, work: work(), at=lambda _: None)
    cache.teacher(WANTED, PLACE)
    return tmp_path / "signals"


def refusal(directory: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011, PT012 (the caller looks at it)
        cache = open_cache(directory)
        cache.teacher(WANTED, PLACE)
        cache.seconds(WANTED)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", [IDENTITY, "hidden-4.json", "hidden-4.bin"])
def test_nothing_is_unpickled_from_teacher_signals(signals, mark, name):  # noqa: F811
    plant(signals / name, mark)
    assert f"delete {signals}" in refusal(signals)
    assert not mark.exists()


@pytest.mark.parametrize("content", NO_OBJECT)
@pytest.mark.parametrize("name", [IDENTITY, "hidden-4.json"])
def test_files_of_signals_that_are_no_json_are_named(signals, name, content):
    (signals / name).write_bytes(content)
    message = refusal(signals)
    assert str(signals / name) in message
    assert f"delete {signals}" in message


@pytest.mark.parametrize(
    "change",
    [
        {"signal": "../../outside"},
        {"signal": "query"},
        {"signal": ["hidden"]},
        {"layer": 3},
        {"layer": None},
        {"layer": "../4"},
        {"dtype": "load"},
        {"dtype": "float64"},
        {"dtype": 32},
        {"places": 7},
        {"places": -1},
        {"width": 0},
        {"width": 2**62},
        {"heads": 0},
        {"heads": {}},
        {"scaling": "x"},
        {"sha256": ["x"]},
        {"sha256": None},
        {"seconds": "long"},
        {"seconds": None},
    ],
    ids=str,
)
def test_signals_that_tell_of_something_else_are_refused(signals, change):
    path = signals / "hidden-4.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert f"delete {signals}" in refusal(signals)
    path.write_text(json.dumps({}))
    assert str(path) in refusal(signals)


def test_signals_are_not_written_through_a_planted_link(signals, tmp_path, teacher_directory):
    (tmp_path / "mine").write_text("precious")
    (signals / "value-2.partial").symlink_to(tmp_path / "mine")
    teacher = ResidentTeacher(
        load_encoder(Source(model=str(teacher_directory))), {"value": (2,)}, device=CPU, dtype=torch.float32
    )
    batch = Batch(input_ids=torch.full((2, 3), 7), mask=torch.ones(2, 3).bool(), sample_ids=torch.arange(2))
    open_cache(signals).fill(teacher, [batch], PLACE, first_alone=lambda _, work: work(), at=lambda _: None)
    assert (tmp_path / "mine").read_text() == "precious"


TOLD = {
    "recipe": "x",
    "data_sha256": "y",
    "scores": {"dev": {"accuracy": 0.5}},
    "baseline": {"dev": {"accuracy": 0.4}},
    "teacher_scores": None,
    "student": {"parameters": 1},
    "teacher": {"parameters": 2},
    "training": {"steps": 1, "rows": 2, "seconds": 0.1},
    "teacher_signals": None,
}


@pytest.mark.parametrize(
    "content",
    [
        *NO_OBJECT,
        *(
            json.dumps(TOLD | change).encode()
            for change in (
                {"recipe": 1},
                {"scores": []},
                {"scores": {"dev": None}},
                {"scores": {"dev": {"accuracy": "../../etc"}}},
                {"scores": {"other": {"accuracy": 0.5}}},
                {"baseline": {"dev": {}}},
                {"teacher_scores": {"dev": {"f1": 1.0}}},
                {"teacher_scores": "none"},
                {"student": {"parameters": "many"}},
                {"teacher": 3},
                {"training": {"steps": 1}},
                {"teacher_signals": {"bytes": None}},
            )
        ),
        *(json.dumps({key: value for key, value in TOLD.items() if key != left}).encode() for left in TOLD),
    ],
)
def test_results_that_no_run_writes_are_told_and_the_run_is_not_done(tmp_path, capsys, content):
    (tmp_path / RESULTS).write_text(json.dumps(TOLD))
    assert finished_results(tmp_path) == TOLD
    (tmp_path / RESULTS).write_bytes(content)
    assert finished_results(tmp_path) is None
    assert f"{tmp_path / RESULTS} is not what a run writes" in capsys.readouterr().err


def test_pickles_for_results_are_not_loaded(tmp_path, mark):  # noqa: F811
    plant(tmp_path / RESULTS, mark)
    assert finished_results(tmp_path) is None
    plant(tmp_path / "results.jsonl", mark)
    with pytest.raises(ValueError, match="is no text"):
        results.read(tmp_path / "results.jsonl")
    assert not mark.exists()


LINE = {
    "cell": "a",
    "axes": {"seed": "0"},
    "recipe_sha256": "x",
    "status": "done",
    "primary": "accuracy",
    **{key: TOLD[key] for key in ("scores", "baseline", "teacher_scores", "student", "teacher", "training")},
    "teacher_directory": None,
}


@pytest.mark.parametrize(
    "broken",
    [
        *(content.decode(errors="replace") for content in NO_OBJECT if content),
        "1",
        "{}",
        *(json.dumps({key: value for key, value in LINE.items() if key != left}) for left in LINE),
        json.dumps(LINE | {"status": "perhaps"}),
        json.dumps(LINE | {"axes": ["seed"]}),
        json.dumps(LINE | {"scores": 1}),
        json.dumps({"cell": "a", "axes": {}, "recipe_sha256": "x", "status": "failed"}),
        json.dumps(LINE)[:-9],
    ],
)
def test_broken_lines_of_results_are_refused_by_number(tmp_path, broken):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{broken}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:2 is no .*delete that line"):
        results.read(path)


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"])
@pytest.mark.parametrize("place", ["grid", "extends", "base", "before", "--axis", "--set"])
def test_grids_cannot_name_python(tmp_path, mark, tag, place):  # noqa: F811
    code = f"!!python/{tag} [{mark}]"
    bad, grid = tmp_path / "bad.yaml", tmp_path / "grid.yaml"
    bad.write_text(f"name: {code}")
    content = {"name": "g", "source": "s", "output": str(tmp_path / "out"), "axes": {"seed": [0, 1]}}
    if place == "before":
        content["before"] = [{"base": str(bad)}]
    if place in ("extends", "base"):
        content[place] = str(bad)
    grid.write_text(f"name: {code}" if place == "grid" else yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"no YAML|none of the keys") as caught:  # noqa: PT012
        settings = read_grid(grid, axes=[("seed", code)] if place == "--axis" else [])
        make_grid(settings, [f"seed={code}"] if place == "--set" else [])
    assert type(caught.value) is ValueError
    assert not mark.exists()
