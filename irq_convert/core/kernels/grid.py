"""The 8-bit second level in scalar float32: fit a grid to a range, encode, decode.

A grid is `(step, offset)` with an integer-valued offset, and stands for the 256 values
`step * (code + offset)`: one rounding, so every implementation decodes the same bits, and zero is
on the grid whenever the range holds it. `core.portable.grid` is the same in torch.
"""

from __future__ import annotations

import numpy as np

from irq_convert.core.kernels.jit import kernel

F32 = np.float32
SPAN = F32(254.0)
FINEST = F32(2.0**-20)
TINY = F32(2.0**-126)
ANCHOR_TRIES = 16


@kernel
def fit_grid(low, high, anchor):
    """`(step, offset)` whose 256 values cover `[low, high]`.

    A nonzero `anchor` (the value of a constant block) is hit exactly where a slightly coarser
    step allows it.
    """
    if low == high:
        if low == F32(0.0):
            return F32(0.0), F32(0.0)
        return abs(low), F32(1.0) if low > F32(0.0) else F32(-1.0)
    step = max((high - low) / SPAN, max(abs(low), abs(high)) * FINEST, TINY)
    if anchor != F32(0.0):
        parts = np.floor(abs(anchor) / step)
        for _ in range(ANCHOR_TRIES):
            if parts < F32(1.0):
                break
            trial = abs(anchor) / parts
            if trial * parts == abs(anchor) and trial >= step:
                step = trial
                break
            parts -= F32(1.0)
    return step, np.floor(low / step)


@kernel
def encode(value, inverse, offset):
    """The nearest code as a float32 from 0 to 255; `inverse` is `1 / step`, or 0 for step 0."""
    code = np.rint(value * inverse) - offset
    return min(F32(255.0), max(F32(0.0), code))


@kernel
def decode(code, step, offset):
    """`step * (code + offset)`."""
    return step * (code + offset)
