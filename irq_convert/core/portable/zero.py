"""The search of `core.kernels.zero` over all blocks at once, in torch."""

from __future__ import annotations

from dataclasses import replace

import torch

from irq_convert.core.kernels.search import ENTROPY, Plan, Tables
from irq_convert.core.portable.grid import Grid
from irq_convert.core.portable.search import Best, Blocks, Fixed, choose, where

NEIGHBOURS = (0, -1, 1)


def profile_zero_points(blocks: Blocks, plan: Plan, tables: Tables) -> Blocks:
    """Profiles for integer zero points; `radius` holds the zero point that fits the range."""
    low, high = blocks.lo.clamp_max(0.0), blocks.hi.clamp_min(0.0)
    levels = _levels(tables, low)
    top = tables.n_levels - 1
    some = low < high
    span = torch.where(some, high - low, torch.ones_like(low))
    real = -low / span * torch.tensor(float(top), device=low.device)
    # Not the last one yet: rounding may reach it although something lies above zero.
    z = real.floor().long().clamp_max(top - 1)
    scale = _fitting_scale(z, low, high, levels, top)
    after = (z + 1).clamp_max(top)
    other = torch.where(
        z < top, _fitting_scale(after, low, high, levels, top), torch.full_like(scale, torch.inf)
    )
    z, scale = torch.where(other < scale, after, z), torch.minimum(scale, other)
    z, scale = torch.where(some, z, 0), torch.where(some, scale, torch.zeros_like(scale))
    widest = scale * max(1.0, float(plan.shrinks[0]))
    tau = zero_tau(z, scale, levels)
    return replace(
        blocks, center=tau, half=scale, plain=scale, widest=widest, radius=z.to(low.dtype)
    )


def _levels(tables: Tables, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tables.levels[: tables.n_levels], device=like.device)


def zero_tau(z: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """`-(level * scale)`, never minus zero."""
    return 0.0 - levels[z] * scale


def _fitting_scale(
    z: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: torch.Tensor, top: int
) -> torch.Tensor:
    infinite, zero = torch.full_like(low, torch.inf), torch.zeros_like(low)
    down = torch.where(z == 0, infinite, -low / (1.0 + levels[z]))
    up = torch.where(z == top, infinite, high / (1.0 - levels[z]))
    return torch.maximum(torch.where(low < 0, down, zero), torch.where(high > 0, up, zero))


def search_zero_points(
    blocks: Blocks, plan: Plan, tables: Tables, tau_grid: Grid, scale_grid: Grid
) -> Best:
    """The stored zero point and scale of every block."""
    fixed = Fixed(blocks, plan.fixed_bits)
    levels = _levels(tables, blocks.lo)
    flat = (blocks.lo == blocks.hi)[:, None]
    fitting = blocks.radius.long()
    low, high = (float(plan.shrinks[i]) for i in (1, 0))
    alone = scale_grid.encode(blocks.plain[:, None])
    first = torch.where(flat, alone, scale_grid.encode(blocks.half[:, None] * low))
    last = torch.where(flat, alone, scale_grid.encode(blocks.half[:, None] * high))
    code = first + torch.arange(int((last - first).max()) + 1, device=first.device)
    valid, code = code <= last, torch.minimum(code, last)
    scale = scale_grid.decode(code)
    best: Best | None = None
    best_sum = torch.zeros_like(fitting)
    for step in NEIGHBOURS if plan.radius > 0 else NEIGHBOURS[:1]:
        z = (fitting + step).clamp(0, tables.n_levels - 1)
        tau = zero_tau(z[:, None].expand_as(code), scale, levels)
        sums, error = blocks.table_sum(tau, scale, tables), fixed.error(blocks, tau, scale, tables)
        at = choose(plan, sums, error, (scale - blocks.half[:, None]).abs(), valid)
        columns = (tau, scale, z[:, None].expand_as(code).to(tau.dtype), code, error)
        found = fixed.best([column.gather(1, at)[:, 0] for column in columns])
        total = sums.gather(1, at)[:, 0] if plan.objective == ENTROPY else torch.zeros_like(z)
        if best is None:
            best, best_sum = found, total
            continue
        better = (total < best_sum) | ((total == best_sum) & (found.error < best.error))
        better &= (z == fitting + step) & ~flat[:, 0]
        best = where(better, found, best)
        best_sum = torch.where(better, total, best_sum)
    assert best is not None
    for _ in range(plan.rounds):
        refined = _refine(blocks, tables, scale_grid, fixed, best, levels)
        if not bool((refined.error < best.error).any()):
            break
        best = refined
    return replace(best, error=best.error + fixed.squares)


def _refine(
    blocks: Blocks,
    tables: Tables,
    scale_grid: Grid,
    fixed: Fixed,
    best: Best,
    levels: torch.Tensor,
) -> Best:
    """One round: least-squares scales of the zero point at hand and its neighbours."""
    edges = blocks.edges(best.tau[:, None], best.scale[:, None], tables)
    many, sums = fixed.masses(edges)[:, 0], fixed.sums(edges)[:, 0]
    whole = torch.tensor(tables.level_fixed[: tables.n_levels], device=many.device)
    around, found = best.tau_code.long(), best
    for step in NEIGHBOURS:
        z = (around + step).clamp(0, tables.n_levels - 1)
        level = whole[None] - whole[z][:, None]
        top, bottom = (level * sums).sum(1), (level * level * many).sum(1)
        usable = (z == around + step) & (top > 0) & (bottom > 0) & (blocks.lo != blocks.hi)
        ratio = top.double() / torch.where(bottom > 0, bottom, 1).double()
        wanted = (ratio * float(1 << tables.level_bits) / fixed.factor.double()).float()
        code = scale_grid.encode(wanted[:, None])
        scale = scale_grid.decode(code)
        tau = zero_tau(z[:, None], scale, levels)
        error = fixed.error(blocks, tau, scale, tables)
        columns = (tau, scale, z[:, None].to(tau.dtype), code, error)
        trial = fixed.best([column[:, 0] for column in columns])
        found = where(usable & (trial.error < found.error), trial, found)
    return found
