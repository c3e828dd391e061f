"""The metrics as plain loops, written from their definitions."""

import math


def accuracy(labels, predictions):
    return sum(a == b for a, b in zip(labels, predictions, strict=True)) / len(labels)


def counts(labels, predictions, positive):
    pairs = list(zip(labels, predictions, strict=True))
    hits = sum(a == positive and b == positive for a, b in pairs)
    false_alarms = sum(a != positive and b == positive for a, b in pairs)
    misses = sum(a == positive and b != positive for a, b in pairs)
    return hits, false_alarms, misses


def f1(labels, predictions, positive=1):
    hits, false_alarms, misses = counts(labels, predictions, positive)
    return 2 * hits / (2 * hits + false_alarms + misses) if hits + false_alarms + misses else 0.0


def f1_macro(labels, predictions):
    classes = sorted({*labels, *predictions})
    return sum(f1(labels, predictions, c) for c in classes) / len(classes)


def matthews(labels, predictions):
    """Two classes: the correlation of two 0/1 variables, from the four counts."""
    tp, fp, fn = counts(labels, predictions, 1)
    tn = len(labels) - tp - fp - fn
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / below if below else 0.0


def pearson(x, y):
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    cov = math.fsum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return cov / math.sqrt(math.fsum((a - mx) ** 2 for a in x) * math.fsum((b - my) ** 2 for b in y))


def ranks(values):
    """Mean rank of equal values."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def spearman(x, y):
    return pearson(ranks(x), ranks(y))


def multi_label(labels, predictions):
    """Micro F1, macro F1 and subset accuracy of rows of 0 and 1."""
    columns = list(zip(zip(*labels, strict=True), zip(*predictions, strict=True), strict=True))
    totals = [sum(part) for part in zip(*(counts(a, b, 1) for a, b in columns), strict=True)]
    micro = 2 * totals[0] / (2 * totals[0] + totals[1] + totals[2])
    return micro, sum(f1(a, b) for a, b in columns) / len(columns), accuracy(labels, predictions)
