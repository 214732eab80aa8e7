# mypy: disallow-untyped-defs=False
"""The search: every storable pair along a path is scored, `C` candidates of `NB` blocks at once.

The paths, the order of the candidates and the rule that breaks ties are those of
`kernels.candidates` and `kernels.search`: most entropy, then the lower squared error, then the pair
nearest to where the search starts, then the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from irq_convert.core.kernels import candidates as _candidates
from irq_convert.core.triton.arithmetic import (
    CENTER,
    ERROR,
    FACTOR,
    GRID_COLUMNS,
    GROUP,
    HALF,
    HI,
    INFINITY,
    INTEGER,
    JOINT,
    LO,
    NEUTRAL,
    PLAIN,
    RADIUS,
    RANGE,
    decode,
    encode,
    negative_product,
    round_down,
    round_up,
)
from irq_convert.core.triton.score import score

STRIDED = tl.constexpr(_candidates.STRIDED)
MOST_INT32 = tl.constexpr(2**31 - 1)
MOST_INT64 = tl.constexpr(2**63 - 1)


@triton.jit
def window(
    center, half, radius, flat, settings, tau_step, tau_offset, tau_inverse, scale_offset,
    scale_inverse, neutral, PATH: tl.constexpr,
):  # fmt: skip
    """`(first code, stride, size)` of the candidates; the code is of the scale or of tau."""
    if PATH == PLAIN:
        first = tl.zeros_like(center)
        last = first
    elif PATH == RANGE:
        around = tl.load(settings) * half
        first = encode(half - around, scale_inverse, scale_offset)
        last = encode(half + around, scale_inverse, scale_offset)
    elif PATH == INTEGER:
        alone = encode(neutral, scale_inverse, scale_offset)
        first = encode(half * tl.load(settings + 3), scale_inverse, scale_offset)
        last = encode(half * tl.load(settings + 2), scale_inverse, scale_offset)
        first, last = tl.where(flat, alone, first), tl.where(flat, alone, last)
    else:
        first = tl.maximum(round_up((center - radius) * tau_inverse - tau_offset), 0.0)
        last = tl.minimum(round_down((center + radius) * tau_inverse - tau_offset), 255.0)
        nearest = encode(center, tau_inverse, tau_offset)
        empty = last < first
        first, last = tl.where(empty, nearest, first), tl.where(empty, nearest, last)
    if PATH != INTEGER:
        last = tl.where(flat, first, last)
    start, span = first.to(tl.int32), (last - first).to(tl.int32)
    stride = tl.full(span.shape, 1, tl.int32)
    if PATH == JOINT:
        stride = span // STRIDED + 1
    return start, stride, span // stride + 1


@triton.jit
def candidate(
    code, lo, hi, center, half, neutral, flat, tau_step, tau_offset, tau_inverse, scale_step,
    scale_offset, scale_inverse, shrink, z, levels, PATH: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """`(tau, scale, tau code, scale code)`, all float32 of the shape of `code`, int32."""
    at = code.to(tl.float32)
    if PATH == INTEGER:
        scale = decode(at, scale_step, scale_offset)
        tau = negative_product(tl.load(levels + z), scale)
        return tau, scale, tl.zeros_like(at) + z.to(tl.float32), at
    tau_code = tl.zeros_like(at) + encode(center, tau_inverse, tau_offset)
    if PATH == PLAIN:
        scale_code = tl.zeros_like(at) + encode(neutral, scale_inverse, scale_offset)
    else:
        scale_code = tl.zeros_like(at) + encode(tl.zeros_like(half), scale_inverse, scale_offset)
        if PATH == RANGE:
            ratio = tl.div_rn(center, tl.where(flat, 1.0, half))
            wanted = decode(at, scale_step, scale_offset) * ratio
            moved = encode(wanted, tau_inverse, tau_offset)
            tau_code = tl.where(flat, tau_code, moved)
            scale_code = tl.where(flat, scale_code, at)
        else:
            t = decode(at, tau_step, tau_offset)
            base = tl.zeros_like(t) + half
            if not UNIFORM:
                base = tl.maximum(hi - t, t - lo)
            moved = encode(base * shrink, scale_inverse, scale_offset)
            tau_code = tl.where(flat, tau_code, at)
            scale_code = tl.where(flat, scale_code, moved)
    tau = decode(tau_code, tau_step, tau_offset)
    scale = decode(scale_code, scale_step, scale_offset)
    return tau, scale, tau_code, scale_code


@triton.jit
def _best_on_path(
    keys, prefix, mass, mids, levels, table, b, n, factor, lo, hi, center, half, neutral, flat,
    tau_step, tau_offset, tau_inverse, scale_step, scale_offset, scale_inverse,
    first, stride, size, shrink, z,
    PATH: tl.constexpr, OBJECTIVE: tl.constexpr, UNIFORM: tl.constexpr, WEIGHTED: tl.constexpr,
    N_LEVELS: tl.constexpr, B: tl.constexpr, NB: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`(entropy sum, error, code)` of each block's winner, `[NB, 1]`; `C` candidates a step."""
    best_total = tl.full((NB, 1), MOST_INT32, tl.int32)
    best_error = tl.full((NB, 1), MOST_INT64, tl.int64)
    best_away = tl.full((NB, 1), INFINITY, tl.float32)
    best_code = tl.zeros((NB, 1), tl.int32)
    most = tl.max(tl.max(size, 1), 0)
    for j0 in range(0, most, C):
        j = j0 + tl.arange(0, C)[None, :]
        valid = j < size
        code = first + tl.minimum(j, size - 1) * stride
        tau, scale, _, _ = candidate(
            code, lo, hi, center, half, neutral, flat, tau_step, tau_offset, tau_inverse,
            scale_step, scale_offset, scale_inverse, shrink, z, levels, PATH, UNIFORM,
        )  # fmt: skip
        total, error = score(
            keys, prefix, mass, mids, levels, table, b, n, tau, scale, factor, WEIGHTED, N_LEVELS,
            B,
        )  # fmt: skip
        if OBJECTIVE == ERROR:
            total = tl.zeros_like(total)
        away = tl.abs(tau - center)
        if (PATH == RANGE) | (PATH == INTEGER):
            away = tl.abs(scale - half)
        low_total = tl.min(tl.where(valid, total, MOST_INT32), 1)[:, None]
        valid = valid & (total == low_total)
        low_error = tl.min(tl.where(valid, error, MOST_INT64), 1)[:, None]
        valid = valid & (error == low_error)
        low_away = tl.min(tl.where(valid, away, INFINITY), 1)[:, None]
        valid = valid & (away == low_away)
        low_code = tl.min(tl.where(valid, code, MOST_INT32), 1)[:, None]
        # A tie in everything stays with the candidate that came first.
        nearer = (low_error == best_error) & (low_away < best_away)
        lower = (low_total == best_total) & ((low_error < best_error) | nearer)
        better = (low_total < best_total) | lower
        best_total = tl.where(better, low_total, best_total)
        best_error = tl.where(better, low_error, best_error)
        best_away = tl.where(better, low_away, best_away)
        best_code = tl.where(better, low_code, best_code)
    return best_total, best_error, best_code


