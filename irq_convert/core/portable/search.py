"""The search of `core.kernels.search` over all blocks at once, in torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from irq_convert.core.kernels.candidates import STRIDED
from irq_convert.core.kernels.group import INTEGER, JOINT, PLAIN, RANGE
from irq_convert.core.kernels.search import ERROR, Plan, Tables
from irq_convert.core.portable.grid import Grid


@dataclass(frozen=True)
class Blocks:
    """Sorted blocks `[n, block_size]` (infinity behind short ones) and their profiles `[n]`.

    `shares`, int64 `[n, block_size]`: what an error of each key counts for, 0 behind short ones.
    """

    keys: torch.Tensor
    shares: torch.Tensor
    lengths: torch.Tensor
    lo: torch.Tensor
    hi: torch.Tensor
    center: torch.Tensor
    half: torch.Tensor
    plain: torch.Tensor
    widest: torch.Tensor
    radius: torch.Tensor

    @property
    def n(self) -> int:
        return self.keys.shape[0]

    @classmethod
    def profile(
        cls, flat: torch.Tensor, shares: torch.Tensor, lengths: torch.Tensor, plan: Plan
    ) -> Blocks:
        """Sort and profile (kernel: `group.profile`)."""
        keys, order = flat.sort(dim=1)
        shares = shares.gather(1, order)
        lo, hi, med = (
            keys.gather(1, at[:, None])[:, 0]
            for at in (torch.zeros_like(lengths), lengths - 1, (lengths - 1) // 2)
        )
        half, mid = (hi - lo) * 0.5, (lo + hi) * 0.5
        fraction = torch.tensor(plan.radius, device=flat.device)
        if plan.uniform:
            ranged = plan.path == RANGE
            radius = fraction * (mid.abs() if ranged else half)
            widest = half + fraction * half if ranged else half
            return cls(keys, shares, lengths, lo, hi, mid, half, half, widest, radius)
        reach = torch.maximum(hi - med, med - lo)
        plain, radius = torch.maximum(lo.abs(), hi.abs()), fraction * reach
        if plan.path == PLAIN:
            return cls(keys, shares, lengths, lo, hi, med * 0.0 + 0.0, half, plain, plain, radius)
        return cls(keys, shares, lengths, lo, hi, med, half, plain, reach + radius, radius)

    def narrowest(self, plan: Plan) -> torch.Tensor:
        """The smallest scale that the search of each block may ask for."""
        floor = torch.tensor(plan.floor, device=self.lo.device)
        if plan.path == INTEGER:
            return self.half * float(plan.shrinks[1]) * floor
        if plan.path == RANGE:
            return (self.half - torch.tensor(plan.radius) * self.half) * floor
        if plan.path == PLAIN or plan.uniform:
            return self.plain * floor
        return torch.maximum(self.half, self.widest - 2.0 * self.radius) * floor

    def take(self, rows: torch.Tensor) -> Blocks:
        """Some of the blocks."""
        return Blocks(*[getattr(self, name)[rows] for name in self.__dataclass_fields__])

    def edges(self, tau: torch.Tensor, scale: torch.Tensor, tables: Tables) -> torch.Tensor:
        """First key of each bin and the length behind the last: int64 `[n, candidates, levels+1]`.

        `tau` and `scale` are `[n, candidates]`.
        """
        mids = torch.tensor(tables.mids[: tables.n_levels - 1], device=tau.device)
        limits = tau[:, :, None] + mids * scale[:, :, None]
        below = torch.searchsorted(self.keys, limits.flatten(1)).view(limits.shape)
        ends = self.lengths[:, None, None].expand(*tau.shape, 1)
        return torch.cat([torch.zeros_like(ends), below, ends], 2)

    def table_sum(self, tau: torch.Tensor, scale: torch.Tensor, tables: Tables) -> torch.Tensor:
        """Sum of the entropy table over bins, int64 `[n, candidates]`."""
        table = torch.tensor(tables.entropy, device=tau.device).long()
        return table[self.edges(tau, scale, tables).diff(dim=2)].sum(2)


@dataclass(frozen=True)
class Best:
    """What each block settles on, all `[n]`; `error` is in units of `1 / factor**2`."""

    tau: torch.Tensor
    scale: torch.Tensor
    tau_code: torch.Tensor
    scale_code: torch.Tensor
    error: torch.Tensor
    factor: torch.Tensor
    squares: torch.Tensor


class Fixed:
    """Keys in fixed point, with the sums that give exact squared errors."""

    def __init__(self, blocks: Blocks, bits: int) -> None:
        top = torch.maximum(blocks.lo.abs(), blocks.hi.abs())
        exponent = (top.view(torch.int32) >> 23).clamp_min(27) - 126
        self.factor = ((bits - exponent + 127) << 23).view(torch.float32)
        inside = torch.arange(blocks.keys.shape[1], device=top.device) < blocks.lengths[:, None]
        keys = torch.where(inside, blocks.keys, torch.zeros_like(blocks.keys))
        values = torch.round(keys * self.factor[:, None]).long()
        self.squares = (blocks.shares * values * values).sum(1)
        self.prefix = torch.nn.functional.pad((blocks.shares * values).cumsum(1), (1, 0))
        self.mass = torch.nn.functional.pad(blocks.shares.cumsum(1), (1, 0))

    def masses(self, edges: torch.Tensor) -> torch.Tensor:
        """Sum of the shares of each bin, int64 like `edges` without its last entry."""
        return self.mass.gather(1, edges.flatten(1)).view(edges.shape).diff(dim=2)

    def sums(self, edges: torch.Tensor) -> torch.Tensor:
        """Sum of the keys of each bin, int64 like `edges` without its last entry."""
        return self.prefix.gather(1, edges.flatten(1)).view(edges.shape).diff(dim=2)

    def best(self, columns: list[torch.Tensor]) -> Best:
        """A `Best` of tau, scale, their codes and the error."""
        tau, scale, tau_code, scale_code, error = columns
        return Best(tau, scale, tau_code, scale_code, error, self.factor, self.squares)

    def error(
        self, blocks: Blocks, tau: torch.Tensor, scale: torch.Tensor, tables: Tables
    ) -> torch.Tensor:
        """Squared error less the sum of squares, int64 `[n, candidates]`."""
        edges = blocks.edges(tau, scale, tables)
        levels = torch.tensor(tables.levels[: tables.n_levels], device=tau.device)
        values = levels * scale[:, :, None] + tau[:, :, None]
        value = torch.round(values * self.factor[:, None, None]).long()
        return (value * (self.masses(edges) * value - 2 * self.sums(edges))).sum(2)


def _candidates(
    blocks: Blocks, plan: Plan, shrink: torch.Tensor, tau_grid: Grid, scale_grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of tau and scale `[n, most]`, and which of them count."""
    center, half = blocks.center[:, None], blocks.half[:, None]
    flat = (blocks.lo == blocks.hi)[:, None]
    wanted = blocks.plain[:, None] if plan.path == PLAIN else torch.zeros_like(half)
    single = tau_grid.encode(center), scale_grid.encode(wanted)
    if plan.path == PLAIN:
        return *single, torch.ones_like(flat)
    if plan.path == RANGE:
        fraction = torch.tensor(plan.radius, device=half.device)
        first = scale_grid.encode(half - fraction * half)
        last = scale_grid.encode(half + fraction * half)
    else:
        first, last = tau_grid.window(center, blocks.radius[:, None])
    span = last - first
    stride = (span / STRIDED).floor() + 1 if plan.path == JOINT else torch.ones_like(span)
    steps = torch.arange(int((span / stride).max()) + 1, device=half.device)
    code = first + steps * stride
    valid = code <= last
    code = torch.minimum(code, last)
    if plan.path == RANGE:
        tau = tau_grid.encode(scale_grid.decode(code) * (center / half))
        pair = tau, code
    else:
        t = tau_grid.decode(code)
        ends = torch.maximum(blocks.hi[:, None] - t, t - blocks.lo[:, None])
        base = half.expand_as(t) if plan.uniform else ends
        pair = code, scale_grid.encode(base * shrink)
    alone = flat & (steps == 0)
    tau_code = torch.where(flat, single[0], pair[0])
    scale_code = torch.where(flat, single[1], pair[1])
    return tau_code, scale_code, torch.where(flat, alone, valid)


