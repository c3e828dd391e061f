"""KL and squared differences of two models' pairwise scores without ever holding the scores: operators over `tiles`.

Scores are `scaling * left . right` for each head: queries and keys of attention, or one tensor with itself or another
for relations. The operators are registered with `torch.library`: `torch.compile` keeps them whole, gradients reach
the student only, and no value is looked at on the host.

Shapes: B rows, H heads, L length, D width per head (student and teacher may differ in D).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dsdistill.kernels import tiles

LOG2E = 1.4426950408889634
Measure = Literal["kl", "mse"]


class Factors(NamedTuple):
    """What is multiplied, each (B, H, L, D)."""

    left: Tensor
    right: Tensor
    teacher_left: Tensor
    teacher_right: Tensor


class Tile(NamedTuple):
    """How a program is cut: M queries by N keys, by so many warps, with loads so many steps ahead."""

    M: int
    N: int
    num_warps: int
    num_stages: int


def pairwise_sum(
    measure: Measure,
    left: Tensor,
    right: Tensor,
    teacher_left: Tensor,
    teacher_right: Tensor,
    *,
    student_scaling: float,
    teacher_scaling: float,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    segments: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Sum over rows, heads and queries of KL(teacher || student) in nats, or of squared differences of scores.

    Args:
        measure: `kl` of the softmaxes over keys, or `mse` of the scores themselves.
        left: Student's queries, (B, H, L, D), any strides; gradients flow.
        right: Student's keys, (B, H / group, L, D); gradients flow. Where left and right are one object on both sides
            (relations of a tensor with itself), its whole gradient takes one pass.
        teacher_left: The teacher's, (B, H, L, D').
        teacher_right: The teacher's, (B, H / group', L, D').
        student_scaling: Factor on the student's products.
        teacher_scaling: Factor on the teacher's.
        queries: bool (B, L), the positions that count; given with `keys` or not at all.
        keys: bool (B, L), the positions that have probability. What stands elsewhere is never used.
        segments: int (B, L), documents that attention does not cross.
        window: Largest |i - j| that attends.

    Returns:
        Scalar in float32.
    """
    own = right is left and teacher_right is teacher_left and queries is keys
    masks = [None if mask is None else mask.to(torch.uint8).contiguous() for mask in (queries, keys)]
    total, _ = _forward(
        measure,
        left,
        None if own else right,
        teacher_left.detach(),
        teacher_right.detach(),
        masks[0],
        masks[1],
        None if segments is None else segments.to(torch.int32).contiguous(),
        window,
        student_scaling,
        teacher_scaling,
    )
    return total


