"""Documents from files, directories, globs and hub data sets, streamed with flat memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsdistill.corpus.lines import COMPRESSIONS, LIMIT_BYTES, Meter, read_lines
from dsdistill.corpus.settings import DEFAULT_COLUMN, CorpusSettings, Format
from dsdistill.corpus.tables import read_csv, read_hub, read_jsonl, read_parquet
from dsdistill.locate import resolve_input

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_GLOB_CHARACTERS = "*?["
_HTML_TAG = re.compile(r"</?[A-Za-z][^<>]{0,300}>|<!--.{0,300}?-->", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Source:
    """One file or hub data set.

    Attributes:
        name: Path, or name on the hub.
        format: Never "auto".
        num_bytes: Size as stored; 0 where unknown.
    """

    name: str
    format: Format
    num_bytes: int


def find_sources(settings: CorpusSettings) -> list[Source]:
    """The files and data sets that the settings name, directories and globs expanded, in a fixed order.

    Raises:
        ValueError: If something does not exist, matches nothing, or is given an option that does not apply to it.
    """
    sources: dict[str, Source] = {}
    for name in settings.input:
        for source in _expand(resolve_input(name), settings.format):
            sources.setdefault(source.name, source)
    formats = {source.format for source in sources.values()}
    if formats == {"text"} and (settings.column or settings.where):
        raise ValueError("column and where have no effect on text files; they are for tables")
    if "hub" not in formats and (settings.hub_config or settings.hub_split):
        raise ValueError(f"hub_config and hub_split have no effect on {', '.join(settings.input)}: these are files")
    return list(sources.values())


def _expand(name: str, chosen: Format) -> list[Source]:
    path = Path(name)
    if chosen == "hub":
        return [Source(name, "hub", 0)]
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and format_of(p) is not None]
        if not found:
            raise ValueError(f"{name}: no file in this directory ends in {' '.join(_FORMAT_OF_SUFFIX)}")
    elif path.is_file():
        found = [path]
    elif any(c in name for c in _GLOB_CHARACTERS):
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        found = sorted(p for p in anchor.glob(str(path.relative_to(anchor))) if p.is_file())
        if not found:
            raise ValueError(f"{name}: no file matches this pattern")
    elif path.exists():
        raise ValueError(f"{name}: neither a file nor a directory")
    elif chosen == "auto" and _may_be_hub_name(name):
        return [Source(name, "hub", 0)]
    else:
        raise ValueError(f"{name}: no such file or directory")
    return [Source(str(p), format_of(p) or "text" if chosen == "auto" else chosen, p.stat().st_size) for p in found]


def format_of(path: Path) -> Format | None:
    """Format by the file's suffix, a compression's suffix after it ignored; None if it says nothing."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return _FORMAT_OF_SUFFIX.get(suffixes[-1]) if suffixes else None


def _may_be_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None and format_of(Path(name)) is None


def read_documents(sources: list[Source], settings: CorpusSettings, meter: Meter) -> Iterator[str]:
    """All documents that the settings keep, in the sources' order.

    Raises:
        ValueError: At the first fault of the input; names file and place.
    """
    seen = _SeenTexts() if settings.drop_duplicates else None
    num_documents = 0
    for source in sources:
        num_from_source = 0
        for text in _read_source(source, settings, meter):
            document = _HTML_TAG.sub(" ", text).strip() if settings.strip_html else text.strip()
            if not document:
                continue
            num_from_source += 1
            if seen is not None and not seen.add(document):
                continue
            yield document
            num_documents += 1
            if num_documents == settings.max_documents:
                return
        if not num_from_source:
            reason = f" with {_conditions(settings)}" if settings.where else ""
            raise ValueError(f"{source.name}: no document found{reason}")


def _conditions(settings: CorpusSettings) -> str:
    return " and ".join(f"{column}={value}" for column, value in settings.where.items())


def _read_source(source: Source, settings: CorpusSettings, meter: Meter) -> Iterator[str]:
    column = settings.column or DEFAULT_COLUMN
    if source.format == "text":
        return _read_text(Path(source.name), settings.documents, meter)
    if source.format == "hub":
        return read_hub(source.name, column, settings.where, config=settings.hub_config, split=settings.hub_split)
    readers: dict[str, Callable[[], Iterator[str]]] = {
        "csv": lambda: read_csv(Path(source.name), column, settings.where, meter, delimiter=","),
        "tsv": lambda: read_csv(Path(source.name), column, settings.where, meter, delimiter="\t"),
        "jsonl": lambda: read_jsonl(Path(source.name), column, settings.where, meter),
        "parquet": lambda: read_parquet(Path(source.name), column, settings.where, meter),
    }
    return readers[source.format]()


def _read_text(path: Path, documents: str, meter: Meter) -> Iterator[str]:
    paragraphs: list[str] = []
    size, first = 0, 1
    for number, line in read_lines(path, meter):
        text = line.strip()
        if documents == "line":
            yield text
        elif text:
            paragraphs.append(text)
            size += len(text)
            if size > LIMIT_BYTES:
                raise ValueError(
                    f"{path}: the document from line {first} on is longer than the limit of {LIMIT_BYTES} bytes; "
                    "separate documents by blank lines, or use documents=line if each line is one"
                )
        else:
            yield "\n".join(paragraphs)
            paragraphs.clear()
            size, first = 0, number + 1
    yield "\n".join(paragraphs)


class _SeenTexts:
    """Set of 64-bit hashes of texts, 8 bytes each but for the latest million."""

    _RECENT = 1 << 20

    def __init__(self) -> None:
        self._sorted: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, text: str) -> bool:
        """Remember a text; whether it is new."""
        number = text_hash(text)
        if number in self._recent:
            return False
        place = int(np.searchsorted(self._sorted, np.uint64(number)))
        if place < len(self._sorted) and int(self._sorted[place]) == number:
            return False
        self._recent.add(number)
        if len(self._recent) >= self._RECENT:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return True


def text_hash(text: str) -> int:
    """64-bit hash of a text, the same on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
