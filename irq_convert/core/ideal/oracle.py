"""Plain torch references of ICQ: the paper's grid, and brute force over all crossings.

Nothing here is fast or clever, and nothing is shared with the compiled sweep but the table of
`c * log2(c)`: codes come from comparing every weight with every boundary. `breakpoint_search` is
what `icq_search` runs where there is no numba.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from irq_convert.core.codebook import Codebook
from irq_convert.core.objective import Objective
from irq_convert.core.search_plan import (
    INT_RADIUS,
    JOINT_RADIUS,
    NF_RADIUS,
    SHRINKS,
    entropy_table,
)

BATCH_ELEMENTS = 1 << 22
RESOLUTION = 2.0**-44
"""Intervals of t narrower than this fraction of a piece's unit are rounding, not intervals."""
MARGINS = (2.0**-18, 2.0**-10)
"""Fractions of the unit by which t is kept away from crossings, where there is room."""
ENDS = 1 + 2.0**-20
"""Windows are wider by this, so that they hold their ends however those are rounded to float32."""


@dataclass(frozen=True)
class IcqResult:
    """What a search found for each of n blocks.

    `tau`, `scale`: float32 `[n]`. `table_sum` int64 `[n]` (sum over codes of the integer entropy
    table, lower is better), `entropy_bits` float64 `[n]` (`-sum p log2 p`) and `squared_error`
    float64 `[n]` are those of the codes that float32 arithmetic gives for that pair.
    `ideal_table_sum` and `ideal_squared_error` are the optimum in real numbers. Float32 reaches it
    unless no float32 pair gives the codes of its interval; then the best interval with one is
    taken (where a whole block spans a few ulps, rounding may even do better than the ideal).
    """

    tau: torch.Tensor
    scale: torch.Tensor
    entropy_bits: torch.Tensor
    table_sum: torch.Tensor
    squared_error: torch.Tensor
    ideal_table_sum: torch.Tensor
    ideal_squared_error: torch.Tensor


@dataclass(frozen=True)
class _Blocks:
    """n blocks of B weights; `weights`, `lo` and `hi` are float64, relative to `center`."""

    source: torch.Tensor  # [n, B], as given
    inside: torch.Tensor  # bool [n, B]
    lengths: torch.Tensor  # int64 [n, 1]
    weights: torch.Tensor  # [n, B]
    lo: torch.Tensor  # [n, 1]
    hi: torch.Tensor  # [n, 1]
    center: torch.Tensor  # [n, 1]


@dataclass(frozen=True)
class _Piece:
    """`tau = tau1 * t`, `s = s0 + s1 * t` for t from `first` to `last`; each is `[n, 1]`."""

    tau1: torch.Tensor
    s0: torch.Tensor
    s1: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    unit: torch.Tensor


def search_window(codebook: Codebook, objective: str) -> tuple[float, tuple[float, ...]]:
    """How far a search goes, as a fraction of its unit, and the factors on the scale it tries."""
    if objective == Objective.MSE:
        return JOINT_RADIUS * ENDS, SHRINKS
    return (INT_RADIUS if codebook.uniform else NF_RADIUS) * ENDS, (1.0,)


