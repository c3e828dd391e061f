"""Speed and memory of a training step, variants side by side: `python benchmarks/speed.py --out runs/speed`.

Every cell trains a few steps under one DeepSpeed engine on random rows without padding, from pinned memory, with
dropout 0.1 in the student: `hf` is what people do today (both models in eager attention with `output_attentions=True`),
`plain` and `fused` are dsdistill with that kernel, `+compile` compiles both models, `+graphs` replays CUDA graphs (the
parts of its steps are told apart less sharply, for the teacher is asked ahead). Times are medians over micro-steps
between CUDA events, warm-up excluded; the model FLOPs are those that the objective needs, whoever computes more.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import dataclasses
import gc
import io
import itertools
import json
import pstats
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn
from torch.autograd import DeviceType
from transformers import BertConfig, BertModel

from dsdistill.config.sections import OptimizationSettings
from dsdistill.core import Batch, Features, LayerPairs, Losses, Signal
from dsdistill.models.capture import ATTENTION, Captured
from dsdistill.models.families import shape_of
from dsdistill.models.teacher import ResidentTeacher
from dsdistill.objectives import find_objective, hidden_mse, relation_kl
from dsdistill.training.ahead import Asked
from dsdistill.training.dist import find_place, gather_rows
from dsdistill.training.distiller import BoundTerm, Distiller, freeze_unreached, wanted_signals
from dsdistill.training.engine import backward, start_engine, start_processes
from dsdistill.training.graphs import GraphedLosses, GraphedTeacher

VOCABULARY = 30522
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ZERO: dict[str, object] = {}
VARIANTS = ("hf", *("".join(v) for v in itertools.product(("plain", "fused"), ("", "+compile"), ("", "+graphs"))))
OBJECTIVES = ("att_mse", "att_kl", "minilm", "minilmv2", "tinybert")
PARTS = ("data", "teacher", "student", "objective", "backward", "step")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the table; models are written as layers x width."""

    variant: str
    objective: str
    teacher: str
    student: str
    length: int
    micro_batch: int
    accumulation: int
    dtype: str
    zero: int

    def configs(self) -> tuple[BertConfig, BertConfig]:
        """Student and teacher; the student gets as many heads as the teacher, as attention maps want it."""
        (depth, width), (teacher_depth, teacher_width) = (map(int, m.split("x")) for m in (self.student, self.teacher))
        return self._config(depth, width, teacher_width // 64), self._config(
            teacher_depth, teacher_width, teacher_width // 64
        )

    def _config(self, depth: int, width: int, heads: int) -> BertConfig:
        return BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=max(512, self.length),
            attn_implementation="eager" if self.variant == "hf" else ATTENTION,
        )

    def terms(self) -> list[BoundTerm]:
        """What a recipe of that name holds."""
        kernel = {"kernel": self.variant.split("+")[0] if self.variant != "hf" else "plain"}
        student, teacher = (int(model.split("x")[0]) for model in (self.student, self.teacher))
        pairs = LayerPairs((student,), (teacher,))
        if self.objective != "tinybert":
            return [bound(self.objective, pairs, kernel)]
        step = teacher // student
        layers = range(1, student + 1)
        pairs = LayerPairs(tuple(layers), tuple(layer * step for layer in layers))
        hidden = LayerPairs((0, *pairs.student), (0, *pairs.teacher))
        return [bound("att_mse", pairs, kernel), bound("hid_seq", hidden, {})]


def bound(name: str, pairs: LayerPairs, params: dict) -> BoundTerm:
    """A term of weight 1."""
    return BoundTerm(label=name, objective=find_objective(name), pairs=pairs, weight=1.0, params=params)


