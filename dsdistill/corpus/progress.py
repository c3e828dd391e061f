"""The progress bar of a preparation."""

from __future__ import annotations

from tqdm import tqdm

from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.sources import Source


class Progress:
    """Progress bar with rate and remaining time: over documents if their number is limited, else over input bytes."""

    def __init__(self, settings: CorpusSettings, sources: list[Source], *, shown: bool) -> None:
        sizes = [source.num_bytes for source in sources]
        self._by_documents = settings.max_documents is not None or not all(sizes)
        total = settings.max_documents if self._by_documents else sum(sizes)
        unit = "doc" if self._by_documents else "B"
        self._bar = tqdm(
            total=total, unit=unit, unit_scale=True, desc="preparing corpus", disable=not shown, mininterval=0.5
        )
        self._tokens = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, bytes_read: int, documents: int, new_tokens: int) -> None:
        """Show where the input and the counts stand."""
        self._tokens += new_tokens
        self._bar.set_postfix_str(f"{documents:,} documents, {self._tokens / 1e6:.1f} M tokens", refresh=False)
        self._bar.update((documents if self._by_documents else bytes_read) - self._bar.n)
