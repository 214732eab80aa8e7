"""Stored scales and taus as the float32 numbers that they stand for, and back.

Eight-bit statistics are numbers on a grid that 256 consecutive blocks share,
`step * (code + offset)`; others are stored as they are (formats/irq-v1.md, section 6).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from irq_convert.core.blocks import GROUP_SIZE
from irq_convert.core.statistic_dtypes import STATISTIC_DTYPES, StoredDtype
from irq_convert.errors import IrqError


def statistic_dtype(dtype: torch.dtype) -> StoredDtype:
    """The row of `STATISTIC_DTYPES` for `dtype`; raises `IrqError` where there is none."""
    found = STATISTIC_DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        *most, last = STATISTIC_DTYPES
        raise IrqError(f"statistics must be {', '.join(most)} or {last}, not {dtype}")
    return found


def check_statistic(stored: torch.Tensor, grid: torch.Tensor | None) -> None:
    """Raise `IrqError` unless `stored` is uint8 with a float32 `grid`, or floating without one."""
    kind = statistic_dtype(stored.dtype)
    if kind.grid and (grid is None or grid.dtype != torch.float32):
        raise IrqError(f"statistics stored as {kind.name} need a float32 grid of (step, offset)")
    if not kind.grid and grid is not None:
        raise IrqError(f"statistics stored as {stored.dtype} take no grid")


def expand_statistic(stored: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
    """The float32 statistic of every block, `[rows, blocks_per_row]`, on the device of `stored`.

    `stored` is uint8 with a `grid`, float32 `[groups, 2]` of (step, offset), or floating without
    one. The sum `code + offset` is exact in float32, so there is one rounding.
    Raises `IrqError` for any other pair of dtypes.
    """
    check_statistic(stored, grid)
    if grid is None:
        return stored.to(torch.float32)
    groups = grid.shape[0]
    codes = stored.reshape(-1).to(torch.float32)
    codes = functional.pad(codes, (0, groups * GROUP_SIZE - codes.numel()))
    values = (codes.view(groups, GROUP_SIZE) + grid[:, 1:2]) * grid[:, 0:1]
    return values.view(-1)[: stored.numel()].view(stored.shape)


def encode_statistic(
    values: torch.Tensor, stored: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Store `values`, floating `[rows, blocks_per_row]`: the twin of `expand_statistic`.

    For uint8 each group of 256 consecutive blocks gets the grid that covers its range, and every
    value its nearest code on it; floating dtypes round each value once. Returns the statistic and
    its grid, None but for uint8. Raises `IrqError` when a value is not finite in `stored` or the
    dtype is none of `STATISTIC_DTYPES`.
    """
    kind = statistic_dtype(stored)
    narrow = values.to(torch.float32 if kind.grid else stored)
    if not bool(torch.isfinite(narrow).all()):
        raise IrqError(f"a statistic is NaN, infinite or too large for {stored}")
    if not kind.grid:
        return narrow, None
    from irq_convert.core.portable.grid import fit_grid

    flat = narrow.reshape(-1)
    groups = -(-flat.numel() // GROUP_SIZE)
    if not groups:
        return flat.to(torch.uint8).view(values.shape), flat.new_zeros(0, 2)
    # The last value again and again changes no range.
    flat = torch.cat([flat, flat[-1:].expand(groups * GROUP_SIZE - flat.numel())])
    low, high = flat.view(groups, GROUP_SIZE).aminmax(dim=1)
    grid = fit_grid(low, high, torch.zeros_like(low))
    codes = grid.of_blocks(flat.numel()).encode(flat[:, None])
    return codes[: values.numel(), 0].to(torch.uint8).view(values.shape), grid.pairs()
