"""Train a tokenizer on your own text.

    python launch/train_tokenizer.py --input texts/ --like path/or/hub-name --kind unigram --vocab_size 16000 \
        --output tokenizers/mine
    python launch/prepare_corpus.py --input texts/ --tokenizer tokenizers/mine --output data/mine
    python launch/pretrain_distill.py ... --set student.tokenizer=tokenizers/mine

Its special tokens are those of the model that will be the teacher. What teacher and student say of tokens then no
longer lines up: the student starts from the teacher's layers and from the embeddings of tokens that both know, and
learns with the objective mlm, later with task.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.train_tokenizer import train_tokenizer


def main() -> int:
    """Exit status: 0 when the tokenizer is there, 2 when the input or the options do not allow it."""
    parser = argparse.ArgumentParser(
        prog="train_tokenizer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, nargs="+", help="as prepare_corpus takes it")
    parser.add_argument("--like", required=True, help="the teacher: its special tokens are taken")
    parser.add_argument(
        "--kind", required=True, choices=("wordpiece", "unigram", "bpe"), help="the last two: SentencePiece"
    )
    parser.add_argument("--vocab_size", required=True, type=int, help="tokens, special ones included")
    parser.add_argument("--output", required=True, type=Path, help="directory of the tokenizer")
    parser.add_argument("--column", help="tables: the column with the text")
    parser.add_argument("--max_documents", type=int, help="stop after so many documents")
    parser.add_argument("--lowercase", action="store_true", help="drop case")
    given = parser.parse_args()
    try:
        settings = CorpusSettings(
            input=tuple(given.input),
            tokenizer=given.like,
            output=given.output,
            column=given.column,
            max_documents=given.max_documents,
        )
        made = train_tokenizer(settings, kind=given.kind, vocab_size=given.vocab_size, lowercase=given.lowercase)
    except (ValueError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    print(f"{given.kind} tokenizer of {len(made):,} tokens: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
