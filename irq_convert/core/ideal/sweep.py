"""The exact sweep of one block: every interval of a path between two crossings, in float64.

On a path `(tau(t), s(t))` that is linear in t each boundary `B_k = tau + m_k * s` is linear too, so
the time at which it passes a weight has a closed form and one pointer a boundary is enough. Between
two crossings the codes, hence the entropy, are constant and the squared error is a quadratic in t.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from irq_convert.core.codebook import MOST_LEVELS
from irq_convert.core.kernels.grid import F32
from irq_convert.core.kernels.jit import allocator, entry_point, kernel
from irq_convert.core.kernels.path import linear_piece
from irq_convert.core.kernels.search import EDGES, ENTROPY

CHUNK = 256
# Narrower intervals than this fraction of the path's unit are rounding of one and the same
# crossing time; no float32 boundary could tell their two ends apart.
RESOLUTION = 2.0**-44
# Distances from a crossing that are tried, same unit: float32 boundaries that move slowly need more
# to be surely on their side of it.
MARGINS = (0.0, 2.0**-22, 2.0**-18, 2.0**-14, 2.0**-10)
# In a narrow interval: how many ulps around a pair are tried.
NEIGHBORS = 4
IDEAL, HELD = 0, 1


class Walk(NamedTuple):
    """Buffers of one thread. Rows 0 and 1 of `sums` and `marks` are the ideal and the held best."""

    edges: np.ndarray  # int64 [EDGES], keys below each boundary, between 0 and n
    start: np.ndarray  # float64 [MOST_LEVELS], boundary at t = 0
    rate: np.ndarray  # float64 [MOST_LEVELS]
    due: np.ndarray  # float64 [MOST_LEVELS], t of the boundary's next crossing
    prefix: np.ndarray  # float64 [block_size + 1], sums of the centered keys
    square: np.ndarray  # float64 [1], sum of squares of the centered keys
    sums: np.ndarray  # int64 [2]
    marks: np.ndarray  # float64 [2, 2]: squared error, distance from the center
    pair: np.ndarray  # float32 [2]: tau and scale of the held best


@allocator
def _make_walk(block_size):
    return Walk(
        np.empty(EDGES, np.int64),
        np.empty(MOST_LEVELS, np.float64),
        np.empty(MOST_LEVELS, np.float64),
        np.empty(MOST_LEVELS, np.float64),
        np.empty(block_size + 1, np.float64),
        np.empty(1, np.float64),
        np.empty(2, np.int64),
        np.empty((2, 2), np.float64),
        np.empty(2, np.float32),
    )


@kernel
def _time(key, center, k, walk):
    """When boundary k meets `key`."""
    return (np.float64(key) - center - walk.start[k]) / walk.rate[k]


@kernel
def _next_due(keys, n, center, k, walk):
    below = walk.edges[k + 1]
    if walk.rate[k] > 0.0 and below < n:
        return _time(keys[below], center, k, walk)
    if walk.rate[k] < 0.0 and below > 0:
        return _time(keys[below - 1], center, k, walk)
    return np.inf


@kernel
def _begin(keys, n, book, path, walk):
    """Place every boundary at `path.lo`. Boundaries are in order, so each starts at the last's."""
    below = 0
    for k in range(book.mids.shape[0]):
        mid = np.float64(book.mids[k])
        walk.start[k] = path.tau0 + mid * path.s0
        walk.rate[k] = path.dtau + mid * path.ds
        while below < n:
            if walk.rate[k] > 0.0:
                under = _time(keys[below], path.center, k, walk) < path.lo
            elif walk.rate[k] < 0.0:
                under = _time(keys[below], path.center, k, walk) > path.lo
            else:
                under = np.float64(keys[below]) - path.center < walk.start[k]
            if not under:
                break
            below += 1
        walk.edges[k + 1] = below
    walk.edges[0] = 0
    walk.edges[book.mids.shape[0] + 1] = n
    for k in range(book.mids.shape[0]):
        walk.due[k] = _next_due(keys, n, path.center, k, walk)


@kernel
def _table_sum(book, walk):
    total = np.int64(0)
    for k in range(book.levels.shape[0]):
        total += np.int64(book.entropy[walk.edges[k + 1] - walk.edges[k]])
    return total


