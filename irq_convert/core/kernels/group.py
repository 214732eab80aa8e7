"""What a group of blocks needs before its search: sorted keys, profiles, the second level."""

from __future__ import annotations

import numpy as np

from irq_convert.core.kernels.grid import F32, fit_grid
from irq_convert.core.kernels.jit import kernel
from irq_convert.core.kernels.sort import LANES, sort_lanes

PLAIN, SHIFT, RANGE, JOINT, INTEGER = 0, 1, 2, 3, 4
LIMIT = F32(2.0**120)


@kernel
def load_sorted(weights, first, blocks, per_row, block_size, keys, network):
    """Sort blocks `first .. first + blocks` into `keys`; returns how many weights are unusable."""
    cols = weights.shape[1]
    bad = 0
    for batch in range((blocks + LANES - 1) // LANES):
        lanes = keys[batch]
        for lane in range(LANES):
            block = batch * LANES + lane
            n = 0
            if block < blocks:
                row = (first + block) // per_row
                start = (first + block - row * per_row) * block_size
                n = min(block_size, cols - start)
                source = weights[row, start : start + n]
                for i in range(n):
                    x = source[i]
                    bad += 0 if abs(x) < LIMIT else 1
                    lanes[i * LANES + lane] = x + F32(0.0)  # -0.0 becomes 0.0
            for i in range(n, block_size):
                lanes[i * LANES + lane] = F32(np.inf)
        if bad == 0:
            sort_lanes(lanes, network)
    return bad


@kernel
def profile(lanes, lane, n, plan, out):
    """`out` = lo, hi, center, half range, plain scale, widest scale, search radius of tau.

    The center is where calibration starts: the lower median for normal-float levels, the middle
    of the range for uniform ones, and zero for uncalibrated normal-float.
    """
    uniform, path, radius = plan.uniform, plan.path, plan.radius
    lo, hi = lanes[lane], lanes[(n - 1) * LANES + lane]
    med = lanes[(n - 1) // 2 * LANES + lane]
    half = (hi - lo) * F32(0.5)
    mid = (lo + hi) * F32(0.5)
    reach = max(hi - med, med - lo)
    if uniform:
        out[2] = mid
        out[4] = half
        out[6] = radius * (abs(mid) if path == RANGE else half)
        out[5] = half + radius * half if path == RANGE else half
    else:
        out[2] = F32(0.0) if path == PLAIN else med
        out[4] = max(abs(lo), abs(hi))
        out[6] = radius * reach
        out[5] = out[4] if path == PLAIN else reach + out[6]
    out[0], out[1], out[3] = lo, hi, half


@kernel
def _narrowest(profile, plan):
    """The smallest scale that the search of this block may ask for."""
    if plan.path == RANGE:
        return (profile[3] - plan.radius * profile[3]) * plan.floor
    if plan.path == INTEGER:
        return profile[3] * plan.shrinks[1] * plan.floor
    if plan.path == PLAIN or plan.uniform:
        return profile[4] * plan.floor
    return max(profile[3], profile[5] - F32(2.0) * profile[6]) * plan.floor


@kernel
def fit_group(profiles, blocks, reach, plan, tau_grid, scale_grid):
    """Second level of one group, known before any search: `(step, offset, 1 / step)` each.

    `reach` is how far taus may lie outside the centers. It is the median of the blocks' radii,
    not the largest: one outlier block must not coarsen the grid of the others.
    """
    tau_low, tau_high, scale_low, scale_high = F32(np.inf), F32(-np.inf), F32(np.inf), F32(-np.inf)
    anchor = F32(0.0)
    at = 4 if plan.path == INTEGER else 2  # a constant block is exact at its scale, or its tau
    for b in range(blocks):
        p = profiles[b]
        spread = p[6] if plan.path == RANGE else reach
        tau_low = min(tau_low, p[2] - spread)
        tau_high = max(tau_high, p[2] + spread)
        scale_low = min(scale_low, _narrowest(p, plan))
        scale_high = max(scale_high, p[5])
        if anchor == F32(0.0) and p[0] == p[1] and p[at] != F32(0.0):
            anchor = p[at]
    if plan.path == INTEGER:
        tau_grid[0], tau_grid[1] = F32(0.0), F32(0.0)
        scale_grid[0], scale_grid[1] = fit_grid(scale_low, scale_high, anchor)
    else:
        tau_grid[0], tau_grid[1] = fit_grid(tau_low, tau_high, anchor)
        scale_grid[0], scale_grid[1] = fit_grid(scale_low, scale_high, F32(0.0))
    for grid in (tau_grid, scale_grid):
        grid[2] = F32(1.0) / grid[0] if grid[0] > F32(0.0) else F32(0.0)
