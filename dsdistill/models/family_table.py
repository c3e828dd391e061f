"""The table of families as Markdown, for docs/families.md and for people: what the code decides about each."""

from __future__ import annotations

import transformers

from dsdistill.models.documents import isolation_problem
from dsdistill.models.families import ANY, FAMILIES, Family, shares_keys
from dsdistill.models.loading import heads_of

MARKERS = ("<!-- families -->", "<!-- /families -->")
"""What stands before and after the table in a document, each on a line of its own."""

COLUMNS = (
    *("family", "capture", "attention objectives", "relations", "logits", "documents apart"),
    *("weights to other families", "tested with"),
)
GROUPED = "yes; queries with keys or values only where none share keys"


def families_table() -> str:
    """All families, one row each, by title; those without an entry last."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [_cells(family) for family in sorted(FAMILIES.values(), key=lambda family: family.title.lower())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (*rows, _cells(ANY)))


def _cells(family: Family) -> tuple[str, ...]:
    model = getattr(transformers, family.tested, None)
    if model is None:
        return (family.title, *["not in the installed transformers"] * (len(COLUMNS) - 2), f"`{family.tested}`")
    config = model.config_class()
    return (
        family.title,
        "attention written anew" if family.own_attention else "attention interface",
        "yes" if family.bias is None else f"yes, with {family.bias}; plain kernel",
        GROUPED if shares_keys(config) else "yes",
        " and ".join(heads_of(config)) or "no head",
        "yes" if isolation_problem(config) is None else "no",
        "no" if family.names is None else "yes",
        f"`{family.tested}`",
    )