class Eager(nn.Module):
    """The usual way: whole models, attention maps of all layers, relations through hooks on the projections."""

    def __init__(self, model: BertModel, objective: str):
        super().__init__()
        self.model = model
        self.objective = objective
        self.projected: dict[Signal, Tensor] = {}
        attention = model.encoder.layer[-1].attention.self
        for name in ("query", "key", "value"):
            getattr(attention, name).register_forward_hook(lambda *a, name=name: self.projected.update({name: a[2]}))

    def signals(self, batch: Batch) -> Features:
        """All attention maps as `query` by layer, hidden states, and the last layer's projections under layer 0."""
        out = self.model(
            input_ids=batch.input_ids, output_attentions=True, output_hidden_states=self.objective == "tinybert"
        )
        heads = self.model.config.num_attention_heads
        split = {n: {0: x.unflatten(-1, (heads, -1)).transpose(1, 2)} for n, x in self.projected.items()}
        maps = dict(enumerate(out.attentions, 1))
        return Features(
            signals={**split, "query": maps | split["query"], "hidden": dict(enumerate(out.hidden_states or ()))}
        )

    def forward(self, batch: Batch, teacher: Features, step: int) -> Losses:
        """The loss on maps after the softmax, as eager attention returns them."""
        student = self.signals(batch)
        ours, theirs = (list(side.signals["query"].items())[:-1] for side in (student, teacher))
        last = (ours[-1][1], theirs[-1][1])
        if self.objective == "att_mse":
            total = F.mse_loss(*last)
        elif self.objective == "tinybert":
            step = len(theirs) // len(ours)
            total = torch.stack([F.mse_loss(x, theirs[(i - 1) * step + step - 1][1]) for i, x in ours]).sum()
            for i in range(len(ours) + 1):
                total = total + hidden_mse(student.at("hidden", i), teacher.at("hidden", i * step), batch.mask)
        elif self.objective == "minilmv2":
            total = torch.stack(
                [self.relation(name, student, teacher, batch, 48) for name in ("query", "key", "value")]
            ).sum()
        else:
            total = F.kl_div((last[0].float() + 1e-6).log(), last[1].float(), reduction="sum") / last[0][..., 0].numel()
            if self.objective == "minilm":
                total = total + self.relation("value", student, teacher, batch, last[0].shape[1])
        return Losses(total.float(), {})

    @staticmethod
    def relation(name: Signal, student: Features, teacher: Features, batch: Batch, heads: int) -> Tensor:
        """Plain relations of the last layer."""
        return relation_kl(student.at(name, 0), teacher.at(name, 0), batch.mask, relation_heads=heads, kernel="plain")


def build(cell: Cell, device: torch.device, probe: Batch) -> tuple[nn.Module, Callable[[Batch], Features], int]:
    """The module to train, what asks the teacher, and the number of frozen parameters."""
    torch.manual_seed(0)
    student_config, teacher_config = cell.configs()
    dtype = DTYPES[cell.dtype]
    with device:
        student = BertModel(student_config, add_pooling_layer=False)
        teacher = BertModel(teacher_config, add_pooling_layer=False)
    if cell.variant == "hf":
        module = Eager(student.train(), cell.objective).to(device)
        asked = Eager(teacher.eval().requires_grad_(False), cell.objective).to(device, dtype)
        ask = torch.no_grad()(asked.signals)
        module.to(dtype)
        return module, ask, len(freeze_unreached(module, probe, ask(probe)))
    terms = cell.terms()
    wanted = wanted_signals(terms)
    resident = ResidentTeacher(teacher, wanted[1], device=device, dtype=dtype)
    distiller = Distiller(
        Captured(student, wanted[0]).train(),
        terms,
        shape=shape_of(student_config),
        teacher=shape_of(teacher_config),
        num_examples=1,
        gather=gather_rows,
        seed=0,
    ).to(device, dtype)
    frozen = freeze_unreached(distiller, probe, resident(probe))
    if "+compile" in cell.variant:
        for captured in (resident.captured, distiller.student):
            captured.compile_forward()
    if "+graphs" in cell.variant:
        distiller.replay = GraphedLosses(distiller)
        return distiller, GraphedTeacher(resident), len(frozen)
    return distiller, resident, len(frozen)


