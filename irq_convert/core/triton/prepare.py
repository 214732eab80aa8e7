# mypy: disallow-untyped-defs=False
"""What each block needs before its search: sorted keys, their sums in fixed point, a profile."""

from __future__ import annotations

import triton
import triton.language as tl

from irq_convert.core import importance as _importance
from irq_convert.core.kernels import group as _group
from irq_convert.core.triton.arithmetic import (
    CENTER,
    FACTOR,
    HALF,
    HI,
    INFINITY,
    INTEGER,
    LO,
    NEUTRAL,
    PLAIN,
    RADIUS,
    RANGE,
    WIDEST,
    block_factor,
    negative_product,
    round_down,
    round_even,
)

LIMIT = tl.constexpr(float(_group.LIMIT))
MOST_INT32 = tl.constexpr(2**31 - 1)
MOST_SHARE = tl.constexpr(_importance.MOST_SHARE)


@triton.jit
def _fitting_scale(z, low, high, levels, TOP: tl.constexpr):
    """The smallest scale at which zero point `z` reaches from `low` to `high`."""
    level = tl.load(levels + z)
    down = tl.where(z == 0, INFINITY, tl.div_rn(-low, 1.0 + level))
    up = tl.where(z == TOP, INFINITY, tl.div_rn(high, 1.0 - level))
    return tl.maximum(tl.where(low < 0.0, down, 0.0), tl.where(high > 0.0, up, 0.0))


@triton.jit
def _zero_point(lo, hi, levels, TOP: tl.constexpr):
    """The zero point that fits a range with 0 in it, and its scale (`kernels.zero`)."""
    low, high = tl.minimum(lo, 0.0), tl.maximum(hi, 0.0)
    some = low < high
    real = tl.div_rn(-low, tl.where(some, high - low, 1.0)) * (TOP * 1.0)
    z = tl.minimum(tl.where(some, round_down(real), 0.0).to(tl.int32), TOP - 1)
    scale = _fitting_scale(z, low, high, levels, TOP)
    after = tl.minimum(z + 1, TOP)
    other = tl.where(z < TOP, _fitting_scale(after, low, high, levels, TOP), INFINITY)
    z, scale = tl.where(other < scale, after, z), tl.minimum(scale, other)
    return tl.where(some, z, 0), tl.where(some, scale, 0.0)


@triton.jit
def _profile(
    lo, hi, med, settings, levels, PATH: tl.constexpr, UNIFORM: tl.constexpr, TOP: tl.constexpr
):  # fmt: skip
    """Center, half range, plain scale, widest scale and radius of the search of each block."""
    radius = tl.load(settings)
    half, middle = (hi - lo) * 0.5, (lo + hi) * 0.5
    reach = tl.maximum(hi - med, med - lo)
    if PATH == INTEGER:
        z, half = _zero_point(lo, hi, levels, TOP)
        center, neutral = negative_product(tl.load(levels + z), half), half
        widest = half * tl.maximum(tl.load(settings + 2), 1.0)
        around = z.to(tl.float32)
    elif UNIFORM:
        center, neutral, widest = middle, half, half
        around = radius * half
        if PATH == RANGE:
            around = radius * tl.abs(middle)
            widest = half + radius * half
    else:
        neutral = tl.maximum(tl.abs(lo), tl.abs(hi))
        around = radius * reach
        center, widest = med, reach + around
        if PATH == PLAIN:
            center, widest = med * 0.0 + 0.0, neutral
    return center, half, neutral, widest, around


@triton.jit
def _sort_pairs(key, share):
    """Sort keys, float32 without NaN, along their rows, and take each one's share along.

    A pair is one integer of 64 bits: above the share, the bits of the key, those of negative ones
    turned over, so that integers are in the order of the keys.
    """
    bits = key.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & MOST_INT32)
    both = tl.sort((order.to(tl.int64) << 32) | share.to(tl.int64), dim=1)
    order = (both >> 32).to(tl.int32)
    bits = order ^ ((order >> 31) & MOST_INT32)
    return bits.to(tl.float32, bitcast=True), (both & MOST_SHARE).to(tl.int32)