@triton.jit(
    do_not_specialize=["cols", "per_row", "blocks"], do_not_specialize_on_alignment=["grids"]
)
def search(
    keys, prefix, mass, profile, grids, settings, mids, levels, table,
    tau_out, scale_out, tau_codes, scale_codes, errors, cols, per_row, blocks, trials,
    PATH: tl.constexpr, OBJECTIVE: tl.constexpr, UNIFORM: tl.constexpr, WEIGHTED: tl.constexpr,
    N_LEVELS: tl.constexpr, B: tl.constexpr, NB: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Settle `NB` blocks: their pair (float32), its codes (uint8), its error (int64), `[blocks]`.

    `trials` paths are compared: shrink factors for squared error, zero points around the fitting
    one, else one. `settings` is radius, floor and the shrink factors.
    """
    number = tl.program_id(0) * NB + tl.arange(0, NB)[:, None]
    real = number < blocks
    b = tl.minimum(number, blocks - 1)
    n = tl.minimum(cols - b % per_row * B, B)
    lo, hi = tl.load(profile + LO * blocks + b), tl.load(profile + HI * blocks + b)
    center, half = tl.load(profile + CENTER * blocks + b), tl.load(profile + HALF * blocks + b)
    neutral = tl.load(profile + NEUTRAL * blocks + b)
    radius, factor = tl.load(profile + RADIUS * blocks + b), tl.load(profile + FACTOR * blocks + b)
    grid = grids + b // GROUP * GRID_COLUMNS
    tau_step, tau_offset, tau_inverse = tl.load(grid), tl.load(grid + 1), tl.load(grid + 2)
    scale_step, scale_offset = tl.load(grid + 3), tl.load(grid + 4)
    scale_inverse = tl.load(grid + 5)
    flat = lo == hi
    fitting = tl.zeros((NB, 1), tl.int32)
    if PATH == INTEGER:
        fitting = radius.to(tl.int32)
    first, stride, size = window(
        center, half, radius, flat, settings, tau_step, tau_offset, tau_inverse, scale_offset,
        scale_inverse, neutral, PATH,
    )  # fmt: skip
    best_total = tl.full((NB, 1), MOST_INT32, tl.int32)
    best_error = tl.full((NB, 1), MOST_INT64, tl.int64)
    best_code = tl.zeros((NB, 1), tl.int32)
    best_shrink = tl.zeros((NB, 1), tl.float32)
    best_z = fitting
    for trial in range(trials):
        shrink = tl.load(settings + 2)
        z, usable = fitting, real
        if PATH == INTEGER:
            z = fitting + tl.where(trial == 1, -1, tl.where(trial == 2, 1, 0))
            usable = real & (z >= 0) & (z < N_LEVELS) & ((trial == 0) | ~flat)
            z = tl.minimum(tl.maximum(z, 0), N_LEVELS - 1)
        else:
            shrink = tl.load(settings + 2 + trial)
        total, error, code = _best_on_path(
            keys, prefix, mass, mids, levels, table, b, n, factor, lo, hi, center, half, neutral,
            flat, tau_step, tau_offset, tau_inverse, scale_step, scale_offset, scale_inverse,
            first, stride, size, shrink, z, PATH, OBJECTIVE, UNIFORM, WEIGHTED, N_LEVELS, B, NB, C,
        )  # fmt: skip
        lower = (total == best_total) & (error < best_error)
        better = usable & ((total < best_total) | lower)
        best_total = tl.where(better, total, best_total)
        best_error = tl.where(better, error, best_error)
        best_code = tl.where(better, code, best_code)
        best_shrink = tl.where(better, shrink, best_shrink)
        best_z = tl.where(better, z, best_z)
    tau, scale, tau_code, scale_code = candidate(
        best_code, lo, hi, center, half, neutral, flat, tau_step, tau_offset, tau_inverse,
        scale_step, scale_offset, scale_inverse, best_shrink, best_z, levels, PATH, UNIFORM,
    )  # fmt: skip
    tl.store(tau_out + b, tau, mask=real)
    tl.store(scale_out + b, scale, mask=real)
    tl.store(tau_codes + b, tau_code.to(tl.int32).to(tl.uint8), mask=real)
    tl.store(scale_codes + b, scale_code.to(tl.int32).to(tl.uint8), mask=real)
    tl.store(errors + b, best_error, mask=real)
