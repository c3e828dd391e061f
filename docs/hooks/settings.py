"""Reference of recipes and grids: a table for each section, made of the settings' own descriptions."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from dsdistill.compare.grid import GridSettings
from dsdistill.config.recipe import Recipe, TaskRecipe, term_model
from dsdistill.config.schema import recipe_schema, schema_of, task_recipe_schema
from dsdistill.config.sections import Term
from dsdistill.objectives.registry import OBJECTIVES

Schema = dict[str, Any]

LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
NAMES = {"integer": "int", "number": "float", "boolean": "bool", "array": "list", "object": "mapping"}

PRETRAINING = """\
What `launch/pretrain_distill.py` reads. Unknown keys are refused with the nearest known one. `--set a.b=value` changes
a key, numbers index lists (`--set objectives.0.weight=2`), and every run writes the whole recipe, defaults included, to
`recipe.yaml` of its directory.
"""
TASKS = """\
What `launch/task_distill.py` reads. Lengths of training are told in epochs. `output` may hold `{task}`, `{name}` and
`{seed}`.
"""
GRIDS = """\
What `launch/compare.py --grid` reads. A path such as `stages.*.optimization.epochs` sets a key in every item of a list.
"""


def pages() -> dict[str, str]:
    """Markdown by page name."""
    return {
        "pretraining": page("Keys of a pre-training recipe", PRETRAINING, Recipe, recipe_schema()),
        "tasks": page("Keys of a task's recipe", TASKS, TaskRecipe, task_recipe_schema()),
        "grids": page("Keys of a grid", GRIDS, GridSettings, schema_of(GridSettings)),
        "objectives": objectives_page(),
    }


def page(title: str, introduction: str, model: type[BaseModel], schema: Schema) -> str:
    """All sections of one kind of file."""
    sections = dict(walk(schema, "", schema["$defs"]))
    parts = [f"# {title}\n\n{introduction}"]
    models = known_models()
    for path, (name, properties) in sections.items():
        settings = models[name] if path else model
        parts.append(section(path, settings, properties, schema["$defs"]))
    return "\n".join(parts)


def walk(schema: Schema, path: str, definitions: Mapping[str, Schema]) -> Iterator[tuple[str, tuple[str, Schema]]]:
    """Path, model name and schema of a section and of all that are inside it; an objective's are elsewhere."""
    yield path, (schema["title"], schema)
    for key, described in schema["properties"].items():
        for name in referred(described):
            inside = f"{path}.{key}".strip(".") + ("[]" if is_list(described) else "")
            if name not in ("Term", "Ramp"):
                yield from walk(definitions[name], inside, definitions)


def is_list(described: Schema) -> bool:
    """Whether a key holds a list of sections."""
    return described.get("type") == "array"


def referred(described: Schema) -> Iterator[str]:
    """Names of the sections that may stand at a key."""
    if "$ref" in described:
        yield described["$ref"].rpartition("/")[2]
    for inner in (
        *described.get("anyOf", ()),
        *(described[k] for k in ("items", "additionalProperties") if isinstance(described.get(k), dict)),
    ):
        yield from referred(inner)


def section(path: str, model: type[BaseModel], schema: Schema, definitions: Mapping[str, Schema]) -> str:
    """A heading, what the section is, its keys, and the rules between them."""
    lines = [f"## `{path}`\n" if path else "## The file\n", cleaned(model.__doc__), ""]
    lines += table(path, schema, definitions)
    told = list(rules(model))
    if told:
        lines += ["", "Refused otherwise:", "", *(f"- {rule}" for rule in told)]
    return "\n".join(lines) + "\n"


