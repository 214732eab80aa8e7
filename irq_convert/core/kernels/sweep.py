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
from irq_convert.core.kernels.lanes import FOUR, LANES, load_lanes, multiply_four, nearest
from irq_convert.core.kernels.simd import fadd, fmul, fsub, load16, splat16, store


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
    """What the columns before `start`, even ones and odd ones, do to the four from there on."""
    e0, o0, e1, o1, e2, o2, e3, o3 = multiply_four(wrong, start, factor, start, 0)
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
