"""The table of families as Markdown, for the README and for people."""

from __future__ import annotations

from dsdistill.models.families import ANY, FAMILIES, Family

MARKERS = ("<!-- families -->", "<!-- /families -->")
"""What stands before and after the table in a document, each on a line of its own."""

COLUMNS = (
    *("family", "capture", "attention objectives", "relations", "logits", "documents apart"),
    *("weights to other families", "tested with"),
)


def families_table() -> str:
    """All families, one row each, by title; those without an entry last."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [_cells(family) for family in sorted(FAMILIES.values(), key=lambda family: family.title.lower())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (*rows, _cells(ANY)))


def _cells(family: Family) -> tuple[str, ...]:
    return (
        family.title,
        "attention written anew" if family.own_attention else "attention interface",
        "yes" if family.bias is None else f"yes, with {family.bias}; plain kernel",
        "yes",
        "with a masked-LM or task head",
        "yes" if family.isolates else "no",
        "no" if family.names is None else "yes",
        f"`{family.tested}`",
    )
