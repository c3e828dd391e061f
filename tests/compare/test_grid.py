"""Grid files: what they mean, and what is wrong with them."""

from pathlib import Path

import pytest
import yaml

from dsdistill.compare.grid import apply, make_grid, read_grid
from tests.compare.fake import KINDS


@pytest.fixture
def content(tmp_path) -> dict:
    return {
        "name": "small",
        "source": "Nothing.",
        "output": str(tmp_path / "grid"),
        "set": {"seconds": 0.5},
        "axes": {
            "objective": ["kd", "minilm"],
            "init": {"lower": {"init": "lower"}, "4,8,12": {"init": [4, 8, 12], "seconds": 1.5}},
            "rate": {"key": "learning_rate", "values": [1e-5, "3e-5"]},
            "task": ["cola", "mrpc"],
            "seed": [0, 1, 2],
        },
    }


@pytest.fixture
def grid_of(tmp_path):
    def make(content: dict, *changes: str, **more):
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return make_grid(read_grid(path, **more), changes, KINDS)

    return make


def test_every_combination_is_a_cell_with_its_settings(content, grid_of):
    grid = grid_of(content)
    assert len(grid.cells) == len({cell.id for cell in grid.cells}) == 2 * 2 * 2 * 2 * 3
    assert grid.cells[0].id == "kd__lower__1e-05__cola__0"
    cell = next(cell for cell in grid.cells if cell.id == "minilm__4,8,12__3e-5__mrpc__2")
    assert dict(cell.axes) == {"objective": "minilm", "init": "4,8,12", "rate": "3e-5", "task": "mrpc", "seed": "2"}
    recipe = cell.recipe
    assert (recipe.objective, recipe.init, recipe.learning_rate, recipe.task, recipe.seed, recipe.seconds) == (
        *("minilm", [4, 8, 12], 3e-5, "mrpc", 2, 1.5),
    )
    assert recipe.output == Path(content["output"]) / "cells" / cell.id


def test_a_base_file_and_changes_go_below_and_above_the_axes(content, grid_of, tmp_path):
    (tmp_path / "base.yaml").write_text("seconds: 9\nteacher: '{grid}/teachers/{task}'\nobjective: x\n")
    content["base"] = str(tmp_path / "base.yaml")
    grid = grid_of(content, "seconds=3", "init=upper")
    assert {(cell.recipe.seconds, cell.recipe.init) for cell in grid.cells} == {(3.0, "upper")}
    assert {cell.recipe.objective for cell in grid.cells} == {"kd", "minilm"}
    assert [str(run.directory) for run in grid.first] == [f"{content['output']}/teachers/{t}" for t in ("cola", "mrpc")]
    for cell in grid.cells:
        assert cell.needs == (cell.teacher,) == (Path(content["output"]) / "teachers" / cell.recipe.task,)


def test_runs_before_are_shared_by_the_cells_that_need_them(content, grid_of, tmp_path):
    (tmp_path / "before.yaml").write_text("name: agnostic\ntask: none\n")
    content["before"] = [
        {"base": str(tmp_path / "before.yaml"), "set": {"objective": "{objective}", "output": "{grid}/{objective}"}}
    ]
    grid = grid_of(content)
    assert [(run.recipe.objective, run.directory.name) for run in grid.first] == [("kd", "kd"), ("minilm", "minilm")]
    assert {cell.needs[0].name for cell in grid.cells if cell.recipe.objective == "kd"} == {"kd"}
    content["before"][0]["set"]["output"] = "{grid}/one"
    with pytest.raises(ValueError, match=r"one is to hold two different runs; put an axis into its path \(cell minilm"):
        grid_of(content)


def test_excluded_combinations_are_left_out(content, grid_of):
    content["exclude"] = [{"objective": "kd", "init": "4,8,12"}, {"seed": "1"}]
    ids = {cell.id for cell in grid_of(content).cells}
    assert len(ids) == 3 * 2 * 2 * 2
    assert not [name for name in ids if name.startswith("kd__4,8,12") or name.endswith("__1")]


def test_the_command_line_changes_the_values_of_an_axis(content, grid_of, tmp_path):
    grid = grid_of(content, axes=[("seed", "7", "8"), ("init", "4,8,12"), ("task", "rte")], output=tmp_path / "b")
    assert {(cell.recipe.seed, cell.axes["seed"]) for cell in grid.cells} == {(7, "7"), (8, "8")}
    assert {str(cell.recipe.init) for cell in grid.cells} == {"[4, 8, 12]"}
    assert {cell.recipe.task for cell in grid.cells} == {"rte"}
    assert grid.cells[0].directory.is_relative_to(tmp_path / "b")


def test_a_grid_may_extend_another(content, grid_of, tmp_path):
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    part = {"extends": "whole.yaml", "name": "part", "source": "Less.", "only": {"init": ["4,8,12"], "task": ["rte"]}}
    grid = grid_of(part)
    assert (grid.settings.name, grid.settings.source, grid.settings.output) == ("part", "Less.", tmp_path / "grid")
    assert len(grid.cells) == 2 * 1 * 2 * 1 * 3
    assert {str(cell.recipe.init) + cell.recipe.task for cell in grid.cells} == {"[4, 8, 12]rte"}
    with pytest.raises(ValueError, match="only: axis init has no 'uper'"):
        grid_of({**part, "only": {"init": ["uper"]}})
    with pytest.raises(ValueError, match=r"grid .*nothing\.yaml cannot be read"):
        grid_of({**part, "extends": "nothing.yaml"})


