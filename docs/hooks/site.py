"""What mkdocs calls: generated reference, links to files of the repository, and a site that fetches nothing foreign."""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.hooks import charts, commands, machine, recipes, settings

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("mkdocs.hooks.site")
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[#)])")
"""The path of a relative link or picture."""

PIPES = re.compile(r"`[^`\n]*\\\|[^`\n]*`")
"""Code with escaped pipes, as tables have it elsewhere; here a table leaves code alone."""

FETCHED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "link": "href",
}
LANGUAGES = {".sbatch": "sh", ".j2": "jinja", ".yaml": "yaml", ".json": "json", ".py": "python", ".sh": "sh"}


def reference() -> dict[str, str]:
    """Generated pages by their place in the site."""
    pages = settings.pages() | {
        "deepspeed": machine.page(),
        "commands": commands.page(),
        "recipes": recipes.page(),
        "charts": charts.page(),
    }
    return {f"reference/{name}.md": text for name, text in pages.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, and a page for every file of the repository that a page links to."""
    for place, text in reference().items():
        files.append(File.generated(config, place, content=text))
    waiting = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    done: set[str] = set()
    while waiting:
        source, text = waiting.pop()
        for target in outside(source, text):
            if target in done:
                continue
            done.add(target)
            path = ROOT / target
            if not path.is_file():
                LOG.warning("%s links to %s, which is no file of the repository", source, target)
            elif path.suffix == ".png":
                files.append(File.generated(config, place_of(target), content=path.read_bytes()))
            else:
                content = path.read_text(encoding="utf-8")
                shown = content if path.suffix == ".md" else listing(target, content)
                files.append(File.generated(config, place_of(target), content=shown))
                if path.suffix == ".md":
                    waiting.append((target, content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their pages."""
    source = source_of(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        if source.startswith("docs/") and target.startswith("docs/"):
            return match[1]
        return posixpath.relpath(place_of(target), posixpath.dirname(page.file.src_uri) or ".")

    return PIPES.sub(lambda code: code[0].replace("\\|", "|"), LINK.sub(rewritten, markdown))


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site whose pages load something from elsewhere.

    Raises:
        PluginError: Naming page and address.
    """
    found = [f"{path}: {address}" for path, address in foreign(Path(config.site_dir))]
    if found:
        raise PluginError("the site would fetch from elsewhere:\n" + "\n".join(found))


def outside(source: str, text: str) -> Iterator[str]:
    """Paths in the repository, outside of docs/, that a page at `source` links to."""
    for link in LINK.findall(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if not target.startswith("docs/"):
            yield target


def place_of(target: str) -> str:
    """Where a file of the repository stands in the site."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"files/{target}" if target.endswith((".md", ".png")) else f"files/{target}.md"


def source_of(place: str) -> str:
    """The path in the repository of a page of the site."""
    return place.removeprefix("files/") if place.startswith("files/") else f"docs/{place}"


def listing(target: str, content: str) -> str:
    """A page that shows a file, and is left out of the search."""
    language = LANGUAGES.get(Path(target).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {target}\n\n````{language}\n{content}````\n"


def foreign(site: Path) -> Iterator[tuple[Path, str]]:
    """Files of a built site and the foreign addresses that a browser would load for them."""
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            reader = _Loads()
            reader.feed(path.read_text(encoding="utf-8"))
            loads = reader.loads
        elif path.suffix == ".css":
            loads = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", path.read_text(encoding="utf-8"))
            loads = [first or second for first, second in loads]
        else:
            continue
        yield from ((path.relative_to(site), a) for a in loads if re.match(r"(https?:)?//", a))


class _Loads(HTMLParser):
    """Collects what a browser loads by itself for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get(FETCHED.get(tag, ""))
        if address and not (tag == "link" and given.get("rel") in ("canonical", "prev", "next", "alternate")):
            self.loads.append(address)
