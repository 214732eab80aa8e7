"""Packed codes and statistics to dense weights on the CPU.

A block's weights take only `2**bits` values, so each block first gets a table of those (two
float32 roundings: numba does not contract the multiplication and the addition) and then looks its
codes up. Conversion to bfloat16 happens in the table, once a block and value. Kernels move bit
patterns, release the GIL and work on a range of rows: callers split rows over threads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from irq_convert.core.codebook import MOST_LEVELS
from irq_convert.core.kernels.jit import entry_point, kernel
from irq_convert.core.kernels.lookup import (
    LANES,
    bfloat16_patterns,
    look_up_2,
    look_up_3,
    look_up_4,
    patterns,
)
from irq_convert.core.kernels.simd import fadd, fmul, load_levels, splat_levels, store

F32 = np.float32
GROUP_SHIFT = 8  # log2 of blocks.GROUP_SIZE
# Indices are unsigned: numba would check signed ones for being negative.
U = np.uint64
U1, U3, U4, U7, U8, U16 = U(1), U(3), U(4), U(7), U(8), U(16)


@kernel
def _statistic(stored, grid, row, block, number):
    """The statistic of one block; an empty `grid` means that it is stored as it is."""
    if grid.shape[0] == 0:
        return F32(stored[row, block])
    group = number >> GROUP_SHIFT
    return grid[group, 0] * (F32(stored[row, block]) + grid[group, 1])


@kernel
def _look_up(packed, at, n, bits, values, table, out, to):
    """`out[to + i] = values[code i]` for `n` codes that begin at byte `at`; `table` is scratch."""
    done = U(0)
    if LANES > 0:
        done = n & ~(U16 - U1)
        step = U(2) * bits
        if bits == U4:
            for i in range(n >> U4):
                look_up_4(values, packed, at + step * i, out, to + U16 * i)
        elif bits == U3:
            for i in range(n >> U4):
                look_up_3(values, packed, at + step * i, out, to + U16 * i)
        else:
            for i in range(n >> U4):
                look_up_2(values, packed, at + step * i, out, to + U16 * i)
    if done == n:
        return
    store(table, 0, values)
    mask = (U1 << bits) - U1
    for i in range(done, n):
        bit = bits * i
        byte = at + (bit >> U3)
        word = U(packed[byte])
        if (bit & U7) + bits > U8:  # the code ends in the next byte
            word |= U(packed[byte + U1]) << U8
        out[to + i] = table[word >> (bit & U7) & mask]


def _make(digest: str) -> Callable[..., None]:
    """`dequantize_rows(...)`, which writes rows `begin .. end` to `out[begin - first:]`.

    `packed` uint8 `[rows, row_bytes]`; `scale` and `tau` uint8 or float32 `[rows, blocks]`, with
    grids float32 `[groups, 2]`, or `[0, 2]` where there is none; `levels` float32
    `[MOST_LEVELS]`, the codebook repeated; `out` the bits of float32 (uint32) or bfloat16 (uint16)
    `[.., cols]`. That it mentions `digest` makes its cache on disk follow the source of every
    kernel.
    """

    def dequantize_rows(
        begin, end, first, packed, scale, tau, scale_grid, tau_grid, levels, bits, block_size, out
    ):  # fmt: skip
        assert digest
        blocks, cols, narrow = scale.shape[1], out.shape[1], out.itemsize == 2
        level = load_levels(levels, 0)
        table = np.empty(MOST_LEVELS, np.uint32)
        for row in range(begin, end):
            source, target = packed[row], out[row - first]
            for block in range(blocks):
                number = row * blocks + block
                s = _statistic(scale, scale_grid, row, block, number)
                t = _statistic(tau, tau_grid, row, block, number)
                weights = fadd(fmul(level, splat_levels(s)), splat_levels(t))
                values = bfloat16_patterns(weights) if narrow else patterns(weights)
                start = block * block_size
                n = min(block_size, cols - start)
                _look_up(
                    source, U(start * bits // 8), U(n), U(bits), values, table, target, U(start)
                )

    return dequantize_rows


dequantize_rows = entry_point(_make, parallel=False)
