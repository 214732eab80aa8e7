# mypy: disallow-untyped-defs=False
"""Device functions that every kernel shares: rounding, the 8-bit grids, positions among keys.

All are IEEE binary32 operations rounded one by one: kernels are launched with contraction off
(`LAUNCH`), divisions are `div_rn`, and rounding to integers is written out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from irq_convert.core import codebook as _codebook
from irq_convert.core.blocks import GROUP_SIZE
from irq_convert.core.kernels import group as _group
from irq_convert.core.kernels import search as _search

PLAIN = tl.constexpr(_group.PLAIN)
RANGE = tl.constexpr(_group.RANGE)
JOINT = tl.constexpr(_group.JOINT)
INTEGER = tl.constexpr(_group.INTEGER)
ERROR = tl.constexpr(_search.ERROR)
INFINITY = tl.constexpr(float("inf"))
WHOLE = tl.constexpr(2.0**23)

LO, HI, CENTER, HALF, NEUTRAL, WIDEST, RADIUS, FACTOR = (tl.constexpr(i) for i in range(8))
"""Rows of a profile, float32 `[8, blocks]`: `kernels.group.profile` and the fixed-point factor."""
PROFILE_ROWS = 8
GROUP = tl.constexpr(GROUP_SIZE)
MOST_BITS = tl.constexpr(_codebook.MOST_BITS)
"""Bits of the widest code, so bytes of eight of them: one int32 holds those."""
GRID_COLUMNS = tl.constexpr(6)
"""Columns of the grids, float32 `[groups, 6]`: step, offset, 1 / step of tau, then of scale."""

LAUNCH = {"enable_fp_fusion": False}
"""Launch options of every kernel: a product and a sum are two roundings, never one."""


@triton.jit
def round_even(x):
    """The nearest integer, ties to even, as float32; exact for every finite `x`."""
    big = tl.where(x < 0.0, -WHOLE, WHOLE)
    # From 2**23 on a float32 is an integer, so the sum rounds to one.
    return tl.where(tl.abs(x) < WHOLE, (x + big) - big, x)


@triton.jit
def round_down(x):
    """The largest integer up to `x`, as float32. (`tl.floor` takes denormals for zero.)"""
    near = round_even(x)
    return tl.where(near > x, near - 1.0, near)


@triton.jit
def round_up(x):
    """The smallest integer from `x` on, as float32."""
    near = round_even(x)
    return tl.where(near < x, near + 1.0, near)


@triton.jit
def encode(value, inverse, offset):
    """The nearest code of a grid, float32 from 0 to 255."""
    return tl.minimum(tl.maximum(round_even(value * inverse) - offset, 0.0), 255.0)


@triton.jit
def decode(code, step, offset):
    """`step * (code + offset)`."""
    return step * (code + offset)


@triton.jit
def negative_product(level, scale):
    """`-(level * scale)`, the tau of an integer zero point; never minus zero."""
    return 0.0 - level * scale


@triton.jit
def block_factor(lo, hi, BITS: tl.constexpr):
    """The power of two that takes weights from `lo` to `hi` to `BITS` bits of fixed point."""
    top = tl.maximum(tl.abs(lo), tl.abs(hi))
    exponent = tl.maximum(top.to(tl.int32, bitcast=True) >> 23, 27) - 126
    return ((BITS - exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def count_below(keys, base, edge, B: tl.constexpr):
    """How many of the `B` sorted keys at `keys + base` lie below `edge`, int32 of its shape."""
    found = tl.zeros(edge.shape, tl.int32)
    for i in tl.static_range(1, 11):
        if B >> i >= 1:
            key = tl.load(keys + base + found + ((B >> i) - 1))
            found += tl.where(key < edge, B >> i, 0)
    key = tl.load(keys + base + found)
    return found + tl.where(key < edge, 1, 0)
