"""Parts of packed weights: rows and columns, and the dtypes that they are saved in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from irq_convert.artifact.config import ModuleFormat
from irq_convert.core.blocks import GROUP_SIZE
from irq_convert.core.moved import with_statistics
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic, statistic_dtype


def cut_rows(q: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Rows `start .. stop` of `q`, without a copy where they begin with a group."""
    shape = q.shape
    aligned = start - start % shape.row_multiple

    def statistic(stored: torch.Tensor, grid: torch.Tensor | None) -> Any:
        if grid is None:
            return stored[start:stop], None
        groups = grid[shape.tile(aligned).groups : shape.tile(stop).groups]
        if aligned == start:
            return stored[start:stop], groups
        return expand_statistic(stored[aligned:stop], groups)[start - aligned :], None

    scale, scale_grid = statistic(q.scale, q.scale_grid)
    tau, tau_grid = statistic(q.tau, q.tau_grid)
    codes = q.codes[start:stop]
    return QuantizedTensor(
        codes, scale, tau, scale_grid, tau_grid, q.cols, q.codebook, q.block_size
    )


def cut_columns(q: QuantizedTensor, first: int, last: int) -> QuantizedTensor:
    """Blocks `first .. last` of every row of `q`, whose statistics need no grid.

    A block fills whole bytes, so its codes are cut out without unpacking.
    """
    begin, end = first * q.block_size, min(last * q.block_size, q.cols)
    bits = q.shape.bits
    return replace(
        q,
        codes=q.codes[:, begin * bits // 8 : -(-end * bits // 8)],
        scale=q.scale[:, first:last],
        tau=q.tau[:, first:last],
        cols=end - begin,
    )


def without_grids(q: QuantizedTensor) -> QuantizedTensor:
    """`q` with float32 statistics where it has grids, so that any part of it can be cut out."""
    if q.scale_grid is None and q.tau_grid is None:
        return q
    scale, tau = expand_statistic(q.scale, q.scale_grid), expand_statistic(q.tau, q.tau_grid)
    return with_statistics(q, scale, tau)


def take_rows(q: QuantizedTensor, rows: torch.Tensor) -> QuantizedTensor:
    """The `rows` of `q`, integers `[n]`, in their order; statistics are float32, without a grid.

    Reads those rows alone. Raises `IndexError` for a number that is no row, on the CPU.
    """
    blocks = q.shape.blocks_per_row
    first = rows.to(torch.int64)[:, None] * blocks
    groups = (first + torch.arange(blocks, device=rows.device)) // GROUP_SIZE

    def statistic(stored: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
        found = stored.index_select(0, rows).to(torch.float32)
        if grid is None:
            return found
        step, offset = grid.index_select(0, groups.view(-1)).view(*groups.shape, 2).unbind(-1)
        return (found + offset) * step  # as `expand_statistic`: one rounding

    codes = q.codes.index_select(0, rows)
    scale, tau = statistic(q.scale, q.scale_grid), statistic(q.tau, q.tau_grid)
    return QuantizedTensor(codes, scale, tau, None, None, q.cols, q.codebook, q.block_size)


def narrow_parts(destination: Any, prefix: str, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parts in a state dict their own `dtypes` again where some program has widened them.

    PEFT's preparation for k-bit training does, with everything in float16. Only where the numbers
    stay the same.
    """
    for name, dtype in dtypes.items():
        part = destination.get(prefix + name)
        if part is not None and part.dtype != dtype and _fits(part, dtype):
            destination[prefix + name] = part.to(dtype)


def _fits(part: torch.Tensor, dtype: torch.dtype) -> bool:
    return part.is_meta or torch.equal(part.to(dtype).to(part.dtype), part)


def format_of(
    fmt: ModuleFormat,
    name: str,
    parts: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> ModuleFormat:
    """`fmt` with the dtypes of scale and tau that `parts` of tensor `name` will be saved in."""
    changes: dict[str, Any] = {}
    for what in ("scale", "tau"):
        part, dtype = parts[f"{name}_{what}"], dtypes[f"{name}_{what}"]
        if part.dtype != dtype and not _fits(part, dtype):
            changes[f"{what}_dtype"] = statistic_dtype(part.dtype).name
    return replace(fmt, **changes) if changes else fmt
