# mypy: disallow-untyped-defs=False
"""Statistics of what was stored: integer sums of entropy, and energies added in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from irq_convert.core.triton.arithmetic import (
    CENTER,
    FACTOR,
    GROUP,
    HI,
    LO,
    NEUTRAL,
    block_factor,
)
from irq_convert.core.triton.score import score

CHUNK = tl.constexpr(32)


@triton.jit(do_not_specialize=["cols", "per_row", "blocks"])
def measure(
    keys, prefix, profile, tau, scale, errors, squares, mids, levels, table, sums, energies,
    cols, per_row, blocks,
    UNIFORM: tl.constexpr, WEIGHTED: tl.constexpr, PLAIN_BITS: tl.constexpr,
    N_LEVELS: tl.constexpr, B: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Entropy sums int64 `[2, blocks]`, uncalibrated and stored; energies float64 `[2, blocks]`.

    No share weighs the energies: after a weighted search, `prefix` and `squares` are those of the
    keys alone in `PLAIN_BITS` bits, and errors are measured anew.
    """
    number = tl.program_id(0) * NB + tl.arange(0, NB)
    real = number < blocks
    b = tl.minimum(number, blocks - 1)
    n = tl.minimum(cols - b % per_row * B, B)
    if WEIGHTED:
        lo, hi = tl.load(profile + LO * blocks + b), tl.load(profile + HI * blocks + b)
        factor = block_factor(lo, hi, PLAIN_BITS)
    else:
        factor = tl.load(profile + FACTOR * blocks + b)
    base = tl.zeros((NB,), tl.float32)
    if UNIFORM:
        base = tl.load(profile + CENTER * blocks + b)
    neutral = tl.load(profile + NEUTRAL * blocks + b)
    plain, _ = score(
        keys, prefix, prefix, mids, levels, table, b, n, base, neutral, factor, False, N_LEVELS, B
    )
    stored, error = score(
        keys, prefix, prefix, mids, levels, table, b, n, tl.load(tau + b), tl.load(scale + b),
        factor, False, N_LEVELS, B,
    )  # fmt: skip
    if not WEIGHTED:
        error = tl.load(errors + b)
    tl.store(sums + b, plain.to(tl.int64), mask=real)
    tl.store(sums + blocks + b, stored.to(tl.int64), mask=real)
    wide = factor.to(tl.float64)
    unit = 1.0 / (wide * wide)
    square = tl.load(squares + b)
    tl.store(energies + b, square.to(tl.float64) * unit, mask=real)
    wrong = (error + square).to(tl.float64) * unit
    tl.store(energies + blocks + b, wrong, mask=real)


@triton.jit(
    do_not_specialize=["blocks", "groups"], do_not_specialize_on_alignment=["counts", "totals"]
)
def add_up(sums, energies, bad, counts, totals, blocks, groups, NG: tl.constexpr):
    """Totals of `NG` groups, block after block: int64 `[groups, 3]` and float64 `[groups, 2]`."""
    g = tl.program_id(0) * NG + tl.arange(0, NG)
    plain = tl.zeros((NG,), tl.int64)
    stored = tl.zeros((NG,), tl.int64)
    unusable = tl.zeros((NG,), tl.int64)
    for first in range(0, GROUP, CHUNK):
        b = g[:, None] * GROUP + first + tl.arange(0, CHUNK)[None, :]
        real = b < blocks
        plain += tl.sum(tl.load(sums + b, mask=real, other=0), 1)
        stored += tl.sum(tl.load(sums + blocks + b, mask=real, other=0), 1)
        unusable += tl.sum(tl.load(bad + b, mask=real, other=0).to(tl.int64), 1)
    energy = tl.zeros((NG,), tl.float64)
    error = tl.zeros((NG,), tl.float64)
    for i in range(GROUP):
        b = g * GROUP + i
        energy += tl.load(energies + b, mask=b < blocks, other=0.0)
        error += tl.load(energies + blocks + b, mask=b < blocks, other=0.0)
    mask = g < groups
    tl.store(counts + g * 3, plain, mask=mask)
    tl.store(counts + g * 3 + 1, stored, mask=mask)
    tl.store(counts + g * 3 + 2, unusable, mask=mask)
    tl.store(totals + g * 2, energy, mask=mask)
    tl.store(totals + g * 2 + 1, error, mask=mask)
