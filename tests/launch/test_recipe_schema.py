"""The schemas that editors read are those of the code, and say of recipes what a run would say."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from dsdistill.objectives.parameters import PARAMETERS
from dsdistill.objectives.registry import OBJECTIVES
from launch.recipe_schema import HOME, schemas

RECIPES = HOME.parent
FILES = sorted(RECIPES.rglob("*.yaml"))


def schema_of(path: Path) -> dict:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    before, named = first.split("=")
    assert before == "# yaml-language-server: $schema"
    return json.loads((path.parent / named).read_text(encoding="utf-8"))


def problems(schema: dict, content: dict) -> list:
    return list(jsonschema.Draft202012Validator(schema).iter_errors(content))


def test_the_files_are_up_to_date():
    for name, text in schemas().items():
        assert (HOME / name).read_text(encoding="utf-8") == text, "run python launch/recipe_schema.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_shipped_recipes_name_their_schema_and_keep_to_it(path):
    assert not problems(schema_of(path), yaml.safe_load(path.read_text(encoding="utf-8")))


BROKEN = {
    "a misspelt section": lambda recipe: recipe.update(studnet={}),
    "a misspelt key": lambda recipe: recipe["optimization"].update(learning_rat=1.0),
    "a wrong type": lambda recipe: recipe["student"].update(num_layers="six"),
    "a number out of range": lambda recipe: recipe["optimization"].update(learning_rate=-1.0),
    "an unknown objective": lambda recipe: recipe["objectives"][0].update(objective="minilmv3"),
    "a parameter of another objective": lambda recipe: recipe["objectives"][0].update(temperature=2.0),
    "a missing section": lambda recipe: recipe.pop("teacher"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_a_run_would_refuse_is_underlined(what):
    path = RECIPES / "quickstart.yaml"
    recipe = copy.deepcopy(yaml.safe_load(path.read_text(encoding="utf-8")))
    BROKEN[what](recipe)
    assert problems(schema_of(path), recipe)


def test_objectives_of_your_own_may_have_any_parameters():
    path = RECIPES / "quickstart.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["objectives"] = [{"objective": "my_package.losses:mine", "sharpness": 3}]
    assert not problems(schema_of(path), recipe)


def test_every_key_is_described():
    for name in schemas():
        schema = json.loads((HOME / name).read_text(encoding="utf-8"))
        choices = {one["title"]: one for one in schema["$defs"].get("Term", {}).get("anyOf", ())}
        for where, model in {"": schema, **schema["$defs"], **choices}.items():
            for key, described in model.get("properties", {}).items():
                told = "description" in described or "$ref" in described or "allOf" in described
                assert told, f"{name}: {where}.{key}"


def test_no_parameter_is_described_that_no_objective_has():
    assert set(PARAMETERS) == {key for entry in OBJECTIVES.values() for key in entry.params}
