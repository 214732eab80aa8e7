"""Inputs as the kernels of `decode.py` take them: in runs of 64, with the sums that tau needs.

As words a run is in fixed point, its largest number the largest word, in the order in which codes
of a width come out of a register. As floats it is copied. What a row lacks to whole runs is zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from irq_convert.core.kernels.avx2 import float_at, word_at, write
from irq_convert.core.kernels.jit import entry_point, kernel
from irq_convert.core.kernels.simd import bits_float, float_bits

F32 = np.float32
RUN = 64
"""Codes that are looked up at once: a whole number of bytes and registers at every width."""
LARGEST_WORD = 32767
WORD_LEVEL = 8190
"""What a level of 1 is as a word: eight products with the largest input fit int32, and all integer
codebooks are exact."""
INFINITE = np.int32(0x7F800000)


@kernel
def padded(count):
    """The next multiple of eight."""
    return (count + 7) // 8 * 8


@kernel
def _column(position, bits):
    """Which of 64 codes lies at `position` of the four registers that `avx2.py` looks up."""
    register, half, i = position // 16, position % 16 // 8, position % 8
    first = 32 * half + 16 * (register % 2)
    return first + 8 * (register // 2) + i if bits == 3 else first + 2 * i + register // 2


@kernel
def _load(x, size, count, values):
    """`values[:count]` from bfloat16 (`size` 2) or float32 at `x`, zeros behind.

    Returns the bits of the largest magnitude, of which those from `INFINITE` on are no number.
    """
    largest = np.int32(0)
    for i in range(count):
        if size == 2:
            bits = np.int32(np.uint32(word_at(x + 2 * i)) << 16)
        else:
            bits = float_bits(float_at(x + 4 * i))
        values[i] = bits_float(bits)
        largest = max(largest, bits & np.int32(0x7FFFFFFF))
    for i in range(count, RUN):
        values[i] = F32(0.0)
    return largest


@kernel
def _add_up(values, run, block_size, sums, at):
    """Add the run to the sums of its blocks, float64 in `sums`, and write them as float32."""
    piece = min(block_size, RUN)
    for first in range(0, RUN, piece):
        block = (run * RUN + first) // block_size
        if block >= sums.size:
            return
        for i in range(first, first + piece):
            sums[block] += values[i]
        write(at + 4 * block, F32(sums[block]))


def _make_words(digest: str) -> Callable[..., None]:
    """`runs_of_words(...)`: `tokens` rows of `cols` at `x` to words at `out`, by runs.

    Writes the unit of every piece, what a product of one and one is, to `units` and the sum of
    every block to `sums`, float32 rows of a multiple of eight. A run with a number that is not
    finite has the unit NaN.
    """

    def runs_of_words(x, size, tokens, cols, block_size, bits, out, units, sums):
        assert digest
        runs, blocks = (cols + RUN - 1) // RUN, (cols + block_size - 1) // block_size
        piece = min(block_size, RUN)
        pieces = (cols + piece - 1) // piece
        values, totals = np.empty(RUN, F32), np.empty(blocks, np.float64)
        order = np.empty(RUN, np.int64)
        for position in range(RUN):
            order[position] = _column(position, bits)
        for token in range(tokens):
            totals[:] = 0.0
            own_units = units + 4 * token * padded(pieces)
            own_sums = sums + 4 * token * padded(blocks)
            for i in range(pieces, padded(pieces)):
                write(own_units + 4 * i, F32(0.0))
            for i in range(blocks, padded(blocks)):
                write(own_sums + 4 * i, F32(0.0))
            for run in range(runs):
                start = token * cols + run * RUN
                top = _load(x + size * start, size, min(RUN, cols - run * RUN), values)
                largest = np.float64(bits_float(top))
                inverse = LARGEST_WORD / largest if top > 0 else 0.0
                if top >= INFINITE:
                    inverse, largest = 0.0, np.nan
                    values[:] = F32(0.0)
                at = out + 2 * RUN * (token * runs + run)
                for position in range(RUN):
                    word = np.rint(values[order[position]] * inverse)
                    write(at + 2 * position, np.int16(word))
                unit = F32(largest / LARGEST_WORD / WORD_LEVEL)
                for i in range(run * (RUN // piece), min(pieces, (run + 1) * (RUN // piece))):
                    write(own_units + 4 * i, unit)
                _add_up(values, run, block_size, totals, own_sums)

    return runs_of_words


def _make_floats(digest: str) -> Callable[..., None]:
    """`runs_of_floats(...)`: the same as floats, all units 1."""

    def runs_of_floats(x, size, tokens, cols, block_size, bits, out, units, sums):
        assert digest
        runs, blocks = (cols + RUN - 1) // RUN, (cols + block_size - 1) // block_size
        piece = min(block_size, RUN)
        pieces = (cols + piece - 1) // piece
        values, totals = np.empty(RUN, F32), np.empty(blocks, np.float64)
        for token in range(tokens):
            totals[:] = 0.0
            for i in range(padded(pieces)):
                write(units + 4 * (token * padded(pieces) + i), F32(1.0))
            own_sums = sums + 4 * token * padded(blocks)
            for i in range(blocks, padded(blocks)):
                write(own_sums + 4 * i, F32(0.0))
            for run in range(runs):
                start = token * cols + run * RUN
                _load(x + size * start, size, min(RUN, cols - run * RUN), values)
                at = out + 4 * RUN * (token * runs + run)
                for i in range(RUN):
                    write(at + 4 * i, values[i])
                _add_up(values, run, block_size, totals, own_sums)

    return runs_of_floats


runs_of_words = entry_point(_make_words, parallel=False)
runs_of_floats = entry_point(_make_floats, parallel=False)
