# mypy: disallow-untyped-defs=False
"""Packed codes and statistics to dense weights on the device, one pass over both.

A program takes runs of eight codes, which fill whole bytes at every width: a run's bytes are read
once, its scale and tau are looked up once, and its eight weights leave in one store. The codes may
be a slice of wider rows, so tiles of columns need no copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from irq_convert.core.codebook import get_codebook
from irq_convert.core.scales import check_statistic
from irq_convert.core.triton.arithmetic import GROUP, LAUNCH, MOST_BITS
from irq_convert.core.triton.quantize import OCTETS, constants, on_device, spread, together

if TYPE_CHECKING:
    from irq_convert.core.quantized import QuantizedTensor

TILE_WEIGHTS = 1 << 28
"""Weights of one launch, so that offsets within it fit 32 bits."""


@triton.jit
def statistic(stored, grid, row, block, number, row_stride, real, GRID: tl.constexpr):
    """The statistic of each run's block: on its group's grid, or stored as it is."""
    value = tl.load(stored + row * row_stride + block, mask=real, other=0).to(tl.float32)
    if GRID:
        at = grid + number // GROUP * 2
        step = tl.load(at, mask=real, other=0.0)
        value = step * (value + tl.load(at + 1, mask=real, other=0.0))
    return value


@triton.jit(
    do_not_specialize=[
        "first_row",
        "rows",
        "octets_per_row",
        "scale_stride",
        "tau_stride",
        "blocks_per_row",
    ],
    # Tiles of columns start anywhere, and these are read one number a run.
    do_not_specialize_on_alignment=["scale", "tau", "scale_grid", "tau_grid"],
)
def dequantize(
    codes, scale, tau, scale_grid, tau_grid, levels, out, first_row, rows, cols, octets_per_row,
    row_bytes, codes_stride, scale_stride, tau_stride, blocks_per_row,
    SCALE_GRID: tl.constexpr, TAU_GRID: tl.constexpr, BITS: tl.constexpr, B: tl.constexpr,
    NO: tl.constexpr,
):  # fmt: skip
    """`out`, `[rows, cols]`, gets rows from `first_row` on: `level[code] * scale + tau`.

    `codes` uint8 with rows of `row_bytes` at `codes_stride`; statistics uint8 with grids, float16
    or float32. float32 arithmetic, then one conversion to the dtype of `out`.
    """
    o = tl.program_id(0) * NO + tl.arange(0, NO)
    inner = o // octets_per_row
    octet = o - inner * octets_per_row
    real = inner < rows
    row = (first_row + inner).to(tl.int64)
    byte = tl.arange(0, MOST_BITS)[None, :]
    at = octet[:, None] * BITS + byte
    mask = real[:, None] & (byte < BITS) & (at < row_bytes)
    parts = tl.load(codes + (row * codes_stride)[:, None] + at, mask=mask, other=0).to(tl.int32)
    word = tl.sum(parts << (8 * byte), 1)
    block = octet * 8 // B
    number = row * blocks_per_row + block
    s = statistic(scale, scale_grid, row, block, number, scale_stride, real, SCALE_GRID)
    t = statistic(tau, tau_grid, row, block, number, tau_stride, real, TAU_GRID)
    j = tl.arange(0, 8)[None, :]
    code = (word[:, None] >> (j * BITS)) & ((1 << BITS) - 1)
    value = tl.load(levels + code) * s[:, None] + t[:, None]
    col = octet[:, None] * 8 + j
    tl.store(
        out + (inner * cols)[:, None] + col,
        value.to(out.dtype.element_ty),
        mask=real[:, None] & (col < cols),
    )


def dequantize_triton(q: QuantizedTensor, begin: int, end: int, out: torch.Tensor) -> None:
    """Write rows `begin .. end` of `q` to `out`, contiguous `[end - begin, cols]`.

    Codes and statistics may have any row stride. Raises `IrqError` for statistics of other dtypes.
    """
    for stored, grid in ((q.scale, q.scale_grid), (q.tau, q.tau_grid)):
        check_statistic(stored, grid)
    codes, scale, tau = (dense_rows(part) for part in (q.codes, q.scale, q.tau))
    levels = constants(q.codebook, q.block_size, out.device).levels
    shape, octets_per_row = q.shape, -(-q.cols // 8)
    step = max(1, TILE_WEIGHTS // max(1, q.cols))
    at_once = together(step * octets_per_row, 1, OCTETS)
    with on_device(out.device):
        for row in range(begin, end, step):
            rows = min(step, end - row)
            dequantize[spread(rows * octets_per_row, at_once)](
                codes, scale, tau, grid_or(q.scale_grid, levels), grid_or(q.tau_grid, levels),
                levels, out[row - begin :], row, rows, q.cols, octets_per_row, shape.row_bytes,
                codes.stride(0), scale.stride(0), tau.stride(0), shape.blocks_per_row,
                SCALE_GRID=q.scale_grid is not None, TAU_GRID=q.tau_grid is not None,
                BITS=get_codebook(q.codebook).bits, B=q.block_size, NO=at_once, **LAUNCH,
            )  # fmt: skip


def dense_rows(part: torch.Tensor) -> torch.Tensor:
    part = part.detach()
    return part if part.stride(1) == 1 or part.shape[1] <= 1 else part.contiguous()


def grid_or(grid: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    return unused if grid is None else grid.detach().contiguous()
