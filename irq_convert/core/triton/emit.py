# mypy: disallow-untyped-defs=False
"""Codes of the weights in their own order, packed eight at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from irq_convert.core.triton.arithmetic import MOST_BITS


@triton.jit(do_not_specialize=["per_row", "octets_per_row", "octets"])
def emit(
    weights, tau, scale, mids, packed, cols, per_row, octets_per_row, octets, row_bytes,
    N_MIDS: tl.constexpr, BITS: tl.constexpr, B: tl.constexpr, NO: tl.constexpr,
):  # fmt: skip
    """Code and pack `NO` runs of eight weights of a row, `octets` in all.

    `code = #{k : w >= tau + m_k * scale}`. `packed` is uint8 `[rows, row_bytes]`, LSB first; eight
    codes fill `BITS` bytes, and bits behind the end of a row are 0.
    """
    o = tl.program_id(0) * NO + tl.arange(0, NO)
    real = o < octets
    row = o // octets_per_row
    inside_row = o - row * octets_per_row
    j = tl.arange(0, 8)[None, :]
    col = (inside_row * 8)[:, None] + j
    inside = real[:, None] & (col < cols)
    x = tl.load(weights + (row.to(tl.int64) * cols)[:, None] + col, mask=inside, other=0.0)
    x = x.to(tl.float32)
    block = row * per_row + inside_row * 8 // B
    t = tl.load(tau + block, mask=real, other=0.0)[:, None]
    s = tl.load(scale + block, mask=real, other=0.0)[:, None]
    code = tl.zeros((NO, 8), tl.int32)
    for k in tl.static_range(N_MIDS):
        code += (x >= t + tl.load(mids + k) * s).to(tl.int32)
    code = tl.where(inside, code, 0)
    word = tl.sum(code << (j * BITS), 1)
    byte = tl.arange(0, MOST_BITS)[None, :]
    at = (inside_row * BITS)[:, None] + byte
    tl.store(
        packed + (row.to(tl.int64) * row_bytes)[:, None] + at,
        ((word[:, None] >> (8 * byte)) & 255).to(tl.uint8),
        mask=real[:, None] & (byte < BITS) & (at < row_bytes),
    )
