"""Packed codes and statistics to dense weights on the CPU.

A block's weights take only `2**bits` values, so each block first gets a table of those (two
float32 roundings: numba does not contract the multiplication and the addition) and then looks its
codes up. Conversion to bfloat16 happens in the table, once a block and value. Kernels release the
GIL and work on a range of rows: callers split rows over threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

OPTIONS = {"error_model": "numpy", "nogil": True, "cache": True}
F32 = np.float32
U32 = np.uint32
GROUP_SHIFT = 8  # log2 of blocks.GROUP_SIZE
# Indices are unsigned throughout: numba checks signed ones for being negative.
U = np.uint64
U0, U1, U2, U3, U4, U5, U6, U7, U8, U9, U12, U15, U18, U21 = (
    U(i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 18, 21)
)


@njit(**OPTIONS)
def _statistic(stored, grid, row, block, number):  # type: ignore[no-untyped-def]
    """The statistic of one block; an empty `grid` means that it is stored as it is."""
    if grid.shape[0] == 0:
        return F32(stored[row, block])
    group = number >> GROUP_SHIFT
    return grid[group, 0] * (F32(stored[row, block]) + grid[group, 1])


@njit(**OPTIONS)
def _look_up_4(packed, at, n, table, out, to):  # type: ignore[no-untyped-def]
    """`out[to + i] = table[code i]` for `n` codes of 4 bits that begin at byte `at`."""
    for i in range(n >> U1):
        byte = U(packed[at + i])
        out[to + U2 * i] = table[byte & U15]
        out[to + U2 * i + U1] = table[byte >> U4]
    if n & U1:
        out[to + n - U1] = table[U(packed[at + (n >> U1)]) & U15]


@njit(**OPTIONS)
def _look_up_3(packed, at, n, table, out, to):  # type: ignore[no-untyped-def]
    """The same for 3 bits: eight codes in three bytes."""
    for i in range(n >> U3):
        first = at + U3 * i
        word = U(packed[first]) | U(packed[first + U1]) << U8 | U(packed[first + U2]) << (U8 + U8)
        start = to + U8 * i
        out[start] = table[word & U7]
        out[start + U1] = table[word >> U3 & U7]
        out[start + U2] = table[word >> U6 & U7]
        out[start + U3] = table[word >> U9 & U7]
        out[start + U4] = table[word >> U12 & U7]
        out[start + U5] = table[word >> U15 & U7]
        out[start + U6] = table[word >> U18 & U7]
        out[start + U7] = table[word >> U21 & U7]
    for i in range(n & ~U7, n):
        bit = U3 * i
        byte = at + (bit >> U3)
        word = U(packed[byte])
        if (bit & U7) > U5:  # the code ends in the next byte
            word |= U(packed[byte + U1]) << U8
        out[to + i] = table[word >> (bit & U7) & U7]


@njit(**OPTIONS)
def _look_up_2(packed, at, n, table, out, to):  # type: ignore[no-untyped-def]
    """The same for 2 bits: four codes in a byte."""
    for i in range(n >> U2):
        byte = U(packed[at + i])
        start = to + U4 * i
        out[start] = table[byte & U3]
        out[start + U1] = table[byte >> U2 & U3]
        out[start + U2] = table[byte >> U4 & U3]
        out[start + U3] = table[byte >> U6]
    for i in range(n & ~U3, n):
        out[to + i] = table[U(packed[at + (i >> U2)]) >> (U2 * (i & U3)) & U3]


@njit(**OPTIONS)
def _look_up(packed, at, n, bits, table, out, to):  # type: ignore[no-untyped-def]
    if bits == 4:
        _look_up_4(packed, at, n, table, out, to)
    elif bits == 3:
        _look_up_3(packed, at, n, table, out, to)
    else:
        _look_up_2(packed, at, n, table, out, to)


@njit(**OPTIONS)
def dequantize_rows(  # type: ignore[no-untyped-def]
    begin, end, first, packed, scale, tau, scale_grid, tau_grid, levels, bits, block_size, out
):  # fmt: skip
    """Write rows `begin .. end` of the matrix to `out[begin - first : end - first]` as float32.

    `packed` uint8 `[rows, row_bytes]`; `scale` and `tau` uint8 or float32 `[rows, blocks_per_row]`,
    with grids float32 `[groups, 2]`, or `[0, 2]` where there is none; `levels` float32
    `[2**bits]`; `out` float32 `[>= end - first, cols]`, contiguous.
    """
    blocks, cols, n_levels = scale.shape[1], out.shape[1], levels.shape[0]
    table = np.empty(16, np.float32)
    for row in range(begin, end):
        source, target = packed[row], out[row - first]
        for block in range(blocks):
            number = row * blocks + block
            s = _statistic(scale, scale_grid, row, block, number)
            t = _statistic(tau, tau_grid, row, block, number)
            for k in range(n_levels):
                table[k] = levels[k] * s + t
            start = block * block_size
            n = min(block_size, cols - start)
            _look_up(source, U(start * bits // 8), U(n), bits, table, target, U(start))


@njit(**OPTIONS)
def dequantize_rows_bf16(  # type: ignore[no-untyped-def]
    begin, end, first, packed, scale, tau, scale_grid, tau_grid, levels, bits, block_size, out
):  # fmt: skip
    """`dequantize_rows` rounded to bfloat16, to nearest even; `out` uint16 holds its bits."""
    blocks, cols, n_levels = scale.shape[1], out.shape[1], levels.shape[0]
    values = np.empty(16, np.float32)
    pattern = values.view(np.uint32)
    table = np.empty(16, np.uint16)
    for row in range(begin, end):
        source, target = packed[row], out[row - first]
        for block in range(blocks):
            number = row * blocks + block
            s = _statistic(scale, scale_grid, row, block, number)
            t = _statistic(tau, tau_grid, row, block, number)
            for k in range(n_levels):
                values[k] = levels[k] * s + t
            for k in range(n_levels):
                kept = pattern[k] + U32(0x7FFF) + (pattern[k] >> U32(16) & U32(1))
                quiet = values[k] != values[k]
                table[k] = np.uint16(U32(0x7FC0) if quiet else kept >> U32(16))
            start = block * block_size
            n = min(block_size, cols - start)
            _look_up(source, U(start * bits // 8), U(n), bits, table, target, U(start))
