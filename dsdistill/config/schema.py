"""JSON schemas of recipes, for editors: completion, descriptions, and red lines under what a run would refuse."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from dsdistill.config.recipe import Recipe, TaskRecipe, term_model
from dsdistill.objectives.registry import OBJECTIVES

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """Of task-agnostic recipes."""
    schema = _with_objectives(schema_of(Recipe))
    schema["$defs"]["CorpusSettings"]["required"].remove("output")  # the section's `directory`, see `CorpusSection`
    return schema


def task_recipe_schema() -> dict[str, Any]:
    """Of recipes of a task."""
    return _with_objectives(schema_of(TaskRecipe))


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Of any settings, keys named as in the file."""
    return {"$schema": DIALECT, **model.model_json_schema(by_alias=True)}


def _with_objectives(schema: dict[str, Any]) -> dict[str, Any]:
    """Terms become a choice: each objective with its own parameters, or one of the user's own with any."""
    shared = schema["$defs"]["Term"]
    choices = []
    for name in sorted(OBJECTIVES):
        one = term_model(name).model_json_schema(by_alias=True)
        schema["$defs"] |= one.pop("$defs", {})
        one["title"], one["description"] = name, OBJECTIVES[name].equation
        one["properties"]["objective"] = {"const": name, "description": f"{name}: {OBJECTIVES[name].paper}"}
        choices.append(one)
    own = {**shared, "title": "an objective of your own", "additionalProperties": True}
    named = {**shared["properties"]["objective"], "pattern": "^[\\w.]+:\\w+$"}
    own["properties"] = {**shared["properties"], "objective": named}
    schema["$defs"]["Term"] = {"description": shared["description"], "anyOf": [*choices, own]}
    return schema
