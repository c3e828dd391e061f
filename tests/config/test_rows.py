"""Rows that models or objectives cannot take are refused before anything is read."""

import pytest

from dsdistill.config.recipe import check_recipe
from dsdistill.plan import make_plan
from dsdistill.training.dist import find_place


def problems(content: dict) -> str:
    with pytest.raises(ValueError, match=r"tokens|corpus") as caught:
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
