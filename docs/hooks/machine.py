"""Reference of the DeepSpeed JSON: keys accepted, set and refused, in DeepSpeed's words where it has some."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from typing import Any

from pydantic import BaseModel

from dsdistill.config.deepspeed import ELSEWHERE, LEARNING_KEYS, MACHINE_KEYS, SECTION_KEYS, section_models

INTRODUCTION = """\
# Keys of the DeepSpeed JSON

The file of `--ds_config` says how a run runs; [the shipped ones](../cluster.md#which-json) are a few lines each. Every
key is checked before anything starts, since DeepSpeed ignores those that it does not know.

## Accepted

| key | meaning |
| --- | --- |
"""


def page() -> str:
    """The whole page."""
    models = section_models()
    lines = [INTRODUCTION.rstrip()]
    for key, meaning in sorted(MACHINE_KEYS.items()):
        link = f" ([keys](#{key}))" if key in models or key in SECTION_KEYS else ""
        lines.append(f"| `{key}` | {meaning}{link} |")
    lines += ["", 'Filled from the recipe, and refused with another value than `"auto"`:', ""]
    lines += [f"- `{key}`: `{where}`" for key, where in sorted(LEARNING_KEYS.items())]
    lines += ["", "## Refused", "", "| key | why |", "| --- | --- |"]
    lines += [f"| `{key}` | {reason} |" for key, reason in sorted(ELSEWHERE.items())]
    for key, model in models.items():
        lines += ["", f"## `{key}`", "", *section(model)]
    for key, names in SECTION_KEYS.items():
        lines += ["", f"## `{key}`", "", "Keys: " + ", ".join(f"`{name}`" for name in names) + "."]
    return "\n".join(lines) + "\n"


def section(model: type[BaseModel]) -> list[str]:
    """A table of a section's keys, and of the sections inside it."""
    lines = ["| key | default | DeepSpeed says |", "| --- | --- | --- |"]
    told, inside = docstrings(model), []
    for name, field in model.model_fields.items():
        below = next((c for c in getattr(field.annotation, "__args__", ()) if hasattr(c, "model_fields")), None)
        if below is not None:
            inside += ["", f"Inside `{name}`:", "", *section(below)]
        key = field.alias or name
        lines.append(f"| `{key}` | {default_of(field)} | {told.get(name, '').replace('|', chr(92) + '|')} |")
    return lines + inside


def default_of(field: Any) -> str:
    """A default as JSON takes it; DeepSpeed's large numbers print themselves with commas."""
    value = field.get_default(call_default_factory=True)
    value = getattr(value, "value", value)
    try:
        return f"`{json.dumps(value)}`"
    except TypeError:
        return f"`{json.dumps(value.model_dump(), default=str)}`" if isinstance(value, BaseModel) else f"`{value}`"


def docstrings(model: type) -> dict[str, str]:
    """The strings that stand under the fields of a class, as one line each."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found
