from pathlib import Path

import pytest
import yaml

from dsdistill.config.recipe import check_recipe, read_recipe, read_task_recipe

FOLDER = Path(__file__).parents[2] / "launch" / "recipes"
RECIPES = [path for path in sorted(FOLDER.rglob("*.yaml")) if path.parent.name != "grids"]


def problems_of(content: dict) -> str:
    with pytest.raises(ValueError, match=r"problem\(s\)") as error:
        check_recipe(content, "recipe.yaml")
    return str(error.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_survive_a_round_trip(path, tmp_path):
    read = read_task_recipe if path.parent.name == "glue" else read_recipe
    recipe = read(path)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert read(tmp_path) == recipe


def test_all_problems_are_reported_at_once_with_their_place(recipe_content):
    recipe_content["optimisation"] = recipe_content.pop("optimization")
    recipe_content["student"]["num_layer"] = recipe_content["student"].pop("num_layers")
    recipe_content["objectives"][0]["relation_head"] = 3
    recipe_content["objectives"][1]["objective"] = "att_kll"
    recipe_content["teacher"]["placement"] = "moon"
    text = problems_of(recipe_content)
    assert "optimisation: unknown key (did you mean 'optimization'?)" in text
    assert "optimization: is required and missing" in text
    assert "student.num_layer: unknown key (did you mean 'num_layers'?)" in text
    assert "objectives[0].relation_head: unknown key (did you mean 'relation_heads'?)" in text
    assert "objectives[1].objective: unknown objective 'att_kll'" in text
    assert "teacher.placement" in text
    assert "'moon'" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimization": {"steps": 0}}, "optimization.steps"),
        ({"optimization": {"warmup_steps": 6}}, "warmup_steps=6 must be smaller than steps=6"),
        ({"optimization": {"schedule": "quadratic"}}, "optimization.schedule"),
        ({"masking": {"probability": 1.5}}, "masking.probability"),
        ({"student": {"init": "middle"}}, "student.init"),
        ({"seed": "seven"}, "seed"),
        ({"name": "a b"}, "name"),
        ({"objectives": []}, "objectives"),
        ({"objectives": [{"weight": 1.0}]}, "must be a mapping with the key 'objective'"),
        ({"objectives": [{"objective": "mlm"}, {"objective": "mlm"}]}, "'mlm' appears twice"),
        ({"objectives": [{"objective": "mlm", "weight": {"from": 1, "to": 0}}]}, "objectives[0].weight"),
        ({"corpus": {"prepare": {"input": "x"}}}, "corpus.prepare.tokenizer"),
    ],
)
def test_bad_values_are_refused_by_name(recipe_content, change, message):
    for section, value in change.items():
        if isinstance(value, dict):
            recipe_content.setdefault(section, {}).update(value)
        else:
            recipe_content[section] = value
    assert message in problems_of(recipe_content)


def test_overrides_reach_sections_and_list_entries(recipe_file):
    recipe = read_recipe(
        recipe_file, ["optimization.steps=9", "objectives.1.weight=0.25", "masking.whole_word=true", "source=here"]
    )
    assert recipe.optimization.steps == 9
    assert recipe.objectives[1].weight == 0.25
    assert recipe.masking.whole_word
    assert recipe.source == "here"


@pytest.mark.parametrize("override", ["steps", "=3", "objectives.9.weight=1", "seed.x=1", "optimization.steps=[1"])
def test_overrides_that_lead_nowhere_are_refused(recipe_file, override):
    with pytest.raises(ValueError, match="--set"):
        read_recipe(recipe_file, [override])


def test_files_that_are_no_recipe_are_refused(tmp_path):
    for name, content in {"a.yaml": "- 1", "b.yaml": "a: [", "c.yaml": "", "d.yaml": "\0"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            read_recipe(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read"):
        read_recipe(tmp_path / "missing.yaml")


def test_yaml_cannot_make_objects(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: !!python/object/apply:os.system ['echo broken']")
    with pytest.raises(ValueError, match="no YAML"):
        read_recipe(path)


def test_schedules_of_numbers_are_read_from_recipes(recipe_content):
    recipe_content["objectives"][0]["weight"] = {"from": 1.0, "to": 0.0, "begin": 10, "until": 20}
    ramp = check_recipe(yaml.safe_load(yaml.safe_dump(recipe_content)), "r").objectives[0].weight
    assert [ramp.at(step) for step in (0, 10, 15, 20, 99)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    step = ramp.model_copy(update={"kind": "step"})
    assert [step.at(step_) for step_ in (0, 19, 20)] == [1.0, 1.0, 0.0]
