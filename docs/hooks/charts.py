"""Reference of TensorBoard's tab Custom Scalars: the charts and the tags that they show, as telemetry has them."""

from __future__ import annotations

from dsdistill.training.telemetry import LAYOUT

INTRODUCTION = """\
# Charts of TensorBoard

What the tab *Custom Scalars* of a run shows together, by regular expressions of tags. What the tags mean:
[TensorBoard](../reading.md#tensorboard).

| group | chart | tags |
| --- | --- | --- |
"""


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION.rstrip()]
    for group, charts in LAYOUT.items():
        for chart, (_, tags) in charts.items():
            lines.append(f"| {group} | {chart} | {', '.join(f'`{tag}`' for tag in tags)} |")
    return "\n".join(lines) + "\n"
