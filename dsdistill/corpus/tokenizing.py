"""What the corpus needs to know of a tokenizer: its special tokens around a text, and a fingerprint of what it does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from dsdistill.locate import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = (
    "Hello World, it's 3.14 o'clock!",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m cafe\u0301 \ufb01ne",
    "  two  spaces\tand\na new line ",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \u043f\u0440\u0438\u0432\u0435\u0442 \u05e9\u05dc\u05d5\u05dd \U0001f600",
    "unaffable antidisestablishmentarianism 1234567890 foo_bar e-mail@example.org",
)
_SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f", "\u2026")


@dataclass(frozen=True, slots=True)
class Template:
    """The special tokens that a model wants around one text or a pair of texts.

    Attributes:
        prefix: Before the text.
        middle: Between the texts of a pair; empty for single texts.
        suffix: After the (last) text.
        separator: Between documents in one row: the suffix's first token; None if there is no suffix.
        middle_first: How many of `middle` have token type 0.
        second_type: Token type of a pair's second text and suffix, 0 or 1.
    """

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    separator: int | None
    middle_first: int
    second_type: int

    @property
    def num_special(self) -> int:
        """Special tokens per row, separators between documents not counted."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a directory, hub name or `package:<import name>`.

    Raises:
        ValueError: If there is none.
    """
    from transformers import AutoTokenizer

    location = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ValueError(f"{name}: no tokenizer could be loaded from there ({first_line})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{name}: {type(tokenizer).__name__} has no fast version (tokenizer.json), which is needed")
    return tokenizer


def plain_backend(tokenizer: PreTrainedTokenizerBase | Tokenizer) -> Tokenizer:
    """Copy of the Rust tokenizer without truncation and padding, which takes special tokens in a text for text."""
    backend: Any = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | Tokenizer) -> str:
    """Hash of the vocabulary, the special tokens and what the tokenizer makes of some probe texts.

    It depends on what the tokenizer does, not on how a version of a library writes it down.

    Returns:
        64 hexadecimal digits.
    """
    backend = plain_backend(tokenizer)
    special = sorted((number, token.content) for number, token in backend.get_added_tokens_decoder().items())
    encodings = [backend.encode(probe).ids for probe in _PROBES]
    pair = backend.encode(_PROBES[0], _PROBES[1])
    content = [sorted(backend.get_vocab().items()), special, encodings, pair.ids, pair.type_ids]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def special_template(backend: Tokenizer, *, pairs: bool) -> Template:
    """The special tokens as the tokenizer's own post-processor sets them.

    Args:
        backend: From `plain_backend`.
        pairs: Whether rows hold pairs of texts.

    Raises:
        ValueError: If the tokenizer adds no special tokens, or its token types are not 0 then 1.
    """
    encoding = backend.encode("a", "a") if pairs else backend.encode("a")
    groups: list[list[tuple[int, int]]] = [[]]
    types_of_texts: list[int] = []
    previous = None
    for number, sequence, kind in zip(encoding.ids, encoding.sequence_ids, encoding.type_ids, strict=True):
        if sequence is None:
            groups[-1].append((number, kind))
        elif sequence != previous:
            groups.append([])
            types_of_texts.append(kind)
        previous = sequence
    num_texts = 2 if pairs else 1
    if len(groups) != num_texts + 1 or not any(groups) or (pairs and not groups[1]):
        raise ValueError(
            "the tokenizer adds no special tokens around a text; an encoder such as BERT needs them "
            "(its tokenizer.json has a post_processor)"
        )
    middle = groups[1] if pairs else []
    kinds = [kind for group in (groups[0], middle) for _, kind in group]
    if types_of_texts[0] != 0 or kinds != sorted(kinds) or not {*types_of_texts, *kinds} <= {0, 1}:
        raise ValueError(f"token types {encoding.type_ids} of a pair are not 0 then 1; use single texts")
    suffix = tuple(number for number, _ in groups[-1])
    return Template(
        prefix=tuple(number for number, _ in groups[0]),
        middle=tuple(number for number, _ in middle),
        suffix=suffix,
        separator=suffix[0] if suffix else None,
        middle_first=sum(kind == 0 for _, kind in middle),
        second_type=types_of_texts[-1],
    )


def sentence_end_ids(backend: Tokenizer) -> list[int]:
    """Tokens that end a sentence."""
    return sorted(number for token, number in backend.get_vocab().items() if token.endswith(_SENTENCE_ENDS))
