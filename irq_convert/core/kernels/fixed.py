"""A block in fixed point: exact sums of its sorted weights, and least squares of tau and scale.

Sums are integers, so no order of adding, thread or device can change them. Where columns have an
importance, each weight counts for its column's share (`core.importance`), an integer too.
"""

from __future__ import annotations

import numpy as np

from irq_convert.core.kernels.grid import F32
from irq_convert.core.kernels.jit import kernel
from irq_convert.core.kernels.simd import bits_float, float_bits


@kernel
def block_factor(keys, n, bits):
    exponent = max(float_bits(max(abs(keys[0]), abs(keys[n - 1]))) >> 23, 27) - 126
    return bits_float(np.int32((bits - exponent + 127) << 23))


@kernel
def fixed_point(keys, n, bits, prefix):
    """Prefix sums of the keys in fixed point; returns the factor and the sum of squares."""
    factor = block_factor(keys, n, bits)
    squares = np.int64(0)
    running = np.int32(0)
    prefix[0] = running
    for i in range(n):
        value = np.int32(np.rint(keys[i] * factor))
        running += value
        squares += np.int64(value) * np.int64(value)
        prefix[i + 1] = running
    return factor, squares


@kernel
def weighted_fixed_point(keys, n, bits, source, shares, mass, prefix):
    """`fixed_point` of a block whose weights, `source` in their own order, count by `shares`.

    A weight's share goes where the first key equal to it lies: no boundary parts equal keys, so
    sums at boundaries are those of the keys below.
    """
    factor = block_factor(keys, n, bits)
    for i in range(n + 1):
        mass[i] = 0
        prefix[i] = 0
    squares = np.int64(0)
    for i in range(n):
        low, high = 0, n
        while low < high:
            middle = (low + high) >> 1
            if keys[middle] < source[i]:
                low = middle + 1
            else:
                high = middle
        value, share = np.int32(np.rint(keys[low] * factor)), shares[i]
        mass[low + 1] += share
        prefix[low + 1] += share * value
        squares += np.int64(share) * np.int64(value) * np.int64(value)
    for i in range(n):
        mass[i + 1] += mass[i]
        prefix[i + 1] += prefix[i]
    return factor, squares


@kernel
def bin_mass(edges, k, weighted, mass):
    """How many weights bin k holds, or the sum of their shares, int64."""
    if weighted:
        return np.int64(mass[edges[k + 1]]) - np.int64(mass[edges[k]])
    return np.int64(edges[k + 1] - edges[k])


@kernel
def solve(edges, n, tables, weighted, mass, prefix, factor):
    """Least-squares (tau, scale) for fixed codes: the 2 x 2 normal equations, exact sums."""
    sum_l = np.int64(0)
    sum_ll = np.int64(0)
    sum_lw = np.int64(0)
    for k in range(tables.n_levels):
        level, many = tables.level_fixed[k], bin_mass(edges, k, weighted, mass)
        sum_l += level * many
        sum_ll += level * level * many
        sum_lw += level * np.int64(prefix[edges[k + 1]] - prefix[edges[k]])
    sum_w = np.int64(prefix[n])
    total = np.int64(n)
    if weighted:
        total = np.int64(mass[n])
    det = total * sum_ll - sum_l * sum_l
    if det <= 0:
        return F32(0.0), F32(-1.0)
    unit = 1.0 / (1 << tables.level_bits)
    scale = np.float64(total * sum_lw - sum_l * sum_w) / np.float64(det) / unit
    tau = (np.float64(sum_w) - np.float64(sum_l) * unit * scale) / np.float64(total)
    return F32(tau / factor), F32(scale / factor)
