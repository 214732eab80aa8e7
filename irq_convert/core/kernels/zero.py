"""The search with integer zero points: tau is minus a level times the scale, so 0 is a code.

Such a block is `step * (code - zero)` with `step = 2 * scale / (levels - 1)`: what serving engines
call asymmetric integers. Every pair left is tried: the zero points around the one that fits the
block's range (with 0 in it), each with every storable scale in the window.
"""

from __future__ import annotations

import numpy as np

from irq_convert.core.kernels.fixed import bin_mass
from irq_convert.core.kernels.grid import F32, decode, encode
from irq_convert.core.kernels.jit import kernel


@kernel
def zero_tau(z, scale, levels):
    """`-(level * scale)`, float32; never minus zero."""
    return F32(0.0) - levels[z] * scale


@kernel
def _fitting_scale(z, low, high, levels, top):
    """The smallest scale at which zero point `z` reaches from `low` to `high`."""
    down = F32(0.0)
    if low < F32(0.0):
        down = F32(np.inf) if z == 0 else -low / (F32(1.0) + levels[z])
    up = F32(0.0)
    if high > F32(0.0):
        up = F32(np.inf) if z == top else high / (F32(1.0) - levels[z])
    return max(down, up)


@kernel
def zero_profile(plan, levels, n_levels, out):
    """`group.profile` for this path: `out[2:7]` = tau, scale, scale, widest scale, zero point."""
    low, high = min(out[0], F32(0.0)), max(out[1], F32(0.0))
    top = n_levels - 1
    z, scale = 0, F32(0.0)
    if low < high:
        # Not the last one yet: rounding may reach it although something lies above zero.
        z = min(top - 1, int(np.floor(-low / (high - low) * F32(top))))
        scale = _fitting_scale(z, low, high, levels, top)
        if z < top:
            other = _fitting_scale(z + 1, low, high, levels, top)
            if other < scale:
                z, scale = z + 1, other
    out[2] = zero_tau(z, scale, levels)
    out[3] = scale
    out[4] = scale
    out[5] = scale * max(F32(1.0), plan.shrinks[0])
    out[6] = F32(z)


@kernel
def zero_path(profile, z, plan, levels, work):
    """Every storable scale of the window with zero point `z`; returns how many."""
    step, offset, inverse = work.scale_grid[0], work.scale_grid[1], work.scale_grid[2]
    first = int(encode(profile[3] * plan.shrinks[1], inverse, offset))
    last = int(encode(profile[3] * plan.shrinks[0], inverse, offset))
    size = last - first + 1
    for j in range(size):
        s = decode(F32(first + j), step, offset)
        work.tau[j] = zero_tau(z, s, levels)
        work.scale[j] = s
        work.tau_code[j] = np.int32(z)
        work.scale_code[j] = np.int32(first + j)
    return size


@kernel
def zero_single(z, scale, levels, work):
    """One candidate: zero point `z` and the storable scale nearest to `scale`."""
    code = encode(scale, work.scale_grid[2], work.scale_grid[1])
    s = decode(code, work.scale_grid[0], work.scale_grid[1])
    work.tau[0] = zero_tau(z, s, levels)
    work.scale[0] = s
    work.tau_code[0] = np.int32(z)
    work.scale_code[0] = np.int32(code)
    return 1


@kernel
def solve_scale(edges, z, tables, weighted, mass, prefix, factor):
    """Least-squares scale for fixed codes and zero point: `sum(l w) / sum(l l)`, exact sums.

    `l` is the level less that of the zero point.
    """
    top = np.int64(0)
    bottom = np.int64(0)
    for k in range(tables.n_levels):
        level = tables.level_fixed[k] - tables.level_fixed[z]
        many = bin_mass(edges, k, weighted, mass)
        top += level * np.int64(prefix[edges[k + 1]] - prefix[edges[k]])
        bottom += level * level * many
    if bottom <= 0 or top <= 0:
        return F32(-1.0)
    return F32(np.float64(top) / np.float64(bottom) * np.float64(1 << tables.level_bits) / factor)
