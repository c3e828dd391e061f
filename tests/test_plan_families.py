"""What a plan says of families that add something to their attention scores, or whose queries share keys."""

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer

from dsdistill.config.recipe import check_recipe
from dsdistill.plan import make_plan
from dsdistill.plan_page import describe_plan
from dsdistill.training.dist import find_place
from tests.models.families_under_test import tiny_configs

JSON = {"train_micro_batch_size_per_gpu": 2}


def save(family, tokenizer, directory):
    config = tiny_configs()[family]
    config.vocab_size = 150
    AutoModelForMaskedLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def mpnet_directory(tmp_path_factory, teacher_directory):
    return save("mpnet", teacher_directory, tmp_path_factory.mktemp("mpnet"))


def plan_of(content, directory, **terms):
    content["teacher"]["model"] = str(directory)
    content["objectives"] = [{"objective": "att_kl"} | terms]
    return make_plan(check_recipe(content, "test"), JSON, find_place())


def test_a_position_bias_is_wanted_with_the_scores_and_told(recipe_content, mpnet_directory):
    plan = plan_of(recipe_content, mpnet_directory)
    assert plan.stages[0].student_wants["bias"] == (2,)
    assert plan.stages[0].teacher_wants["bias"] == (4,)
    assert "MPNet adds a learned number per head and distance" in describe_plan(plan, find_place())


def test_families_without_a_bias_are_asked_for_none(recipe_content, teacher_directory):
    plan = plan_of(recipe_content, teacher_directory, kernel="fused")
    assert set(plan.stages[0].teacher_wants) == {"query", "key"}
    assert "adds" not in describe_plan(plan, find_place())


def test_everything_that_such_a_family_cannot_do_is_told_at_once(recipe_content, mpnet_directory):
    recipe_content["student"]["activation_checkpointing"] = True
    with pytest.raises(ValueError, match="kernel: fused cannot be used, because MPNet adds") as told:
        plan_of(recipe_content, mpnet_directory, kernel="fused")
    assert "mpnet cannot recompute its layers" in str(told.value)


def test_relation_heads_that_grouped_heads_do_not_allow_are_told_with_every_objective(
    recipe_content, teacher_directory, tmp_path
):
    """Heads of queries divide, those of the fewer keys and values do not."""
    directory = save("eurobert", teacher_directory, tmp_path)
    with pytest.raises(ValueError, match="relation_heads=32 does not divide width 16 of the student's key"):
        plan_of(recipe_content, directory, objective="minilmv2", relation_heads=32)
    with pytest.raises(ValueError, match="student's query and key cannot be related: several of its queries share"):
        plan_of(recipe_content, directory, objective="minilmv2", relation_heads=16, relations=[["query", "key"]])
    plan = plan_of(recipe_content, directory, objective="minilmv2", relation_heads=16)
    assert set(plan.stages[0].teacher_wants) == {"query", "key", "value"}


@pytest.mark.parametrize(
    ("objective", "layers", "told"),
    [("att_kl", "last", True), ("hid_seq", "last", False), ("hid_seq", "first", True), ("mlm", "last", False)],
)
def test_an_output_that_nothing_trains_is_told(recipe_content, teacher_directory, objective, layers, told):
    chosen = {} if objective == "mlm" else {"layers": layers}
    plan = plan_of(recipe_content, teacher_directory, objective=objective, **chosen)
    assert ("no objective reads the output of the student's last layer" in describe_plan(plan, find_place())) == told
