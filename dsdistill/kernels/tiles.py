"""Triton programs that compare two models' pairwise scores tile by tile; no scores ever reach device memory.

A score is `scaling * left_i . right_j` of one head; left and right are queries and keys, or twice the same tensor.
`forward` sums KL or squared differences over rows of scores, `left_gradient` and `right_gradient` rebuild the scores
and sum over keys or over queries. Every output is written by one program in one order: results are deterministic.

Shapes: B rows, H heads, L length, D width per head; tiles are M queries by N keys. S is the student, T the teacher.
Scores live in base 2 (log2 e is part of the scale), so that a probability is one `exp2`.
"""

import triton
import triton.language as tl

FILL = tl.constexpr(-1e30)
"""Stands in for minus infinity: finite, so that no difference of two of them is NaN."""
LN2 = tl.constexpr(0.6931471805599453)
KL_SHIFT = tl.constexpr(14.0)
"""Differences of probabilities times 2^14: far from fp16's smallest numbers, and two of them below its largest."""
MSE_FACTOR = tl.constexpr(0.125)
"""Differences of scores times 1/8: fp16 holds them from 5e-4 at full precision up to 5e5."""
HALF_MAX = tl.constexpr(65504.0)
NEAR = tl.constexpr(50.0)
"""Log-sum-exps (base 2) below which one exponential serves a pair both ways: 2^lse and 2^-lse fit well in float32."""


