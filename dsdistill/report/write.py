"""The page: one HTML file that needs nothing else, and a Markdown twin with its pictures beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from dsdistill.corpus.files import write_text
from dsdistill.report import facts, plots
from dsdistill.report.collect import Run

HTML, MARKDOWN = "report.html", "report.md"


def write_report(runs: list[Run], directory: Path) -> list[Path]:
    """Write both pages and the pictures.

    Args:
        runs: One, or several to compare.
        directory: Where to; made if it does not exist.

    Returns:
        The HTML page and its Markdown twin.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pages = [page_of(run, f"run{number}" if len(runs) > 1 else "run") for number, run in enumerate(runs, 1)]
    content = {"pages": pages, "comparison": compare(runs) if len(runs) > 1 else None}
    content["title"] = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    pictures = [p for page in (*pages, content["comparison"] or {"pictures": []}) for p in page["pictures"]]
    for picture in pictures:
        write_text(directory / picture["file"], picture["svg"])
    environment = Environment(
        loader=PackageLoader("dsdistill.report"),
        undefined=StrictUndefined,
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    for name in (HTML, MARKDOWN):
        write_text(directory / name, environment.get_template(f"{name}.j2").render(content))
    return [directory / HTML, directory / MARKDOWN]


def page_of(run: Run, name: str) -> dict[str, Any]:
    """What the templates show of a run."""
    return {
        "name": run.name,
        "directory": str(run.directory),
        "problems": run.problems,
        "facts": facts.facts(run),
        "models": facts.sizes_and_speeds(run),
        "loading": facts.how_to_load(run) if run.parameters else None,
        "repeat": facts.repeat_command(run) if run.recipe else None,
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False) if run.recipe else None,
        "ds_config": json.dumps(run.ds_config, indent=2) if run.ds_config else None,
        "pictures": pictures_of(
            name,
            {
                "Objectives while training": ("loss", plots.losses(run.curves, "loss/")),
                "Objectives on held-out rows": ("held_out", plots.losses(run.curves, "held_out/")),
                "Scores while training": ("score", plots.losses(run.curves, "score/")),
                "Where a step's time goes": ("parts", plots.parts(run.curves)),
                "Speed, optimizer, memory": ("gauges", plots.gauges(run.curves)),
                **drawn_in_training(run),
            },
        ),
    }


def drawn_in_training(run: Run) -> dict[str, tuple[str, str | None]]:
    """What training drew last, titles by the names of its pictures."""
    titles = {"layers": "Every layer of the student and of the teacher compared"}
    return {
        f"{titles.get(name, name.replace('_', ' ').capitalize())}{stage and f' ({stage})'}": (
            re.sub(r"\W", "_", f"{stage and f'{stage}-'}{name}"),
            plots.embedded(png),
        )
        for (stage, name), png in run.pictures.items()
    }


def compare(runs: list[Run]) -> dict[str, Any]:
    """What the templates show of several runs beside each other."""
    named = facts.groups(runs)
    rows, means, points = [], {}, {}
    told = [score for run in runs if (score := facts.score(run))]
    what = told[0][0] if told else ""
    for name, members in named.items():
        scores = [score[1] for run in members if (score := facts.score(run)) and score[0] == what]
        rates = [rate for run in members if (rate := facts.fastest(run))]
        shown = facts.UNKNOWN
        if scores:
            means[name] = facts.mean_and_deviation(scores)
            deviation = means[name][1]
            shown = f"{means[name][0]:.4g}" + (f" +- {deviation:.2g}" if deviation is not None else "")
        if scores and rates:
            points[name] = (max(rates), means[name][0])
        first = members[0]
        rows.append((name, facts.shape(first), facts.objectives(first), len(members), shown))
    curves = {
        f"{run.name} ({run.directory.name})": run.curves[-1].series("held_out/total") for run in runs if run.curves
    }
    return {
        "what": what or "no score",
        "rows": rows,
        "pictures": pictures_of(
            "compared",
            {
                what: ("scores", plots.bars(means, what)),
                "Held-out objective": ("held_out", plots.overlaid(curves, "held-out objective")),
                "Score against speed": ("speed", plots.scatter(points, "student's rows per second", what)),
            },
        ),
    }


def pictures_of(name: str, drawn: dict[str, tuple[str, str | None]]) -> list[dict[str, str]]:
    """Title, file and SVG of those pictures that there is something to draw of."""
    return [
        {"title": title, "file": f"{name}-{file}.svg", "svg": svg}
        for title, (file, svg) in drawn.items()
        if svg is not None
    ]


def all_problems(runs: Iterable[Run]) -> list[str]:
    """What could not be read, for the terminal."""
    return [f"{run.directory}: {problem}" for run in runs for problem in run.problems]