def random_batches(cell: Cell, count: int) -> list[Batch]:
    """Rows of real tokens only, in pinned memory."""
    generator = torch.Generator().manual_seed(1)
    shape = (cell.micro_batch, cell.length)
    return [
        Batch(
            input_ids=torch.randint(1000, VOCABULARY, shape, generator=generator),
            mask=torch.ones(shape, dtype=torch.bool),
            sample_ids=torch.arange(shape[0]),
            token_type_ids=torch.zeros(shape, dtype=torch.long),
            padded=False,
        ).pin_memory()
        for _ in range(count)
    ]


class Clock:
    """CUDA events at the borders of the parts of micro-steps; nothing is waited for."""

    def __init__(self):
        self.marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(self, part: str) -> None:
        """The part that begins here."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((part, event))

    def medians_ms(self) -> dict[str, float]:
        """Median time of each part; `step` only where the optimizer stepped."""
        torch.cuda.synchronize()
        times: dict[str, list[float]] = {}
        for (part, start), (_, end) in itertools.pairwise(self.marks):
            times.setdefault(part, []).append(start.elapsed_time(end))
        return {part: statistics.median(values) for part, values in times.items()}


def measure(cell: Cell, steps: int, device: torch.device, peak_flops: float, profile: Path | None) -> dict:
    """Train a few steps and report."""
    place = find_place()
    batches = random_batches(cell, 4)
    probe = Batch(*(x[:2].to(device) if isinstance(x, Tensor) else x for x in batches[0]))
    began = time.perf_counter()
    module, ask, frozen = build(cell, device, probe)
    engine = start_engine(module, OPTIMIZATION, engine_config(cell), place)
    engine.train()
    losses = getattr(module, "losses", None)
    clock, graphed = Clock(), isinstance(ask, GraphedTeacher)
    if losses is not None and not graphed:

        def timed(*args, **kwargs):
            clock.mark("objective")
            return losses(*args, **kwargs)

        module.losses = timed
    asked = Asked(itertools.cycle(batches), ask, device, ahead=graphed)

    @contextlib.contextmanager
    def part(name: str) -> Iterator[None]:
        clock.mark(name)
        yield

    def train_step() -> None:
        for _ in range(cell.accumulation):
            batch, signals = asked.take(part)
            clock.mark("student")
            total = engine(batch, signals, 0).total
            clock.mark("backward")
            backward(engine, total)
            boundary = engine.is_gradient_accumulation_boundary()
            if boundary:
                asked.prepare(lambda name: contextlib.nullcontext())
            clock.mark("step" if boundary else "hooks")
            engine.step()

    for _ in range(2 if cell.accumulation > 1 else 4):
        train_step()
    torch.cuda.synchronize()
    warmup_s = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    clock.marks.clear()
    began = time.perf_counter()
    for _ in range(steps):
        train_step()
    clock.mark("end")
    host_s = time.perf_counter() - began
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    tokens = steps * cell.accumulation * cell.micro_batch * cell.length
    report = dataclasses.asdict(cell) | {
        "tokens_per_s": tokens / seconds,
        "micro_step_ms": 1e3 * seconds / steps / cell.accumulation,
        "host_ms": 1e3 * host_s / steps / cell.accumulation,
        "parts_ms": clock.medians_ms(),
        # graphs keep their memory, which no tensor holds between replays
        "peak_gib": (torch.cuda.max_memory_reserved if graphed else torch.cuda.max_memory_allocated)() / 2**30,
        "mfu": flops_per_token(cell) * tokens / seconds / peak_flops,
        "frozen": frozen,
        "warmup_s": warmup_s,
        "loss_scale": float(getattr(engine.optimizer, "cur_scale", 1.0)),
    }
    if profile is not None:
        profile.write_text(profile_of(engine, train_step))
    engine.destroy()
    return report


def profile_of(engine: DeepSpeedEngine, train_step: Callable[[], None]) -> str:
    """Where one step's time goes on the GPU, and where the host's goes in the engine's own step."""
    with torch.profiler.profile() as profiler:
        train_step()
        torch.cuda.synchronize()
    device = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
    device += idle_times(profiler)
    host, step = cProfile.Profile(), engine.step

    def watched() -> None:
        torch.cuda.synchronize()
        host.runcall(step)

    engine.step = watched
    train_step()
    del engine.step
    told = io.StringIO()
    pstats.Stats(host, stream=told).sort_stats("tottime").print_stats(25)
    return device + told.getvalue()