@triton.jit
def _store_sums(out, values, b, i, real, B: tl.constexpr, NB: tl.constexpr):
    """Sums of the first 0, 1, ... values of each block, int32 `[blocks, B + 1]`."""
    tl.store(out + b * (B + 1), tl.zeros((NB,), tl.int32), mask=real)
    tl.store(out + b[:, None] * (B + 1) + 1 + i, tl.cumsum(values, 1), mask=real[:, None])


@triton.jit(
    do_not_specialize=["per_row", "blocks"], do_not_specialize_on_alignment=["shares", "owners"]
)
def prepare(
    weights, shares, owners, settings, levels, keys, prefix, mass, plain, profile, squares, bad,
    cols, per_row, blocks,
    PATH: tl.constexpr, UNIFORM: tl.constexpr, WEIGHTED: tl.constexpr, FIXED_BITS: tl.constexpr,
    PLAIN_BITS: tl.constexpr, TOP: tl.constexpr, B: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Sort and profile `NB` blocks of `weights`, `[rows, cols]` float32, float16 or bfloat16.

    Fills `keys` float32 `[blocks, B]` (infinity behind short blocks), `prefix` int32
    `[blocks, B + 1]`, `profile` float32 `[8, blocks]`, `squares` int64 and `bad` int32 `[blocks]`.
    Where `WEIGHTED`, errors of columns count for `shares`, int32 `[matrices, cols]`, of the matrix
    that `owners`, int32 `[rows]`, name: `prefix` sums keys times shares and `mass`, int32 alike,
    shares; `plain` sums, and `squares` are of, keys in `PLAIN_BITS` bits that no share weighs.
    """
    b = tl.program_id(0) * NB + tl.arange(0, NB)
    real = b < blocks
    row = b // per_row
    start = (b - row * per_row) * B
    n = tl.minimum(cols - start, B)
    i = tl.arange(0, B)[None, :]
    inside = real[:, None] & (i < n[:, None])
    at = row.to(tl.int64) * cols + start
    x = tl.load(weights + at[:, None] + i, mask=inside, other=0.0).to(tl.float32)
    good = tl.abs(x) < LIMIT
    tl.store(bad + b, tl.sum((inside & ~good).to(tl.int32), 1), mask=real)
    x = tl.where(good & (x != 0.0), x, 0.0)  # -0.0 becomes 0.0
    key = tl.where(inside, x, INFINITY)
    if WEIGHTED:
        owner = tl.load(owners + row, mask=real, other=0).to(tl.int64)
        of_row = shares + owner * cols + start
        share = tl.load(of_row[:, None] + i, mask=inside, other=0)
        key, share = _sort_pairs(key, share)
    else:
        key = tl.sort(key, dim=1)
    tl.store(keys + b[:, None] * B + i, key, mask=real[:, None])
    lo = tl.min(tl.where(inside, x, INFINITY), 1)
    hi = tl.max(tl.where(inside, x, -INFINITY), 1)
    med = tl.sum(tl.where(i == ((n - 1) // 2)[:, None], key, 0.0), 1)

    factor = block_factor(lo, hi, FIXED_BITS)
    finite = tl.where(inside, key, 0.0)
    whole = round_even(finite * factor[:, None]).to(tl.int32)
    if WEIGHTED:
        _store_sums(prefix, whole * share, b, i, real, B, NB)
        _store_sums(mass, share, b, i, real, B, NB)
        whole = round_even(finite * block_factor(lo, hi, PLAIN_BITS)[:, None]).to(tl.int32)
        _store_sums(plain, whole, b, i, real, B, NB)
    else:
        _store_sums(prefix, whole, b, i, real, B, NB)
    wide = whole.to(tl.int64)
    tl.store(squares + b, tl.sum(wide * wide, 1), mask=real)

    center, half, neutral, widest, around = _profile(
        lo, hi, med, settings, levels, PATH, UNIFORM, TOP
    )
    tl.store(profile + LO * blocks + b, lo, mask=real)
    tl.store(profile + HI * blocks + b, hi, mask=real)
    tl.store(profile + CENTER * blocks + b, center, mask=real)
    tl.store(profile + HALF * blocks + b, half, mask=real)
    tl.store(profile + NEUTRAL * blocks + b, neutral, mask=real)
    tl.store(profile + WIDEST * blocks + b, widest, mask=real)
    tl.store(profile + RADIUS * blocks + b, around, mask=real)
    tl.store(profile + FACTOR * blocks + b, factor, mask=real)