def test_runs_before_may_concern_some_cells_only(content, grid_of, tmp_path):
    (tmp_path / "before.yaml").write_text("name: agnostic\ntask: none\n")
    before = {"base": str(tmp_path / "before.yaml"), "set": {"output": "{grid}/first"}, "only": {"objective": ["kd"]}}
    grid = grid_of({**content, "before": [before]})
    assert {cell.recipe.objective for cell in grid.cells if cell.needs} == {"kd"}
    before["only"]["objective"] = ["kdd"]
    with pytest.raises(ValueError, match=r"before\.only: axis objective has no 'kdd'"):
        grid_of({**content, "before": [before]})


def test_paths_reach_into_lists():
    settings = {"stages": [{"name": "a", "optimization": {"epochs": 1}}, {"name": "b"}]}
    apply(settings, {"stages.*.optimization.epochs": 3, "stages.1.name": "c", "student.init": "lower"})
    assert settings == {
        "stages": [{"name": "a", "optimization": {"epochs": 3}}, {"name": "c", "optimization": {"epochs": 3}}],
        "student": {"init": "lower"},
    }
    for path in ("stages.2.name", "stages.x", "student.*", "student.init.x"):
        with pytest.raises(ValueError, match=f"^{path.replace('*', '.')}: there is no place"):
            apply(settings, {path: 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": {}}, r"axis: unknown key \(did you mean 'axes'\?\)"),
        ({"name": "a b"}, "name: String should match pattern"),
        ({"keep": "some"}, "keep: Input should be 'results', 'models' or 'all', got 'some'"),
        ({"source": None}, "source: Input should be a valid string"),
        ({"exclude": [{"objektive": "kd"}]}, r"exclude: no axis 'objektive' \(did you mean 'objective'\?\)"),
        (
            {"exclude": [{"objective": "kdd"}]},
            r"axis objective has no 'kdd' \(did you mean 'kd'\?\); known: kd, minilm",
        ),
        ({"best_over": ["task"]}, "the best task cannot be chosen"),
        ({"best_over": ["rat"]}, r"best_over: no axis 'rat' \(did you mean 'rate'\?\)"),
        ({"axes": {}}, "axes: Dictionary should have at least 1 item"),
        ({"axes": {"seed": [0, 0]}}, "axes.seed: '0' is there twice"),
        ({"axes": {"seed": []}}, "seed.values: List should have at least 1 item"),
        ({"axes": {"seed": {"key": "seed"}}}, "seed.values: is required and missing"),
        ({"axes": {"seed": {"key": "seed", "values": [1], "x": 1}}}, "seed.x: unknown key"),
        ({"axes": {"seed": 3}}, "seed must be a list of values"),
        ({"axes": {"init": {"lower": "lower"}}}, "init must be a list of values"),
        ({"axes": {"task": ["../cola"]}}, r"label '\.\./cola' may hold letters"),
    ],
)
def test_a_bad_grid_file_is_refused_with_a_sentence(content, grid_of, change, message):
    with pytest.raises(ValueError, match=message):
        grid_of({**content, **change})


def test_several_problems_of_a_grid_file_are_told_together(content, grid_of):
    with pytest.raises(ValueError, match=r"(?s)4 problem.*name.*keep.*cell_timeout_s.*axis: unknown"):
        grid_of({**content, "name": "/", "keep": 3, "cell_timeout_s": 0, "axis": 1})


def test_problems_of_cells_are_told_once_with_their_number(content, grid_of):
    content["set"]["secnds"] = 3
    with pytest.raises(ValueError, match="2 problem") as caught:
        grid_of(content, "seed=x")
    lines = str(caught.value).splitlines()
    assert lines[0] == "grid small has 2 problem(s):"
    assert "  secnds: unknown key (did you mean 'seconds'?)" in lines[2]
    assert lines[1].startswith("  seed: ")
    assert all(line.endswith("(cell kd__lower__1e-05__cola__0 and 47 more)") for line in lines[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": [("sed", "1")]}, r"--axis sed 1: no axis 'sed' \(did you mean 'seed'"),
        ({"axes": [("init", "upper")]}, "axis init has no 'upper'.*known: lower, 4,8,12"),
        ({"axes": [("seed",)]}, "--axis seed: give at least one value"),
        ({"axes": [("seed", "1", "1")]}, "'1' is there twice"),
        ({"output": None, "changes": ["seed"]}, "--set 'seed' must be section.key=value"),
        ({"output": None, "changes": ["seed=[1"]}, "the value is no YAML"),
    ],
)
def test_bad_changes_are_refused_with_a_sentence(content, grid_of, arguments, message):
    with pytest.raises(ValueError, match=message):
        grid_of(content, *arguments.pop("changes", ()), **arguments)


def test_missing_and_unreadable_files_are_told(content, grid_of, tmp_path):
    with pytest.raises(ValueError, match=r"base .*nothing\.yaml cannot be read: No such file"):
        grid_of({**content, "base": str(tmp_path / "nothing.yaml")})
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ValueError, match="it must be a YAML mapping"):
        read_grid(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is no YAML"):
        read_grid(tmp_path / "broken.yaml")


def test_cells_without_scores_are_refused(content, grid_of):
    with pytest.raises(ValueError, match="the recipe has none of the keys task"):
        grid_of({**content, "axes": {"seed": [1]}})
