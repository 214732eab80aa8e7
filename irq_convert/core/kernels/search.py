"""The search of one block: score every candidate, keep the best, refine it by least squares."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from irq_convert.core.codebook import MOST_LEVELS
from irq_convert.core.kernels.candidates import ROOM, pad, range_path, shift_path, single
from irq_convert.core.kernels.fixed import fixed_point, solve, weighted_fixed_point
from irq_convert.core.kernels.grid import F32
from irq_convert.core.kernels.group import INTEGER, JOINT, PLAIN, RANGE
from irq_convert.core.kernels.jit import allocator, kernel
from irq_convert.core.kernels.score import (
    bin_edges,
    pair_error,
    score_entropy,
    score_error,
    table_sum,
)
from irq_convert.core.kernels.zero import solve_scale, zero_path, zero_single

ENTROPY, ERROR = 0, 1
EDGES = MOST_LEVELS + 1


class Tables(NamedTuple):
    """Constants of a codebook and block size; `mids` and `levels` are padded to whole vectors."""

    mids: np.ndarray  # float32 [MOST_LEVELS]
    levels: np.ndarray  # float32 [MOST_LEVELS]
    level_fixed: np.ndarray  # int64 [MOST_LEVELS], levels times 2**level_bits
    entropy: np.ndarray  # int32 [block_size + 1], fixed-point c * log2(c)
    pairs: np.ndarray  # int32 [block_size + 1, block_size + 1], sums of two entries
    network: np.ndarray  # int64 [comparators, 2]
    n_levels: int
    bits: int
    level_bits: int


class Plan(NamedTuple):
    """The search in the kernel's terms; made by `irq_convert.core.search_plan`."""

    path: int
    objective: int
    uniform: bool
    radius: np.float32
    floor: np.float32
    shrinks: np.ndarray  # float32 [factors]
    rounds: int
    fixed_bits: int
    weighted: bool
    plain_bits: int  # fixed bits of the error that is reported, which no share weighs


class Scratch(NamedTuple):
    """Buffers of one group, reused for every block."""

    lanes: np.ndarray  # float32 [16, block_size * 16], sorted keys, sixteen blocks a row
    key: np.ndarray  # float32 [block_size]
    profiles: np.ndarray  # float32 [256, 7]
    radii: np.ndarray  # float32 [256]
    tau_grid: np.ndarray  # float32 [3]: step, offset, 1 / step
    scale_grid: np.ndarray
    tau: np.ndarray  # float32 [ROOM], candidates
    scale: np.ndarray
    tau_code: np.ndarray  # int32 [ROOM]
    scale_code: np.ndarray
    entropy: np.ndarray  # int32 [ROOM]
    error: np.ndarray  # int64 [ROOM]
    tie: np.ndarray  # int32 [ROOM]
    tie_tau: np.ndarray  # float32 [ROOM]
    tie_scale: np.ndarray
    low: np.ndarray  # int32 [MOST_LEVELS]
    high: np.ndarray
    edges: np.ndarray  # int32 [EDGES]
    fixed_edges: np.ndarray  # int32 [EDGES], of the codes that a round of refining starts from
    prefix: np.ndarray  # int32 [block_size + 1]
    mass: np.ndarray  # int32 [block_size + 1], sums of shares
    squares: np.ndarray  # int64 [1]
    codes: np.ndarray  # uint8 [block_size]
    best: np.ndarray  # float32 [2], the (tau, scale) that a block settles on
    best_code: np.ndarray  # int32 [2]