def _read(blocks: torch.Tensor, lengths: torch.Tensor | None, codebook: Codebook) -> _Blocks:
    n, size = blocks.shape
    if lengths is None:
        lengths = torch.full((n,), size)
    lengths = lengths.to(device=blocks.device, dtype=torch.int64)[:, None]
    inside = torch.arange(size, device=blocks.device) < lengths
    weights = blocks.to(torch.float64)
    ordered = weights.masked_fill(~inside, torch.inf).sort(dim=1).values
    lo, hi = ordered[:, :1], ordered.gather(1, lengths - 1)
    median = ordered.gather(1, (lengths - 1) // 2)
    center = (lo + hi) / 2 if codebook.uniform else median
    return _Blocks(blocks, inside, lengths, weights - center, lo - center, hi - center, center)


def _batches(everything: _Blocks, rows: int) -> Iterator[_Blocks]:
    for i in range(0, len(everything.lengths), rows):
        yield _Blocks(*(getattr(everything, f.name)[i : i + rows] for f in fields(_Blocks)))


def _codes(weights: torch.Tensor, mids: Any, tau: torch.Tensor, scale: torch.Tensor) -> Any:
    """`code = #{k : w >= tau + m_k * s}`: `[n, M, B]` for weights `[n, B]`, pairs `[n, M]`."""
    codes = torch.zeros((*tau.shape, weights.shape[1]), dtype=torch.uint8, device=tau.device)
    for mid in torch.from_numpy(mids).to(tau):
        codes += weights[:, None, :] >= (tau + mid * scale)[:, :, None]
    return codes


def _counts(codes: torch.Tensor, inside: torch.Tensor, levels: int) -> torch.Tensor:
    """How often each code occurs, int64 `[n, M, levels]`."""
    here = inside[:, None, :]
    return torch.stack([((codes == k) & here).sum(dim=2) for k in range(levels)], dim=2)


def _table_sum(counts: torch.Tensor, block_size: int) -> torch.Tensor:
    table = torch.from_numpy(entropy_table(max(2, block_size))).to(counts)
    return table[counts].sum(dim=-1)


def _entropy(counts: torch.Tensor) -> torch.Tensor:
    """`-sum p log2 p` in float64 over the last dimension."""
    p = counts.double() / counts.sum(dim=-1, keepdim=True)
    return -torch.xlogy(p, p).sum(dim=-1) / math.log(2)


def grid_search(
    blocks: torch.Tensor,
    codebook: Codebook,
    n: int = 100,
    *,
    lengths: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """IR-QLoRA's own search: the best of 2n + 1 evenly spaced candidates for each block.

    Normal-float: tau = median + f * max|w - median| with f within +-0.0541, s = max|w - tau|.
    Integer: both ends of the range times p within 1 +- 0.1. The first of equals wins, as in the
    authors' code. `dtype` is the arithmetic of tau, s and the boundaries. `blocks` is
    `[blocks, B]`; returns `(table_sum int64, tau, scale)`, each `[blocks]`.
    """
    everything = _read(blocks, lengths, codebook)
    f = torch.linspace(-1, 1, 2 * n + 1, dtype=torch.float64, device=blocks.device)
    found = []
    for batch in _batches(everything, max(1, BATCH_ELEMENTS // (len(f) * blocks.shape[1]))):
        if codebook.uniform:
            p = 1 + INT_RADIUS * f
            tau, scale = (p * batch.center).to(dtype), (p * batch.hi).to(dtype)
        else:
            tau = batch.center + NF_RADIUS * f * torch.maximum(batch.hi, -batch.lo)
            tau = tau.to(dtype)
            hi, lo = (batch.hi + batch.center).to(dtype), (batch.lo + batch.center).to(dtype)
            scale = torch.maximum(hi - tau, tau - lo)
        codes = _codes(batch.source.to(dtype), codebook.midpoint_array(), tau, scale)
        counts = _counts(codes, batch.inside, len(codebook.levels))
        sums = _table_sum(counts, blocks.shape[1])
        best = sums.argmin(dim=1, keepdim=True)
        found.append(torch.cat([x.gather(1, best).double() for x in (sums, tau, scale)], dim=1))
    nothing = torch.zeros(0, 3, dtype=torch.float64, device=blocks.device)
    sums, tau, scale = torch.cat([*found, nothing]).unbind(dim=1)
    return sums.to(torch.int64), tau, scale


def _pieces(batch: _Blocks, codebook: Codebook, objective: str) -> Iterator[_Piece]:
    """Every linear piece of every path that is searched."""
    radius, shrinks = search_window(codebook, objective)
    one, lo, hi = torch.ones_like(batch.lo), batch.lo, batch.hi
    for c in shrinks:
        if codebook.uniform and objective == Objective.ENTROPY:
            yield _Piece(batch.center, hi, hi, -radius * one, radius * one, one)
        elif codebook.uniform:
            yield _Piece(one, c * hi, 0 * one, -radius * hi, radius * hi, hi)
        else:
            unit, kink = torch.maximum(hi, -lo), (lo + hi) / 2
            first, last = -radius * unit, radius * unit
            yield _Piece(one, c * hi, -c * one, first, torch.minimum(last, kink), unit)
            yield _Piece(one, -c * lo, c * one, torch.maximum(first, kink), last, unit)


def _intervals(
    batch: _Blocks, mids: Any, piece: _Piece
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ends of all intervals between crossings, float64 `[n, M]` each, and which of them exist."""
    first, last = piece.first, torch.maximum(piece.first, piece.last)
    ends = [first, last]
    for mid in torch.from_numpy(mids).to(batch.weights):
        t = (batch.weights - mid * piece.s0) / (piece.tau1 + mid * piece.s1)
        t = torch.where(batch.inside & ~t.isnan(), t, first)
        ends.append(torch.minimum(torch.maximum(t, first), last))
    times = torch.cat(ends, dim=1).sort(dim=1).values
    low, high = times[:, :-1], times[:, 1:]
    real = high - low > RESOLUTION * piece.unit
    order = real.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    order = order[:, : max(1, int(real.sum(dim=1).max()))]
    return low.gather(1, order), high.gather(1, order), real.gather(1, order)


def _winner(rows: tuple[torch.Tensor, ...], real: torch.Tensor, by_entropy: bool) -> torch.Tensor:
    """`rows` at the best entry, float64 `[n, len(rows)]`; they start with sum, error and |t|.

    The order is the objective, then the lower error, then the smaller |t|. Without any real entry
    everything is infinite.
    """
    for row in rows[0 if by_entropy else 1 : 3]:
        least = row.double().masked_fill(~real, torch.inf).amin(dim=1, keepdim=True)
        real = real & (row.double() == least)
    at = real.to(torch.uint8).argmax(dim=1, keepdim=True)
    found = torch.cat([row.gather(1, at).double() for row in rows], dim=1)
    return found.masked_fill(~real.any(dim=1, keepdim=True), torch.inf)


def _ideal(
    batch: _Blocks, codebook: Codebook, piece: _Piece, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Table sum, least squared error and its t in every interval, `[n, M]` each."""
    middle = (low + high) / 2
    mids, levels = codebook.midpoint_array(), torch.from_numpy(codebook.level_array()).to(middle)
    codes = _codes(batch.weights, mids, piece.tau1 * middle, piece.s0 + piece.s1 * middle)
    sums = _table_sum(_counts(codes, batch.inside, len(levels)), batch.source.shape[1])
    # While the codes stay the same the residual of a weight is rest - t * slope.
    here, level = batch.inside[:, None, :], levels[codes.to(torch.int32)]
    rest = (batch.weights[:, None, :] - level * piece.s0[:, :, None]).where(here, 0.0)
    slope = (piece.tau1[:, :, None] + level * piece.s1[:, :, None]).where(here, 0.0)
    t = ((rest * slope).sum(dim=2) / (slope * slope).sum(dim=2)).nan_to_num(nan=0.0)
    t = torch.minimum(torch.maximum(t, low), high)
    errors = ((rest - t[:, :, None] * slope) ** 2).sum(dim=2)
    return sums, errors, t


def _held(
    batch: _Blocks, codebook: Codebook, piece: _Piece, t: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Table sum, error, |t|, tau, scale and entropy of the float32 pair next to every t."""
    tau = (batch.center + piece.tau1 * t).float()
    t = torch.where(piece.tau1 == 1, tau.double() - batch.center, t)
    scale = (piece.s0 + piece.s1 * t).float()
    codes = _codes(batch.source, codebook.midpoint_array(), tau, scale)
    counts = _counts(codes, batch.inside, len(codebook.levels))
    level = torch.from_numpy(codebook.level_array()).to(tau.device)[codes.to(torch.int32)]
    values = (level * scale[:, :, None] + tau[:, :, None]).double()
    squares = (batch.source[:, None, :].double() - values) ** 2
    errors = squares.where(batch.inside[:, None, :], 0.0).sum(dim=2)
    sums = _table_sum(counts, batch.source.shape[1])
    return sums, errors, t.abs(), tau, scale, _entropy(counts)


def _try_piece(
    batch: _Blocks, codebook: Codebook, piece: _Piece, by_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Winners of one piece: ideal (sum, error, |t|) and the rows of `_held` in float32."""
    low, high, real = _intervals(batch, codebook.midpoint_array(), piece)
    sums, errors, t = _ideal(batch, codebook, piece, low, high)
    inner = []
    for part in MARGINS:
        margin = torch.minimum((high - low) / 4, part * piece.unit)
        inner.append(torch.minimum(torch.maximum(t, low + margin), high - margin))
    held = _held(batch, codebook, piece, torch.cat(inner, dim=1))
    ideal = _winner((sums, errors, t.abs()), real, by_entropy)
    return ideal, _winner(held, real.repeat(1, len(MARGINS)), by_entropy)


def breakpoint_search(
    blocks: torch.Tensor,
    codebook: Codebook,
    *,
    objective: str = "entropy",
    lengths: torch.Tensor | None = None,
) -> IcqResult:
    """The exact optimum by brute force: try every interval between any two crossings.

    Crossings are the t at which `w = tau(t) + m_k * s(t)` for some weight, boundary and linear
    piece of the path, in float64. `blocks`: float32 `[n, B]` without NaN, of which row i counts
    up to `lengths[i]` (default B). `objective`: "entropy" or "mse". Works on any device.
    """
    everything = _read(blocks, lengths, codebook)
    by_entropy, found = objective == Objective.ENTROPY, []
    for batch in _batches(everything, max(1, BATCH_ELEMENTS // (blocks.shape[1] * 256))):
        tried = [
            _try_piece(batch, codebook, piece, by_entropy)
            for piece in _pieces(batch, codebook, objective)
        ]
        winners = []
        for rows in zip(*tried, strict=True):
            table = torch.stack(rows, dim=1)
            winners.append(_winner(table.unbind(dim=2), table[:, :, 0].isfinite(), by_entropy))
        found.append(torch.cat(winners, dim=1))
    flat = torch.zeros(len(blocks), 9, dtype=torch.float64, device=blocks.device)
    flat[:, [0, 3]] = _table_sum(everything.lengths, blocks.shape[1])[:, None].double()
    flat[:, 6] = everything.center[:, 0]
    result = torch.where(everything.lo < everything.hi, torch.cat([*found, flat[:0]]), flat)
    ideal_sum, ideal_error, _, total, error, _, tau, scale, bits = result.unbind(dim=1)
    return IcqResult(
        tau=tau.float(),
        scale=scale.float(),
        entropy_bits=bits,
        table_sum=total.to(torch.int64),
        squared_error=error,
        ideal_table_sum=ideal_sum.to(torch.int64),
        ideal_squared_error=ideal_error,
    )


def max_entropy(
    blocks: torch.Tensor, codebook: Codebook, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """The most entropy of any interval, bits, float64 `[n]`, without the integer table."""
    everything, found = _read(blocks, lengths, codebook), []
    for batch in _batches(everything, max(1, BATCH_ELEMENTS // (blocks.shape[1] * 256))):
        best = torch.zeros_like(batch.center[:, 0])
        for piece in _pieces(batch, codebook, Objective.ENTROPY):
            low, high, real = _intervals(batch, codebook.midpoint_array(), piece)
            t = (low + high) / 2
            mids, s = codebook.midpoint_array(), piece.s0 + piece.s1 * t
            codes = _codes(batch.weights, mids, piece.tau1 * t, s)
            bits = _entropy(_counts(codes, batch.inside, len(codebook.levels)))
            best = torch.maximum(best, bits.masked_fill(~real, 0.0).amax(dim=1))
        found.append(best)
    return torch.cat([*found, everything.center[:0, 0]])
