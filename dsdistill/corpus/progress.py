"""How far the reading of documents is."""

from __future__ import annotations

from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.sources import Source
from dsdistill.progress import Progress


class Reading(Progress):
    """Rate and remaining time: over documents if their number is limited, else over input bytes.

    Args:
        what: What is being done.
        settings: Of the corpus.
        sources: Its input.
        shown: As for `Progress`.
        beats: As for `Progress`.
    """

    def __init__(
        self, what: str, settings: CorpusSettings, sources: list[Source], *, shown: bool = True, beats: bool = False
    ):
        sizes = [source.num_bytes for source in sources]
        self._by_documents = settings.max_documents is not None or not all(sizes)
        total = settings.max_documents if self._by_documents else sum(filter(None, sizes))
        super().__init__(what, total, unit="document" if self._by_documents else "B", shown=shown, beats=beats)

    def at(self, bytes_read: int, documents: int, tokens: int | None = None) -> None:
        """Show where the input and the counts stand."""
        numbers = [f"{documents:,} documents"] * (not self._by_documents)
        if tokens is not None:
            numbers.append(f"{tokens / 1e6:.1f} M tokens")
        self.to(documents if self._by_documents else bytes_read, ", ".join(numbers))