def choose(
    plan: Plan,
    table_sum: torch.Tensor,
    error: torch.Tensor,
    away: torch.Tensor,
    valid: torch.Tensor,
) -> torch.Tensor:
    """Index of the winner: objective, lower error, nearest the center, first."""
    worst = torch.iinfo(torch.int64).max
    alive = valid
    if plan.objective != ERROR:
        sums = torch.where(alive, table_sum, worst)
        alive = alive & (sums == sums.min(1, keepdim=True).values)
    errors = torch.where(alive, error, worst)
    alive = alive & (errors == errors.min(1, keepdim=True).values)
    distance = torch.where(alive, away, float("inf"))
    alive = alive & (distance == distance.min(1, keepdim=True).values)
    return alive.to(torch.uint8).argmax(1, keepdim=True)


def search(blocks: Blocks, plan: Plan, tables: Tables, tau_grid: Grid, scale_grid: Grid) -> Best:
    """The stored pair of every block; grids come one entry a block."""
    fixed = Fixed(blocks, plan.fixed_bits)
    best: Best | None = None
    for shrink in torch.tensor(plan.shrinks, device=blocks.lo.device):
        tau_code, scale_code, valid = _candidates(blocks, plan, shrink, tau_grid, scale_grid)
        tau, scale = tau_grid.decode(tau_code), scale_grid.decode(scale_code)
        error = fixed.error(blocks, tau, scale, tables)
        start = (scale, blocks.half) if plan.path == RANGE else (tau, blocks.center)
        away = (start[0] - start[1][:, None]).abs()
        at = choose(plan, blocks.table_sum(tau, scale, tables), error, away, valid)
        columns = (tau, scale, tau_code, scale_code, error)
        found = fixed.best([column.gather(1, at)[:, 0] for column in columns])
        best = found if best is None else where(found.error < best.error, found, best)
    assert best is not None
    if plan.rounds:
        best = _refine(blocks, plan, tables, tau_grid, scale_grid, fixed, best)
    return replace(best, error=best.error + fixed.squares)


