"""The sweep of GPTQ over rows on the CPU, with levels and statistics of this format.

Columns are quantized one after another, each corrected for what those before it got wrong. With
the second moments of the inputs as `H = V D V^T`, V unit upper triangular in the order of the
sweep, the error of a row is

    (w - q) H (w - q)^T = sum_k D_k (v_k - q_k)^2,    v_k = w_k + sum_{j<k} (w_j - q_j) V_jk,

so q_k is the level nearest to v_k (Frantar et al., 2023, in the form of Chee et al., 2023, which
needs no inverse of H). Sixteen rows go side by side, a lane each. A column collects its corrections
in the order of the columns, so rows depend on no other row and results on no number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from irq_convert.core.kernels.grid import F32
from irq_convert.core.kernels.jit import entry_point, kernel
from irq_convert.core.kernels.simd import (
    choose,
    count,
    fadd,
    fless,
    fmul,
    fsub,
    isplat16,
    isub,
    load16,
    splat16,
    store,
)

LANES = 16
FOUR = 4
"""Columns that are fed back to at once. An even number: even and odd columns are summed apart."""
ZERO = np.int32(0)


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
def load_lanes(rows, first, width, out):
    """`out[j * LANES + lane] = rows[first + lane, j]`; lanes behind the last row repeat it."""
    last = rows.shape[0] - 1
    for lane in range(LANES):
        row = min(first + lane, last)
        for j in range(width):
            out[j * LANES + lane] = rows[row, j]


def _make_sweep(digest):
    def sweep_rows(weights, scale, tau, factor, order, block_size, levels, mids, n_mids, codes):
        """Codes, uint8 `[rows, cols]`, of `weights`, float32 `[rows, cols]`, into `codes`.

        `scale` and `tau`: float32 `[rows, blocks_per_row]`, as decoded. `order`, int64 `[cols]`:
        the columns in the order of the sweep. `factor`, float32 `[cols, cols]`: V transposed.
        """
        digest  # noqa: B018 - keys the cache
        rows, cols = weights.shape
        blocks = scale.shape[1]
        for batch in prange((rows + LANES - 1) // LANES):
            first = batch * LANES
            work = np.empty(cols * LANES, np.float32)
            wrong = np.empty(cols * LANES, np.float32)
            scales = np.empty(blocks * LANES, np.float32)
            taus = np.empty(blocks * LANES, np.float32)
            found = np.empty(LANES, np.int32)
            load_lanes(weights, first, cols, work)
            load_lanes(scale, first, blocks, scales)
            load_lanes(tau, first, blocks, taus)
            sums = np.empty(FOUR * 2 * LANES, np.float32)
            for j in range(cols):
                start = j // FOUR * FOUR
                if start + FOUR > cols:  # the last few, each alone
                    start = 0
                if not start:
                    sums[:] = F32(0.0)
                elif start == j:
                    _feed_back(j, factor, wrong, sums)
                _sweep_column(
                    j, start, order[j], factor[j], work, wrong, sums, scales, taus, block_size,
                    levels, mids, n_mids, found,
                )  # fmt: skip
                for lane in range(min(LANES, rows - first)):
                    codes[first + lane, order[j]] = np.uint8(found[lane])

    return sweep_rows


@kernel
def _feed_back(start, factor, wrong, sums):
    """What the columns before `start`, even ones and odd ones, do to the four from there on.

    Each vector of `wrong` is loaded once for all four.
    """
    r0, r1, r2, r3 = factor[start], factor[start + 1], factor[start + 2], factor[start + 3]
    e0, e1, e2, e3 = splat16(F32(0.0)), splat16(F32(0.0)), splat16(F32(0.0)), splat16(F32(0.0))
    o0, o1, o2, o3 = splat16(F32(0.0)), splat16(F32(0.0)), splat16(F32(0.0)), splat16(F32(0.0))
    for i in range(0, start, 2):
        one, two = load16(wrong, i * LANES), load16(wrong, (i + 1) * LANES)
        e0 = fadd(e0, fmul(one, splat16(r0[i])))
        e1 = fadd(e1, fmul(one, splat16(r1[i])))
        e2 = fadd(e2, fmul(one, splat16(r2[i])))
        e3 = fadd(e3, fmul(one, splat16(r3[i])))
        o0 = fadd(o0, fmul(two, splat16(r0[i + 1])))
        o1 = fadd(o1, fmul(two, splat16(r1[i + 1])))
        o2 = fadd(o2, fmul(two, splat16(r2[i + 1])))
        o3 = fadd(o3, fmul(two, splat16(r3[i + 1])))
    store(sums, 0 * LANES, e0)
    store(sums, 1 * LANES, o0)
    store(sums, 2 * LANES, e1)
    store(sums, 3 * LANES, o1)
    store(sums, 4 * LANES, e2)
    store(sums, 5 * LANES, o2)
    store(sums, 6 * LANES, e3)
    store(sums, 7 * LANES, o3)


@kernel
def _sweep_column(
    j, start, col, factor, work, wrong, sums, scales, taus, block_size, levels, mids, n_mids, found
):
    """Quantize column `col`, the j-th of the sweep; leaves `w - q` in `wrong`.

    `sums`: what `_feed_back` found of the columns before `start`.
    """
    at = (j - start) % FOUR * 2 * LANES
    even, odd = load16(sums, at), load16(sums, at + LANES)
    for i in range(start, j - 1, 2):
        even = fadd(even, fmul(load16(wrong, i * LANES), splat16(factor[i])))
        odd = fadd(odd, fmul(load16(wrong, (i + 1) * LANES), splat16(factor[i + 1])))
    if j % 2:
        even = fadd(even, fmul(load16(wrong, (j - 1) * LANES), splat16(factor[j - 1])))
    weight = load16(work, col * LANES)
    value = fadd(weight, fadd(even, odd))
    at = col // block_size * LANES
    level = nearest(value, load16(scales, at), load16(taus, at), levels, mids, n_mids, found, 0)
    store(wrong, j * LANES, fsub(weight, level))


sweep_rows = entry_point(_make_sweep)
