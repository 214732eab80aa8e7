"""The same quantization in plain torch: the portable path, and the kernel's oracle.

Every step mirrors `core.kernels` formula by formula in float32, with entropy and error as exact
integers, so both give the same bytes. It is written to be read, over all blocks at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from irq_convert.core.blocks import GROUP_SIZE, BlockShape
from irq_convert.core.kernels.group import INTEGER, LIMIT, RANGE
from irq_convert.core.kernels.search import Plan, Tables
from irq_convert.core.packing import pack_codes
from irq_convert.core.portable.grid import Grid, fit_grid
from irq_convert.core.portable.search import Best, Blocks, Fixed, search
from irq_convert.core.portable.zero import profile_zero_points, search_zero_points
from irq_convert.core.search_plan import make_tables, plan_search
from irq_convert.core.spec import QuantSpec

CHUNK_GROUPS = 16


def quantize_portable(
    weights: torch.Tensor, shape: BlockShape, spec: QuantSpec, shares: torch.Tensor | None = None
) -> tuple:
    """Quantize float32 `[rows, cols]` on any device; the parts as `core.quantize` wants them.

    `shares`, int32 `[rows, cols]`, weigh the squared errors.
    """
    device = weights.device
    flat, lengths = _to_blocks(weights, shape, float("inf"))
    weighing = None if shares is None else _to_blocks(shares, shape, 0)[0].to(device)
    packed_codes = torch.empty((shape.blocks, shape.block_size), dtype=torch.uint8, device=device)
    found = []
    for start in range(0, shape.blocks, CHUNK_GROUPS * GROUP_SIZE):
        part = slice(start, min(shape.blocks, start + CHUNK_GROUPS * GROUP_SIZE))
        own = None if weighing is None else weighing[part].long()
        chunk = _quantize_groups(flat[part], lengths[part], spec, own)
        packed_codes[part] = chunk.codes
        found.append(chunk)
    codes = packed_codes.reshape(shape.rows, -1)[:, : shape.cols]
    return (
        pack_codes(codes.contiguous(), shape.bits),
        torch.cat([c.scale for c in found]),
        torch.cat([c.tau for c in found]),
        torch.cat([c.scale_grid for c in found]),
        torch.cat([c.tau_grid for c in found]),
        np.concatenate([c.counts for c in found]),
        np.concatenate([c.energies for c in found]),
    )


@dataclass(frozen=True)
class _Chunk:
    codes: torch.Tensor
    scale: torch.Tensor
    tau: torch.Tensor
    scale_grid: torch.Tensor
    tau_grid: torch.Tensor
    counts: np.ndarray
    energies: np.ndarray


def _to_blocks(
    weights: torch.Tensor, shape: BlockShape, filling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks `[blocks, block_size]`, short ones filled up, and their lengths."""
    width = shape.blocks_per_row * shape.block_size
    padded = F.pad(weights, (0, width - shape.cols), value=filling)
    lengths = torch.full((shape.rows, shape.blocks_per_row), shape.block_size)
    lengths[:, -1] = shape.tail
    return padded.reshape(-1, shape.block_size), lengths.reshape(-1).to(weights.device)


