"""Speed of the fused comparisons alone: `python benchmarks/kernels.py --out runs/kernels`, `--sweep` to choose tiles.

FLOPs are those of the matrix products that cannot be avoided: scores of both models forward and again backward, and one
product for each of the student's two gradients (for a tensor with itself, one). Flash attention's backward counts five.
Times are medians; the plain objective is compiled and holds all scores at once.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from dsdistill.kernels import pairwise
from dsdistill.kernels.pairwise import Tile
from dsdistill.objectives import attention_kl, attention_mse, chunks, relation_kl

TOKENS = 2**15


class Case(NamedTuple):
    """A comparison of B rows of L tokens; `own` relates a tensor to itself."""

    measure: str
    heads: int
    width: int
    length: int
    own: bool = False

    def tensors(self) -> list[Tensor]:
        """Student's and teacher's factors, (B, L, H, D) seen as (B, H, L, D)."""
        B = max(1, TOKENS // self.length)
        sides = [(i < 2, i % 2) for i in range(4)]
        return [
            torch.randn(B, self.length, self.heads, self.width, device="cuda", dtype=torch.float16)
            .transpose(1, 2)
            .requires_grad_(student)
            for student, second in sides
            if not (second and self.own)
        ]

    def loss(self, kernel: str) -> Callable[..., Tensor]:
        """The objective as a function of the factors."""
        mask = torch.ones(max(1, TOKENS // self.length), self.length, dtype=torch.bool, device="cuda")
        if self.own:
            return functools.partial(
                lambda student, teacher, mask, **options: relation_kl(student, teacher, mask, **options),
                mask=mask,
                relation_heads=self.heads,
                padded=False,
                kernel=kernel,
            )
        function = attention_kl if self.measure == "kl" else attention_mse
        scale = self.width**-0.5
        return functools.partial(
            function, mask=mask, student_scaling=scale, teacher_scaling=scale, padded=False, kernel=kernel
        )

    def flops(self) -> float:
        """Of the unavoidable products, forward and backward."""
        product = 2 * max(1, TOKENS // self.length) * self.heads * self.length**2 * self.width
        return product * (5 if self.own else 6)


CASES = [
    *(Case(measure, 12, 64, length) for measure in ("kl", "mse") for length in (128, 512, 2048, 8192)),
    *(Case("kl", 12, 32, length) for length in (128, 512)),
    *(Case("kl", heads, 768 // heads, length, True) for heads in (12, 48) for length in (128, 512, 2048)),
    Case("kl", 48, 8, 512, True),
]


def times_ms(loss: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[float, float]:
    """Median times of the forward, and of forward and backward."""
    learned = [x for x in tensors if x.requires_grad]
    bench = functools.partial(do_bench, warmup=10, rep=40, return_mode="median")

    def both() -> None:
        torch.autograd.grad(loss(*tensors), learned)

    return bench(lambda: loss(*tensors)), bench(both)


def flash_backward_rate(length: int, width: int) -> float:
    """FLOP/s of flash attention's backward."""
    B = TOKENS // length
    q, k, v = (
        torch.randn(B, length, 12, width, device="cuda", dtype=torch.float16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v)
        upstream = torch.randn_like(out)
        time_ms = do_bench(
            lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True),
            warmup=10,
            rep=40,
            return_mode="median",
        )
    return 10 * B * 12 * length**2 * width / (1e-3 * time_ms)


def report(out: Path, cases: list[Case], plain: bool) -> None:
    """A row for each case."""
    chunks.GPU_ELEMENTS = 2**40
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, fp16, {TOKENS} tokens, no padding",
        "",
        "| measure | heads x width | length | forward ms | forward + backward ms | TFLOP/s | of flash backward "
        "| compiled plain ms | faster |",
        "|---" * 9 + "|",
    ]
    flash: dict[tuple[int, int], float] = {}
    for case in cases:
        torch.manual_seed(0)
        tensors = case.tensors()
        forward, both = times_ms(case.loss("fused"), tensors)
        rate = case.flops() / (1e-3 * both)
        key = (case.length, max(32, case.width))
        flash.setdefault(key, flash_backward_rate(*key))
        slow = None
        if plain and case.length <= 2048:
            try:
                torch._dynamo.reset()
                slow = times_ms(torch.compile(case.loss("plain"), dynamic=False), tensors)[1]
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        shown = ("-", "-") if slow is None else (f"{slow:.3f}", f"{slow / both:.1f} x")
        lines.append(
            f"| {case.measure}{' own' if case.own else ''} | {case.heads} x {case.width} | {case.length} "
            f"| {forward:.3f} | {both:.3f} | {rate / 1e12:.0f} | {rate / flash[key]:.0%} | {' | '.join(shown)} |"
        )
        print(lines[-1], flush=True)
        (out / "kernels.md").write_text("\n".join(lines) + "\n")
        torch.cuda.empty_cache()
    rates = ", ".join(f"{length} x {width}: {rate / 1e12:.0f}" for (length, width), rate in flash.items())
    lines += ["", f"Flash attention's backward, TFLOP/s by length x width: {rates}"]
    print(lines[-1], flush=True)
    (out / "kernels.md").write_text("\n".join(lines) + "\n")


