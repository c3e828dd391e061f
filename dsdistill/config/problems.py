"""Plain settings: read, changed by `--set`, and what is wrong with them told: path, fault, what is allowed."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Plain settings from a YAML file.

    Raises:
        ValueError: If there is no such file or it is no YAML mapping; names it as `what`.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{what} {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} {path} holds no settings; it must be a YAML mapping")
    return content


def describe_problem(error: ErrorDetails, model: type[BaseModel], prefix: str = "") -> str:
    """One line: path, what is wrong, what is allowed."""
    path = ".".join([prefix, *map(str, error["loc"])]).strip(".")
    if error["type"] == "extra_forbidden":
        names = _names_at(model, error["loc"][:-1])
        return f"{path}: unknown key{nearest(str(error['loc'][-1]), names)}; known here: {', '.join(sorted(names))}"
    if error["type"] == "missing":
        return f"{path}: is required and missing"
    got = "" if error["type"] == "value_error" else f", got {shown(error['input'])}"
    return f"{path}: {error['msg'].removeprefix('Value error, ')}{got}"


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long: a few lines of YAML can name more than memory holds."""
    text = _SHORT.repr(value)
    return text if len(text) <= 500 else text[:500] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlong = 3, 100
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 20
_SHORT.maxstring = _SHORT.maxother = 200


def _names_at(model: Any, location: tuple) -> list[str]:
    for part in location:
        if isinstance(part, int):  # an item of a list, whose model is known already
            continue
        field = getattr(model, "model_fields", {}).get(part)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    fields: Mapping[str, Any] = getattr(model, "model_fields", {})
    return [field.alias or name for name, field in fields.items()]


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` if a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def apply_override(content: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value`; numbers in the path index lists.

    Raises:
        ValueError: If it has no `=`, or the path leads through something that is no section.
    """
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ValueError(f"--set {override!r} must be section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {override!r}: the value is no YAML") from error
    *parents, last = path.split(".")
    place: Any = content
    for part in parents:
        place = _step_into(place, part, override)
    _entry(place, last, override)(value)


def _step_into(place: Any, part: str, override: str) -> Any:
    if isinstance(place, list) and part.isdigit() and int(part) < len(place):
        return place[int(part)]
    if isinstance(place, dict):
        if place.get(part) is None:
            place[part] = {}
        return place[part]
    raise ValueError(f"--set {override!r}: there is no section {part!r} to set something in")


def _entry(place: Any, last: str, override: str) -> Callable[[Any], None]:
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        return lambda value: place.__setitem__(int(last), value)
    if isinstance(place, dict):
        return lambda value: place.__setitem__(last, value)
    raise ValueError(f"--set {override!r}: there is nothing with keys at that place")
