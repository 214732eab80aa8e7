"""Sixteen rows side by side, a lane each: how they are loaded, rounded and multiplied."""

from __future__ import annotations

import numpy as np

from irq_convert.core.kernels.grid import F32
from irq_convert.core.kernels.jit import kernel
from irq_convert.core.kernels.simd import (
    choose,
    count,
    fadd,
    fless,
    fmul,
    isplat16,
    isub,
    load16,
    splat16,
    store,
)

LANES = 16
FOUR = 4
"""Columns that are multiplied at once. An even number: even and odd terms are summed apart."""
ZERO = np.int32(0)


@kernel
def load_lanes(rows, first, width, out):
    """`out[j * LANES + lane] = rows[first + lane, j]`; lanes behind the last row repeat it."""
    last = rows.shape[0] - 1
    for lane in range(LANES):
        row = min(first + lane, last)
        for j in range(width):
            out[j * LANES + lane] = rows[row, j]


@kernel
def nearest(value, scale, tau, levels, mids, n_mids, codes, at):
    """The stored value of the level nearest to `value`; its codes go to `codes[at:]`.

    `code = #{k : w >= tau + m_k * scale}`, the rule of the format.
    """
    found = fadd(fmul(splat16(levels[n_mids]), scale), tau)
    code = isplat16(np.int32(n_mids))
    below = isplat16(ZERO)
    for i in range(n_mids):
        k = n_mids - 1 - i
        mask = fless(value, fadd(tau, fmul(splat16(mids[k]), scale)))
        below = count(below, mask)
        found = choose(mask, fadd(fmul(splat16(levels[k]), scale), tau), found)
    store(codes, at, isub(code, below))
    return found


@kernel
def multiply_four(values, length, matrix, row, first):
    """`sum_j values[j] matrix[row + i, first + j]` over j < `length`, for i of 0, 1, 2, 3.

    For each i the sum over even j and that over odd j, sixteen lanes each. Each vector of `values`
    is loaded once for all four.
    """
    r0, r1, r2, r3 = matrix[row], matrix[row + 1], matrix[row + 2], matrix[row + 3]
    e0, e1, e2, e3 = splat16(F32(0.0)), splat16(F32(0.0)), splat16(F32(0.0)), splat16(F32(0.0))
    o0, o1, o2, o3 = splat16(F32(0.0)), splat16(F32(0.0)), splat16(F32(0.0)), splat16(F32(0.0))
    for j in range(0, length - 1, 2):
        at = first + j
        one, two = load16(values, j * LANES), load16(values, (j + 1) * LANES)
        e0 = fadd(e0, fmul(one, splat16(r0[at])))
        e1 = fadd(e1, fmul(one, splat16(r1[at])))
        e2 = fadd(e2, fmul(one, splat16(r2[at])))
        e3 = fadd(e3, fmul(one, splat16(r3[at])))
        o0 = fadd(o0, fmul(two, splat16(r0[at + 1])))
        o1 = fadd(o1, fmul(two, splat16(r1[at + 1])))
        o2 = fadd(o2, fmul(two, splat16(r2[at + 1])))
        o3 = fadd(o3, fmul(two, splat16(r3[at + 1])))
    if length % 2:
        at = first + length - 1
        one = load16(values, (length - 1) * LANES)
        e0 = fadd(e0, fmul(one, splat16(r0[at])))
        e1 = fadd(e1, fmul(one, splat16(r1[at])))
        e2 = fadd(e2, fmul(one, splat16(r2[at])))
        e3 = fadd(e3, fmul(one, splat16(r3[at])))
    return e0, o0, e1, o1, e2, o2, e3, o3
