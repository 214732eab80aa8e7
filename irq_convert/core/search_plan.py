"""From options to a search: which path is walked, how far, and the constant tables it needs."""

from __future__ import annotations

import functools

import numpy as np

from irq_convert.core.codebook import MOST_LEVELS, get_codebook
from irq_convert.core.importance import SHARE_BITS
from irq_convert.core.kernels.group import INTEGER, JOINT, PLAIN, RANGE, SHIFT
from irq_convert.core.kernels.search import ENTROPY, ERROR, Plan, Tables
from irq_convert.core.kernels.sort import merge_network
from irq_convert.core.objective import Objective, ZeroPoint
from irq_convert.core.spec import QuantSpec

# lambda * sigma of the paper's code: 0.1 / ppf(0.9677083), a fraction of max|w - median|.
NF_RADIUS = 0.1 * 0.5410845
INT_RADIUS = 0.1
JOINT_RADIUS = 0.2
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
REFINE_FLOOR = 0.5
LEVEL_BITS = 20
ZERO_POINT_SCALES = {
    Objective.NONE: (1.0, 1.0),
    Objective.ENTROPY: (1.0 + INT_RADIUS, 1.0 - INT_RADIUS),
    Objective.MSE: (max(SHRINKS), min(SHRINKS)),
}
"""Largest and smallest factor on the fitting scale, with integer zero points."""


def plan_search(spec: QuantSpec, weighted: bool = False) -> Plan:
    """The search that `spec` asks for, in the kernel's terms; `weighted` by importance."""
    uniform, wanted = spec.book.uniform, Objective(spec.objective)
    shrinks: tuple[float, ...] = (1.0,)
    floor, objective = 1.0, ENTROPY
    if wanted == Objective.NONE:
        path, radius = PLAIN, (NF_RADIUS if spec.refine else 0.0)
    elif wanted == Objective.MSE:
        path, radius, shrinks, objective = JOINT, JOINT_RADIUS, SHRINKS, ERROR
        floor = min(SHRINKS)
    elif uniform:
        path, radius = RANGE, INT_RADIUS
    else:
        path, radius = SHIFT, NF_RADIUS
    if spec.zero_point == ZeroPoint.INTEGER:
        # The window of scales around the fitting one, and whether its neighbours are tried.
        path, radius = INTEGER, float(wanted != Objective.NONE)
        shrinks = ZERO_POINT_SCALES[wanted]
        floor = 1.0
    if spec.refine:
        floor = min(floor, REFINE_FLOOR)
    # Sums of a block in fixed point have to stay inside int32 with three bits of headroom.
    room = 28 - (spec.block_size - 1).bit_length()
    plain_bits = min(20, room)
    return Plan(
        path=path,
        objective=objective,
        uniform=uniform,
        radius=np.float32(radius),
        floor=np.float32(floor),
        shrinks=np.array(shrinks, np.float32),
        rounds=spec.refine,
        fixed_bits=min(20, room - SHARE_BITS) if weighted else plain_bits,
        weighted=weighted,
        plain_bits=plain_bits,
    )


def entropy_shift(block_size: int) -> int:
    """Fraction bits of the entropy table, so that the sum over a block's bins fits int32."""
    return 30 - int(np.ceil(np.log2(block_size * np.log2(block_size))))


def entropy_table(block_size: int) -> np.ndarray:
    """`round(c * log2(c) * 2**entropy_shift)` for counts 0 to `block_size`, int32."""
    counts = np.arange(block_size + 1, dtype=np.float64)
    exact = counts * np.log2(np.maximum(counts, 1.0))
    return np.rint(exact * 2.0 ** entropy_shift(block_size)).astype(np.int32)


@functools.cache
def make_tables(codebook: str, block_size: int, weighted: bool = False) -> Tables:
    """Constants for a codebook and block size, padded to whole vectors."""
    book = get_codebook(codebook)
    levels = np.zeros(MOST_LEVELS, np.float32)
    levels[: len(book.levels)] = book.level_array()
    mids = np.full(MOST_LEVELS, 2.0, np.float32)
    mids[: len(book.levels) - 1] = book.midpoint_array()
    table = entropy_table(block_size)
    # Products of two sums over a block of level times share have to stay inside int64.
    level_bits = (
        min(LEVEL_BITS, 31 - SHARE_BITS - block_size.bit_length()) if weighted else LEVEL_BITS
    )
    return Tables(
        mids=mids,
        levels=levels,
        level_fixed=np.rint(levels.astype(np.float64) * 2**level_bits).astype(np.int64),
        entropy=table,
        pairs=table[:, None] + table[None, :],
        network=merge_network(block_size),
        n_levels=len(book.levels),
        bits=book.bits,
        level_bits=level_bits,
    )