def table(path: str, schema: Schema, definitions: Mapping[str, Schema]) -> list[str]:
    """The keys of a section."""
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    needed = schema.get("required", ())
    for key, described in schema["properties"].items():
        inside = [name for name in referred(described) if name not in ("Term", "Ramp")]
        where = f"{path}.{key}".strip(".") + ("[]" if is_list(described) else "")
        link = f" ([keys](#{anchor(where)}))" if inside else ""
        if "Term" in referred(described):
            link = " ([objectives](objectives.md))"
        meaning = described.get("description") or (
            cleaned(definitions[inside[0]].get("description")).partition("\n")[0] if inside else ""
        )
        cells = (f"`{key}`", type_of(described), default_of(described, key in needed, bool(inside)), meaning + link)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def anchor(path: str) -> str:
    """What mkdocs makes of a section's heading."""
    return "".join(c for c in path.lower() if c.isalnum() or c in "_-")


def cleaned(text: str | None) -> str:
    """A docstring as one paragraph per blank line."""
    return inspect.cleandoc(text or "")


def rules(model: type[BaseModel]) -> Iterator[str]:
    """What the validators of a section, its own and inherited, hold, in their own words."""
    for found in model.__pydantic_decorators__.model_validators.values():
        if found.func.__doc__:
            yield " ".join(cleaned(found.func.__doc__).split())


def type_of(described: Schema) -> str:
    """A type in words, with its limits."""
    if "const" in described:
        return f"`{described['const']}`"
    if "enum" in described:
        return ", ".join(f"`{value}`" for value in described["enum"])
    if "anyOf" in described:
        kinds = dict.fromkeys(type_of(choice) for choice in described["anyOf"])
        return " or ".join(kinds)
    if "$ref" in described:
        return "[ramp](objectives.md#ramps)" if described["$ref"].endswith("/Ramp") else "section"
    kind = described.get("type", "anything")
    limits = " and ".join(f"{sign} {described[word]}" for word, sign in LIMITS.items() if word in described)
    if kind == "array":
        items = described.get("prefixItems") or [described.get("items", {})]
        inner = dict.fromkeys(type_of(item) for item in items)
        return f"list of {' or '.join(inner)}"
    return f"{NAMES.get(kind, kind)} {limits}".strip()


def default_of(described: Schema, needed: bool, is_section: bool) -> str:
    """A default as YAML takes it."""
    if needed:
        return "required"
    value = described.get("default")
    if is_section and isinstance(value, dict):
        return "its keys' defaults"
    return f"`{json.dumps(value)}`"


def known_models() -> dict[str, type[BaseModel]]:
    """The settings of this program by class name."""
    return {m.__name__: m for m in subclasses(BaseModel) if m.__module__.startswith("dsdistill.")}


def subclasses(model: type) -> Iterator[type]:
    """All classes below one."""
    for below in model.__subclasses__():
        yield below
        yield from subclasses(below)


def objectives_page() -> str:
    """What every objective has, ramps, and each objective with its parameters."""
    shared = schema_of(Term)
    definitions = shared["$defs"]
    lines = [
        "# Keys of an objective",
        "",
        "An item of `objectives` (of a stage, for a task). Which to choose: [objectives](../objectives.md).",
        "",
        "## Every objective",
        "",
        *table("", shared, definitions),
        "",
        "## Ramps",
        "",
        "A `weight`, and every parameter that is a float, may change over the optimizer steps.",
        "",
        *table("", definitions["Ramp"], definitions),
    ]
    for name in sorted(OBJECTIVES):
        lines += ["", f"## `{name}`", "", *one_objective(name)]
    return "\n".join(lines) + "\n"


def one_objective(name: str) -> list[str]:
    """Equation, source, the function's own words, and parameters."""
    entry = OBJECTIVES[name]
    student, teacher = (", ".join(sorted(names)) or "nothing" for names in entry.needs({}))
    lines = [f"    {entry.equation}", "", f"{entry.paper}. Reads {student} of the student, {teacher} of the teacher."]
    words = cleaned(entry.function.__doc__).partition("\nArgs:")[0].partition("\nReturns:")[0].strip()
    lines += ["", words] if words else []
    schema = term_model(name).model_json_schema(by_alias=True)
    own = {key: described for key, described in schema["properties"].items() if key in entry.params}
    if own:
        lines += ["", *table("", {**schema, "properties": own}, schema.get("$defs", {}))]
    return lines
