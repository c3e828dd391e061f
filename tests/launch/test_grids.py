"""Every shipped grid, read as it is, with a teacher that needs no download."""

from collections import Counter
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM

from dsdistill.compare.grid import make_grid, read_grid
from dsdistill.compare.run import epochs_of

GRIDS = Path(__file__).parents[2] / "launch" / "recipes" / "grids"
NAMES = sorted(path.stem for path in GRIDS.glob("*.yaml"))
STUDY_TASKS = ["qnli", "sst2", "mnli", "mrpc", "qqp", "rte", "cola"]
SHAPES = {
    "study_task_specific": {"objective": 9, "init": 3, "task": 7, "seed": 4},
    "study_table1": {"objective": 9, "init": 1, "task": 7, "seed": 4},
    "study_table2": {"objective": 9, "learning_rate": 4, "batch": 2, "task": 7, "seed": 4},
    "study_table3": {"objective": 6, "init": 3, "task": 7, "seed": 4},
    "study_table4": {"objective": 5, "learning_rate": 4, "batch": 2, "task": 7, "seed": 4},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Twelve layers with twelve heads, as the study's."""
    directory = tmp_path_factory.mktemp("twelve")
    sizes = {"hidden_size": 24, "num_attention_heads": 12, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=99, num_hidden_layers=12, **sizes)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def grids(teacher) -> dict:
    return {
        name: make_grid(read_grid(GRIDS / f"{name}.yaml"), [f"teacher.model={teacher}"] * name.startswith("study"))
        for name in NAMES
    }


def test_the_promised_grids_are_there_and_say_what_they_repeat(grids):
    assert set(NAMES) >= set(SHAPES)
    for name, grid in grids.items():
        assert "arXiv:2305.15032" in grid.settings.source, name
        assert "differs" in grid.settings.source.lower(), name


@pytest.mark.parametrize("name", SHAPES)
def test_the_study_grids_have_its_axes(grids, name):
    settings = grids[name].settings
    assert {axis: len(settings.labels(axis)) for axis in settings.axes} == SHAPES[name]
    assert list(settings.labels("task")) == STUDY_TASKS


@pytest.mark.parametrize("name", NAMES)
def test_all_rows_have_equal_budgets(grids, name):
    epochs = {(cell.axes["task"], epochs_of(cell)) for cell in grids[name].cells}
    assert max(Counter(task for task, _ in epochs).values()) == 1


def test_task_specific_rows_follow_the_layers_they_start_from(grids):
    for cell in grids["study_task_specific"].cells:
        recipe = cell.recipe
        assert ",".join(map(str, recipe.student.init)) == cell.axes["init"]
        *first, prediction = recipe.stages
        assert {term.layers for stage in first for term in stage.objectives} <= {"init"}
        assert {term.objective: term.weight for term in prediction.objectives} == {"kd": 0.5, "task": 0.5}
        small = cell.axes["task"] in ("mrpc", "rte", "cola")
        rate = 2e-5 if cell.axes["task"] == "rte" else 1e-5
        for settings in (*(stage.optimization for stage in recipe.stages), recipe.teacher.fine_tuning):
            assert (settings.global_batch, settings.learning_rate) == (16 if small else 32, rate)
    assert len(grids["study_task_specific"].first) == 7, "one teacher per task"


@pytest.mark.parametrize(("name", "init", "count"), [("study_table2", "random", 8), ("study_table4", "lower", 4)])
def test_task_agnostic_students_are_made_once_and_fine_tuned(grids, name, init, count):
    grid = grids[name]
    assert len(grid.first) == count
    assert {run.recipe.student.init for run in grid.first} == {init}
    assert {run.recipe.optimization.steps for run in grid.first} == {100_000}
    made = {run.directory: run.recipe.objectives for run in grid.first}
    for cell in grid.cells:
        if cell.axes["objective"] == "bert_base":
            assert cell.needs == ()
            continue
        (needed,) = cell.needs
        assert needed.name == cell.axes["objective"]
        assert cell.recipe.student.init_from == needed / "model"
        assert needed in made
        assert cell.recipe.stages[0].optimization.learning_rate == float(cell.axes["learning_rate"])
