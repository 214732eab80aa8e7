# mypy: disallow-untyped-defs=False
"""The second level of every group of 256 blocks, from the profiles of its blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from irq_convert.core.kernels import grid as _grid
from irq_convert.core.triton.arithmetic import (
    CENTER,
    GRID_COLUMNS,
    GROUP,
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
    round_down,
)

SPAN = tl.constexpr(float(_grid.SPAN))
FINEST = tl.constexpr(float(_grid.FINEST))
TINY = tl.constexpr(float(_grid.TINY))
TRIES = tl.constexpr(_grid.ANCHOR_TRIES)


@triton.jit
def _fit(low, high, anchor):
    """`(step, offset, 1 / step)` of grids that cover `[low, high]`: `kernels.grid.fit_grid`."""
    ones = tl.full(low.shape, 1.0, tl.float32)
    top = tl.maximum(tl.abs(low), tl.abs(high))
    step = tl.maximum(tl.maximum(tl.div_rn(high - low, ones * SPAN), top * FINEST), TINY)
    size = tl.abs(anchor)
    parts = round_down(tl.div_rn(size, step))
    open_ = size != 0.0
    for _ in range(TRIES):
        trial = tl.div_rn(size, tl.where(parts >= 1.0, parts, 1.0))
        hit = open_ & (parts >= 1.0) & (trial * parts == size) & (trial >= step)
        step = tl.where(hit, trial, step)
        open_ = open_ & ~hit
        parts -= 1.0
    offset = round_down(tl.div_rn(low, step))
    same = low == high
    step = tl.where(same, tl.abs(low), step)
    sign = tl.where(low > 0.0, 1.0, tl.where(low < 0.0, -1.0, 0.0))
    offset = tl.where(same, sign, offset)
    some = step > 0.0
    inverse = tl.where(some, tl.div_rn(ones, tl.where(some, step, 1.0)), 0.0)
    return step, offset, inverse


@triton.jit(do_not_specialize=["blocks", "groups"], do_not_specialize_on_alignment=["grids"])
def fit_groups(
    profile, settings, grids, blocks, groups,
    PATH: tl.constexpr, UNIFORM: tl.constexpr, NG: tl.constexpr,
):  # fmt: skip
    """Fit both grids of `NG` groups into `grids`, float32 `[groups, 6]`: `kernels.fit_group`."""
    g = tl.program_id(0) * NG + tl.arange(0, NG)
    i = tl.arange(0, GROUP)[None, :]
    b = g[:, None] * GROUP + i
    real = b < blocks
    many = tl.minimum(blocks - g * GROUP, GROUP)
    lo = tl.load(profile + LO * blocks + b, mask=real, other=0.0)
    hi = tl.load(profile + HI * blocks + b, mask=real, other=0.0)
    center = tl.load(profile + CENTER * blocks + b, mask=real, other=0.0)
    half = tl.load(profile + HALF * blocks + b, mask=real, other=0.0)
    neutral = tl.load(profile + NEUTRAL * blocks + b, mask=real, other=0.0)
    widest = tl.load(profile + WIDEST * blocks + b, mask=real, other=0.0)
    radius = tl.load(profile + RADIUS * blocks + b, mask=real, other=0.0)

    floor = tl.load(settings + 1)
    if PATH == RANGE:
        narrowest = (half - tl.load(settings) * half) * floor
    elif PATH == INTEGER:
        narrowest = half * tl.load(settings + 3) * floor
    elif PATH == PLAIN or UNIFORM:
        narrowest = neutral * floor
    else:
        narrowest = tl.maximum(half, widest - 2.0 * radius) * floor
    narrow = tl.min(tl.where(real, narrowest, INFINITY), 1)
    wide = tl.max(tl.where(real, widest, -INFINITY), 1)

    value = center
    if PATH == INTEGER:
        value = neutral
    flat = real & (lo == hi) & (value != 0.0)
    first = tl.min(tl.where(flat, i, GROUP), 1)
    anchor = tl.sum(tl.where(i == first[:, None], value, 0.0), 1)
    none = tl.zeros((NG,), tl.float32)
    tau_step, tau_offset, tau_inverse = none, none, none
    if PATH == INTEGER:
        scale_step, scale_offset, scale_inverse = _fit(narrow, wide, anchor)
    else:
        around = radius
        if PATH != RANGE:
            # The median radius: one outlier block must not coarsen the grid of the others.
            ranked = tl.sort(tl.where(real, radius, INFINITY), dim=1)
            middle = tl.sum(tl.where(i == (many // 2)[:, None], ranked, 0.0), 1)
            around = tl.zeros_like(radius) + middle[:, None]
        low = tl.min(tl.where(real, center - around, INFINITY), 1)
        high = tl.max(tl.where(real, center + around, -INFINITY), 1)
        tau_step, tau_offset, tau_inverse = _fit(low, high, anchor)
        scale_step, scale_offset, scale_inverse = _fit(narrow, wide, none)
    at, mask = grids + g * GRID_COLUMNS, g < groups
    tl.store(at, tau_step, mask=mask)
    tl.store(at + 1, tau_offset, mask=mask)
    tl.store(at + 2, tau_inverse, mask=mask)
    tl.store(at + 3, scale_step, mask=mask)
    tl.store(at + 4, scale_offset, mask=mask)
    tl.store(at + 5, scale_inverse, mask=mask)
