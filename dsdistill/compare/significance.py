"""Paired t-tests between the rows of a grid, with Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from scipy import stats

Pair = tuple[str, str]
"""Task and seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A paired t-test of two rows.

    Attributes:
        first: Labels of one row.
        second: Labels of the other.
        axis: The axis on which they differ.
        n: Pairs: both rows have a score of that task and seed.
        difference: Mean of first - second, in points.
        t: Student's t with n - 1 degrees of freedom; nan if it cannot be computed (fewer than two pairs, or all
            differences equal).
        p: Two-sided; nan likewise.
        p_holm: Corrected for all tests of the table (Holm 1979); nan likewise.
    """

    first: Mapping[str, str]
    second: Mapping[str, str]
    axis: str
    n: int
    difference: float
    t: float
    p: float
    p_holm: float = math.nan


def compare(rows: Sequence[tuple[Mapping[str, str], Mapping[Pair, float]]]) -> list[Comparison]:
    """Test every two rows that differ on one axis.

    Args:
        rows: Labels and scores by task and seed.

    Returns:
        The tests, corrected together.
    """
    tests = [test for first, second in combinations(rows, 2) for test in _test(first, second)]
    corrected = holm([test.p for test in tests])
    return [replace(test, p_holm=p) for test, p in zip(tests, corrected, strict=True)]


def _test(
    first: tuple[Mapping[str, str], Mapping[Pair, float]], second: tuple[Mapping[str, str], Mapping[Pair, float]]
) -> Iterator[Comparison]:
    differing = [axis for axis in first[0] if first[0][axis] != second[0][axis]]
    pairs = [pair for pair in first[1] if pair in second[1]]
    if len(differing) != 1 or not pairs:
        return
    ours, theirs = ([scores[pair] for pair in pairs] for scores in (first[1], second[1]))
    t, p = paired_t(ours, theirs)
    difference = math.fsum(a - b for a, b in zip(ours, theirs, strict=True)) / len(pairs)
    yield Comparison(first=first[0], second=second[0], axis=differing[0], n=len(pairs), difference=difference, t=t, p=p)


def paired_t(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Student's paired t-test: t and the two-sided p; nan if there are fewer than two pairs or no variance."""
    differences = {a - b for a, b in zip(first, second, strict=True)}
    if len(differences) < 2:
        return math.nan, math.nan
    result = stats.ttest_rel(first, second)
    return float(result.statistic), float(result.pvalue)  # pyright: ignore[reportAttributeAccessIssue] (no stubs)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of m is multiplied by m - k + 1, never below the one before it.

    Values that are nan stay so and do not count.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, largest = list(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
