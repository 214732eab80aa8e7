"""The paths of the exact sweep: how tau and scale move together, as linear pieces in one t.

Coordinates are relative to the center of the search, where t = 0: differences of float32 numbers
are exact there, and an offset of the block costs no precision.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from irq_convert.core.kernels.jit import kernel
from irq_convert.core.kernels.search import ENTROPY


class Book(NamedTuple):
    """A codebook: float32 midpoints and levels, int32 fixed-point `c * log2(c)` by count."""

    mids: np.ndarray  # float32 [n_mids]
    levels: np.ndarray  # float32 [n_mids + 1]
    entropy: np.ndarray  # int32 [block_size + 1]


class Range(NamedTuple):
    """What is searched: `objective` along which paths, and how far."""

    uniform: bool
    objective: int
    radius: float
    shrinks: np.ndarray  # float64 [factors]


class Path(NamedTuple):
    """`tau = center + tau0 + dtau * t`, `s = s0 + ds * t` for t from `lo` to `hi`.

    `unit` is the size of t that moves boundaries across the block.
    """

    center: float
    tau0: float
    dtau: float
    s0: float
    ds: float
    lo: float
    hi: float
    unit: float


@kernel
def linear_piece(keys, n, span, shrink, right):
    """One of the two linear pieces of a path; uniform levels have only the first.

    Normal-float: tau = median + t, `s = shrink * max(hi - tau, tau - lo)`, pieces left and right of
    the middle of the range. Uniform: both ends of the range times 1 + t, or for squared error a
    shift by t at `s = shrink * half`.
    """
    lo, hi = np.float64(keys[0]), np.float64(keys[n - 1])
    middle, half = 0.5 * (lo + hi), 0.5 * (hi - lo)
    reach = span.radius
    if span.uniform:
        if span.objective == ENTROPY:
            return Path(middle, 0.0, middle, half, half, -reach, reach, 1.0)
        return Path(middle, 0.0, 1.0, shrink * half, 0.0, -reach * half, reach * half, half)
    center = np.float64(keys[(n - 1) // 2])
    lo -= center
    hi -= center
    kink = 0.5 * (lo + hi)
    unit = max(hi, -lo)
    reach *= unit
    if right:
        return Path(center, 0.0, 1.0, -shrink * lo, shrink, max(-reach, kink), reach, unit)
    return Path(center, 0.0, 1.0, shrink * hi, -shrink, -reach, min(reach, kink), unit)