@kernel
def _lowest_error(n, book, path, low, high, walk):
    """`(t, squared error)` at the minimum over `[low, high]`, for the codes that hold there.

    With n_k weights of sum S_k in bin k the error is `sum_k n_k v_k^2 - 2 S_k v_k` plus the sum of
    squares, where `v_k = level_k * s(t) + tau(t)`: a quadratic in t.
    """
    square = linear = 0.0
    constant = walk.square[0]
    for k in range(book.levels.shape[0]):
        first, behind = walk.edges[k], walk.edges[k + 1]
        level, many = np.float64(book.levels[k]), np.float64(behind - first)
        weight = walk.prefix[behind] - walk.prefix[first]
        value = level * path.s0 + path.tau0
        slope = level * path.ds + path.dtau
        square += many * slope * slope
        linear += slope * (many * value - weight)
        constant += value * (many * value - 2.0 * weight)
    t = -linear / square if square > 0.0 else low
    t = min(max(t, low), high)
    return t, max(0.0, constant + t * (2.0 * linear + t * square))


@kernel
def _holds(keys, n, book, tau, scale, walk):
    """Whether the float32 boundaries of the pair give exactly the codes of `walk.edges`."""
    for k in range(book.mids.shape[0]):
        edge = tau + book.mids[k] * scale
        below = walk.edges[k + 1]
        if below > 0 and not keys[below - 1] < edge:
            return False
        if below < n and keys[below] < edge:
            return False
    return True


@kernel
def _round_pair(path, t, walk):
    """The float32 pair at t; where t is tau itself the scale follows from the rounded tau."""
    walk.pair[0] = F32(path.center + path.tau0 + path.dtau * t)
    if path.dtau == 1.0:
        t = np.float64(walk.pair[0]) - path.center - path.tau0
    walk.pair[1] = F32(path.s0 + path.ds * t)


@kernel
def _ulp(value):
    size = abs(value)
    return np.nextafter(size, F32(np.inf)) - size


