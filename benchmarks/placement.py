"""What it costs to keep the teacher elsewhere, and whether memory is predicted: `placement.py --out DIR`.

Three parts, chosen by `--parts`. `placements`: a large teacher beside a student, the same steps with every placement;
signals are compared bit for bit, and the teacher's own share of the GPU is told beside its bar (two layers and what is
beside layers). `growth`: many small steps with a streamed teacher; memory before and after. `prediction`: peaks of
training steps beside what `dsdistill.memory` says, a row for each of `--predict`.

On one GPU `zero3` has nobody to share with, and only shows that it runs. On several, start it with a launcher:

    deepspeed --num_gpus 2 benchmarks/placement.py --out DIR --parts placements --placements resident zero3 cpu
    deepspeed --num_gpus 2 benchmarks/placement.py --out DIR --parts placements --placements ranks

Rows of 128 random tokens, 256 in a micro-batch, fp16, `minilm` on the last layers, medians between CUDA events.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import itertools
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import DTYPES, OPTIMIZATION, Cell, Clock, engine_config, random_batches
from torch import Tensor
from transformers import BertModel, PreTrainedModel

from dsdistill.core import Batch
from dsdistill.locate import Source
from dsdistill.memory import GIB, Engine, predict_memory, teacher_bytes
from dsdistill.models.capture import Captured
from dsdistill.models.families import shape_of
from dsdistill.models.streamed import StreamedTeacher
from dsdistill.models.teacher import ResidentTeacher
from dsdistill.tracing import Trace, trace_step
from dsdistill.training.dist import Place, find_place, gather_rows
from dsdistill.training.distiller import Distiller, freeze_unreached, wanted_signals
from dsdistill.training.engine import backward, start_engine, start_processes
from dsdistill.training.placement import Placed, Placement, at_once, lines
from dsdistill.training.teacher_ranks import RemoteTeacher, serve
from dsdistill.training.watchdog import Watchdog

PATIENCE_S = 120.0
PREDICTED = """\
0:fused:128:resident 1:fused:128:resident 2:fused:128:resident 3:fused:128:resident 1:plain:128:resident
1:fused:512:resident 1:fused:128:cpu"""


def models_of(cell: Cell) -> tuple[Callable[[], PreTrainedModel], Callable[[], PreTrainedModel]]:
    """What makes the student and the teacher, random, wherever new tensors are put."""
    return tuple(  # type: ignore[return-value]
        lambda config=config: BertModel(copy.deepcopy(config), add_pooling_layer=False) for config in cell.configs()
    )


def loaded(cell: Cell, kept: dict[str, PreTrainedModel]) -> PreTrainedModel:
    """A fresh copy of the teacher on the CPU, the same every time."""
    if cell.teacher not in kept:
        kept.clear()
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = models_of(cell)[1]()
        kept[cell.teacher] = torch.nn.Module.to(model, "cpu")
    return copy.deepcopy(kept[cell.teacher])


def trace_of(cell: Cell) -> Trace:
    """What one micro-batch holds."""
    shape = (cell.micro_batch, cell.length)
    batch = Batch(
        input_ids=torch.empty(shape, dtype=torch.long, device="meta"),
        mask=torch.empty(shape, dtype=torch.bool, device="meta"),
        sample_ids=torch.empty(shape[0], dtype=torch.long, device="meta"),
        token_type_ids=torch.empty(shape, dtype=torch.long, device="meta"),
        padded=False,
    )
    student, teacher = (shape_of(config) for config in cell.configs())
    terms = cell.terms()
    return trace_step(
        *models_of(cell),
        wanted_signals(terms),
        terms,
        (student, teacher),
        batch,
        dtype=DTYPES[cell.dtype],
        fused=cell.variant.startswith("fused"),
    )


def train(
    cell: Cell, placement: Placement, place: Place, steps: int, kept: dict[str, PreTrainedModel]
) -> dict[str, Any]:
    """Train a few steps and report times and memory."""
    gc.collect()
    torch.cuda.empty_cache()
    batches = random_batches(cell, 4)
    probe = Batch(*(x[:2].to(place.device) if isinstance(x, Tensor) else x for x in batches[0]))
    terms, before = cell.terms(), torch.cuda.memory_allocated()
    wanted = wanted_signals(terms)
    source = Source(model="random")
    teacher = placement.place(source, lambda: loaded(cell, kept), wanted[1], place=place, dtype=DTYPES[cell.dtype])
    ask = at_once(teacher)
    assert ask is not None
    signals = ask(batches[0].to(place.device))
    checksum = [t.double().sum().item() for layers in signals.signals.values() for t in layers.values()]
    del signals
    gc.collect()
    teacher_share = torch.cuda.memory_allocated() - before
    configs = cell.configs()
    torch.manual_seed(0)
    with place.device:
        student = models_of(cell)[0]()
    distiller = Distiller(
        Captured(student, wanted[0]).train(),
        terms,
        shape=shape_of(configs[0]),
        teacher=shape_of(configs[1]),
        num_examples=1,
        gather=gather_rows,
        seed=0,
    ).to(place.device)
    freeze_unreached(distiller, probe, ask(probe))
    if "+compile" in cell.variant:
        distiller.student.compile_forward()
        if isinstance(teacher, ResidentTeacher | RemoteTeacher):
            teacher.compile_forward()
    config = engine_config(cell)
    config["train_batch_size"] *= place.world_size
    engine = start_engine(distiller, OPTIMIZATION, config, place)
    engine.train()
    clock, losses = Clock(), []
    stream = itertools.islice(itertools.cycle(batches), (steps + 1) * cell.accumulation)
    stream = iter(teacher.ahead(stream)) if isinstance(teacher, RemoteTeacher) else stream

    def train_step() -> None:
        for _ in range(cell.accumulation):
            clock.mark("data")
            batch = next(stream).to(place.device)
            clock.mark("teacher")
            said = teacher(batch)
            clock.mark("student")
            total = engine(batch, said, 0).total
            losses.append(total.detach())
            clock.mark("backward")
            backward(engine, total)
            clock.mark("step" if engine.is_gradient_accumulation_boundary() else "hooks")
            engine.step()

    train_step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    clock.marks.clear()
    began = time.perf_counter()
    for _ in range(steps):
        train_step()
    clock.mark("end")
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() - before
    engine_of = Engine.of(config, processes=place.world_size, weight_bytes=DTYPES[cell.dtype].itemsize)
    trace = trace_of(cell)
    predicted = predict_memory(trace, engine_of, placement.kind)
    assert trace.teacher is not None
    report = dataclasses.asdict(cell) | {
        "placement": placement.kind,
        "processes": place.world_size,
        "micro_step_ms": 1e3 * seconds / steps / cell.accumulation,
        "parts_ms": clock.medians_ms(),
        "teacher_mib": teacher_share / 2**20,
        "teacher_predicted_mib": teacher_bytes(trace.teacher, placement.kind, place.world_size, 2) / 2**20,
        "two_layers_and_rest_mib": teacher_bytes(trace.teacher, "cpu", place.world_size, 2) / 2**20,
        "peak_gib": peak / GIB,
        "predicted_gib": predicted.peak / GIB,
        "predicted_parts_gib": {name: round(value / GIB, 3) for name, value in dataclasses.asdict(predicted).items()},
        "signal_sums": checksum,
        "loss": torch.stack(losses).double().sum().item(),
    }
    engine.destroy()
    return report


def same_signals(cell: Cell, place: Place, kept: dict[str, PreTrainedModel]) -> str:
    """Whether a streamed teacher says what a resident one says, to the last bit, over a few batches."""
    wanted, options = wanted_signals(cell.terms())[1], {"device": place.device, "dtype": DTYPES[cell.dtype]}
    teachers: list[Placed] = [
        ResidentTeacher(loaded(cell, kept), wanted, **options),
        StreamedTeacher(loaded(cell, kept), wanted, **options),
    ]
    different = total = 0
    for batch in random_batches(cell, 3):
        one, other = (teacher(batch.to(place.device)) for teacher in teachers)
        for signal, layers in one.signals.items():
            for layer, tensor in layers.items():
                total += 1
                different += not torch.equal(tensor, other.at(signal, layer))
    equal = teachers[0].checksum() == teachers[1].checksum()
    return f"signals of cpu and resident: {total - different} of {total} tensors equal bit for bit; weights {equal}"


def growth(cell: Cell, place: Place, steps: int, kept: dict[str, PreTrainedModel]) -> dict[str, float]:
    """Memory over many small forwards of a streamed teacher."""
    cell = dataclasses.replace(cell, micro_batch=8)
    teacher = StreamedTeacher(
        loaded(cell, kept), wanted_signals(cell.terms())[1], device=place.device, dtype=DTYPES[cell.dtype]
    )
    batches = [batch.to(place.device) for batch in random_batches(cell, 4)]
    marks = []
    for number, batch in enumerate(itertools.islice(itertools.cycle(batches), steps)):
        teacher(batch)
        if number in (20, steps - 1):
            torch.cuda.synchronize()
            host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            marks.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), host))
    (a, b, c), (x, y, z) = marks
    return {
        "forwards": steps,
        "allocated_bytes": x - a,
        "reserved_bytes": y - b,
        "host_peak_mib": round(z - c, 1),
        "teacher_mib": x / 2**20,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for placement.json and placement.md")
    parts = ["placements", "growth", "prediction"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--placements", nargs="+", default=["resident", "cpu", "zero3"])
    parser.add_argument("--nvme_path", type=Path, help="for placement nvme")
    parser.add_argument("--teacher", default="24x1024", help="layers x width")
    parser.add_argument("--student", default="6x1024", help="layers x width")
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2**15, help="of a micro-batch")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage of the student in `placements`")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps that are timed")
    parser.add_argument("--forwards", type=int, default=500, help="of `growth`")
    parser.add_argument(
        "--predict",
        nargs="+",
        metavar="ZERO:VARIANT:LENGTH:PLACEMENT",
        default=PREDICTED.split(),
        help="12x768 into 6x768; +compile after the variant costs a minute",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


def row(report: dict[str, Any], base: float | None) -> str:
    """One line of the table."""
    parts = " ".join(f"{report['parts_ms'].get(p, 0):.1f}" for p in ("teacher", "student", "backward", "step"))
    cost = f"{report['micro_step_ms'] / base - 1:+.1%}" if base else "-"
    return (
        f"| {report['teacher']} to {report['student']}, {report['length']} x {report['micro_batch']} "
        f"| {report['variant']}, ZeRO {report['zero']} | {report['placement']} | {report['processes']} "
        f"| {report['micro_step_ms']:.1f} | {cost} | {parts} | {report['teacher_mib']:.0f} "
        f"(predicted {report['teacher_predicted_mib']:.0f}, bar {report['two_layers_and_rest_mib']:.0f}) "
        f"| {report['peak_gib']:.2f} | {report['predicted_gib']:.2f} "
        f"| {report['predicted_gib'] / report['peak_gib'] - 1:+.1%} | {report['loss']:.6f} |"
    )


HEAD = (
    "| models, rows | variant | placement | processes | micro-step ms | beside resident | ms: teacher student backward "
    "step | teacher on GPU MiB | peak GiB | predicted | error | sum of losses |\n" + "|---" * 12 + "|"
)


def main() -> None:
    """Parse and run."""
    arguments, began = parse(), time.perf_counter()
    place = find_place()
    ranks = "ranks" in arguments.placements
    if ranks and (arguments.placements != ["ranks"] or arguments.parts != ["placements"]):
        raise SystemExit("placement ranks is measured alone: its processes do nothing else")
    place = place.with_teachers(1 if ranks else 0)
    start_processes(place)
    cell = Cell(
        "fused",
        "minilm",
        arguments.teacher,
        arguments.student,
        128,
        arguments.tokens // 128,
        arguments.accumulation,
        "fp16",
        arguments.zero,
    )
    kept: dict[str, PreTrainedModel] = {}
    if place.is_teacher:
        serve(lambda _: loaded(cell, kept), place, PATIENCE_S)
        return
    square = torch.ones(256, 256, device=place.device, dtype=DTYPES["fp16"])
    square @ square  # so that the libraries' own memory is not the first teacher's
    del square
    told: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    lines_ = [f"{told['device']}, torch {told['torch']}, {place.world_size} process(es) that train", ""]

    def tell(line: str) -> None:
        lines_.append(line)
        if place.is_first:
            print(f"{line}", flush=True)
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "placement.md").write_text("\n".join(lines_) + "\n")
            (arguments.out / "placement.json").write_text(json.dumps(told, indent=1))

    def measure(one: Cell, kind: str, base: float | None, line: Any) -> float | None:
        placement = Placement(kind=kind, nvme=arguments.nvme_path if kind == "nvme" else None, line=line)  # type: ignore[arg-type]
        try:
            report = train(one, placement, place, arguments.steps, kept)
        except torch.OutOfMemoryError as error:
            tell(f"| {one.teacher} | {one.variant}, ZeRO {one.zero} | {kind} | out of memory: {str(error)[:90]} |")
            return None
        told["rows"].append(report)
        tell(row(report, base))
        return report["micro_step_ms"]

    tell(HEAD)
    with lines(place, PATIENCE_S) as line, Watchdog(place, PATIENCE_S) as watchdog:
        if "placements" in arguments.parts:
            base = None
            for kind in arguments.placements:
                watchdog.at(f"placement {kind}")
                taken = measure(cell, kind, base, line)
                base = taken if kind == "resident" else base
    if "prediction" in arguments.parts:
        for wanted in arguments.predict:
            zero, variant, length, kind = wanted.split(":")
            rows = max(1, arguments.tokens // int(length))
            measure(
                Cell(
                    variant, "minilm", "12x768", "6x768", int(length), rows, arguments.accumulation, "fp16", int(zero)
                ),
                kind,
                None,
                None,
            )
    if "placements" in arguments.parts and "cpu" in arguments.placements:
        told["signals"] = same_signals(cell, place, kept)
        tell(f"\n{told['signals']}")
    if "growth" in arguments.parts:
        told["growth"] = growth(cell, place, arguments.forwards, kept)
        tell(f"\ngrowth over {arguments.forwards} forwards of a streamed teacher: {told['growth']}")
    tell("\nbars: cpu at most +10 % beside resident; its teacher at most the bar; errors within 15 %; growth 0")
    tell(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
