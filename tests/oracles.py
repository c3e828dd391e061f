"""Independent oracles: the equations of the papers as plain float64 Python loops.

Written from the equations, not from the package: no batching, no masks as tensors, no tricks for stability. Every
function takes nested lists (`tensor.tolist()`), and `mask[b][i]` is True for real positions.
"""

from __future__ import annotations

import math


def softmax(row):
    top = max(row)
    exps = [math.exp(x - top) for x in row]
    return [e / math.fsum(exps) for e in exps]


def kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def real(mask_row):
    return [i for i, m in enumerate(mask_row) if m]


def visible(b, i, mask, segments=None, window=None):
    """Keys that query i of row b may attend to."""
    return [
        j
        for j in real(mask[b])
        if (segments is None or segments[b][i] == segments[b][j]) and (window is None or abs(i - j) <= window)
    ]


def attention_kl(sq, sk, tq, tk, mask, s_scale, t_scale, segments=None, window=None):
    rows = []
    for b in range(len(mask)):
        for h in range(len(sq[b])):
            for i in real(mask[b]):
                keys = visible(b, i, mask, segments, window)
                p = softmax([t_scale * dot(tq[b][h][i], tk[b][h][j]) for j in keys])
                q = softmax([s_scale * dot(sq[b][h][i], sk[b][h][j]) for j in keys])
                rows.append(kl(p, q))
    return mean(rows)


def attention_mse(sq, sk, tq, tk, mask, s_scale, t_scale, segments=None, window=None):
    squares = []
    for b in range(len(mask)):
        for h in range(len(sq[b])):
            for i in real(mask[b]):
                for j in visible(b, i, mask, segments, window):
                    gap = s_scale * dot(sq[b][h][i], sk[b][h][j]) - t_scale * dot(tq[b][h][i], tk[b][h][j])
                    squares.append(gap * gap)
    return mean(squares)


def merge_heads(x):
    """[head][position][width] -> [position][head * width]."""
    return [[v for head in x for v in head[i]] for i in range(len(x[0]))]


def relation_kl(s, t, mask, heads, s_other=None, t_other=None, segments=None):
    rows = []
    for b in range(len(mask)):
        sides = []
        for left, right in ((t, t_other or t), (s, s_other or s)):
            a, c = merge_heads(left[b]), merge_heads(right[b])
            sides.append((a, c, len(a[0]) // heads))
        for r in range(heads):
            for i in real(mask[b]):
                keys = visible(b, i, mask, segments)
                p, q = (
                    softmax([dot(a[i][r * d : (r + 1) * d], c[j][r * d : (r + 1) * d]) / math.sqrt(d) for j in keys])
                    for a, c, d in sides
                )
                rows.append(kl(p, q))
    return mean(rows)


def linear(x, weight, bias=None):
    """A vector through a weight given as rows of outputs."""
    return [dot(x, row) + (bias[o] if bias else 0.0) for o, row in enumerate(weight)]


def hidden_mse(s, t, mask):
    return mean(
        (x - y) ** 2 for b in range(len(mask)) for i in real(mask[b]) for x, y in zip(s[b][i], t[b][i], strict=True)
    )


def cross_entropy(logits, labels):
    return mean(-math.log(softmax(z)[y]) for z, y in zip(logits, labels, strict=True) if y != -100)