@triton.jit
def load_rows(base, rows, real, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Rows of one head, (rows, BLOCK); zeros in rows that are not real and beyond the width."""
    columns = tl.arange(0, BLOCK)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if EVEN and WIDTH == BLOCK:
        return tl.load(pointers)
    if WIDTH == BLOCK:
        return tl.load(pointers, mask=real[:, None], other=0.0)
    return tl.load(pointers, mask=real[:, None] & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def real_rows(mask, rows, L, MASKED: tl.constexpr):
    """Which rows exist and, with a mask, are no padding."""
    real = rows < L
    if MASKED:
        real = tl.load(mask + rows, mask=real, other=0) != 0
    return real


@triton.jit
def load_segments(segments, rows, L, SEGMENTS: tl.constexpr):
    """Document numbers of rows, or anything where there are none."""
    if SEGMENTS:
        return tl.load(segments + rows, mask=rows < L, other=-1)
    return rows


@triton.jit
def may_attend(queries, keys, query_segments, key_segments, window, SEGMENTS: tl.constexpr, WINDOW: tl.constexpr):
    """Which pairs of a tile may attend; arguments are broadcastable."""
    if SEGMENTS and WINDOW:
        distance = queries - keys
        return (query_segments == key_segments) & (distance <= window) & (distance >= -window)
    if SEGMENTS:
        return query_segments == key_segments
    distance = queries - keys
    return (distance <= window) & (distance >= -window)


@triton.jit
def reach(bounds, block, first, last):
    """The part of a loop over tiles in which a block of rows or columns can see anything; others change nothing."""
    return tl.maximum(first, tl.load(bounds + 2 * block)), tl.minimum(last, tl.load(bounds + 2 * block + 1))


@triton.jit
def forward(
    left_s,
    right_s,
    left_t,
    right_t,
    queries,
    keys,
    segments,
    bounds,
    sums,
    lse_s,
    lse_t,
    strides,
    scale_s,
    scale_t,
    H,
    L,
    window,
    KL: tl.constexpr,
    GROUP_S: tl.constexpr,
    GROUP_T: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BOUNDED: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Sum over M queries of one head: of KL rows (in nats), or of squared differences of scores.

    KL of row i is sum_j p_ij (t_ij - s_ij) + lse_s_i - lse_t_i, with running maxima and sums of both softmaxes; the two
    log-sum-exps (base 2) are what the gradients need.
    """
    ls, rs, lt, rt = strides
    blocks = tl.cdiv(L, M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * M
    b, h = head // H, head % H
    rows = start + tl.arange(0, M)
    real = real_rows(queries + b * L, rows, L, MASKED)
    left_s = load_rows(left_s + b * ls[0] + h * ls[1], rows, real, ls[2], WIDTH_S, BLOCK_S, EVEN)
    left_t = load_rows(left_t + b * lt[0] + h * lt[1], rows, real, lt[2], WIDTH_T, BLOCK_T, EVEN)
    right_s += b * rs[0] + (h // GROUP_S) * rs[1]
    right_t += b * rt[0] + (h // GROUP_T) * rt[1]
    row_segments = load_segments(segments + b * L, rows, L, SEGMENTS)
    top_s = tl.full((M,), FILL, tl.float32)
    top_t = tl.full((M,), FILL, tl.float32)
    sum_s = tl.zeros((M,), tl.float32)
    sum_t = tl.zeros((M,), tl.float32)
    cross = tl.zeros((M,), tl.float32)
    first, last = 0, L
    if WINDOW:
        first = tl.maximum(0, start - window) // N * N
        last = tl.minimum(L, start + M + window)
    if BOUNDED:
        first, last = reach(bounds, b * blocks + start // M, first, last)
    for j in tl.range(first, last, N):
        columns = j + tl.arange(0, N)
        seen = real_rows(keys + b * L, columns, L, MASKED)
        tile_s = load_rows(right_s, columns, seen, rs[2], WIDTH_S, BLOCK_S, EVEN)
        tile_t = load_rows(right_t, columns, seen, rt[2], WIDTH_T, BLOCK_T, EVEN)
        s = tl.dot(left_s, tl.trans(tile_s), input_precision=PRECISION_S) * scale_s
        t = tl.dot(left_t, tl.trans(tile_t), input_precision=PRECISION_T) * scale_t
        if KL and not EVEN:
            hidden = tl.where(seen, 0.0, FILL)
            s += hidden[None, :]
            t += hidden[None, :]
        if SEGMENTS or WINDOW:
            others = load_segments(segments + b * L, columns, L, SEGMENTS)
            allowed = may_attend(
                rows[:, None], columns[None, :], row_segments[:, None], others[None, :], window, SEGMENTS, WINDOW
            )
            s = tl.where(allowed, s, FILL if KL else 0.0)
            t = tl.where(allowed, t, FILL if KL else 0.0)
        if KL:
            new_s = tl.maximum(top_s, tl.max(s, 1))
            new_t = tl.maximum(top_t, tl.max(t, 1))
            shrink_t = tl.exp2(top_t - new_t)
            weight = tl.exp2(t - new_t[:, None])
            sum_s = sum_s * tl.exp2(top_s - new_s) + tl.sum(tl.exp2(s - new_s[:, None]), 1)
            sum_t = sum_t * shrink_t + tl.sum(weight, 1)
            cross = cross * shrink_t + tl.sum(weight * (t - s), 1)
            top_s, top_t = new_s, new_t
        else:
            cross += tl.sum((s - t) * (s - t), 1)
    if KL:
        top_s += tl.log2(sum_s)
        top_t += tl.log2(sum_t)
        inside = rows < L
        tl.store(lse_s + head * L + rows, top_s, mask=inside)
        tl.store(lse_t + head * L + rows, top_t, mask=inside)
        divergence = (cross / sum_t + (top_s - top_t)) * LN2
        tl.store(sums + tl.program_id(0), tl.sum(tl.where(real, divergence, 0.0), 0))
    else:
        tl.store(sums + tl.program_id(0), tl.sum(cross, 0))


@triton.jit
def sum_over_keys(
    left_s,
    left_t,
    right_s,
    right_t,
    keys,
    segments,
    rows,
    row_segments,
    row_s,
    row_t,
    lse_s,
    lse_t,
    inverse_s,
    inverse_t,
    strides,
    scale_s,
    scale_t,
    L,
    window,
    first,
    last,
    KL: tl.constexpr,
    BOTH: tl.constexpr,
    NEAR_LSE: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sum of `left_gradient` over the keys that M queries may see, unscaled; pointers are those of one head."""
    _, rs, _, rt = strides
    if NEAR_LSE:
        power_s = tl.exp2(row_s + KL_SHIFT)
        power_t = tl.exp2(row_t + KL_SHIFT)
    total = tl.zeros((M, BLOCK_S), tl.float32)
    for j in tl.range(first, last, N, num_stages=STAGES):
        columns = j + tl.arange(0, N)
        seen = real_rows(keys, columns, L, MASKED)
        tile_s = load_rows(right_s, columns, seen, rs[2], WIDTH_S, BLOCK_S, EVEN)
        tile_t = load_rows(right_t, columns, seen, rt[2], WIDTH_T, BLOCK_T, EVEN)
        s = tl.dot(left_s, tl.trans(tile_s), input_precision=PRECISION_S) * scale_s
        t = tl.dot(left_t, tl.trans(tile_t), input_precision=PRECISION_T) * scale_t
        if KL and not EVEN:
            hidden = tl.where(seen, 0.0, FILL)
            s += hidden[None, :]
            t += hidden[None, :]
        if SEGMENTS or WINDOW:
            others = load_segments(segments, columns, L, SEGMENTS)
            allowed = may_attend(
                rows[:, None], columns[None, :], row_segments[:, None], others[None, :], window, SEGMENTS, WINDOW
            )
            s = tl.where(allowed, s, FILL if KL else 0.0)
            t = tl.where(allowed, t, FILL if KL else 0.0)
        if KL:
            own_s = tl.exp2(s - row_s[:, None])
            own_t = tl.exp2(t - row_t[:, None])
            if BOTH:
                exists = columns < L
                if NEAR_LSE:
                    own_s *= 1.0 + power_s[:, None] * tl.load(inverse_s + columns, mask=exists, other=0.0)[None, :]
                    own_t *= 1.0 + power_t[:, None] * tl.load(inverse_t + columns, mask=exists, other=0.0)[None, :]
                else:
                    column_s = tl.load(lse_s + columns, mask=exists, other=0.0) - KL_SHIFT
                    column_t = tl.load(lse_t + columns, mask=exists, other=0.0) - KL_SHIFT
                    own_s += tl.exp2(s - column_s[None, :])
                    own_t += tl.exp2(t - column_t[None, :])
            change = own_s - own_t
        else:
            change = tl.clamp(s - t, -HALF_MAX, HALF_MAX)
        total = tl.dot(change.to(tile_s.dtype), tile_s, total, input_precision=PRECISION_S)
    return total


@triton.jit
def left_gradient(
    left_s,
    right_s,
    left_t,
    right_t,
    queries,
    keys,
    segments,
    bounds,
    lse_s,
    lse_t,
    inverse_s,
    inverse_t,
    upstream,
    gradient,
    strides,
    gradient_strides,
    scale_s,
    scale_t,
    factor,
    H,
    L,
    window,
    KL: tl.constexpr,
    BOTH: tl.constexpr,
    GROUP_S: tl.constexpr,
    GROUP_T: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BOUNDED: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradient of M rows of `left_s` for one head: sum_j dS_ij right_j, dS = (softmax(s) - softmax(t)) or 2 (s - t).

    With BOTH, left and right are one tensor: scores are symmetric, and sum_j (dS_ij + dS_ji) x_j is its whole gradient.
    There softmax_ji is softmax_ij 2^lse_i 2^-lse_j, and the last factor is what the `inverse`s hold: exponentials, not
    products, bound narrow heads. Where a log-sum-exp is too large for that both are computed.
    """
    ls, rs, lt, rt = strides
    blocks = tl.cdiv(L, M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * M
    b, h = head // H, head % H
    rows = start + tl.arange(0, M)
    inside = rows < L
    real = real_rows(queries + b * L, rows, L, MASKED)
    left_s = load_rows(left_s + b * ls[0] + h * ls[1], rows, real, ls[2], WIDTH_S, BLOCK_S, EVEN)
    left_t = load_rows(left_t + b * lt[0] + h * lt[1], rows, real, lt[2], WIDTH_T, BLOCK_T, EVEN)
    right_s += b * rs[0] + (h // GROUP_S) * rs[1]
    right_t += b * rt[0] + (h // GROUP_T) * rt[1]
    row_segments = load_segments(segments + b * L, rows, L, SEGMENTS)
    lse_s += head * L
    lse_t += head * L
    row_s = tl.zeros((M,), tl.float32)
    row_t = tl.zeros((M,), tl.float32)
    if KL:
        row_s = tl.load(lse_s + rows, mask=inside, other=0.0) - KL_SHIFT
        row_t = tl.load(lse_t + rows, mask=inside, other=0.0) - KL_SHIFT
    near = False
    if BOTH:
        inverse_s += head * L
        inverse_t += head * L
        largest = tl.zeros((N,), tl.float32)
        for j in tl.range(0, L, N):
            columns = j + tl.arange(0, N)
            largest = tl.maximum(largest, tl.abs(tl.load(lse_s + columns, mask=columns < L, other=0.0)))
            largest = tl.maximum(largest, tl.abs(tl.load(lse_t + columns, mask=columns < L, other=0.0)))
        near = tl.max(largest, 0) < NEAR
    first, last = 0, L
    if WINDOW:
        first = tl.maximum(0, start - window) // N * N
        last = tl.minimum(L, start + M + window)
    if BOUNDED:
        first, last = reach(bounds, b * blocks + start // M, first, last)
    if not BOTH:
        total = sum_over_keys(
            left_s, left_t, right_s, right_t, keys + b * L, segments + b * L, rows, row_segments, row_s, row_t,
            lse_s, lse_t, inverse_s, inverse_t, strides, scale_s, scale_t, L, window, first, last,
            KL, BOTH, False, WIDTH_S, WIDTH_T, BLOCK_S, BLOCK_T, MASKED, EVEN, SEGMENTS, WINDOW,
            PRECISION_S, PRECISION_T, M, N, None,
        )  # fmt: skip
    elif near:
        total = sum_over_keys(
            left_s, left_t, right_s, right_t, keys + b * L, segments + b * L, rows, row_segments, row_s, row_t,
            lse_s, lse_t, inverse_s, inverse_t, strides, scale_s, scale_t, L, window, first, last,
            KL, BOTH, True, WIDTH_S, WIDTH_T, BLOCK_S, BLOCK_T, MASKED, EVEN, SEGMENTS, WINDOW,
            PRECISION_S, PRECISION_T, M, N, None,
        )  # fmt: skip
    else:  # rare: no shared memory is set aside for it
        total = sum_over_keys(
            left_s, left_t, right_s, right_t, keys + b * L, segments + b * L, rows, row_segments, row_s, row_t,
            lse_s, lse_t, inverse_s, inverse_t, strides, scale_s, scale_t, L, window, first, last,
            KL, BOTH, False, WIDTH_S, WIDTH_T, BLOCK_S, BLOCK_T, MASKED, EVEN, SEGMENTS, WINDOW,
            PRECISION_S, PRECISION_T, M, N, 1,
        )  # fmt: skip
    total *= tl.load(upstream) * factor
    total = tl.where(real[:, None], total, 0.0)
    columns = tl.arange(0, BLOCK_S)
    pointers = (
        gradient
        + b * gradient_strides[0]
        + h * gradient_strides[1]
        + rows[:, None] * gradient_strides[2]
        + columns[None, :]
    )
    tl.store(pointers, total.to(gradient.dtype.element_ty), mask=inside[:, None] & (columns[None, :] < WIDTH_S))


@triton.jit
def right_gradient(
    left_s,
    right_s,
    left_t,
    right_t,
    queries,
    keys,
    segments,
    bounds,
    lse_s,
    lse_t,
    inverse_s,
    inverse_t,
    upstream,
    gradient,
    strides,
    gradient_strides,
    scale_s,
    scale_t,
    factor,
    H,
    L,
    window,
    KL: tl.constexpr,
    BOTH: tl.constexpr,
    GROUP_S: tl.constexpr,
    GROUP_T: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BOUNDED: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradient of N rows of `right_s` for one of its heads: sum_i dS_ij left_i, over the queries of its group."""
    ls, rs, lt, rt = strides
    blocks = tl.cdiv(L, N)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * N
    b, h = head // (H // GROUP_S), head % (H // GROUP_S)
    columns = start + tl.arange(0, N)
    inside = columns < L
    seen = real_rows(keys + b * L, columns, L, MASKED)
    right_s = load_rows(right_s + b * rs[0] + h * rs[1], columns, seen, rs[2], WIDTH_S, BLOCK_S, EVEN)
    column_segments = load_segments(segments + b * L, columns, L, SEGMENTS)
    hidden = tl.where(seen, 0.0, FILL)
    total = tl.zeros((N, BLOCK_S), tl.float32)
    first, last = 0, L
    if WINDOW:
        first = tl.maximum(0, start - window) // M * M
        last = tl.minimum(L, start + N + window)
    if BOUNDED:
        first, last = reach(bounds, b * blocks + start // N, first, last)
    for member in tl.range(GROUP_S):
        q = h * GROUP_S + member
        of_head = (b * H + q) * L
        head_s = left_s + b * ls[0] + q * ls[1]
        head_t = left_t + b * lt[0] + q * lt[1]
        tile_t = load_rows(right_t + b * rt[0] + (q // GROUP_T) * rt[1], columns, seen, rt[2], WIDTH_T, BLOCK_T, EVEN)
        for i in tl.range(first, last, M):
            rows = i + tl.arange(0, M)
            real = real_rows(queries + b * L, rows, L, MASKED)
            query_s = load_rows(head_s, rows, real, ls[2], WIDTH_S, BLOCK_S, EVEN)
            query_t = load_rows(head_t, rows, real, lt[2], WIDTH_T, BLOCK_T, EVEN)
            s = tl.dot(right_s, tl.trans(query_s), input_precision=PRECISION_S) * scale_s
            t = tl.dot(tile_t, tl.trans(query_t), input_precision=PRECISION_T) * scale_t
            if KL and not EVEN:
                s += hidden[:, None]
                t += hidden[:, None]
            if SEGMENTS or WINDOW:
                others = load_segments(segments + b * L, rows, L, SEGMENTS)
                allowed = may_attend(
                    rows[None, :], columns[:, None], others[None, :], column_segments[:, None], window, SEGMENTS, WINDOW
                )
                s = tl.where(allowed, s, FILL if KL else 0.0)
                t = tl.where(allowed, t, FILL if KL else 0.0)
            if KL:
                row_s = tl.load(lse_s + of_head + rows, mask=rows < L, other=0.0) - KL_SHIFT
                row_t = tl.load(lse_t + of_head + rows, mask=rows < L, other=0.0) - KL_SHIFT
                change = tl.exp2(s - row_s[None, :]) - tl.exp2(t - row_t[None, :])
            else:
                change = tl.clamp(s - t, -HALF_MAX, HALF_MAX)
            total = tl.dot(change.to(query_s.dtype), query_s, total, input_precision=PRECISION_S)
    total *= tl.load(upstream) * factor
    total = tl.where(seen[:, None], total, 0.0)
    widths = tl.arange(0, BLOCK_S)
    pointers = (
        gradient
        + b * gradient_strides[0]
        + h * gradient_strides[1]
        + columns[:, None] * gradient_strides[2]
        + widths[None, :]
    )
    tl.store(pointers, total.to(gradient.dtype.element_ty), mask=inside[:, None] & (widths[None, :] < WIDTH_S))