@torch.library.custom_op("dsdistill::pairwise_sum", mutates_args=())
def _forward(
    measure: str,
    left: Tensor,
    right: Tensor | None,
    teacher_left: Tensor,
    teacher_right: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    segments: Tensor | None,
    window: int | None,
    student_scaling: float,
    teacher_scaling: float,
) -> tuple[Tensor, Tensor]:
    """The sum, and for KL both models' log-sum-exps in base 2, (2, B, H, L)."""
    B, H, L, _ = left.shape
    factors = Factors(*map(_rows, (left, left if right is None else right, teacher_left, teacher_right)))
    tile = tile_for("forward", measure, factors)
    sums = left.new_empty(B * H * -(-L // tile.M), dtype=torch.float32)
    lse = left.new_empty((2, B, H, L) if measure == "kl" else (2, 0), dtype=torch.float32)
    unit = LOG2E if measure == "kl" else 1.0
    bounds = bounds_of(segments, tile.M, tile.N)
    with torch.cuda.device_of(left):
        tiles.forward[(sums.numel(),)](
            factors.left,
            factors.right,
            factors.teacher_left,
            factors.teacher_right,
            left if queries is None else queries,
            left if keys is None else keys,
            left if segments is None else segments,
            left if bounds is None else bounds,
            sums,
            lse[0],
            lse[1],
            tuple(factor.stride()[:3] for factor in factors),
            student_scaling * unit,
            teacher_scaling * unit,
            H,
            L,
            0 if window is None else window,
            BOUNDED=bounds is not None,  # type: ignore[arg-type] (Triton makes a constexpr of it)
            **_options(measure, factors, queries, segments, window, tile),
        )
    return sums.sum(), lse


@_forward.register_fake
def _(measure, left, right, teacher_left, teacher_right, queries, keys, segments, window, *scalings):
    B, H, L, _ = left.shape
    lse = left.new_empty((2, B, H, L) if measure == "kl" else (2, 0), dtype=torch.float32)
    return left.new_empty((), dtype=torch.float32), lse


@torch.library.custom_op("dsdistill::pairwise_gradients", mutates_args=())
def _backward(
    upstream: Tensor,
    measure: str,
    left: Tensor,
    right: Tensor | None,
    teacher_left: Tensor,
    teacher_right: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    segments: Tensor | None,
    window: int | None,
    student_scaling: float,
    teacher_scaling: float,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of left and right; of left alone, and nothing, where right is None."""
    B, H, L, _ = left.shape
    own = right is None
    factors = Factors(*map(_rows, (left, left if right is None else right, teacher_left, teacher_right)))
    if measure == "kl":
        units, factor = LOG2E, student_scaling * 2.0**-tiles.KL_SHIFT.value
    else:
        # of a tensor with itself both factors' gradients are equal
        units, factor = tiles.MSE_FACTOR.value, student_scaling * (4.0 if own else 2.0) / tiles.MSE_FACTOR.value
    inverse = torch.exp2(-lse) if own and measure == "kl" else lse
    gradients = [_gradient_like(left)] if own else [_gradient_like(left), _gradient_like(factors.right)]
    with torch.cuda.device_of(left):
        for program, gradient in zip((tiles.left_gradient, tiles.right_gradient), gradients, strict=False):
            of_left = program is tiles.left_gradient
            tile = tile_for("left" if of_left else "right", measure, factors)
            size, step = (tile.M, tile.N) if of_left else (tile.N, tile.M)
            bounds = bounds_of(segments, size, step)
            program[(B * gradient.shape[1] * -(-L // size),)](
                factors.left,
                factors.right,
                factors.teacher_left,
                factors.teacher_right,
                left if queries is None else queries,
                left if keys is None else keys,
                left if segments is None else segments,
                left if bounds is None else bounds,
                lse[0],
                lse[1],
                inverse[0],
                inverse[1],
                upstream,
                gradient,
                tuple(factor.stride()[:3] for factor in factors),
                gradient.stride()[:3],
                student_scaling * units,
                teacher_scaling * units,
                factor,
                H,
                L,
                0 if window is None else window,
                BOUNDED=bounds is not None,  # type: ignore[arg-type] (Triton makes a constexpr of it)
                BOTH=own and measure == "kl",  # type: ignore[arg-type]
                **_options(measure, factors, queries, segments, window, tile),
            )
    return gradients[0], left.new_empty(0) if own else gradients[1]


@_backward.register_fake
def _(upstream, measure, left, right, *rest):
    return _gradient_like(left), left.new_empty(0) if right is None else _gradient_like(right)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    measure, *tensors, window, student_scaling, teacher_scaling = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.settings = (window, student_scaling, teacher_scaling)
    ctx.measure = measure
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lse = ctx.saved_tensors
    to_left, to_right = _backward(upstream, ctx.measure, *tensors, *ctx.settings, lse)
    return None, to_left, None if tensors[1] is None else to_right, *(None,) * 8


_forward.register_autograd(_differentiate, setup_context=_keep)


def _gradient_like(factor: Tensor) -> Tensor:
    """Empty (B, H, L, D) that is (B, L, H, D) in memory, as the projections before it want their gradient."""
    B, H, L, D = factor.shape
    return factor.new_empty(B, L, H, D).transpose(1, 2)


def _rows(factor: Tensor) -> Tensor:
    """A factor whose widths lie side by side in memory."""
    return factor if factor.stride(-1) == 1 else factor.contiguous()


def _options(
    measure: str,
    factors: Factors,
    queries: Tensor | None,
    segments: Tensor | None,
    window: int | None,
    tile: Tile,
) -> dict[str, Any]:
    """Compile-time arguments of a program."""
    left, right, teacher_left, teacher_right = factors
    _, H, L, width = left.shape
    masked = queries is not None
    return {
        "KL": measure == "kl",
        "GROUP_S": H // right.shape[1],
        "GROUP_T": H // teacher_right.shape[1],
        "WIDTH_S": width,
        "WIDTH_T": teacher_left.shape[3],
        "BLOCK_S": block_of(width),
        "BLOCK_T": block_of(teacher_left.shape[3]),
        "MASKED": masked,
        "EVEN": not masked and L % tile.M == 0 and L % tile.N == 0,
        "SEGMENTS": segments is not None,
        "WINDOW": window is not None,
        "PRECISION_S": "tf32x3" if left.dtype == torch.float32 else "tf32",
        "PRECISION_T": "tf32x3" if teacher_left.dtype == torch.float32 else "tf32",
        **tile._asdict(),
    }


BOUNDED_FROM = 1024
"""Rows of fewer tokens are compared whole: bounds take a dozen small kernels, which cost more than they save there."""


def bounds_of(segments: Tensor | None, size: int, step: int) -> Tensor | None:
    """Where the tiles that share a document with a block of rows begin and end, whatever the numbers of documents are.

    A tile is left out if all its numbers are larger, or all smaller, than all of the block.

    Args:
        segments: int32 (B, L), or None.
        size: Rows of a block.
        step: Rows of a tile; bounds are its multiples.

    Returns:
        int32 (B, L / size rounded up, 2); None where everything is visited.
    """
    if segments is None or segments.shape[1] < BOUNDED_FROM:
        return None
    lowest, highest = _extremes(segments, size)
    tile_lowest, tile_highest = _extremes(segments, step)
    shared = (lowest[:, :, None] <= tile_highest[:, None]) & (highest[:, :, None] >= tile_lowest[:, None])
    first = shared.int().argmax(2)
    last = shared.shape[2] - shared.flip(2).int().argmax(2)
    return (torch.stack((first, last), dim=2) * step).to(torch.int32)


def _extremes(segments: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest document number of each block of rows, (B, L / size rounded up)."""
    B, L = segments.shape
    blocks = -(-L // size)
    padded = torch.cat([segments, segments[:, -1:].expand(B, blocks * size - L)], dim=1).view(B, blocks, size)
    return padded.amin(2), padded.amax(2)


def block_of(size: int) -> int:
    """The power of two, at least 16, that holds so many."""
    return max(16, 1 << (size - 1).bit_length())


Program = Literal["forward", "left", "right"]


def tile_for(program: Program, measure: str, factors: Factors) -> Tile:
    """The tile that was fastest where it was measured (`benchmarks/speed_notes.md`), smaller for short rows."""
    left, _, teacher_left, _ = factors
    if left.dtype == torch.float32 or teacher_left.dtype == torch.float32:
        return Tile(32, 32, 4, 2)
    tile = TILES[program, measure, max(block_of(left.shape[3]), block_of(teacher_left.shape[3]))]
    longest = block_of(left.shape[2])
    return tile._replace(M=min(tile.M, longest), N=min(tile.N, longest))


TILES: dict[tuple[str, str, int], Tile] = {
    ("forward", "kl", 16): Tile(64, 128, 4, 3),
    ("forward", "kl", 32): Tile(64, 64, 4, 3),
    ("forward", "kl", 64): Tile(64, 64, 4, 3),
    ("forward", "kl", 128): Tile(64, 64, 4, 2),
    ("left", "kl", 16): Tile(64, 64, 4, 3),
    ("left", "kl", 32): Tile(64, 64, 4, 3),
    ("left", "kl", 64): Tile(64, 64, 4, 3),
    ("left", "kl", 128): Tile(64, 64, 4, 2),
    ("right", "kl", 16): Tile(64, 128, 4, 3),
    ("right", "kl", 32): Tile(64, 128, 4, 3),
    ("right", "kl", 64): Tile(64, 64, 4, 3),
    ("right", "kl", 128): Tile(64, 64, 8, 2),
    **{("forward", "mse", block): Tile(128, 64, 8, 3) for block in (16, 32, 64)},
    **{("left", "mse", block): Tile(128, 64, 8, 3) for block in (16, 32, 64)},
    **{("right", "mse", block): Tile(64, 128, 8, 3) for block in (16, 32, 64)},
    **{(program, "mse", 128): Tile(64, 64, 8, 2) for program in ("forward", "left", "right")},
}
"""By program, measure and the wider of both models' padded heads."""