TILES = [
    Tile(M, N, warps, stages)
    for (M, N, warps), stages in itertools.product(
        [(64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (64, 128, 8), (128, 128, 8)],
        (2, 3),
    )
]
SWEPT = [
    Case("kl", 12, 64, 512),
    Case("kl", 12, 64, 128),
    Case("mse", 12, 64, 512),
    Case("mse", 12, 64, 128),
    Case("kl", 12, 32, 512),
    Case("kl", 12, 64, 512, True),
    Case("kl", 24, 32, 512, True),
    Case("kl", 48, 16, 512, True),
    Case("kl", 48, 16, 128, True),
]
KERNELS = ("forward", "left", "right")


def runs(case: Case, tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The programs of a case with the tiles that `pairwise` holds now; left and right gradients run together."""
    left, *right = tensors[: len(tensors) // 2]
    teacher_left, *teacher_right = tensors[len(tensors) // 2 :]
    scale = case.width**-0.5
    other = right[0] if right else None
    arguments = (case.measure, left, other, teacher_left, teacher_right[0] if right else teacher_left)
    options = (None, None, None, None, scale, scale)
    with torch.no_grad():
        _, lse = pairwise._forward(*arguments, *options)
    upstream = torch.ones((), device="cuda")

    def gradients() -> None:
        pairwise._backward(upstream, *arguments, *options, lse)

    with_both = {"forward": lambda: pairwise._forward(*arguments, *options), "left": gradients}
    return with_both if case.own else {**with_both, "right": gradients}


def compile_some(share: list[tuple[Case, str, Tile]]) -> None:
    """Fill the compiler's cache, in one of many processes."""
    for case, kernel, tile in share:
        with torch.no_grad():
            tensors = [x[:1] for x in case.tensors()]
            key = (kernel, case.measure, pairwise.block_of(case.width))
            pairwise.TILES[key] = tile
            try:
                runs(case, tensors)[kernel]()
            except Exception as error:  # a tile that does not fit is a result
                print(case, kernel, tile, type(error).__name__, flush=True)


def sweep(out: Path) -> None:
    """Every tile for every program; the best five of each."""
    jobs = [
        (case, kernel, tile)
        for case in SWEPT
        for kernel in (KERNELS[:2] if case.own else KERNELS)
        for tile in TILES
        if max(tile.M, tile.N) <= case.length
    ]
    compiled = [job for job in jobs if job[0].length == 512]
    workers = min(14, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_some, [compiled[i::workers] for i in range(workers)], chunksize=1)
    results: dict[str, list[tuple[float, Tile]]] = {}
    usual = Tile(64, 64, 4, 2)
    for case, kernel, tile in jobs:
        block = pairwise.block_of(case.width)
        for name in KERNELS:
            pairwise.TILES[name, case.measure, block] = usual
        with torch.no_grad():
            try:
                run = runs(case, case.tensors())
                pairwise.TILES[kernel, case.measure, block] = tile
                time = do_bench(run[kernel], warmup=3, rep=12, return_mode="median")
            except Exception as error:
                print(case, kernel, tile, type(error).__name__, flush=True)
                continue
        results.setdefault(f"{case} {kernel}", []).append((time, tile))
    lines = []
    for name, times in results.items():
        lines.append(name)
        lines += [f"    {time:.4f} ms {tuple(tile)}" for time, tile in sorted(times)[:6]]
    print("\n".join(lines), flush=True)
    (out / "sweep.txt").write_text("\n".join(lines) + "\n")
    (out / "sweep.json").write_text(json.dumps({name: sorted(times) for name, times in results.items()}))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true", help="time every tile instead")
    parser.add_argument("--no_plain", action="store_true", help="leave the compiled plain objective out")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.sweep:
        sweep(arguments.out)
    else:
        report(arguments.out, CASES, not arguments.no_plain)


if __name__ == "__main__":
    main()
