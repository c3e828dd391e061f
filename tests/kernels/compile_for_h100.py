"""Compiles the fused kernels to machine code of an H100 on a machine without a GPU; what `test_compilation.py` starts.

Triton's compiler needs no GPU, only its launcher does: a driver that knows nothing but the target takes its place.
"""

import contextlib
import itertools
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from dsdistill.kernels import pairwise, tiles

SHARED_MEMORY = 227 * 1024
"""Bytes that a block may have on an H100."""


class CompilingOnly:
    """Stands for a program of `tiles`; a launch compiles it and notes what it asks of the GPU."""

    def __init__(self, program: Any):
        self.program = program

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.compile(grid, args, options)

    def compile(self, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
        kernel = self.program.warmup(*args, grid=grid, **options)
        assert kernel.asm["cubin"], self.program.__name__
        assert kernel.metadata.shared <= SHARED_MEMORY, (self.program.__name__, options, kernel.metadata.shared)
        print(json.dumps([self.program.__name__, options["KL"], options["SEGMENTS"], options["WINDOW"]]))


def main(measures: list[str], lengths: list[int], widths: list[int], masks: list[list[bool]]) -> None:
    """Compile forward and both gradients; `masks` says whether with documents, and whether with padding and windows."""
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _=0: 0,
    )
    driver.set_active(target)
    CompiledKernel._init_handles = lambda self: None  # would load it
    torch.cuda.device_of = lambda _: contextlib.nullcontext()
    programs = {name: CompilingOnly(getattr(tiles, name)) for name in ("forward", "left_gradient", "right_gradient")}
    pairwise.tiles = SimpleNamespace(**{**vars(tiles), **programs})
    for measure, length, width, (documents, masked) in itertools.product(measures, lengths, widths, masks):
        factors = [torch.zeros(1, 2, length, width, dtype=torch.float16) for _ in range(4)]
        mask = torch.ones(1, length, dtype=torch.bool) if masked else None
        segments = torch.zeros(1, length, dtype=torch.int32) if documents else None
        common = (*factors, mask, mask, segments, 64 if masked else None, 0.1, 0.1)
        _, lse = pairwise._forward._init_fn(measure, *common)
        pairwise._backward(torch.ones(()), measure, *common, lse)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
