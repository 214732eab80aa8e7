"""Quantize on the device: the kernels of this folder one after another, a chunk of rows at a time.

Scratch is some tens of bytes a weight of one chunk, whatever the size of the matrix; nothing is
read back before the end. Kernels hand blocks on through scratch memory, which stays in the second
level cache, and each has the shape that suits its step: tiles of whole blocks to sort, tiles of
candidates to score, a block a lane to refine and to count.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from irq_convert.core.blocks import GROUP_SIZE, BlockShape
from irq_convert.core.kernels.group import INTEGER
from irq_convert.core.kernels.search import ERROR, Plan
from irq_convert.core.search_plan import make_tables, plan_search
from irq_convert.core.spec import QuantSpec
from irq_convert.core.triton import emit, grids, prepare, refine, search, totals
from irq_convert.core.triton.arithmetic import GRID_COLUMNS, LAUNCH, PROFILE_ROWS
from irq_convert.core.triton.support import interpreting

CHUNK_WEIGHTS = 1 << 22
TILE = 1024
"""Weights of whole blocks that one program sorts."""
SCORES = 256
"""Candidates that one program scores at a time, those of all its blocks together."""
LANES = 128
"""Blocks of one program where a lane is a block."""
NARROW, WIDE = 32, 64
OCTETS = 256
GROUPS = 32


@dataclass(frozen=True)
class Constants:
    """Constants on the device: of a codebook and block size, and of a search."""

    mids: torch.Tensor
    levels: torch.Tensor
    level_fixed: torch.Tensor
    table: torch.Tensor
    n_levels: int
    level_bits: int


@functools.cache
def constants(
    codebook: str, block_size: int, device: torch.device, weighted: bool = False
) -> Constants:
    tables = make_tables(codebook, block_size, weighted)

    def moved(part: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(part.copy()).to(device)

    return Constants(
        mids=moved(tables.mids),
        levels=moved(tables.levels),
        level_fixed=moved(tables.level_fixed),
        table=moved(tables.entropy),
        n_levels=tables.n_levels,
        level_bits=tables.level_bits,
    )


@functools.cache
def _search(
    spec: QuantSpec, device: torch.device, weighted: bool = False
) -> tuple[Plan, torch.Tensor]:
    """The plan, and its numbers on the device: radius, floor and shrink factors."""
    plan = plan_search(spec, weighted)
    numbers = np.concatenate([np.array([plan.radius, plan.floor], np.float32), plan.shrinks])
    return plan, torch.from_numpy(numbers).to(device)


class _Scratch:
    """Buffers of one chunk, used again for every chunk."""

    def __init__(
        self, blocks: int, block_size: int, device: torch.device, weighted: bool = False
    ) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.keys = empty(blocks, block_size, dtype=torch.float32)
        self.prefix = empty(blocks, block_size + 1, dtype=torch.int32)
        # Sums of shares, and of keys that no share weighs: only a weighted search has them.
        self.mass = torch.empty_like(self.prefix) if weighted else self.prefix
        self.plain = torch.empty_like(self.prefix) if weighted else self.prefix
        self.profile = empty(PROFILE_ROWS, blocks, dtype=torch.float32)
        self.squares = empty(blocks, dtype=torch.int64)
        self.errors = empty(blocks, dtype=torch.int64)
        self.bad = empty(blocks, dtype=torch.int32)
        self.tau = empty(blocks, dtype=torch.float32)
        self.scale = empty(blocks, dtype=torch.float32)
        self.sums = empty(2, blocks, dtype=torch.int64)
        self.energies = empty(2, blocks, dtype=torch.float64)


@dataclass(frozen=True)
class _Result:
    packed: torch.Tensor
    scale: torch.Tensor
    tau: torch.Tensor
    grids: torch.Tensor
    counts: torch.Tensor
    energies: torch.Tensor


def quantize_triton(
    weight: torch.Tensor,
    shape: BlockShape,
    spec: QuantSpec,
    weighing: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple:
    """Quantize `weight`, `[rows, cols]` of any float dtype; the parts as `core.quantize` wants.

    `weighing`: shares of columns, int32 `[matrices, cols]`, and each row's matrix, int32 `[rows]`.
    Byte for byte what the CPU kernels give. The tensor has to be where `support.why_not` allows.
    """
    device = weight.device
    out = _Result(
        torch.empty((shape.rows, shape.row_bytes), dtype=torch.uint8, device=device),
        torch.empty(shape.blocks, dtype=torch.uint8, device=device),
        torch.empty(shape.blocks, dtype=torch.uint8, device=device),
        torch.empty((shape.groups, GRID_COLUMNS.value), dtype=torch.float32, device=device),
        torch.empty((shape.groups, 3), dtype=torch.int64, device=device),
        torch.empty((shape.groups, 2), dtype=torch.float64, device=device),
    )
    step = min(shape.rows, shape.tile_rows(CHUNK_WEIGHTS))
    shared = None
    if weighing is not None:
        shared = tuple(torch.from_numpy(part).to(device) for part in weighing)
    scratch = _Scratch(shape.tile(step).blocks, shape.block_size, device, shared is not None)
    with on_device(device):
        for start in range(0, shape.rows, step):
            rows = weight[start : start + step]
            if rows.dtype == torch.float64:
                rows = rows.to(torch.float32)
            stop = start + rows.shape[0]
            blocks = slice(shape.tile(start).blocks, shape.tile(stop).blocks)
            groups = slice(shape.tile(start).groups, shape.tile(stop).groups)
            part = _Result(
                out.packed[start:stop],
                *(tensor[blocks] for tensor in (out.scale, out.tau)),
                *(tensor[groups] for tensor in (out.grids, out.counts, out.energies)),
            )
            own = None if shared is None else (shared[0], shared[1][start:stop])
            _quantize_chunk(rows.contiguous(), shape.tile(rows.shape[0]), spec, own, scratch, part)
    return (
        out.packed,
        out.scale,
        out.tau,
        out.grids[:, 3:5].contiguous(),
        out.grids[:, 0:2].contiguous(),
        out.counts.cpu().numpy(),
        out.energies.cpu().numpy(),
    )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the current device: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def spread(items: int, each: int) -> tuple[int, ...]:
    """The grid of programs that take `each` of `items`."""
    return (-(-items // each),)


def together(items: int, each: int, most: int) -> int:
    """How many of `items`, of `each` elements, one program takes to fill `most`: a power of two.

    The interpreter runs programs one after another at a cost a program more than an element, so
    under it they are as large as the work asks for.
    """
    if not interpreting():
        return max(1, most // each)
    return min(1 << (items - 1).bit_length(), max(1, 16 * most // each))


def _quantize_chunk(
    rows: torch.Tensor,
    shape: BlockShape,
    spec: QuantSpec,
    shared: tuple[torch.Tensor, torch.Tensor] | None,
    work: _Scratch,
    out: _Result,
) -> None:
    weighted = shared is not None
    known = constants(spec.codebook, spec.block_size, rows.device, weighted)
    plan, settings = _search(spec, rows.device, weighted)
    where = (shape.cols, shape.blocks_per_row, shape.blocks)
    keys = (work.keys, work.prefix, work.mass)
    sorted_blocks = together(shape.blocks, spec.block_size, TILE)
    prepare.prepare[spread(shape.blocks, sorted_blocks)](
        rows, *(shared or (work.bad, work.bad)), settings, known.levels, *keys, work.plain,
        work.profile, work.squares, work.bad, *where,
        PATH=plan.path, UNIFORM=plan.uniform, WEIGHTED=weighted, FIXED_BITS=plan.fixed_bits,
        PLAIN_BITS=plan.plain_bits, TOP=known.n_levels - 1, B=spec.block_size, NB=sorted_blocks,
        **LAUNCH,
    )  # fmt: skip
    at_once = together(shape.groups, GROUP_SIZE, GROUP_SIZE)
    grids.fit_groups[spread(shape.groups, at_once)](
        work.profile, settings, out.grids, shape.blocks, shape.groups,
        PATH=plan.path, UNIFORM=plan.uniform, NG=at_once, **LAUNCH,
    )  # fmt: skip
    settled = (work.tau, work.scale, out.tau, out.scale, work.errors)
    seen = (*keys, work.profile, out.grids)
    _search_chunk(spec, plan, settings, known, seen, settled, where)
    _measure_chunk(shape, plan, known, work, out)
    octets_per_row = -(-shape.cols // 8)
    at_once = together(shape.rows * octets_per_row, 1, OCTETS)
    emit.emit[spread(shape.rows * octets_per_row, at_once)](
        rows, work.tau, work.scale, known.mids, out.packed, *where[:2], octets_per_row,
        shape.rows * octets_per_row, shape.row_bytes,
        N_MIDS=known.n_levels - 1, BITS=shape.bits, B=spec.block_size, NO=at_once, **LAUNCH,
    )  # fmt: skip


def _search_chunk(
    spec: QuantSpec,
    plan: Plan,
    settings: torch.Tensor,
    known: Constants,
    seen: tuple[torch.Tensor, ...],
    settled: tuple[torch.Tensor, ...],
    where: tuple[int, int, int],
) -> None:
    """Search every block, then refine: `seen` is read, `settled` written."""
    book = {
        "WEIGHTED": plan.weighted,
        "N_LEVELS": known.n_levels,
        "B": spec.block_size,
        **LAUNCH,
    }
    trials = len(plan.shrinks)
    if plan.path == INTEGER:
        trials = 3 if plan.radius > 0 else 1
    candidates = NARROW if plan.objective == ERROR else WIDE
    side_by_side = together(where[2], candidates, SCORES)
    search.search[spread(where[2], side_by_side)](
        *seen, settings, known.mids, known.levels, known.table, *settled, *where, trials,
        PATH=plan.path, OBJECTIVE=plan.objective, UNIFORM=plan.uniform, NB=side_by_side,
        C=candidates, **book,
    )  # fmt: skip
    if plan.rounds:
        kernel = refine.refine_zero_points if plan.path == INTEGER else refine.refine
        lanes = together(where[2], 1, LANES)
        kernel[spread(where[2], lanes)](
            *seen, known.mids, known.levels, known.level_fixed, known.table, *settled, *where,
            plan.rounds, LEVEL_UNIT=float(1 << known.level_bits), NB=lanes, **book,
        )  # fmt: skip


def _measure_chunk(
    shape: BlockShape, plan: Plan, known: Constants, work: _Scratch, out: _Result
) -> None:
    """Entropies and energies of what was settled, added up by group."""
    lanes = together(shape.blocks, 1, LANES)
    totals.measure[spread(shape.blocks, lanes)](
        work.keys, work.plain, work.profile, work.tau, work.scale, work.errors, work.squares,
        known.mids, known.levels, known.table, work.sums, work.energies,
        shape.cols, shape.blocks_per_row, shape.blocks,
        UNIFORM=plan.uniform, WEIGHTED=plan.weighted, PLAIN_BITS=plan.plain_bits,
        N_LEVELS=known.n_levels, B=shape.block_size, NB=lanes, **LAUNCH,
    )  # fmt: skip
    added = together(shape.groups, 1, GROUPS)
    totals.add_up[spread(shape.groups, added)](
        work.sums, work.energies, work.bad, out.counts, out.energies, shape.blocks, shape.groups,
        NG=added, num_warps=1, **LAUNCH,
    )  # fmt: skip
