"""Scoring many (tau, scale) candidates of one block: entropy and squared error of the codes.

Lanes are candidates. For a list of candidates along a path on which every boundary
`B_k = tau + m_k * scale` moves one way up to the rounding of the statistics, only the sorted
weights between the boundary's two ends can change sides; the rest is counted once. Entropy and
error are integers (a table over counts; fixed-point weights), so their order never depends on
summation order, threads or device.
"""

from __future__ import annotations

import numpy as np

from irq_convert.core.codebook import MOST_LEVELS
from irq_convert.core.kernels.jit import kernel
from irq_convert.core.kernels.simd import (
    count,
    fadd,
    fless,
    fmax,
    fmin,
    fmul,
    gather,
    iadd,
    iload_levels,
    imul,
    isplat16,
    isplat64,
    isplat_levels,
    isub,
    lane_sum,
    load16,
    load64,
    load_levels,
    lsplat16,
    round_to_int,
    splat16,
    splat64,
    splat_levels,
    store,
    widen_mul,
)

WIDE = 64
ZERO = np.int32(0)


@kernel
def bin_edges(keys, n, n_mids, mids, tau, scale, edges):
    """`edges[k]`, int32 `[MOST_LEVELS + 1]`: the first sorted key of bin k; `n` behind the last."""
    edge = fadd(splat_levels(tau), fmul(load_levels(mids, 0), splat_levels(scale)))
    total = isplat_levels(ZERO)
    for i in range(n):
        total = count(total, fless(splat_levels(keys[i]), edge))
    store(edges, 1, total)
    edges[0] = 0
    for k in range(n_mids, MOST_LEVELS):
        edges[k + 1] = n


@kernel
def table_sum(edges, n_levels, table):
    """Sum over bins of `table[count]`, int64: what `score_entropy` gives for one pair."""
    total = np.int64(0)
    for k in range(n_levels):
        total += np.int64(table[edges[k + 1] - edges[k]])
    return total


@kernel
def pair_error(
    keys, n, n_mids, mids, levels, tau, scale, fixed, weighted, mass, prefix, edges
):  # fmt: skip
    """`score_error` of one pair; lanes are levels. Leaves `bin_edges` in `edges`."""
    bin_edges(keys, n, n_mids, mids, tau, scale, edges)
    before, below = iload_levels(edges, 0), iload_levels(edges, 1)
    value = fadd(fmul(load_levels(levels, 0), splat_levels(scale)), splat_levels(tau))
    value = round_to_int(fmul(value, splat_levels(fixed)))
    twice = isub(gather(prefix, below), gather(prefix, before))
    many = isub(below, before)
    if weighted:
        many = isub(gather(mass, below), gather(mass, before))
    pull = isub(imul(many, value), iadd(twice, twice))
    return lane_sum(widen_mul(value, pull))


@kernel
def _spans(keys, n, mids, tau, scale, first, last, slack, low, high):
    """Keys `low[k]:high[k]` are those that boundary k may cross between two candidates."""
    mid = load_levels(mids, 0)
    start = fadd(splat_levels(tau[first]), fmul(mid, splat_levels(scale[first])))
    end = fadd(splat_levels(tau[last]), fmul(mid, splat_levels(scale[last])))
    floor = fadd(fmin(start, end), splat_levels(-slack))
    ceil = fadd(fmax(start, end), splat_levels(slack))
    below = isplat_levels(ZERO)
    reach = isplat_levels(ZERO)
    for i in range(n):
        key = splat_levels(keys[i])
        below = count(below, fless(key, floor))
        reach = count(reach, fless(key, ceil))
    store(low, 0, below)
    store(high, 0, reach)


@kernel
def _below(keys, low, high, edge):
    """Keys below `edge`, lane by lane: `low` surely are, those from `high` on are not."""
    total = isplat64(low)
    for i in range(low, high):
        total = count(total, fless(splat64(keys[i]), edge))
    return total


@kernel
def score_entropy(keys, n, n_mids, mids, tau, scale, size, slack, table, low, high, out):
    """`out[j]` = sum over bins of the entropy table for candidate j; the minimum has most entropy.

    `keys`: sorted float32 block of `n` weights; `tau`, `scale`: float32 candidates, room for
    whole vectors past `size`; `slack` bounds how far rounding takes a boundary off its path.
    `table`, int32 `[counts, counts]`, holds the sum of two bins: one look-up for both.
    """
    width = np.int32(table.shape[0])
    flat = table.reshape(-1)
    for j in range(0, size, WIDE):
        last = min(j + WIDE, size) - 1
        _spans(keys, n, mids, tau, scale, j, last, slack, low, high)
        taus = load64(tau, j)
        scales = load64(scale, j)
        total = isplat64(ZERO)
        before = isplat64(ZERO)
        for k in range(0, n_mids - 1, 2):
            edge = fadd(taus, fmul(splat64(mids[k]), scales))
            middle = _below(keys, low[k], high[k], edge)
            edge = fadd(taus, fmul(splat64(mids[k + 1]), scales))
            after = _below(keys, low[k + 1], high[k + 1], edge)
            pair = iadd(imul(isub(middle, before), isplat64(width)), isub(after, middle))
            total = iadd(total, gather(flat, pair))
            before = after
        edge = fadd(taus, fmul(splat64(mids[n_mids - 1]), scales))
        middle = _below(keys, low[n_mids - 1], high[n_mids - 1], edge)
        after = isplat64(np.int32(n))
        pair = iadd(imul(isub(middle, before), isplat64(width)), isub(after, middle))
        store(out, j, iadd(total, gather(flat, pair)))


@kernel
def score_error(
    keys, n, n_mids, mids, levels, tau, scale, size, slack, fixed, weighted, mass, prefix, low,
    high, out,
):  # fmt: skip
    """`out[j]` = squared error of candidate j minus the sum of squares of the block, int64.

    In fixed point of factor `fixed` (a power of two): with `V_k` the rounded value of level k and
    `S_k` the sum of the weights in its bin, the error is `sum_k V_k * (n_k * V_k - 2 * S_k)`.
    `prefix[i]` is the int32 sum of the first i fixed-point keys. With `weighted` each key counts
    for its column's share: `n_k` becomes a sum of shares, whose sums `mass[i]` are, and `prefix`
    sums keys times shares.
    """
    unit = splat16(fixed)
    for j in range(0, size, 16):
        last = min(j + 16, size) - 1
        _spans(keys, n, mids, tau, scale, j, last, slack, low, high)
        taus = load16(tau, j)
        scales = load16(scale, j)
        total = lsplat16(np.int64(0))
        before = isplat16(ZERO)
        passed = isplat16(ZERO)
        for k in range(n_mids + 1):
            if k < n_mids:
                edge = fadd(taus, fmul(splat16(mids[k]), scales))
                below = isplat16(low[k])
                for i in range(low[k], high[k]):
                    below = count(below, fless(splat16(keys[i]), edge))
            else:
                below = isplat16(np.int32(n))
            weight = gather(prefix, below)
            value = round_to_int(fmul(fadd(fmul(splat16(levels[k]), scales), taus), unit))
            twice = isub(weight, passed)
            count_or_mass = below
            if weighted:
                count_or_mass = gather(mass, below)
            pull = isub(imul(isub(count_or_mass, before), value), iadd(twice, twice))
            total = iadd(total, widen_mul(value, pull))
            before = count_or_mass
            passed = weight
        store(out, j, total)
