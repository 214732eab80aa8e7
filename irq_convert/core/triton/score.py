# mypy: disallow-untyped-defs=False
"""Scoring (tau, scale) candidates: the entropy and the squared error of the codes they give.

The same integers as `kernels.score`: every boundary's position among the sorted keys of the block
by bisection, a table over counts, and sums of keys in fixed point. Weighed by importance, sums of
shares stand in the place of counts, and those of the keys are of keys times shares.
"""

from __future__ import annotations

import triton
import triton.language as tl

from irq_convert.core.triton.arithmetic import count_below, round_even


@triton.jit
def score(
    keys, prefix, mass, mids, levels, table, block, n, tau, scale, factor,
    WEIGHTED: tl.constexpr, N_LEVELS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """`(entropy table sum int32, squared error less the sum of squares int64)` of each pair.

    `tau` and `scale` float32 of any shape; `block` (index into `keys`, `prefix` and `mass`), `n`
    (weights of the block) and `factor` of a shape that broadcasts to it. `mass`, sums of shares,
    is read only where `WEIGHTED`.
    """
    total = tl.zeros(tau.shape, tl.int32)
    error = tl.zeros(tau.shape, tl.int64)
    before = tl.zeros(tau.shape, tl.int32)
    passed = tl.zeros(tau.shape, tl.int32)
    heft = tl.zeros(tau.shape, tl.int32)
    for k in range(N_LEVELS):
        edge = tau + tl.load(mids + k) * scale
        below = tl.where(k < N_LEVELS - 1, count_below(keys, block * B, edge, B), n)
        many = below - before
        total += tl.load(table + many)
        weight = tl.load(prefix + block * (B + 1) + below)
        value = round_even((tl.load(levels + k) * scale + tau) * factor).to(tl.int32)
        if WEIGHTED:
            heavy = tl.load(mass + block * (B + 1) + below)
            many = heavy - heft
            heft = heavy
        pull = many * value - 2 * (weight - passed)
        error += value.to(tl.int64) * pull.to(tl.int64)
        before = below
        passed = weight
    return total, error
