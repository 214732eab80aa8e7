# mypy: disallow-untyped-defs=False
"""A few inputs times packed rows on the device: no dense weight is ever written.

A program takes some rows, and of them runs of eight codes at a time, which fill whole bytes at
every width and lie in one block. A run adds `scale sum(level x) + tau sum(x)` to a sum of its own;
those of a row are added up at its end. Everything is float32, whatever the dtype of the inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from irq_convert.core.codebook import get_codebook
from irq_convert.core.triton.arithmetic import LAUNCH, MOST_BITS
from irq_convert.core.triton.dequantize import dense_rows, grid_or, statistic
from irq_convert.core.triton.quantize import constants, on_device, spread, together

if TYPE_CHECKING:
    from irq_convert.core.quantized import QuantizedTensor

ROWS = 4
"""Rows of a program."""
OCTETS = 128
"""Runs of a row that a program takes at once."""


@triton.jit(do_not_specialize=["rows", "tokens", "octets_per_row", "blocks_per_row"])
def multiply_rows(
    x, codes, scale, tau, scale_grid, tau_grid, levels, out, rows, cols, tokens, octets_per_row,
    row_bytes, codes_stride, scale_stride, tau_stride, blocks_per_row,
    SCALE_GRID: tl.constexpr, TAU_GRID: tl.constexpr, BITS: tl.constexpr, B: tl.constexpr,
    R: tl.constexpr, NO: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """`out`, float32 `[tokens, rows]`, gets `x`, `[tokens, cols]`, times rows of packed codes.

    `codes` uint8 with rows of `row_bytes` at `codes_stride`; statistics uint8 with grids, float16
    or float32. `T` is at least `tokens`.
    """
    line = tl.program_id(0) * R + tl.arange(0, R)
    real = line < rows
    row = line.to(tl.int64)[:, None]
    token = tl.arange(0, T)[:, None]
    byte = tl.arange(0, MOST_BITS)[None, None, :]
    total = tl.zeros((T, R, NO), tl.float32)
    for first in range(0, octets_per_row, NO):
        octet = first + tl.arange(0, NO)[None, :]
        inside = real[:, None] & (octet < octets_per_row)
        at = octet[:, :, None] * BITS + byte
        mask = inside[:, :, None] & (byte < BITS) & (at < row_bytes)
        parts = tl.load(codes + (row * codes_stride)[:, :, None] + at, mask=mask, other=0)
        word = tl.sum(parts.to(tl.int32) << (8 * byte), 2)
        block = octet * 8 // B
        number = row * blocks_per_row + block
        s = statistic(scale, scale_grid, row, block, number, scale_stride, inside, SCALE_GRID)
        t = statistic(tau, tau_grid, row, block, number, tau_stride, inside, TAU_GRID)
        inner = tl.zeros((T, R, NO), tl.float32)
        plain = tl.zeros((T, NO), tl.float32)
        for j in tl.static_range(8):
            col = octet * 8 + j
            present = (token < tokens) & (col < cols)
            value = tl.load(x + token * cols + col, mask=present, other=0.0).to(tl.float32)
            level = tl.load(levels + ((word >> (j * BITS)) & ((1 << BITS) - 1)))
            inner += level[None, :, :] * value[:, None, :]
            plain += value
        total += s[None, :, :] * inner + t[None, :, :] * plain[:, None, :]
    where = out + tl.arange(0, T)[:, None] * rows + line[None, :]
    tl.store(where, tl.sum(total, 2), mask=(token < tokens) & real[None, :])


def decode_rows_triton(x: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    """`x @ W^T`, float32 `[tokens, rows]`, of `x` floating `[tokens, cols]` on the device of `q`.

    The parts of `q` fit together; codes and statistics may have any row stride.
    """
    tokens, rows = x.shape[0], q.codes.shape[0]
    codes, scale, tau = (dense_rows(part) for part in (q.codes, q.scale, q.tau))
    levels = constants(q.codebook, q.block_size, x.device).levels
    octets_per_row = -(-q.cols // 8)
    out = torch.empty(tokens, rows, dtype=torch.float32, device=x.device)
    at_once = together(rows, OCTETS, ROWS * OCTETS)
    with on_device(x.device):
        multiply_rows[spread(rows, at_once)](
            x.contiguous(), codes, scale, tau, grid_or(q.scale_grid, levels),
            grid_or(q.tau_grid, levels), levels, out, rows, q.cols, tokens, octets_per_row,
            q.shape.row_bytes, codes.stride(0), scale.stride(0), tau.stride(0),
            q.shape.blocks_per_row,
            SCALE_GRID=q.scale_grid is not None, TAU_GRID=q.tau_grid is not None,
            BITS=get_codebook(q.codebook).bits, B=q.block_size, R=at_once, NO=OCTETS,
            T=triton.next_power_of_2(tokens), **LAUNCH,
        )  # fmt: skip
    return out
