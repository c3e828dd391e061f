"""The table: finding, filling in, adding from outside, printing."""

import subprocess
import sys

import pytest

from dsdistill.objectives import OBJECTIVES, find_objective, objective
from dsdistill.objectives.table import markdown_table
from tests.objectives.cases import CASES
from tests.objectives.worlds import PAIRS, STUDENT, TEACHER, identity, make_world

TOY = '''
"""An objective from outside the package."""
from dsdistill.objectives import objective


@objective(
    "toy",
    student={"hidden"},
    teacher={"hidden"},
    equation="weight * (mean H^S - mean H^T)^2",
    paper="none",
)
def toy(student, teacher, batch, pairs, *, weight: float = 2.0):
    """Compare two numbers."""
    (s, t), *_ = pairs
    return {"toy": weight * (student.at("hidden", s).mean() - teacher.at("hidden", t).mean()) ** 2}
'''


@pytest.fixture
def no_trace(monkeypatch):
    """Restores the table after the test."""
    before = dict(OBJECTIVES)
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


def test_an_objective_from_outside_is_found_by_module_and_name(tmp_path, monkeypatch, no_trace):
    assert len(TOY.strip().splitlines()) < 20
    (tmp_path / "toy_objectives.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    entry = find_objective("toy_objectives:toy")
    assert entry.params["weight"].default == 2.0
    assert entry.needs({}) == ({"hidden"}, {"hidden"})
    assert entry.make_head(STUDENT, TEACHER, PAIRS, {}) is None
    world = make_world()
    got = entry(world.student, world.teacher, world.batch, world.pairs, {"weight": 3.0}, gather=identity, head=None)
    assert got["toy"] == 1.5 * entry(world.student, world.teacher, world.batch, world.pairs, {})["toy"]


def test_a_missing_module_and_an_unknown_name_are_refused():
    with pytest.raises(ValueError, match=r"no_such_module.*cannot be imported"):
        find_objective("no_such_module:toy")
    with pytest.raises(ValueError, match=r"'minilmv3'; known: .*minilmv2"):
        find_objective("minilmv3")


def test_a_name_is_taken_once(no_trace):
    with pytest.raises(ValueError, match="twice"):
        objective("kd", student={"logits"}, equation="", paper="")(dict)


def test_every_objective_has_property_tests():
    assert {case.name for case in CASES} == set(OBJECTIVES)


def test_every_objective_can_be_set_by_a_recipe():
    for entry in OBJECTIVES.values():
        for name, parameter in entry.params.items():
            assert parameter.annotation is not parameter.empty, (entry.name, name)
            assert parameter.default is not parameter.empty, (entry.name, name)
        assert entry.equation.isascii()
        assert entry.paper
        assert entry.function.__doc__


def test_the_table_lists_everything():
    lines = markdown_table().splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == sorted(OBJECTIVES)
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    minilmv2 = next(line for line in lines if line.startswith("| `minilmv2`"))
    assert "`relation_heads`: int = 48" in minilmv2
    assert "[[query, query], [key, key], [value, value]]" in minilmv2
    assert "`reduction`: mean or study = mean" in minilmv2


def test_the_module_prints_the_table():
    done = subprocess.run([sys.executable, "-m", "dsdistill.objectives"], capture_output=True, text=True, check=True)
    assert done.stdout == markdown_table()
