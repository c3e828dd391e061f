"""What more GPUs will do, from what one or two did: `python -m benchmarks.scaling_model [runs/scaling/scaling.json]`.

A step of N GPUs takes A (forward + backward) + optimizer + what communication does not hide behind computation. With S
bytes of trained half-precision weights, bus bandwidth B and ring collectives, gathering or scattering them once takes

    t(S) = S (N - 1) / N / B + (latency per hop) log2(N) (number of messages)

| ZeRO | in each micro-step | in each step | hidden behind |
|---|---|---|---|
| 0 | - | all-reduce, 2 t(S) | nothing |
| 1 | - | all-reduce, 2 t(S); all-gather, t(S) | the last backward, but for the last bucket; nothing |
| 2 | all-reduce, 2 t(S) | all-gather, t(S) | its backward, but for the last bucket; nothing |
| 3 | two all-gathers, one reduce-scatter, 3 t(S) | - | forward (one gather); backward (the others) |

as DeepSpeed 0.19.8 does with `overlap_comm` and the buckets of `ds_configs`. B is the bandwidth inside a node, or that
of all network cards of a node together where there are several nodes and that is less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

BUCKET_BYTES = 2 * 50_000_000
GPUS = (8, 16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Links:
    """What GPUs talk over.

    Attributes:
        name: For people.
        node_gb_per_s: Of all network cards of a node together, one direction.
        inside_gb_per_s: Bus bandwidth of collectives inside a node.
        gpus_per_node: GPUs of a node.
        hop_s: Latency of a hop; a tree of N has log2(N).
    """

    name: str
    node_gb_per_s: float
    inside_gb_per_s: float = 350.0
    gpus_per_node: int = 8
    hop_s: float = 15e-6

    def once(self, size: float, gpus: int) -> float:
        """Seconds to gather or scatter so many bytes once over all GPUs."""
        if gpus == 1:
            return 0.0
        several = gpus > self.gpus_per_node
        rate = min(self.inside_gb_per_s, self.node_gb_per_s) if several else self.inside_gb_per_s
        return size * (gpus - 1) / gpus / (rate * 1e9) + self.hop_s * math.log2(gpus) * math.ceil(size / BUCKET_BYTES)


@dataclasses.dataclass(frozen=True)
class Work:
    """One GPU's share, as measured on one GPU.

    Attributes:
        forward_s: Teacher, student and objectives of a micro-batch.
        backward_s: Of a micro-batch.
        optimizer_s: The engine's step, and what else happens once a step.
        accumulation: Micro-batches in a step.
        tokens: Of a micro-batch.
        trained: Trained parameters.
        floor_s: Least time of forward and backward of a micro-batch, however small: the host's.
    """

    forward_s: float
    backward_s: float
    optimizer_s: float
    accumulation: int
    tokens: int
    trained: int
    floor_s: float = 0.02

    def scaled(self, tokens_per_gpu: float) -> Work:
        """The same model with so many tokens per GPU and step: fewer micro-batches, then smaller ones."""
        accumulation = max(1, round(tokens_per_gpu / self.tokens))
        share = tokens_per_gpu / accumulation / self.tokens
        share = max(share, self.floor_s / (self.forward_s + self.backward_s))
        return dataclasses.replace(
            self,
            forward_s=self.forward_s * share,
            backward_s=self.backward_s * share,
            accumulation=accumulation,
            tokens=round(tokens_per_gpu / accumulation),
        )


def exposed_s(work: Work, gpus: int, zero: int, links: Links) -> float:
    """Seconds of a step in which GPUs wait for communication."""
    size = 2 * work.trained
    once, tail = links.once(size, gpus), 2 * links.once(min(size, BUCKET_BYTES), gpus)
    reduction = max(2 * once - work.backward_s, tail)
    if zero == 0:
        return 2 * once
    if zero == 1:
        return reduction + once
    if zero == 2:
        return work.accumulation * reduction + once
    return work.accumulation * (max(0.0, once - work.forward_s) + max(0.0, 2 * once - work.backward_s))


def step_s(work: Work, gpus: int, zero: int, links: Links) -> float:
    """Seconds of a step."""
    alone = work.accumulation * (work.forward_s + work.backward_s) + work.optimizer_s
    return alone + exposed_s(work, gpus, zero, links)


def efficiency(work: Work, gpus: int, zero: int, links: Links) -> float:
    """Tokens/s of N GPUs over N times those of one with the same share."""
    return step_s(work, 1, zero, links) / step_s(work, gpus, zero, links)


def fixed_batch_s(work: Work, gpus: int, zero: int, links: Links, tokens: int) -> float:
    """Seconds of a step over so many tokens on all GPUs together."""
    return step_s(work.scaled(tokens / gpus), gpus, zero, links)


NETWORKS = (
    Links("8 x 400 Gb/s a node", node_gb_per_s=360.0),
    Links("1 x 400 Gb/s a node", node_gb_per_s=45.0),
    Links("1 x 100 Gb/s a node", node_gb_per_s=11.0),
)
"""Assumed: nine tenths of the line rate."""

MEASURED = Work(0.0210, 0.0157, 0.0063, 4, 32768, 61_050_000)
"""12 x 768 into 6 x 768, `minilm`, compiled, one H100: `speed.md`, commit 9dd2e3f."""


def work_of(cell: dict, tokens: int, accumulation: int) -> Work:
    """One GPU's share from a cell of `scaling.py`."""
    forward, backward = (cell["parts_ms"][part] / 1e3 for part in ("forward", "backward"))
    rest = cell["step_s"] - accumulation * (forward + backward)
    return Work(forward, backward, rest, accumulation, tokens, cell["trained_parameters"])


