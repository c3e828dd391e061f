"""Code blocks of the README and the guides, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml
from markdown_it import MarkdownIt

from tests.workers import ROOT

LANGUAGES = {"sh", "python", "yaml", "text"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A code block.

    Attributes:
        page: Path of the page in the repository.
        line: Where it begins.
        language: As the fence says; an indented block is `sh`.
        text: Its content.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command as a shell would see it.

    Attributes:
        place: Page and line.
        text: As it stands, lines joined.
        variables: Set in front of it.
        words: The program and its arguments.
    """

    place: str
    text: str
    variables: dict[str, str]
    words: tuple[str, ...]


def guides() -> list[str]:
    """The pages that are written by hand: the README, then the guides in the order of the site."""
    entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = []
    while entries:
        (value,) = entries.pop(0).values()
        if isinstance(value, list):
            entries = value + entries
        elif not value.startswith("reference/"):
            pages.append(f"docs/{value}")
    return ["README.md", *pages]


def blocks(page: str, root: Path = ROOT) -> list[Block]:
    """All code blocks of a page, in order."""
    found = []
    for token in MarkdownIt().parse((root / page).read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            language = token.info.strip() if token.type == "fence" else "sh"
            assert language in LANGUAGES, f"{page}: a block of {language!r}; known: {', '.join(sorted(LANGUAGES))}"
            found.append(Block(page=page, line=token.map[0] + 1, language=language, text=token.content))
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a block of shell; lines that end in a backslash go on."""
    found, start, text = [], 0, ""
    for number, line in enumerate(block.text.splitlines(), start=1):
        start = start or number
        text += line.removesuffix("\\") + " "
        if line.endswith("\\"):
            continue
        words = shlex.split(text, comments=True)
        variables = {}
        while words and re.match(r"[A-Za-z_]\w*=", words[0]):
            name, _, variables_value = words.pop(0).partition("=")
            variables[name] = variables_value
        if words or variables:
            place = f"{block.page}:{block.line + start}"
            text = re.sub(r"\s+", " ", text).strip() if "'" not in text else text.strip()
            found.append(Command(place=place, text=text, variables=variables, words=tuple(words)))
        start, text = 0, ""
    assert not text, f"{block.place}: the last line goes on into nothing"
    return found
