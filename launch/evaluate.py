"""Speed and size of a student and its teacher, or their sentence embeddings: `python launch/evaluate.py runs/mine`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsdistill.command import exit_code, make_parser, quiet_libraries

WHAT = """\
Measure latency, throughput, parameters and bytes of a student and its teacher; write them into the model card and
speed.json. With --sts or --texts: score sentence embeddings instead, into the card and sentences.json."""
EXAMPLES = r"""
python launch/evaluate.py runs/quickstart --lengths 128 --device cpu
python launch/evaluate.py runs/quickstart --sts data/glue --texts lines.txt
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = make_parser(WHAT, EXAMPLES, fault="a fault: a file that cannot be written")
    models = found.add_argument_group("what is measured")
    models.add_argument("model", help="run directory, model directory, hub name, or package:<import name>")
    models.add_argument("--teacher", help="compare with this one; by default the teacher of the run's recipe")
    models.add_argument(
        "--device", choices=["cpu", "cuda", "all"], default="all", help="where; all: a GPU too if there is one"
    )
    speed = found.add_argument_group("speed")
    speed.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512], help="tokens per row")
    speed.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="rows per call")
    speed.add_argument("--threads", type=int, help="CPU threads; torch's own number if not given")
    speed.add_argument("--seconds", type=float, default=2.0, help="about how long each measurement may take")
    sentences = found.add_argument_group("sentence embeddings")
    sentences.add_argument(
        "--sts", type=Path, help="scored sentence pairs: GLUE's STS-B folder, or a file with its columns"
    )
    sentences.add_argument(
        "--texts", type=Path, help="one text a line: on whose neighbours do student and teacher agree?"
    )
    sentences.add_argument("--neighbours", type=int, default=10, help="nearest texts that are compared")
    return found


def main() -> int:
    """Parse, measure, print."""
    arguments = parser().parse_args()
    return exit_code(lambda: print(run(arguments)))


def run(arguments: argparse.Namespace) -> str:
    """What the arguments ask for, as a table.

    Raises:
        ValueError: If they cannot be met here.
    """
    quiet_libraries()
    import torch

    from dsdistill.evaluate import evaluate
    from dsdistill.evaluate_sentences import evaluate_sentences

    if min(*arguments.lengths, *arguments.batches, arguments.threads or 1, arguments.neighbours) < 1:
        raise ValueError("lengths, batches, threads and neighbours must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU here")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    names = ["cpu", "cuda"] if arguments.device == "all" and torch.cuda.is_available() else [arguments.device]
    devices = [torch.device(name.replace("all", "cpu")) for name in names]
    if arguments.sts is not None or arguments.texts is not None:
        return evaluate_sentences(
            arguments.model,
            teacher=arguments.teacher,
            sts=arguments.sts,
            texts=arguments.texts,
            neighbours=arguments.neighbours,
            device=devices[-1],
        )
    return evaluate(
        arguments.model,
        teacher=arguments.teacher,
        lengths=arguments.lengths,
        batches=arguments.batches,
        devices=devices,
        budget_s=arguments.seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