@kernel
def _search_pair(keys, n, book, path, low, high, walk):
    """Look for a float32 pair in a narrow interval: inner points and their nearest neighbors."""
    for quarter in (2, 1, 3):
        _round_pair(path, low + 0.25 * quarter * (high - low), walk)
        tau, scale = walk.pair[0], walk.pair[1]
        tau_ulp, scale_ulp = _ulp(tau), _ulp(scale)
        for i in range(2 * NEIGHBORS + 1):
            t = tau + F32((i + 1) // 2 * (1 - 2 * (i % 2))) * tau_ulp
            for j in range(2 * NEIGHBORS + 1):
                s = scale + F32((j + 1) // 2 * (1 - 2 * (j % 2))) * scale_ulp
                if s > F32(0.0) and _holds(keys, n, book, t, s, walk):
                    walk.pair[0], walk.pair[1] = t, s
                    return True
    return False


@kernel
def _hold(keys, n, book, path, low, high, t, walk):
    """Put a float32 pair with the codes of this interval in `walk.pair`, near t; False if none."""
    tau, scale = walk.pair[0], walk.pair[1]
    for margin in MARGINS:
        away = min(0.25 * (high - low), margin * path.unit)
        _round_pair(path, min(max(t, low + away), high - away), walk)
        if _holds(keys, n, book, walk.pair[0], walk.pair[1], walk):
            return True
    if _search_pair(keys, n, book, path, low, high, walk):
        return True
    walk.pair[0], walk.pair[1] = tau, scale
    return False


@kernel
def _precedes(objective, total, error, away, best, walk):
    """Whether this interval beats the ideal or the held best: the rule that breaks every tie."""
    if objective == ENTROPY and total != walk.sums[best]:
        return total < walk.sums[best]
    if error != walk.marks[best, 0]:
        return error < walk.marks[best, 0]
    return away < walk.marks[best, 1]


@kernel
def _mark(total, error, away, best, walk):
    walk.sums[best] = total
    walk.marks[best, 0], walk.marks[best, 1] = error, away


@kernel
def _consider(keys, n, book, objective, path, low, high, total, walk):
    if objective == ENTROPY and total > walk.sums[HELD]:
        return
    t, error = _lowest_error(n, book, path, low, high, walk)
    if _precedes(objective, total, error, abs(t), IDEAL, walk):
        _mark(total, error, abs(t), IDEAL, walk)
    if _precedes(objective, total, error, abs(t), HELD, walk) and _hold(
        keys, n, book, path, low, high, t, walk
    ):
        _mark(total, error, abs(t), HELD, walk)


@kernel
def sweep_piece(keys, n, book, objective, path, walk):
    """Walk one linear piece of a path over the `n` sorted `keys` and update both bests.

    The ideal best is the best interval in float64; the held best is the best one whose codes a
    float32 pair gives. A boundary moves up or down by the sign of its rate; a weight has a code of
    at most k where it lies strictly below boundary k.
    """
    _begin(keys, n, book, path, walk)
    total = _table_sum(book, walk)
    now = path.lo
    while True:
        k, due = 0, walk.due[0]
        for i in range(1, book.mids.shape[0]):
            if walk.due[i] < due:
                k, due = i, walk.due[i]
        end = min(due, path.hi)
        if end - now > RESOLUTION * path.unit:
            _consider(keys, n, book, objective, path, now, end, total, walk)
        if due >= path.hi:
            return
        now = due
        before, at, behind = walk.edges[k], walk.edges[k + 1], walk.edges[k + 2]
        total -= np.int64(book.entropy[at - before]) + np.int64(book.entropy[behind - at])
        at += 1 if walk.rate[k] > 0.0 else -1
        total += np.int64(book.entropy[at - before]) + np.int64(book.entropy[behind - at])
        walk.edges[k + 1] = at
        walk.due[k] = _next_due(keys, n, path.center, k, walk)


@kernel
def _center_sums(keys, n, center, walk):
    walk.prefix[0] = 0.0
    walk.square[0] = 0.0
    for i in range(n):
        key = np.float64(keys[i]) - center
        walk.prefix[i + 1] = walk.prefix[i] + key
        walk.square[0] += key * key


@kernel
def float32_outcome(keys, n, book, tau, scale, walk):
    """`(table sum, squared error)` of the codes and values that a float32 pair really gives."""
    below = 0
    for k in range(book.mids.shape[0]):
        edge = tau + book.mids[k] * scale
        while below < n and keys[below] < edge:
            below += 1
        walk.edges[k + 1] = below
    walk.edges[0] = 0
    walk.edges[book.mids.shape[0] + 1] = n
    error = 0.0
    for k in range(book.levels.shape[0]):
        value = np.float64(book.levels[k] * scale + tau)
        for i in range(walk.edges[k], walk.edges[k + 1]):
            error += (np.float64(keys[i]) - value) ** 2
    return _table_sum(book, walk), error


@kernel
def sweep_block(keys, n, book, span, walk):
    """The best pair of one block of `n >= 1` sorted keys; leaves it in `walk`.

    A block without range has scale 0 and its own value as tau. Where no interval at all holds a
    float32 pair (magnitudes near the smallest float32) the center is taken.
    """
    first = linear_piece(keys, n, span, 1.0, False)
    walk.pair[0], walk.pair[1] = F32(first.center), F32(0.0)
    walk.sums[:] = np.int64(book.entropy[n])
    walk.marks[:] = 0.0
    if keys[0] == keys[n - 1]:
        return
    middle = 0.5 * (np.float64(keys[0]) + np.float64(keys[n - 1]))
    walk.pair[1] = F32(np.float64(keys[n - 1]) - middle) if span.uniform else F32(first.unit)
    walk.sums[:] = np.int64(1) << np.int64(62)
    walk.marks[:] = np.inf
    _center_sums(keys, n, first.center, walk)
    for f in range(span.shrinks.shape[0]):
        for right in range(1 if span.uniform else 2):
            path = linear_piece(keys, n, span, span.shrinks[f], right == 1)
            if path.lo < path.hi:
                sweep_piece(keys, n, book, span.objective, path, walk)


def _make_sweep_blocks(digest):
    def sweep_blocks(keys, lengths, book, span, pairs, sums, errors):
        """Sweep every block of `keys`, float32 `[blocks, block_size]`, sorted along rows.

        `lengths`: int64 `[blocks]`, 1 to block_size keys that count. Fills `pairs` float32
        `[blocks, 2]` (tau, scale), `sums` int64 `[blocks, 2]` (entropy table sum of the pair's
        codes, ideal) and `errors` float64 `[blocks, 2]` (squared error of the pair, ideal).
        """
        digest  # noqa: B018 - keys the cache
        blocks = keys.shape[0]
        for chunk in prange((blocks + CHUNK - 1) // CHUNK):
            walk = _make_walk(keys.shape[1])
            for b in range(chunk * CHUNK, min(blocks, (chunk + 1) * CHUNK)):
                sweep_block(keys[b], lengths[b], book, span, walk)
                sums[b, 1], errors[b, 1] = walk.sums[IDEAL], walk.marks[IDEAL, 0]
                pairs[b] = walk.pair
                total, error = float32_outcome(
                    keys[b], lengths[b], book, walk.pair[0], walk.pair[1], walk
                )
                sums[b, 0], errors[b, 0] = total, error

    return sweep_blocks


sweep_blocks = entry_point(_make_sweep_blocks)
