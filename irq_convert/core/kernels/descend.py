"""Rounds of refitting and coordinate descent over rows on the CPU, after the sweep.

For a row with target w, stored values q and second moments H of the inputs, `G = (w - q) H` is what
is left to gain. Block by block, the others held fixed: the pair (tau, scale) by least squares
against H, rounded to what can be stored; then every code of the block in turn,

    q_j <- the level nearest to q_j + G_j / H_jj,

which is the best value of that one weight. Every step is taken only where it lowers the error, so
the error falls. Sixteen rows go side by side, a lane each, and depend on no other row.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from irq_convert.core.kernels.grid import F32, decode, encode
from irq_convert.core.kernels.jit import entry_point, kernel
from irq_convert.core.kernels.lanes import FOUR, LANES, load_lanes, multiply_four, nearest
from irq_convert.core.kernels.simd import fadd, fmul, fsub, load16, splat16, store


@kernel
def _subtract_product(moved, first, count, moments, gain, begin, end):
    """`gain[k] -= sum_j moved[j] H[first + j, k]` for k in `begin .. end`, sixteen rows at once."""
    fours = begin + (end - begin) // FOUR * FOUR
    for k in range(begin, fours, FOUR):
        e0, o0, e1, o1, e2, o2, e3, o3 = multiply_four(moved, count, moments, k, first)
        at = k * LANES
        store(gain, at, fsub(load16(gain, at), fadd(e0, o0)))
        store(gain, at + LANES, fsub(load16(gain, at + LANES), fadd(e1, o1)))
        store(gain, at + 2 * LANES, fsub(load16(gain, at + 2 * LANES), fadd(e2, o2)))
        store(gain, at + 3 * LANES, fsub(load16(gain, at + 3 * LANES), fadd(e3, o3)))
    for k in range(fours, end):
        row = moments[k]
        even, odd = splat16(F32(0.0)), splat16(F32(0.0))
        for j in range(0, count - 1, 2):
            even = fadd(even, fmul(load16(moved, j * LANES), splat16(row[first + j])))
            odd = fadd(odd, fmul(load16(moved, (j + 1) * LANES), splat16(row[first + j + 1])))
        if count % 2:
            at = count - 1
            even = fadd(even, fmul(load16(moved, at * LANES), splat16(row[first + at])))
        store(gain, k * LANES, fsub(load16(gain, k * LANES), fadd(even, odd)))


@kernel
def _fit_lane(sums, pair, grids, levels, zero):
    """The storable (tau, scale) that gains most for one lane, if it gains; returns whether.

    `sums`: sum(l H l), sum(l H 1), sum(1 H 1), sum(G l), sum(G). `pair`: tau and scale, replaced.
    `grids`: step, offset and 1 / step of scale, then of tau. `zero`: the zero point that ties tau
    to the scale, or -1.
    """
    ll, lo, oo, gl, go = sums[0], sums[1], sums[2], sums[3], sums[4]
    tau, scale = pair[0], pair[1]
    if zero >= 0:
        top, bottom = (
            gl - levels[zero] * go,
            ll - levels[zero] * (F32(2.0) * lo - levels[zero] * oo),
        )
        if not bottom > F32(0.0):
            return False
        new_scale = scale + top / bottom
    else:
        det = ll * oo - lo * lo
        if not det > F32(1e-6) * ll * oo:
            return False
        new_scale = scale + (gl * oo - go * lo) / det
        tau = tau + (ll * go - lo * gl) / det
    new_scale = decode(encode(new_scale, grids[2], grids[1]), grids[0], grids[1])
    if not new_scale > F32(0.0):
        return False
    if zero >= 0:
        new_tau = F32(0.0) - levels[zero] * new_scale
    else:
        new_tau = decode(encode(tau, grids[5], grids[4]), grids[3], grids[4])
    ds, dt = new_scale - scale, new_tau - pair[0]
    gain = F32(2.0) * (ds * gl + dt * go) - ds * ds * ll - F32(2.0) * ds * dt * lo - dt * dt * oo
    if not gain > F32(0.0):
        return False
    pair[0], pair[1] = new_tau, new_scale
    return True


@kernel
def _refit_block(
    first, count, moments, at, codes, value, gain, scales, taus, grids, levels, zeros, moved, sums,
    pair,
):  # fmt: skip
    """Refit tau and scale of block `at` in every lane; updates `value`, and `gain` in the block."""
    whole = F32(0.0)
    for j in range(count):
        total = F32(0.0)
        row = moments[first + j]
        for i in range(count):
            total += row[first + i]
        whole += total
        for lane in range(LANES):
            sums[j * LANES + lane] = total
    for lane in range(LANES):
        lo, gl, go = F32(0.0), F32(0.0), F32(0.0)
        for j in range(count):
            here = (first + j) * LANES + lane
            level = levels[codes[here]]
            lo += level * sums[j * LANES + lane]
            gl += level * gain[here]
            go += gain[here]
            moved[j * LANES + lane] = level
        pair[2 + lane * 5 + 1], pair[2 + lane * 5 + 2] = lo, whole
        pair[2 + lane * 5 + 3], pair[2 + lane * 5 + 4] = gl, go
    for lane in range(LANES):
        pair[2 + lane * 5] = F32(0.0)
    total = splat16(F32(0.0))
    for j in range(count):
        row = moments[first + j]
        inner = splat16(F32(0.0))
        for i in range(count):
            inner = fadd(inner, fmul(load16(moved, i * LANES), splat16(row[first + i])))
        total = fadd(total, fmul(load16(moved, j * LANES), inner))
    store(sums, 0, total)
    for lane in range(LANES):
        pair[2 + lane * 5] = sums[lane]
    for lane in range(LANES):
        here = at * LANES + lane
        pair[0], pair[1] = taus[here], scales[here]
        took = _fit_lane(pair[2 + lane * 5 :], pair, grids[here], levels, zeros[here])
        for j in range(count):
            place = (first + j) * LANES + lane
            before = value[place]
            if took:
                value[place] = levels[codes[place]] * pair[1] + pair[0]
            moved[j * LANES + lane] = value[place] - before
        taus[here], scales[here] = pair[0], pair[1]
    _subtract_product(moved, first, count, moments, gain, first, first + count)


@kernel
def _descend_block(
    first, count, moments, inverse, at, codes, value, gain, scales, taus, levels, mids, n_mids
):
    """One pass over the codes of a block; updates `value`, `codes`, and `gain` in the block."""
    scale, tau = load16(scales, at * LANES), load16(taus, at * LANES)
    for j in range(first, first + count):
        here = j * LANES
        before = load16(value, here)
        wanted = fadd(before, fmul(load16(gain, here), splat16(inverse[j])))
        after = nearest(wanted, scale, tau, levels, mids, n_mids, codes, here)
        store(value, here, after)
        moved = fsub(after, before)
        row = moments[j]
        for i in range(first, first + count):
            left = fsub(load16(gain, i * LANES), fmul(moved, splat16(row[i])))
            store(gain, i * LANES, left)


def _make_descend(digest):
    def descend_rows(
        target, moments, inverse, block_size, levels, mids, n_mids, rounds, grids, zeros, scale,
        tau, codes,
    ):  # fmt: skip
        """Improve `scale`, `tau` (float32 `[rows, blocks_per_row]`) and `codes` (uint8) in place.

        `target` float32 `[rows, cols]`; `moments` float32 `[cols, cols]`, symmetric; `inverse`:
        one over its diagonal. `grids`: float32 `[rows, blocks_per_row, 6]`, step, offset and one
        over the step of scale, then of tau. `zeros`, int32 `[rows, blocks_per_row]`: the zero
        point that ties tau to the scale, or -1.
        """
        digest  # noqa: B018 - keys the cache
        rows, cols = target.shape
        blocks = scale.shape[1]
        for batch in prange((rows + LANES - 1) // LANES):
            lanes = np.minimum(batch * LANES + np.arange(LANES), rows - 1)
            value = np.empty(cols * LANES, np.float32)
            gain = np.zeros(cols * LANES, np.float32)
            wrong = np.empty(cols * LANES, np.float32)
            code = np.empty(cols * LANES, np.int32)
            old = np.empty(cols * LANES, np.float32)
            scales = np.empty(blocks * LANES, np.float32)
            taus = np.empty(blocks * LANES, np.float32)
            moved = np.empty(block_size * LANES, np.float32)
            sums = np.empty(block_size * LANES, np.float32)
            pair = np.empty(2 + 5 * LANES, np.float32)
            own_grids = np.empty((blocks * LANES, 6), np.float32)
            own_zeros = np.empty(blocks * LANES, np.int32)
            load_lanes(scale, batch * LANES, blocks, scales)
            load_lanes(tau, batch * LANES, blocks, taus)
            for lane in range(LANES):
                row = lanes[lane]
                for b in range(blocks):
                    own_grids[b * LANES + lane] = grids[row, b]
                    own_zeros[b * LANES + lane] = zeros[row, b]
                for j in range(cols):
                    here, b = j * LANES + lane, j // block_size * LANES + lane
                    code[here] = codes[row, j]
                    value[here] = levels[code[here]] * scales[b] + taus[b]
                    wrong[here] = value[here] - target[row, j]
            _subtract_product(wrong, 0, cols, moments, gain, 0, cols)
            for _ in range(rounds):
                for b in range(blocks):
                    first = b * block_size
                    count = min(block_size, cols - first)
                    old[: count * LANES] = value[first * LANES : (first + count) * LANES]
                    _refit_block(
                        first, count, moments, b, code, value, gain, scales, taus, own_grids,
                        levels, own_zeros, moved, sums, pair,
                    )  # fmt: skip
                    _descend_block(
                        first, count, moments, inverse, b, code, value, gain, scales, taus, levels,
                        mids, n_mids,
                    )  # fmt: skip
                    for j in range(count * LANES):
                        moved[j] = value[first * LANES + j] - old[j]
                    _subtract_product(moved, first, count, moments, gain, 0, first)
                    _subtract_product(moved, first, count, moments, gain, first + count, cols)
            for lane in range(min(LANES, rows - batch * LANES)):
                row = lanes[lane]
                for b in range(blocks):
                    scale[row, b] = scales[b * LANES + lane]
                    tau[row, b] = taus[b * LANES + lane]
                for j in range(cols):
                    here = j * LANES + lane
                    codes[row, j] = np.uint8(code[here])

    return descend_rows


descend_rows = entry_point(_make_descend)