@allocator
def make_scratch(block_size):
    """Fresh buffers with room for whole vectors past the longest candidate list."""
    return Scratch(
        np.empty((16, block_size * 16), np.float32),
        np.empty(block_size, np.float32),
        np.empty((256, 7), np.float32),
        np.empty(256, np.float32),
        np.empty(3, np.float32),
        np.empty(3, np.float32),
        np.empty(ROOM, np.float32),
        np.empty(ROOM, np.float32),
        np.empty(ROOM, np.int32),
        np.empty(ROOM, np.int32),
        np.empty(ROOM, np.int32),
        np.empty(ROOM, np.int64),
        np.empty(ROOM, np.int32),
        np.empty(ROOM, np.float32),
        np.empty(ROOM, np.float32),
        np.empty(MOST_LEVELS, np.int32),
        np.empty(MOST_LEVELS, np.int32),
        np.empty(EDGES, np.int32),
        np.empty(EDGES, np.int32),
        np.empty(block_size + 1, np.int32),
        np.empty(block_size + 1, np.int32),
        np.empty(1, np.int64),
        np.empty(block_size, np.uint8),
        np.empty(2, np.float32),
        np.empty(2, np.int32),
    )


@kernel
def _distance(path, profile, t, s):
    """How far a candidate lies from where calibration starts, along the path's own axis."""
    return abs(s - profile[3]) if path in (RANGE, INTEGER) else abs(t - profile[2])


@kernel
def stored_error(keys, n, tables, work, tau, scale, factor, weighted):
    """`pair_error` with what `work` holds of the block."""
    return pair_error(
        keys, n, tables.n_levels - 1, tables.mids, tables.levels, tau, scale, factor, weighted,
        work.mass, work.prefix, work.edges,
    )  # fmt: skip


@kernel
def _shortlist(keys, n, plan, tables, work, size, slack):
    """Candidates whose errors decide: all of them, or those that tie for most entropy."""
    if plan.objective == ERROR or size == 1:
        for j in range(size):
            work.tie[j] = j
        return size
    score_entropy(
        keys, n, tables.n_levels - 1, tables.mids, work.tau, work.scale, size, slack,
        tables.pairs, work.low, work.high, work.entropy,
    )  # fmt: skip
    best = work.entropy[0]
    for j in range(1, size):
        best = min(best, work.entropy[j])
    ties = 0
    for j in range(size):
        if work.entropy[j] == best:
            work.tie[ties] = j
            ties += 1
    return ties


@kernel
def _best_on_path(keys, n, profile, plan, tables, work, size, slack, factor):
    """Index and error of the winner: objective, then lower error, then nearest the center."""
    pad(work.tau, work.scale, size)
    ties = _shortlist(keys, n, plan, tables, work, size, slack)
    if ties == 1:
        best = work.tie[0]
        tau, scale = work.tau[best], work.scale[best]
        return best, stored_error(keys, n, tables, work, tau, scale, factor, plan.weighted)
    for i in range(ties):
        work.tie_tau[i] = work.tau[work.tie[i]]
        work.tie_scale[i] = work.scale[work.tie[i]]
    pad(work.tie_tau, work.tie_scale, ties)
    score_error(
        keys, n, tables.n_levels - 1, tables.mids, tables.levels, work.tie_tau, work.tie_scale,
        ties, slack, factor, plan.weighted, work.mass, work.prefix, work.low, work.high,
        work.error,
    )  # fmt: skip
    best, error, near = work.tie[0], work.error[0], F32(np.inf)
    for i in range(ties):
        t, s = work.tie_tau[i], work.tie_scale[i]
        away = _distance(plan.path, profile, t, s)
        if work.error[i] < error or (work.error[i] == error and away < near):
            best, error, near = work.tie[i], work.error[i], away
    return best, error


@kernel
def _keep(work, j):
    work.best[0], work.best[1] = work.tau[j], work.scale[j]
    work.best_code[0], work.best_code[1] = work.tau_code[j], work.scale_code[j]


@kernel
def refine(keys, n, plan, tables, work, factor, error):
    """Alternate least squares and new codes until the stored error stops falling."""
    for _ in range(plan.rounds):
        bin_edges(keys, n, tables.n_levels - 1, tables.mids, work.best[0], work.best[1], work.edges)
        t, s = solve(work.edges, n, tables, plan.weighted, work.mass, work.prefix, factor)
        if not s > F32(0.0):
            break
        single(t, s, work)
        found = stored_error(
            keys, n, tables, work, work.tau[0], work.scale[0], factor, plan.weighted
        )
        if found >= error:
            break
        error = found
        _keep(work, 0)
    return error


