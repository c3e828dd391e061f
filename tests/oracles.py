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


def score(q, k, scale, bias, b, h, i, j):
    """One attention score; a bias is [b][h][i][j]."""
    return scale * dot(q[b][h][i], k[b][h][j]) + (bias[b][h][i][j] if bias else 0.0)


def attention_kl(sq, sk, tq, tk, mask, s_scale, t_scale, segments=None, window=None, s_bias=None, t_bias=None):
    rows = []
    for b in range(len(mask)):
        for h in range(len(sq[b])):
            for i in real(mask[b]):
                keys = visible(b, i, mask, segments, window)
                p = softmax([score(tq, tk, t_scale, t_bias, b, h, i, j) for j in keys])
                q = softmax([score(sq, sk, s_scale, s_bias, b, h, i, j) for j in keys])
                rows.append(kl(p, q))
    return mean(rows)


def attention_mse(sq, sk, tq, tk, mask, s_scale, t_scale, segments=None, window=None, s_bias=None, t_bias=None):
    squares = []
    for b in range(len(mask)):
        for h in range(len(sq[b])):
            for i in real(mask[b]):
                for j in visible(b, i, mask, segments, window):
                    gap = score(sq, sk, s_scale, s_bias, b, h, i, j) - score(tq, tk, t_scale, t_bias, b, h, i, j)
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


def soft(logits, temperature):
    return softmax([z / temperature for z in logits])


def kd(s, t, kind, temperature, beta=0.5):
    rows = []
    for zs, zt in zip(s, t, strict=True):
        if kind == "mse":
            rows.append(mean((a - b) ** 2 for a, b in zip(zs, zt, strict=True)))
            continue
        if kind == "binary":
            pairs = [(soft([a, 0.0], temperature), soft([b, 0.0], temperature)) for a, b in zip(zt, zs, strict=True)]
            rows.append(mean(kl(p, q) for p, q in pairs))
            continue
        p, q = soft(zt, temperature), soft(zs, temperature)
        if kind == "forward" or (kind == "jsd" and beta == 0):
            rows.append(kl(p, q))
        elif kind == "reverse" or (kind == "jsd" and beta == 1):
            rows.append(kl(q, p))
        else:
            m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
            rows.append(beta * kl(p, m) + (1 - beta) * kl(q, m))
    return mean(rows) * temperature**2


def soft_cross_entropy(s, t, temperature):
    rows = []
    for zs, zt in zip(s, t, strict=True):
        p, q = soft(zt, temperature), soft(zs, temperature)
        rows.append(-math.fsum(a * math.log(b) for a, b in zip(p, q, strict=True)))
    return mean(rows) * temperature**2


def binary_cross_entropy(logits, labels):
    def probability(z, y):
        return 1 / (1 + math.exp(-z if y else z))

    return mean(
        -math.log(probability(z, y)) for zs, ys in zip(logits, labels, strict=True) for z, y in zip(zs, ys, strict=True)
    )


def squared_error(logits, labels):
    return mean((z[0] - y) ** 2 for z, y in zip(logits, labels, strict=True))


def length(a):
    return math.sqrt(dot(a, a))


def cosine(a, b):
    return dot(a, b) / (length(a) * length(b))


def hidden_cosine(s, t, mask):
    return mean(1 - cosine(s[b][i], t[b][i]) for b in range(len(mask)) for i in real(mask[b]))


def moments(x):
    mu = mean(x)
    return mu, mean((v - mu) ** 2 for v in x)


def feature_maps(s, t, mask):
    """MobileBERT's three differences: normalised states, means, variances."""
    shapes, means, variances = [], [], []
    for b in range(len(mask)):
        for i in real(mask[b]):
            (mu_s, var_s), (mu_t, var_t) = moments(s[b][i]), moments(t[b][i])
            unit_s = [(v - mu_s) / math.sqrt(var_s + 1e-6) for v in s[b][i]]
            unit_t = [(v - mu_t) / math.sqrt(var_t + 1e-6) for v in t[b][i]]
            shapes.append(mean((x - y) ** 2 for x, y in zip(unit_s, unit_t, strict=True)))
            means.append((mu_s - mu_t) ** 2)
            variances.append(abs(var_s - var_t))
    return mean(shapes), mean(means), mean(variances)


def pearson(x, y):
    """Correlation, or None where one side does not vary."""
    mx, my = mean(x), mean(y)
    a, b = [v - mx for v in x], [v - my for v in y]
    for centred, values in ((a, x), (b, y)):
        largest = max(max(map(abs, values)), 1e-20)
        if math.fsum((c / largest) ** 2 for c in centred) <= 1e-10:
            return None
    # in units of the largest, lest the product of tiny numbers vanishes
    top_a, top_b = max(map(abs, a)), max(map(abs, b))
    return cosine([v / top_a for v in a], [v / top_b for v in b])


