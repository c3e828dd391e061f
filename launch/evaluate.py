"""Speed and size of a student and its teacher, or their sentence embeddings: `python launch/evaluate.py runs/mine`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsdistill.command import BAD_INPUT, FAULT, quiet_libraries


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure latency, throughput, parameters and bytes; write them into the model card and speed.json. "
        "With --sts or --texts: score sentence embeddings instead, into the card and sentences.json."
    )
    parser.add_argument("model", help="run directory, model directory, hub name, or package:<import name>")
    parser.add_argument("--teacher", help="compare with this one; by default the teacher of the run's recipe")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512], help="tokens per row")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="rows per call")
    parser.add_argument(
        "--device", choices=["cpu", "cuda", "all"], default="all", help="all: a GPU too if there is one"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long each measurement may take")
    parser.add_argument("--sts", type=Path, help="scored sentence pairs: GLUE's STS-B folder, or a file like its own")
    parser.add_argument("--texts", type=Path, help="one text a line: on whose neighbours do student and teacher agree?")
    parser.add_argument("--neighbours", type=int, default=10, help="nearest texts that are compared")
    return parser.parse_args()


def main() -> int:
    """Parse, measure, print."""
    arguments = parse_arguments()
    import torch

    from dsdistill.evaluate import evaluate
    from dsdistill.evaluate_sentences import evaluate_sentences

    quiet_libraries()
    try:
        if min(*arguments.lengths, *arguments.batches, arguments.threads or 1, arguments.neighbours) < 1:
            raise ValueError("lengths, batches, threads and neighbours must be at least 1")
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: there is no GPU here")
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        names = ["cpu", "cuda"] if arguments.device == "all" and torch.cuda.is_available() else [arguments.device]
        devices = [torch.device(name.replace("all", "cpu")) for name in names]
        if arguments.sts is not None or arguments.texts is not None:
            table = evaluate_sentences(
                arguments.model,
                teacher=arguments.teacher,
                sts=arguments.sts,
                texts=arguments.texts,
                neighbours=arguments.neighbours,
                device=devices[-1],
            )
        else:
            table = evaluate(
                arguments.model,
                teacher=arguments.teacher,
                lengths=arguments.lengths,
                batches=arguments.batches,
                devices=devices,
                budget_s=arguments.seconds,
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAULT
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
