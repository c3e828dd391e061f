"""The model card of an export: what it is, from what, under which licence, its numbers, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from dsdistill.locate import Source
from dsdistill.models.loading import auto_class
from dsdistill.models.sentences import file_beside

UNKNOWN_LICENCE = "not stated by the teacher; ask who published it"
PLACE = "path/to/this/directory"


def model_card(facts: Mapping[str, Any], recipe_yaml: str, *, teacher: Source, is_sentence_encoder: bool) -> str:
    """README.md of an export.

    Args:
        facts: Names and values of the table; `name`, `teacher` and `head` are read here too.
        recipe_yaml: The complete recipe.
        teacher: Whose licence is told; it binds the student.
        is_sentence_encoder: Whether sentence-transformers loads the export.
    """
    licence = licence_of(teacher)
    library = "sentence-transformers" if is_sentence_encoder else "transformers"
    head = {"library_name": library, **({"license": licence} if licence else {}), "tags": ["distillation", "dsdistill"]}
    rows = {**facts, "licence of the teacher": licence or UNKNOWN_LICENCE}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"
        f"# {facts['name']}\n\nDistilled from `{facts['teacher']}` with dsdistill.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"```python\n{loading_code(facts.get('head', 'none'), is_sentence_encoder, PLACE)}\n```\n\n"
        f"## Recipe\n\n```yaml\n{recipe_yaml}```\n"
    )


def loading_code(head: Any, is_sentence_encoder: bool, place: str) -> str:
    """Python that loads an export.

    Args:
        head: The model's, see `loading.Head`.
        is_sentence_encoder: Whether sentence-transformers loads it.
        place: Its directory.
    """
    if is_sentence_encoder:
        return (
            "from sentence_transformers import SentenceTransformer\n\n"
            f"model = SentenceTransformer({place!r})\n"
            'embeddings = model.encode(["a sentence", "another one"])'
        )
    loader = auto_class(head).__name__
    return (
        f"from transformers import {loader}, AutoTokenizer\n\n"
        f"model = {loader}.from_pretrained({place!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place!r})\n"
        'output = model(**tokenizer("a sentence", return_tensors="pt"))'
    )


def licence_of(source: Source) -> str | None:
    """The identifier that a model's own card gives, or None if it gives none."""
    card = file_beside(source, "README.md")
    if card is None:
        return None
    start, found, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    if start.strip() or not found:
        return None
    try:
        told = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return None
    licence = told.get("license") if isinstance(told, dict) else None
    return licence if isinstance(licence, str) else None
