"""Counter-based random numbers: 64-bit hashes of integers, vectorised, the same on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mix64(x: UInt64) -> UInt64:
    """Splitmix64's finaliser (Steele et al. 2014) of `x` plus the golden ratio; a bijection of 64-bit numbers.

    Products wrap around, silently as long as `x` has a dimension.
    """
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


def hash64(*parts: int | NDArray) -> UInt64:
    """Hash of a tuple of integers; arrays broadcast.

    Args:
        parts: Numbers or integer arrays; negative numbers wrap modulo 2**64.

    Returns:
        uint64 array of the broadcast shape (one-dimensional at least).
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        number = np.array([part % 2**64], np.uint64) if isinstance(part, int) else part.astype(np.uint64, copy=False)
        state = mix64(mix64(state) ^ number)
    return state
