"""Rows that models or objectives cannot take are refused before anything is read."""

import shutil
from pathlib import Path

import pytest

from dsdistill.config.recipe import check_recipe
from dsdistill.plan import make_plan
from dsdistill.training.dist import find_place
from tests.models.test_sentences import KINDS, describe


def problems(content: dict) -> str:
    with pytest.raises(ValueError, match=r"tokens|corpus|pool|embeddings") as caught:
        make_plan(check_recipe(content, "recipe"), {}, find_place())
    return str(caught.value)


def prepared_as(content: dict, **settings) -> dict:
    """The recipe with text that will be prepared in another way."""
    prepare = {"input": "text.txt", "tokenizer": content["teacher"]["model"], "length": 32, **settings}
    return {**content, "corpus": {**content["corpus"], "prepare": prepare}}


def test_rows_longer_than_a_model_takes(recipe_content):
    assert "have 96 tokens, but the teacher takes 64" in problems(prepared_as(recipe_content, length=96))
    recipe_content["student"] |= {"init": "random", "overrides": {"max_position_embeddings": 16}}
    found = problems(recipe_content)
    assert "have 32 tokens, but the student takes 16; prepare" in found
    assert "the teacher takes" not in found


def test_isolation_without_packed_rows(recipe_content):
    recipe_content["corpus"]["isolate"] = True
    assert "isolate has no effect" in problems(prepared_as(recipe_content, rows="document"))
    make_plan(check_recipe(prepared_as(recipe_content), "recipe"), {}, find_place())


def pooled(content: dict, **params) -> dict:
    return {**content, "objectives": [{"objective": "pooled", **params}], "masking": {"probability": 0.0}}


def test_embeddings_of_rows_that_hold_several_documents(recipe_content):
    assert "a row of this corpus holds several documents; prepare it with rows: document" in problems(
        pooled(recipe_content)
    )
    for accepted in (
        prepared_as(pooled(recipe_content), rows="document"),
        pooled(recipe_content, layers="uniform", pooling="first"),  # PKD's patient hidden states
    ):
        make_plan(check_recipe(accepted, "recipe"), {}, find_place())


def test_embeddings_are_scored_only_if_they_are_trained(recipe_content, tmp_path):
    recipe_content["evaluation"]["sentences"] = {"rows": 9, "neighbours": 2}
    (stage,) = make_plan(check_recipe(recipe_content, "recipe"), {}, find_place()).stages
    assert 4 in stage.teacher_wants["hidden"]
    recipe_content["objectives"] = [{"objective": "minilmv2", "relation_heads": 8}]
    recipe_content["evaluation"]["sentences"]["sts"] = str(tmp_path / "nothing.tsv")
    found = problems(recipe_content)
    assert "no objective reads the output of the student's last layer, 2" in found
    assert "no scored sentence pairs in" in found


def test_pooling_is_the_teachers(recipe_content, teacher_directory, tmp_path):
    directory = Path(shutil.copytree(teacher_directory, tmp_path / "encoder"))
    recipe_content["teacher"]["model"] = str(directory)
    describe(directory, pooling={"pooling_mode": "max"})
    content = prepared_as(pooled(recipe_content), rows="document")
    (stage,) = make_plan(check_recipe(content, "recipe"), {}, find_place()).stages
    assert stage.terms[0].params["pooling"] == "max"
    asked = prepared_as(pooled(recipe_content, pooling="mean"), rows="document")
    assert "pooling is mean, but the teacher's is max" in problems(asked)
    describe(directory, {**KINDS, "3_Dense": "Dense"})
    assert "passes its embeddings through Dense" in problems(content)
    content["objectives"] = [{"objective": "minilmv2", "relation_heads": 8}]
    make_plan(check_recipe(content, "recipe"), {}, find_place())