def idle_times(profiler: torch.profiler.profile, at_least_us: float = 30.0) -> str:
    """When the GPU had nothing to do, between which kernels, and where the host waited for it."""
    events = profiler.events() or []
    kernels = sorted(
        ((e.time_range.start, e.time_range.end, e.name) for e in events if e.device_type == DeviceType.CUDA),
        key=lambda kernel: kernel[0],
    )
    lines, total, busy_until, last = [], 0.0, kernels[0][0], ""
    for start, end, name in kernels:
        if start - busy_until > at_least_us:
            total += start - busy_until
            lines.append(f"{start - kernels[0][0]:9.0f} {start - busy_until:7.0f}  {last[:70]} -> {name[:70]}")
        if end > busy_until:
            busy_until, last = end, name
    waits = [
        f"{e.time_range.start - kernels[0][0]:9.0f} {e.time_range.elapsed_us():7.0f}  {e.name}"
        for e in events
        if e.device_type == DeviceType.CPU and "Synchronize" in e.name
    ]
    whole = kernels[-1][1] - kernels[0][0]
    head = f"\nGPU idle {total:.0f} of {whole:.0f} us, in pieces over {at_least_us:.0f} us (at, for, between):\n"
    return head + "\n".join(lines) + "\nhost waits (at, for, call):\n" + "\n".join(waits) + "\n\n"


OPTIMIZATION = OptimizationSettings(
    steps=1000, global_batch=1, learning_rate=1e-4, warmup_steps=0, gradient_clipping=1.0
)


def engine_config(cell: Cell) -> dict:
    """The filled JSON of a run."""
    config = json.loads((Path(__file__).parent.parent / f"ds_configs/zero{cell.zero}.json").read_text())
    half = {"fp16": config.pop("fp16")} if cell.dtype == "fp16" else {"bf16": {"enabled": True}}
    config.pop("fp16", None)
    config["zero_optimization"] |= ZERO
    return (
        config
        | half
        | {
            "train_batch_size": cell.micro_batch * cell.accumulation,
            "train_micro_batch_size_per_gpu": cell.micro_batch,
            "gradient_accumulation_steps": cell.accumulation,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
        }
    )


def flops_per_token(cell: Cell) -> float:
    """Of the models' matrix products that the objective needs: forward of the teacher, forward and twice that back.

    A layer has 12 E^2 weights (projections 4 E^2, feed-forward 8 E^2) and attention of 4 L E; of the last layer only
    the wanted projections run, unless its hidden states are wanted.
    """
    sizes = [tuple(map(int, model.split("x"))) for model in (cell.student, cell.teacher)]
    wanted = {"att_mse": 2, "att_kl": 2, "minilm": 3, "minilmv2": 3}.get(cell.objective)

    def forward(depth: int, width: int) -> float:
        layer = 24 * width**2 + 4 * cell.length * width
        return depth * layer if wanted is None else (depth - 1) * layer + 2 * wanted * width**2

    return 3 * forward(*sizes[0]) + forward(*sizes[1])


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square product of random numbers, the ceiling that utilisation is measured against."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    clock = Clock()
    for _ in range(5):
        torch.mm(a, b)
    for _ in range(21):
        clock.mark("product")
        torch.mm(a, b)
    clock.mark("end")
    return 2 * 8192**3 / (1e-3 * clock.medians_ms()["product"])


