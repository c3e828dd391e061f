"""The reference made of the code has every key and option, and links of pages outside of the site lead somewhere."""

import argparse
import importlib
import re
import sys
from collections.abc import Iterator

import pytest
from markdown.extensions.toc import slugify
from pydantic import BaseModel

from docs.hooks import charts, commands, machine, recipes, settings, site
from dsdistill.compare.grid import GridSettings
from dsdistill.config.deepspeed import ELSEWHERE, MACHINE_KEYS, section_models
from dsdistill.config.recipe import Recipe, TaskRecipe
from dsdistill.config.sections import Term
from dsdistill.objectives.registry import OBJECTIVES
from dsdistill.training.telemetry import LAYOUT
from tests.workers import ROOT

KINDS = {"pretraining": Recipe, "tasks": TaskRecipe, "grids": GridSettings}
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return settings.pages()


def keys_of(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """Section and key of everything that a file may hold, by the settings' annotations."""
    for name, field in model.model_fields.items():
        yield path, field.alias or name
        if not issubclass(model, Term):
            for below in models_in(field.annotation):
                if not issubclass(below, Term):
                    listed = "[]" if "list" in str(field.annotation) else ""
                    yield from keys_of(below, f"{path}.{name}".strip(".") + listed)


def models_in(annotation) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from models_in(inner)


def keys_in(page: str) -> set[tuple[str, str]]:
    """Section and key of every row of the page's tables."""
    section, found = "", set()
    for line in page.splitlines():
        if line.startswith("## "):
            section = "" if "`" not in line else line.split("`")[1]
        elif row := re.match(r"\| `([^`]+)` \|", line):
            found.add((section, row[1]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_a_file_is_there(pages, kind):
    assert keys_in(pages[kind]) == set(keys_of(KINDS[kind]))


def test_every_row_has_a_type_a_default_and_a_meaning(pages):
    for name, page in pages.items():
        for line in page.splitlines():
            if line.startswith("| `"):
                cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                assert len(cells) == 4, (name, line)
                assert all(cells), (name, line)


def test_every_objective_is_there_with_its_parameters(pages):
    found = keys_in(pages["objectives"])
    assert {(name, key) for name, entry in OBJECTIVES.items() for key in entry.params} <= found
    assert all(f"## `{name}`" in pages["objectives"] for name in OBJECTIVES)


def test_rules_between_keys_are_told(pages):
    assert "`until` is greater than `begin`" not in pages["pretraining"], "ramps are told with the objectives"
    assert "Either `init` or `init_from` is given" in pages["pretraining"]
    assert "Rows come from one of" in pages["tasks"]


def test_every_key_of_the_json_is_there():
    found = {key for _, key in keys_in(machine.page())}
    assert found >= {*MACHINE_KEYS, *ELSEWHERE}
    for model in section_models().values():
        assert found >= {field.alias or name for name, field in model.model_fields.items()}


def test_every_option_of_every_script_is_there(monkeypatch):
    page = commands.page()
    for script in commands.scripts():
        _, found, rest = page.partition(f"## `{script.name}`")
        assert found, script.name
        told = rest.partition("\n## ")[0]
        for option in options(script.stem, monkeypatch):
            assert option in told, (script.name, option)


def options(script: str, monkeypatch) -> set[str]:
    """The options of a script's parser that are not hidden."""
    seen: set[str] = set()

    def stop(parser, *_):
        seen.update(s for a in parser._actions if a.help != argparse.SUPPRESS for s in a.option_strings)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [script])
        with pytest.raises(SystemExit):
            importlib.import_module(f"launch.{script}").main()
    assert "--help" in seen
    return seen


def test_every_chart_of_tensorboard_is_explained():
    """The guide names, for each chart, a tag that it shows; the reference has all charts."""
    page, guide = charts.page(), (ROOT / "docs/reading.md").read_text()
    tags = re.findall(r"`([a-z_]+/[^`]*)`", guide)
    for group, inside in LAYOUT.items():
        for chart, (_, patterns) in inside.items():
            assert f"| {group} | {chart} |" in page
            for pattern in patterns:
                assert any(re.match(pattern, tag) for tag in tags), f"docs/reading.md says nothing of {pattern}"


def test_every_recipe_is_there():
    page = recipes.page()
    for path in (ROOT / "launch" / "recipes").rglob("*.yaml"):
        assert f"]({'../../'}{path.relative_to(ROOT)})" in page


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_outside_of_the_site_lead_somewhere(page):
    for link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / path
        assert target.is_file(), (page, link)
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slugify(heading.replace("`", ""), "-") for heading in headings}, (page, link)


def test_a_site_that_would_fetch_from_elsewhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="https://ok.example"></a><script src="own.js"></script><link rel="canonical" href="https://ok.example">'
        '<img src="//b.example/x.png"><link rel="stylesheet" href="https://c.example/x.css">'
    )
    (tmp_path / "a.css").write_text("a { background: url(own.png) } @import 'https://d.example/x.css';")
    assert [address for _, address in site.foreign(tmp_path)] == [
        "https://d.example/x.css",
        "//b.example/x.png",
        "https://c.example/x.css",
    ]
