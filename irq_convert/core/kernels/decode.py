"""A few inputs times packed rows on the CPU: no dense weight is ever written.

With `scale` and `tau` of a block b and the levels of its codes, `formats/irq-v1.md` section 4 gives

    y_r = sum_b ( scale_rb sum_{j in b} level[code_rj] x_j + tau_rb sum_{j in b} x_j ),

so the sums over x are made once (`decode_input.py`), and of a row only its inner sums remain.
Sixty-four codes, a run, are looked up at once, in one of two ways. As words, levels and inputs are
in fixed point and products add up exactly in int32: for bfloat16, whose own rounding is coarser. As
floats, both are what they are, for float32.

Lanes add up in the same order whatever rows a call is asked for, so threads change no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from irq_convert.core.kernels.avx2 import (
    byte_at,
    bytes32,
    float_at,
    floats8,
    floats_of_bytes,
    lanes_total,
    multiply_add,
    prefetch,
    seen,
    show,
    splat8,
    word_at,
    write,
)
from irq_convert.core.kernels.decode_input import RUN, padded
from irq_convert.core.kernels.decode_run import add_run, levels_at
from irq_convert.core.kernels.jit import entry_point, kernel
from irq_convert.core.kernels.simd import bits_float, fadd, float_bits, fmul

F32 = np.float32
GROUP_SHIFT = 8  # log2 of blocks.GROUP_SIZE
AHEAD = 2048  # bytes; what a core reads on its own ends with each page
AT_ONCE = 16  # rows between two looks at the other thread


@kernel
def _statistics(stored, size, grid, row, blocks, out):
    """The float32 statistics of a row to `out`; `size` is 1 with a grid, or 4."""
    if size == 4:
        for block in range(blocks):
            write(out + 4 * block, float_at(stored + 4 * (row * blocks + block)))
        return
    first = row * blocks
    block = 0
    while block < blocks:
        group = (first + block) >> GROUP_SHIFT
        stop = min(blocks, ((group + 1) << GROUP_SHIFT) - first)
        step, offset = float_at(grid + 8 * group), float_at(grid + 8 * group + 4)
        steps, offsets = splat8(step), splat8(offset)
        while block + 8 <= stop:
            codes = floats_of_bytes(stored + first + block)
            write(out + 4 * block, fmul(steps, fadd(codes, offsets)))
            block += 8
        while block < stop:
            code = F32(byte_at(stored + first + block))
            write(out + 4 * block, step * (code + offset))
            block += 1


@kernel
def _factors(scales, inputs, block_size, pieces, out):
    """For every piece of a row: scale of its block times `inputs`, the unit of its inputs."""
    if block_size <= RUN:
        for piece in range(0, pieces, 8):
            found = fmul(floats8(scales + 4 * piece), floats8(inputs + 4 * piece))
            write(out + 4 * piece, found)
        return
    each = block_size // RUN
    for piece in range(pieces):
        scale = float_at(scales + 4 * (piece // each))
        write(out + 4 * piece, scale * float_at(inputs + 4 * piece))


@kernel
def _copy(source, size, target):
    for i in range(size):
        write(target + i, byte_at(source + i))


@kernel
def _dot(one, two, count, total):
    """`total` and the products of two rows of floats, eight at a time."""
    for i in range(0, count, 8):
        total = multiply_add(floats8(one + 4 * i), floats8(two + 4 * i), total)
    return total


@kernel
def _turn(meeting, upwards, row):
    """Whether another thread has done what comes: it shares these rows from their other end.

    `meeting` holds two int64: below the first, rows are taken from the first one upwards, and from
    the second on they are done by the thread that goes downwards. The upper one waits for nothing:
    rows that the other has taken and not finished it computes again.
    """
    if upwards:
        show(meeting, row + AT_ONCE)
        return row >= seen(meeting + 8)
    show(meeting + 8, row + 1)
    return row < seen(meeting)


@kernel
def _finish(words, total, bias, row, y, at):
    """Add the bias, round once and store number `at` of `y`."""
    if not words:
        if bias:
            total += float_at(bias + 4 * row)
        write(y + 4 * at, total)
        return
    if bias:
        total += bits_float(np.int32(np.uint32(word_at(bias + 2 * row)) << 16))
    bits = float_bits(total)
    if total == total:
        bits = np.int32(bits + 0x7FFF + ((bits >> 16) & 1))
    write(y + 2 * at, np.int16(bits >> 16))


def _make(words: bool, bits: int) -> Callable[[str], Callable[..., None]]:
    """`multiply_rows(...)` for codes of `bits`, with words or with floats.

    Writes `y[token, row]`, bfloat16 where it multiplies words and else float32, for the rows
    `begin .. end`. All but sizes are addresses: `bias` `[rows]` of the dtype of `y`, or 0;
    `codes`, rows of `row_bytes`; `scale` and `tau` of one byte a block with a grid, or of four;
    `meeting`, where threads that share the rows see each other, or 0, and whether this one takes
    them `upwards` (`_turn`); returns the row at which it stopped;
    `x`, `units`, `sums` as `decode_input.py` leaves them; `tables` as `core/decode_cpu.py` makes
    them. That it mentions `digest` makes its cache on disk follow the source of every kernel.
    """

    def make(digest):
        def multiply_rows(
            begin, end, rows, cols, block_size, tokens, codes, scale, tau, scale_grid, tau_grid,
            scale_size, tau_size, x, units, sums, tables, bias, y, meeting, upwards,
        ):  # fmt: skip
            assert digest
            runs, whole = (cols + RUN - 1) // RUN, cols // RUN
            blocks = (cols + block_size - 1) // block_size
            piece = min(block_size, RUN)
            pieces = (cols + piece - 1) // piece
            row_bytes, run_bytes = (cols * bits + 7) // 8, RUN * bits // 8
            x_bytes = RUN * (2 if words else 4)
            wide, wider = padded(blocks), padded(pieces)
            ends = np.zeros(RUN, np.uint8)
            scratch = np.zeros(2 * wide + tokens * (wider + 8), np.float32)
            # Signed as all addresses are: numba joins the two kinds to a float.
            end_at, scales = np.int64(ends.ctypes.data), np.int64(scratch.ctypes.data)
            taus = scales + 4 * wide
            factors = taus + 4 * wide
            totals = factors + 4 * tokens * wider
            if words:
                levels = (
                    bytes32(tables), bytes32(tables + 32), bytes32(tables + 64),
                    bytes32(tables + 96),
                )  # fmt: skip
            else:
                levels = (floats8(tables), floats8(tables + 32))
            for step in range(end - begin):
                row = begin + step if upwards else end - 1 - step
                if meeting and step % AT_ONCE == 0 and _turn(meeting, upwards, row):
                    return row
                source = codes + row * row_bytes
                _statistics(scale, scale_size, scale_grid, row, blocks, scales)
                _statistics(tau, tau_size, tau_grid, row, blocks, taus)
                _copy(source + whole * run_bytes, row_bytes - whole * run_bytes, end_at)
                if tokens == 1:
                    _factors(scales, units, block_size, pieces, factors)
                    total = splat8(F32(0.0))
                    for run in range(whole):
                        prefetch(source + run * run_bytes + AHEAD)
                        found = levels_at(bits, source + run * run_bytes, levels)
                        total = add_run(found, x + run * x_bytes, block_size, factors, run, total)
                    if whole < runs:
                        found = levels_at(bits, end_at, levels)
                        where = x + whole * x_bytes
                        total = add_run(found, where, block_size, factors, whole, total)
                    total = _dot(taus, sums, blocks, total)
                    _finish(words, lanes_total(total), bias, row, y, row)
                    continue
                for token in range(tokens):
                    own = factors + 4 * token * wider
                    _factors(scales, units + 4 * token * wider, block_size, pieces, own)
                    write(totals + 32 * token, splat8(F32(0.0)))
                for run in range(runs):
                    at = source + run * run_bytes if run < whole else end_at
                    prefetch(at + AHEAD)
                    found = levels_at(bits, at, levels)
                    for token in range(tokens):
                        where = x + (token * runs + run) * x_bytes
                        own, kept = factors + 4 * token * wider, totals + 32 * token
                        total = add_run(found, where, block_size, own, run, floats8(kept))
                        write(kept, total)
                for token in range(tokens):
                    total = floats8(totals + 32 * token)
                    total = _dot(taus, sums + 4 * token * wide, blocks, total)
                    _finish(words, lanes_total(total), bias, row, y, token * rows + row)
            if meeting:
                show(meeting + (0 if upwards else 8), end if upwards else begin)
            return end

        return multiply_rows

    return make


MULTIPLY: dict[tuple[bool, int], Any] = {
    (words, bits): entry_point(_make(words, bits), parallel=False)
    for words in (True, False)
    for bits in (2, 3, 4)
}
"""`multiply_rows` by whether it multiplies words and by the bits of a code."""