def row(report: dict) -> str:
    """One line of the table."""
    models = f"{report['teacher']} to {report['student']}"
    shape = f"{report['length']} x {report['micro_batch']}"
    name = f"| {report['variant']} | {report['objective']} | {models} | {shape} | {report['accumulation']} "
    if "error" in report:
        return f"{name}| {report['dtype']} | {report['error'].splitlines()[0][:80]} | | | |"
    parts = " ".join(f"{report['parts_ms'].get(part, 0):.1f}" for part in PARTS)
    return (
        f"{name}| {report['dtype']} | {report['tokens_per_s'] / 1e3:.0f} k | {report['mfu']:.0%} "
        f"| {report['peak_gib']:.2f} | {parts} |"
    )


def cell_of(text: str, arguments: argparse.Namespace) -> Cell:
    """A cell written as `variant objective teacher student length accumulation dtype`."""
    variant, objective, teacher, student, length, accumulation, dtype = text.split()
    rows = max(1, arguments.tokens // int(length))
    return Cell(variant, objective, teacher, student, int(length), rows, int(accumulation), dtype, arguments.zero)


def chosen_cells(arguments: argparse.Namespace) -> list[Cell]:
    """The cells given one by one, or the product of what the flags name."""
    if arguments.cells:
        return [cell_of(text, arguments) for text in arguments.cells]
    return [
        Cell(
            variant,
            objective,
            teacher,
            student,
            length,
            max(1, arguments.tokens // length),
            accumulation,
            dtype,
            arguments.zero,
        )
        for teacher, student, objective, length, accumulation, dtype, variant in itertools.product(
            arguments.teachers,
            arguments.students,
            arguments.objectives,
            arguments.lengths,
            arguments.accumulation,
            arguments.dtypes,
            arguments.variants,
        )
    ]


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for speed.json, speed.md and profiles")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["hf", "plain", "fused+compile"])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--teachers", nargs="+", default=["12x768", "24x1024"])
    parser.add_argument("--students", nargs="+", default=["6x768", "6x384"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048, 8192])
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--cells", nargs="+", help="instead: 'variant objective teacher student length accumulation type'"
    )
    parser.add_argument("--tokens", type=int, default=2**15, help="of a micro-batch")
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps that are timed")
    parser.add_argument("--sdpa", choices=("flash", "cudnn"), help="attention of the models; torch chooses otherwise")
    parser.add_argument("--zero_options", type=json.loads, default={}, help="JSON, beyond those in ds_configs")
    parser.add_argument("--profile", action="store_true", help="write a profile of one step of every cell")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    ZERO.update(arguments.zero_options)
    if arguments.sdpa:
        torch.backends.cuda.enable_flash_sdp(arguments.sdpa == "flash")
        torch.backends.cuda.enable_cudnn_sdp(arguments.sdpa == "cudnn")
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    place = find_place()
    start_processes(place)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    cells = chosen_cells(arguments)
    rates = {name: matmul_rate(DTYPES[name]) for name in sorted({cell.dtype for cell in cells})}
    machine = [torch.cuda.get_device_name(), f"torch {torch.__version__}", f"commit {commit.strip() or '-'}"]
    machine += [f"{name} product {rate / 1e12:.0f} TFLOP/s" for name, rate in rates.items()]
    columns = ["variant", "objective", "models", "length x rows", "accumulation", "type", "tokens/s", "MFU", "peak GiB"]
    head = [
        ", ".join([*machine, f"ZeRO {arguments.zero}"]),
        "",
        f"| {' | '.join(columns)} | ms: {' '.join(PARTS)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    print("\n".join(head), flush=True)
    reports, lines = [], head
    for number, cell in enumerate(cells):
        profile = arguments.out / f"profile{number}.txt" if arguments.profile else None
        try:
            reports.append(measure(cell, arguments.steps, place.device, rates[cell.dtype], profile))
        except Exception as error:  # what does not run is a result too
            told = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
            traceback.print_exc()
            reports.append(dataclasses.asdict(cell) | {"error": told})
        lines.append(row(reports[-1]))
        print(lines[-1], flush=True)
        (arguments.out / "speed.json").write_text(json.dumps({"rates": rates, "cells": reports}, indent=1))
        (arguments.out / "speed.md").write_text("\n".join(lines) + "\n")
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
