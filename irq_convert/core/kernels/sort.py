"""Sorting blocks sixteen at a time: a branch-free network over vectors.

Lane `l` of row `i` holds the i-th weight of block `l`, so one compare-exchange of two rows orders
a pair in sixteen blocks at once and the cost does not depend on the data.
"""

from __future__ import annotations

import functools

import numpy as np

from irq_convert.core.kernels.jit import kernel
from irq_convert.core.kernels.simd import fmax, fmin, load16, store

LANES = 16


@functools.cache
def merge_network(size: int) -> np.ndarray:
    """Batcher's odd-even merge network for `size` (a power of two) keys.

    Returns int64 `[comparators, 2]`: pairs `(i, j)`, i < j, to be ordered one after another.
    """
    pairs = []
    p = 1
    while p < size:
        k = p
        while k >= 1:
            for j in range(k % p, size - k, 2 * k):
                for i in range(min(k, size - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


@kernel
def sort_lanes(keys, network):
    """Sort the columns of `keys`, flat float32 `[size * LANES]`, in place; no NaN."""
    for c in range(network.shape[0]):
        i = network[c, 0] * LANES
        j = network[c, 1] * LANES
        a = load16(keys, i)
        b = load16(keys, j)
        store(keys, i, fmin(a, b))
        store(keys, j, fmax(a, b))