def _quantize_groups(
    flat: torch.Tensor, lengths: torch.Tensor, spec: QuantSpec, shares: torch.Tensor | None
) -> _Chunk:
    groups = -(-flat.shape[0] // GROUP_SIZE)
    inside = torch.arange(flat.shape[1], device=flat.device) < lengths[:, None]
    bad = (inside & ~(flat.abs() < float(LIMIT))).sum(1)
    if int(bad.sum()):
        return _refused(flat, groups, _per_group(bad.cpu().numpy()))
    weighted = shares is not None
    plan = plan_search(spec, weighted)
    tables = make_tables(spec.codebook, spec.block_size, weighted)
    own = inside.long() if shares is None else shares
    blocks = Blocks.profile(torch.where(inside, flat + 0.0, flat), own, lengths, plan)
    integer = plan.path == INTEGER
    if integer:
        blocks = profile_zero_points(blocks, plan, tables)
    tau_grid, scale_grid = _fit_groups(blocks, plan)
    walk = search_zero_points if integer else search
    best = walk(blocks, plan, tables, tau_grid.of_blocks(blocks.n), scale_grid.of_blocks(blocks.n))
    mids = torch.tensor(tables.mids[: tables.n_levels - 1], device=flat.device)
    edges = best.tau[:, None] + mids * best.scale[:, None]
    codes = (flat[:, :, None] >= edges[:, None, :]).sum(2).to(torch.uint8)
    plain_tau = blocks.center if plan.uniform else torch.zeros_like(blocks.center)
    plain = blocks.table_sum(plain_tau[:, None], blocks.plain[:, None], tables)[:, 0]
    stored = blocks.table_sum(best.tau[:, None], best.scale[:, None], tables)[:, 0]
    energy, error = _energies(blocks, best, plan, tables)
    counts = [plain.cpu().numpy(), stored.cpu().numpy(), bad.cpu().numpy()]
    return _Chunk(
        codes=torch.where(inside, codes, torch.zeros_like(codes)),
        scale=best.scale_code.to(torch.uint8),
        tau=best.tau_code.to(torch.uint8),
        scale_grid=scale_grid.pairs(),
        tau_grid=tau_grid.pairs(),
        counts=np.stack([_per_group(c) for c in counts], 1),
        energies=np.stack([_per_group(e.cpu().numpy()) for e in (energy, error)], 1),
    )


def _energies(
    blocks: Blocks, best: Best, plan: Plan, tables: Tables
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares of the weights and of the errors, which no share weighs."""
    if plan.weighted:
        ones = (blocks.shares > 0).long()
        blocks = replace(blocks, shares=ones)
        fixed = Fixed(blocks, plan.plain_bits)
        error = fixed.error(blocks, best.tau[:, None], best.scale[:, None], tables)[:, 0]
        best = replace(
            best, factor=fixed.factor, squares=fixed.squares, error=error + fixed.squares
        )
    unit = 1.0 / (best.factor.double() * best.factor.double())
    return best.squares.double() * unit, best.error.double() * unit


def _refused(flat: torch.Tensor, groups: int, bad: np.ndarray) -> _Chunk:
    empty = torch.zeros(flat.shape[0], dtype=torch.uint8, device=flat.device)
    grid = torch.zeros((groups, 2), device=flat.device)
    counts = np.stack([np.zeros_like(bad), np.zeros_like(bad), bad], 1)
    codes = torch.zeros_like(flat, dtype=torch.uint8)
    return _Chunk(codes, empty, empty, grid, grid, counts, np.zeros((groups, 2)))


def _per_group(values: np.ndarray) -> np.ndarray:
    """Sums over groups, block after block as the kernel adds them."""
    starts = range(0, len(values), GROUP_SIZE)
    return np.array([np.cumsum(values[i : i + GROUP_SIZE])[-1] for i in starts])


def _fit_groups(blocks: Blocks, plan: Plan) -> tuple[Grid, Grid]:
    """Second level of every group, from the profiles of its blocks (kernel: `fit_group`)."""
    low, high = [], []
    narrow, wide, anchor = [], [], []
    narrowest = blocks.narrowest(plan)
    for start in range(0, blocks.n, GROUP_SIZE):
        part = slice(start, min(blocks.n, start + GROUP_SIZE))
        radius, center = blocks.radius[part], blocks.center[part]
        around = radius if plan.path == RANGE else radius.sort().values[len(radius) // 2]
        low.append((center - around).min())
        high.append((center + around).max())
        narrow.append(narrowest[part].min())
        wide.append(blocks.widest[part].max())
        value = blocks.plain[part] if plan.path == INTEGER else center
        flat = (blocks.lo[part] == blocks.hi[part]) & (value != 0)
        anchor.append(value[flat][0] if bool(flat.any()) else torch.zeros_like(value[0]))
    zero = torch.zeros_like(torch.stack(anchor))
    if plan.path == INTEGER:
        scales = fit_grid(torch.stack(narrow), torch.stack(wide), torch.stack(anchor))
        return Grid(zero, zero, zero), scales
    return (
        fit_grid(torch.stack(low), torch.stack(high), torch.stack(anchor)),
        fit_grid(torch.stack(narrow), torch.stack(wide), zero),
    )
