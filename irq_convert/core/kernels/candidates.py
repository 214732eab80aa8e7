"""Candidates of one block: the storable (tau, scale) pairs along a path.

Each function fills `work.tau`, `work.scale` (decoded from the 8-bit grids) and their codes, and
returns how many there are. Along each path every boundary moves one way, up to the rounding of
the two statistics; `score` relies on it.
"""

from __future__ import annotations

import numpy as np

from irq_convert.core.kernels.grid import F32, decode, encode
from irq_convert.core.kernels.jit import kernel

MOST = 256
ROOM = MOST + 64
STRIDED = 32


@kernel
def code_window(center, radius, inverse, offset):
    """First and last code whose value lies in `center +- radius`; the nearest if there is none."""
    # Clamped as float32: beside an outlier the other blocks' grid is too fine for any integer.
    first = int(max(F32(0.0), np.ceil((center - radius) * inverse - offset)))
    last = int(min(F32(255.0), np.floor((center + radius) * inverse - offset)))
    if last < first:
        first = last = int(encode(center, inverse, offset))
    return first, last


@kernel
def single(t, s, work):
    """One candidate: the storable pair nearest to `(t, s)`."""
    tau_at = encode(t, work.tau_grid[2], work.tau_grid[1])
    scale_at = encode(s, work.scale_grid[2], work.scale_grid[1])
    work.tau[0] = decode(tau_at, work.tau_grid[0], work.tau_grid[1])
    work.scale[0] = decode(scale_at, work.scale_grid[0], work.scale_grid[1])
    work.tau_code[0] = np.int32(tau_at)
    work.scale_code[0] = np.int32(scale_at)
    return 1


@kernel
def shift_path(profile, uniform, shrink, sparse, work):
    """Every storable tau within the search radius of the center.

    The scale is `shrink` times `max(hi - tau, tau - lo)` for normal-float levels (IR-QLoRA's
    ICQ) and `shrink` times half the range for uniform ones. `sparse` thins long windows.
    """
    lo, hi, center, half, radius = profile[0], profile[1], profile[2], profile[3], profile[6]
    tau_step, tau_offset = work.tau_grid[0], work.tau_grid[1]
    scale_step, scale_offset, inverse = work.scale_grid[0], work.scale_grid[1], work.scale_grid[2]
    first, last = code_window(center, radius, work.tau_grid[2], tau_offset)
    stride = (last - first) // STRIDED + 1 if sparse else 1
    size = (last - first) // stride + 1
    for j in range(size):
        code = first + j * stride
        t = decode(F32(code), tau_step, tau_offset)
        right = hi - t
        left = t - lo
        base = half if uniform else (right if right > left else left)
        scale_at = encode(base * shrink, inverse, scale_offset)
        work.tau[j] = t
        work.scale[j] = decode(scale_at, scale_step, scale_offset)
        work.tau_code[j] = np.int32(code)
        work.scale_code[j] = np.int32(scale_at)
    return size


@kernel
def range_path(profile, radius, work):
    """Every storable scale from `1 - radius` to `1 + radius` halves of the range, tau likewise.

    This scales both ends of the range by one factor, as the integer variant of IR-QLoRA does. The
    best factor is often an end of the window, so the ends are rounded to the nearest code, not
    inward.
    """
    center, half = profile[2], profile[3]
    inverse, offset = work.scale_grid[2], work.scale_grid[1]
    first = int(encode(half - radius * half, inverse, offset))
    last = int(encode(half + radius * half, inverse, offset))
    ratio = center / half
    size = last - first + 1
    for j in range(size):
        s = decode(F32(first + j), work.scale_grid[0], work.scale_grid[1])
        tau_at = encode(s * ratio, work.tau_grid[2], work.tau_grid[1])
        work.tau[j] = decode(tau_at, work.tau_grid[0], work.tau_grid[1])
        work.scale[j] = s
        work.tau_code[j] = np.int32(tau_at)
        work.scale_code[j] = np.int32(first + j)
    return size


@kernel
def pad(tau, scale, size):
    """Repeat the last candidate up to a whole vector so that spare lanes hold finite values."""
    for j in range(size, (size + 63) // 64 * 64):
        tau[j] = tau[size - 1]
        scale[j] = scale[size - 1]