def mean_distance(groups):
    correlations = [pearson(x, y) for x, y in groups if x]
    return mean(1 - r for r in correlations if r is not None)


def logit_pearson(s, t, temperature):
    ps, pt = [soft(z, temperature) for z in s], [soft(z, temperature) for z in t]
    inter = mean_distance(zip(ps, pt, strict=True))
    intra = mean_distance(zip(map(list, zip(*ps, strict=True)), map(list, zip(*pt, strict=True)), strict=True))
    return inter * temperature**2, intra * temperature**2


def attention_pearson(sq, sk, tq, tk, mask, s_scale, t_scale, s_bias=None, t_bias=None):
    """Along keys, along queries, along heads."""
    keys_groups, query_groups, head_groups = [], [], []
    for b in range(len(mask)):
        places = real(mask[b])
        maps = [
            [[softmax([score(*side, b, h, i, j) for j in places]) for i in places] for h in range(len(sq[b]))]
            for side in ((sq, sk, s_scale, s_bias), (tq, tk, t_scale, t_bias))
        ]
        heads, n = range(len(sq[b])), range(len(places))
        for h in heads:
            keys_groups += [(maps[0][h][i], maps[1][h][i]) for i in n]
            query_groups += [([maps[0][h][i][j] for i in n], [maps[1][h][i][j] for i in n]) for j in n]
        head_groups += [([maps[0][h][i][j] for h in heads], [maps[1][h][i][j] for h in heads]) for i in n for j in n]
    return mean_distance(keys_groups), mean_distance(query_groups), mean_distance(head_groups)


def pool(hidden, mask, pooling):
    """One vector for each row that has real positions."""
    rows = []
    for states, keep in zip(hidden, mask, strict=True):
        if any(keep):
            places = real(keep)
            chosen = {"first": states[:1], "last": [states[places[-1]]]}.get(pooling, [states[i] for i in places])
            columns = list(zip(*chosen, strict=True))
            if pooling == "max":
                rows.append([max(column) for column in columns])
            elif pooling == "mean_sqrt_length":
                rows.append([math.fsum(column) / math.sqrt(len(places)) for column in columns])
            elif pooling == "weighted_mean":
                total = sum(i + 1 for i in places)
                rows.append([sum((i + 1) * x for i, x in zip(places, c, strict=True)) / total for c in columns])
            else:
                rows.append([mean(column) for column in columns])
    return rows


def unit(a):
    return [x / length(a) for x in a]


def pooled_cosine(s, t):
    return mean(1 - cosine(a, b) for a, b in zip(s, t, strict=True))


def pooled_mse(s, t):
    return mean((x - y) ** 2 for a, b in zip(s, t, strict=True) for x, y in zip(unit(a), unit(b), strict=True))


def pooled_mse_of_any_length(s, t):
    return mean((x - y) ** 2 for a, b in zip(s, t, strict=True) for x, y in zip(a, b, strict=True))


def pooled_similarity(s, t, temperature, diagonal=True):
    rows = []
    for i in range(len(s)):
        others = [j for j in range(len(s)) if diagonal or j != i]
        if others:
            p = softmax([cosine(t[i], t[j]) / temperature for j in others])
            q = softmax([cosine(s[i], s[j]) / temperature for j in others])
            rows.append(kl(p, q))
    return mean(rows)


def contrast(s, t, negatives, temperature, kind, examples):
    """`negatives[i]` are vectors that row i's student is held against; rows without any do not count."""
    rows = []
    for a, positive, others in zip(s, t, negatives, strict=True):
        if not others:
            continue
        x = cosine(a, positive) / temperature
        xs = [cosine(a, o) / temperature for o in others]
        if kind == "infonce":
            rows.append(-math.log(softmax([x, *xs])[0]))
        else:
            c = len(others) / examples

            def h(value, c=c):
                return math.exp(value) / (math.exp(value) + c)

            rows.append(-math.log(h(x)) - math.fsum(math.log(1 - h(y)) for y in xs))
    return mean(rows)


def unbiased_hsic(k, other):
    """Song et al. 2012, equation 4: U-statistics over distinct tokens."""
    m = len(k)
    pairs = [(i, j) for i in range(m) for j in range(m) if i != j]
    first = math.fsum(k[i][j] * other[i][j] for i, j in pairs) / (m * (m - 1))
    second = math.fsum(k[i][j] * other[q][r] for i, j in pairs for q, r in pairs if len({i, j, q, r}) == 4)
    third = math.fsum(k[i][j] * other[i][q] for i, j in pairs for q in range(m) if q not in (i, j))
    three = m * (m - 1) * (m - 2)
    return first + second / (three * (m - 3)) - 2 * third / three


def cka(s, t):
    k, other = ([[dot(a, b) for b in x] for a in x] for x in (s, t))
    return unbiased_hsic(k, other) / math.sqrt(unbiased_hsic(k, k) * unbiased_hsic(other, other))