@kernel
def _search_zero_points(keys, n, profile, plan, tables, work, slack, factor):
    """The best scale of each zero point around the fitting one, and the best of these."""
    fitting = int(profile[6])
    error, entropy = np.int64(0), np.int64(0)
    for i in range(3 if plan.radius > F32(0.0) else 1):
        z = fitting + (0, -1, 1)[i]
        if z < 0 or z >= tables.n_levels:
            continue
        size = zero_path(profile, z, plan, tables.levels, work)
        best, found = _best_on_path(keys, n, profile, plan, tables, work, size, slack, factor)
        total = np.int64(0)
        if plan.objective == ENTROPY:
            bin_edges(
                keys, n, tables.n_levels - 1, tables.mids, work.tau[best], work.scale[best],
                work.edges,
            )  # fmt: skip
            total = table_sum(work.edges, tables.n_levels, tables.entropy)
        if i == 0 or total < entropy or (total == entropy and found < error):
            error, entropy = found, total
            _keep(work, best)
    return error


@kernel
def _refine_zero_points(keys, n, plan, tables, work, factor, error):
    """`refine` with integer zero points: each neighbour has its own least-squares scale."""
    for _ in range(plan.rounds):
        bin_edges(keys, n, tables.n_levels - 1, tables.mids, work.best[0], work.best[1], work.edges)
        for k in range(EDGES):
            work.fixed_edges[k] = work.edges[k]
        around, before = work.best_code[0], error
        for i in range(3):
            z = around + (0, -1, 1)[i]
            if z < 0 or z >= tables.n_levels:
                continue
            s = solve_scale(
                work.fixed_edges, z, tables, plan.weighted, work.mass, work.prefix, factor
            )
            if not s > F32(0.0):
                continue
            zero_single(z, s, tables.levels, work)
            found = stored_error(
                keys, n, tables, work, work.tau[0], work.scale[0], factor, plan.weighted
            )
            if found < error:
                error = found
                _keep(work, 0)
        if error >= before:
            break
    return error


@kernel
def search_block(keys, n, source, shares, profile, plan, tables, work):
    """Find the stored pair of one block; `keys` are sorted, `profile` is `group.profile`'s.

    `source` are its weights in their own order, which `shares` weigh where `plan.weighted`.

    Leaves the pair in `work.best` and `work.best_code`. Returns its squared error in units of
    `1 / factor**2`, and the factor.
    """
    if plan.weighted:
        factor, squares = weighted_fixed_point(
            keys, n, plan.fixed_bits, source, shares, work.mass, work.prefix
        )
    else:
        factor, squares = fixed_point(keys, n, plan.fixed_bits, work.prefix)
    work.squares[0] = squares
    slack = F32(2.0) * (work.tau_grid[0] + work.scale_grid[0])
    error = np.int64(0)
    flat = profile[0] == profile[1]
    if plan.path == INTEGER:
        if flat:
            zero_single(int(profile[6]), profile[4], tables.levels, work)
            _keep(work, 0)
            error = stored_error(
                keys, n, tables, work, work.tau[0], work.scale[0], factor, plan.weighted
            )
            return error + squares, factor
        error = _search_zero_points(keys, n, profile, plan, tables, work, slack, factor)
        return _refine_zero_points(keys, n, plan, tables, work, factor, error) + squares, factor
    for f in range(plan.shrinks.shape[0]):
        if plan.path == PLAIN or flat:
            size = single(profile[2], profile[4] if plan.path == PLAIN else F32(0.0), work)
        elif plan.path == RANGE:
            size = range_path(profile, plan.radius, work)
        else:
            size = shift_path(profile, plan.uniform, plan.shrinks[f], plan.path == JOINT, work)
        best, found = _best_on_path(keys, n, profile, plan, tables, work, size, slack, factor)
        if f == 0 or found < error:
            error = found
            _keep(work, best)
    if plan.rounds > 0 and not flat:
        error = refine(keys, n, plan, tables, work, factor, error)
    return error + squares, factor
