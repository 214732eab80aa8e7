# mypy: disallow-untyped-defs=False
"""Refining: least squares for the codes at hand, rounded to the grids, as long as the error falls.

Lanes are blocks. The sums are exact integers and the solution is float64, as in `kernels.search`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from irq_convert.core.triton.arithmetic import (
    FACTOR,
    GRID_COLUMNS,
    GROUP,
    HI,
    LO,
    count_below,
    decode,
    encode,
    negative_product,
)
from irq_convert.core.triton.score import score


@triton.jit
def _code_sums(
    keys, prefix, mass, mids, level_fixed, base_level, b, n, tau, scale,
    WEIGHTED: tl.constexpr, N_LEVELS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """`(sum l, sum l*l, sum l*w)` over the weights of a block, int64, `l` less `base_level`.

    Where `WEIGHTED`, each weight counts for its share.
    """
    sum_l = tl.zeros(tau.shape, tl.int64)
    sum_ll = tl.zeros(tau.shape, tl.int64)
    sum_lw = tl.zeros(tau.shape, tl.int64)
    before = tl.zeros(tau.shape, tl.int32)
    passed = tl.zeros(tau.shape, tl.int32)
    heft = tl.zeros(tau.shape, tl.int32)
    for k in range(N_LEVELS):
        edge = tau + tl.load(mids + k) * scale
        below = tl.where(k < N_LEVELS - 1, count_below(keys, b * B, edge, B), n)
        weight = tl.load(prefix + b * (B + 1) + below)
        level = tl.load(level_fixed + k) - base_level
        many = (below - before).to(tl.int64)
        if WEIGHTED:
            heavy = tl.load(mass + b * (B + 1) + below)
            many = (heavy - heft).to(tl.int64)
            heft = heavy
        sum_l += level * many
        sum_ll += level * level * many
        sum_lw += level * (weight - passed).to(tl.int64)
        before = below
        passed = weight
    return sum_l, sum_ll, sum_lw


@triton.jit(
    do_not_specialize=["cols", "per_row", "blocks", "rounds"],
    do_not_specialize_on_alignment=["grids"],
)
def refine(
    keys, prefix, mass, profile, grids, mids, levels, level_fixed, table,
    tau_out, scale_out, tau_codes, scale_codes, errors, cols, per_row, blocks, rounds,
    WEIGHTED: tl.constexpr, LEVEL_UNIT: tl.constexpr, N_LEVELS: tl.constexpr, B: tl.constexpr,
    NB: tl.constexpr,
):  # fmt: skip
    """At most `rounds` rounds for `NB` blocks, in place on what `search` left.

    `LEVEL_UNIT` is one level in the fixed point of `level_fixed`.
    """
    number = tl.program_id(0) * NB + tl.arange(0, NB)
    real = number < blocks
    b = tl.minimum(number, blocks - 1)
    n = tl.minimum(cols - b % per_row * B, B)
    factor = tl.load(profile + FACTOR * blocks + b)
    grid = grids + b // GROUP * GRID_COLUMNS
    tau_step, tau_offset, tau_inverse = tl.load(grid), tl.load(grid + 1), tl.load(grid + 2)
    scale_step, scale_offset = tl.load(grid + 3), tl.load(grid + 4)
    scale_inverse = tl.load(grid + 5)
    tau, scale = tl.load(tau_out + b), tl.load(scale_out + b)
    tau_code = tl.load(tau_codes + b).to(tl.float32)
    scale_code = tl.load(scale_codes + b).to(tl.float32)
    error = tl.load(errors + b)
    active = real & (tl.load(profile + LO * blocks + b) != tl.load(profile + HI * blocks + b))
    wide, unit = n.to(tl.int64), 1.0 / LEVEL_UNIT
    if WEIGHTED:
        wide = tl.load(mass + b * (B + 1) + n).to(tl.int64)
    sum_w = tl.load(prefix + b * (B + 1) + n).to(tl.int64)
    left = rounds
    while (left > 0) & (tl.max(active.to(tl.int32), 0) > 0):
        sum_l, sum_ll, sum_lw = _code_sums(
            keys, prefix, mass, mids, level_fixed, 0, b, n, tau, scale, WEIGHTED, N_LEVELS, B
        )
        det = wide * sum_ll - sum_l * sum_l
        top = (wide * sum_lw - sum_l * sum_w).to(tl.float64)
        solved = top / tl.where(det > 0, det, 1).to(tl.float64) / unit
        shift = (sum_w.to(tl.float64) - sum_l.to(tl.float64) * unit * solved) / wide.to(tl.float64)
        wanted = (solved / factor.to(tl.float64)).to(tl.float32)
        center = (shift / factor.to(tl.float64)).to(tl.float32)
        active = active & (det > 0) & (wanted > 0.0)
        new_tau_code = encode(center, tau_inverse, tau_offset)
        new_scale_code = encode(wanted, scale_inverse, scale_offset)
        new_tau = decode(new_tau_code, tau_step, tau_offset)
        new_scale = decode(new_scale_code, scale_step, scale_offset)
        _, found = score(
            keys, prefix, mass, mids, levels, table, b, n, new_tau, new_scale, factor, WEIGHTED,
            N_LEVELS, B,
        )  # fmt: skip
        active = active & (found < error)
        tau, scale = tl.where(active, new_tau, tau), tl.where(active, new_scale, scale)
        tau_code = tl.where(active, new_tau_code, tau_code)
        scale_code = tl.where(active, new_scale_code, scale_code)
        error = tl.where(active, found, error)
        left -= 1
    tl.store(tau_out + b, tau, mask=real)
    tl.store(scale_out + b, scale, mask=real)
    tl.store(tau_codes + b, tau_code.to(tl.int32).to(tl.uint8), mask=real)
    tl.store(scale_codes + b, scale_code.to(tl.int32).to(tl.uint8), mask=real)
    tl.store(errors + b, error, mask=real)


@triton.jit(
    do_not_specialize=["cols", "per_row", "blocks", "rounds"],
    do_not_specialize_on_alignment=["grids"],
)
def refine_zero_points(
    keys, prefix, mass, profile, grids, mids, levels, level_fixed, table,
    tau_out, scale_out, tau_codes, scale_codes, errors, cols, per_row, blocks, rounds,
    WEIGHTED: tl.constexpr, LEVEL_UNIT: tl.constexpr, N_LEVELS: tl.constexpr, B: tl.constexpr,
    NB: tl.constexpr,
):  # fmt: skip
    """`refine` with integer zero points: each neighbour has its own least-squares scale."""
    number = tl.program_id(0) * NB + tl.arange(0, NB)
    real = number < blocks
    b = tl.minimum(number, blocks - 1)
    n = tl.minimum(cols - b % per_row * B, B)
    factor = tl.load(profile + FACTOR * blocks + b)
    grid = grids + b // GROUP * GRID_COLUMNS
    scale_step, scale_offset = tl.load(grid + 3), tl.load(grid + 4)
    scale_inverse = tl.load(grid + 5)
    tau, scale = tl.load(tau_out + b), tl.load(scale_out + b)
    zero = tl.load(tau_codes + b).to(tl.int32)
    scale_code = tl.load(scale_codes + b).to(tl.float32)
    error = tl.load(errors + b)
    active = real & (tl.load(profile + LO * blocks + b) != tl.load(profile + HI * blocks + b))
    left = rounds
    while (left > 0) & (tl.max(active.to(tl.int32), 0) > 0):
        before, around = error, zero
        from_tau, from_scale = tau, scale
        for i in range(3):
            z = around + tl.where(i == 1, -1, tl.where(i == 2, 1, 0))
            usable = active & (z >= 0) & (z < N_LEVELS)
            z = tl.minimum(tl.maximum(z, 0), N_LEVELS - 1)
            base = tl.load(level_fixed + z)
            _, bottom, top = _code_sums(
                keys, prefix, mass, mids, level_fixed, base, b, n, from_tau, from_scale, WEIGHTED,
                N_LEVELS, B,
            )  # fmt: skip
            usable = usable & (bottom > 0) & (top > 0)
            ratio = top.to(tl.float64) / tl.where(bottom > 0, bottom, 1).to(tl.float64)
            wanted = (ratio * LEVEL_UNIT / factor.to(tl.float64)).to(tl.float32)
            new_code = encode(wanted, scale_inverse, scale_offset)
            new_scale = decode(new_code, scale_step, scale_offset)
            new_tau = negative_product(tl.load(levels + z), new_scale)
            _, found = score(
                keys, prefix, mass, mids, levels, table, b, n, new_tau, new_scale, factor, WEIGHTED,
                N_LEVELS, B,
            )  # fmt: skip
            better = usable & (wanted > 0.0) & (found < error)
            tau, scale = tl.where(better, new_tau, tau), tl.where(better, new_scale, scale)
            zero = tl.where(better, z, zero)
            scale_code = tl.where(better, new_code, scale_code)
            error = tl.where(better, found, error)
        active = active & (error < before)
        left -= 1
    tl.store(tau_out + b, tau, mask=real)
    tl.store(scale_out + b, scale, mask=real)
    tl.store(tau_codes + b, zero.to(tl.uint8), mask=real)
    tl.store(scale_codes + b, scale_code.to(tl.int32).to(tl.uint8), mask=real)
    tl.store(errors + b, error, mask=real)