def tables(works: dict[int, Work], tokens: int) -> str:
    """Predictions as Markdown, for each network: efficiency at fixed work per GPU, and steps/s at a fixed batch."""
    lines = []
    for links in NETWORKS:
        head = "".join(f" {gpus} |" for gpus in GPUS)
        lines += [f"{links.name}, {links.gpus_per_node} GPUs a node", ""]
        lines += [f"| | ZeRO |{head}", "|---" * (len(GPUS) + 2) + "|"]
        for zero, work in works.items():
            cells = "".join(f" {efficiency(work, gpus, zero, links):.0%} |" for gpus in GPUS)
            lines.append(f"| efficiency, {work.accumulation} x {work.tokens} tokens per GPU | {zero} |{cells}")
        for zero, work in works.items():
            cells = "".join(f" {1 / fixed_batch_s(work, gpus, zero, links, tokens):.1f} |" for gpus in GPUS)
            lines.append(f"| steps/s, {tokens / 2**20:.0f} Mi tokens in all | {zero} |{cells}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", nargs="?", type=Path, help="scaling.json of scaling.py; else figures of speed.md")
    parser.add_argument("--tokens", type=int, default=2**20, help="of the fixed global batch")
    parser.add_argument("--accumulation", type=int, default=4, help="of the measurement")
    parser.add_argument("--micro_batch_tokens", type=int, default=32768, help="of the measurement")
    arguments = parser.parse_args()
    works = dict.fromkeys((1, 2), MEASURED)
    if arguments.measured:
        cells = [cell for run in json.loads(arguments.measured.read_text()) for cell in run["cells"]]
        alone = sorted((c for c in cells if c["gpus"] == 1), key=lambda c: c["tokens_per_s"])
        works = {c["zero"]: work_of(c, arguments.micro_batch_tokens, arguments.accumulation) for c in alone}
        works = dict(sorted(works.items()))
        for c in cells:
            if c["gpus"] > 1 and c["zero"] in works:
                predicted = step_s(works[c["zero"]], c["gpus"], c["zero"], NETWORKS[0])
                print(
                    f"ZeRO {c['zero']}, {c['gpus']} GPUs: predicted {1e3 * predicted:.1f} ms per step, measured ",
                    end="",
                )
                print(f"{1e3 * c['step_s']:.1f}")
        print()
    print(tables(works, arguments.tokens))


if __name__ == "__main__":
    main()