def where(condition: torch.Tensor, yes: Best, no: Best) -> Best:
    names = Best.__dataclass_fields__
    return Best(*[torch.where(condition, getattr(yes, n), getattr(no, n)) for n in names])


def _refine(
    blocks: Blocks, plan: Plan, tables: Tables, tau_grid: Grid, scale_grid: Grid,
    fixed: Fixed, best: Best,
) -> Best:  # fmt: skip
    active = blocks.lo != blocks.hi
    for _ in range(plan.rounds):
        tau, scale, solvable = _solve(blocks, tables, fixed, best)
        active = active & solvable
        if not bool(active.any()):
            break
        tau_code = tau_grid.encode(tau[:, None])
        scale_code = scale_grid.encode(scale[:, None])
        t, s = tau_grid.decode(tau_code), scale_grid.decode(scale_code)
        error = fixed.error(blocks, t, s, tables)
        found = fixed.best([x[:, 0] for x in (t, s, tau_code, scale_code, error)])
        active = active & (found.error < best.error)
        best = where(active, found, best)
    return best


def _solve(
    blocks: Blocks, tables: Tables, fixed: Fixed, best: Best
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Least-squares (tau, scale) for the codes of `best`, and where there is one."""
    edges = blocks.edges(best.tau[:, None], best.scale[:, None], tables)
    many, sums = fixed.masses(edges)[:, 0], fixed.sums(edges)[:, 0]
    level = torch.tensor(tables.level_fixed[: tables.n_levels], device=many.device)
    n, sum_w = fixed.mass[:, -1], sums.sum(1)
    sum_l, sum_ll = (level * many).sum(1), (level * level * many).sum(1)
    sum_lw = (level * sums).sum(1)
    det = n * sum_ll - sum_l * sum_l
    unit = 1.0 / (1 << tables.level_bits)
    safe = torch.where(det > 0, det, torch.ones_like(det))
    scale = (n * sum_lw - sum_l * sum_w).double() / safe.double() / unit
    tau = (sum_w.double() - sum_l.double() * unit * scale) / n.double()
    factor = fixed.factor.double()
    stored = (scale / factor).float()
    return (tau / factor).float(), stored, (det > 0) & (stored > 0)
