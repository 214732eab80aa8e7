"""A run of sixty-four codes times its inputs: as words that add up exactly, or as floats.

Which of the two is told by the type of the tables or levels, so that what walks over runs is
written once.
"""

from __future__ import annotations

from typing import Any

from numba.extending import overload

from irq_convert.core.kernels.avx2 import (
    BYTES,
    WORDS,
    float_at,
    floats8,
    multiply_add,
    multiply_words,
    pair,
    splat8,
    to_floats,
    words16,
)
from irq_convert.core.kernels.codes64 import (
    indices_2,
    indices_3,
    indices_4,
    look_up_floats_2,
    look_up_floats_3,
    look_up_floats_4,
    look_up_words,
)
from irq_convert.core.kernels.decode_input import RUN
from irq_convert.core.kernels.jit import kernel
from irq_convert.core.kernels.simd import fadd, fmul, iadd

INLINED: Any = {"error_model": "numpy", "forceinline": True}


def levels_at(bits, at, tables):
    """The levels of 64 codes: four registers of words, or eight of floats, as `tables` are."""
    raise NotImplementedError("only inside kernels")


@overload(levels_at, jit_options=INLINED)
def _levels_at(bits, at, tables):
    def words(bits, at, tables):
        if bits == 4:
            one, two = indices_4(at)
        elif bits == 3:
            one, two = indices_3(at)
        else:
            one, two = indices_2(at)
        a, b = look_up_words(one, tables[0], tables[1])
        c, d = look_up_words(two, tables[2], tables[3])
        return a, b, c, d

    def floats(bits, at, tables):
        if bits == 4:
            return look_up_floats_4(at, tables[0], tables[1])
        if bits == 3:
            return look_up_floats_3(at, tables[0], tables[1])
        return look_up_floats_2(at, tables[0], tables[1])

    return words if tables.dtype == BYTES else floats


def add_run(levels, x, block_size, factors, run, total):
    """`total` and the products of a run's levels and inputs, times the factors of its pieces."""
    raise NotImplementedError("only inside kernels")


@overload(add_run, jit_options=INLINED)
def _add_run(levels, x, block_size, factors, run, total):
    return _add_words if levels.dtype == WORDS else _add_floats


def _add_words(levels, x, block_size, factors, run, total):
    """Halves of registers are the first and the last thirty-two codes, `low` the first of each."""
    a, b, c, d = levels
    low = iadd(multiply_words(a, words16(x)), multiply_words(c, words16(x + 64)))
    high = iadd(multiply_words(b, words16(x + 32)), multiply_words(d, words16(x + 96)))
    if block_size >= RUN:
        both = to_floats(iadd(low, high))
        return multiply_add(both, splat8(float_at(factors + 4 * run)), total)
    if block_size == 32:
        at = factors + 8 * run
        both = to_floats(iadd(low, high))
        return multiply_add(both, pair(float_at(at), float_at(at + 4)), total)
    at = factors + 16 * run
    total = multiply_add(to_floats(low), pair(float_at(at), float_at(at + 8)), total)
    return multiply_add(to_floats(high), pair(float_at(at + 4), float_at(at + 12)), total)


@kernel
def _sixteen(one, two, x):
    return multiply_add(two, floats8(x + 32), fmul(one, floats8(x)))


def _add_floats(levels, x, block_size, factors, run, total):
    a, b, c, d, e, f, g, h = levels
    one, two = _sixteen(a, b, x), _sixteen(c, d, x + 64)
    three, four = _sixteen(e, f, x + 128), _sixteen(g, h, x + 192)
    if block_size >= RUN:
        both = fadd(fadd(one, two), fadd(three, four))
        return multiply_add(both, splat8(float_at(factors + 4 * run)), total)
    if block_size == 32:
        at = factors + 8 * run
        total = multiply_add(fadd(one, two), splat8(float_at(at)), total)
        return multiply_add(fadd(three, four), splat8(float_at(at + 4)), total)
    at = factors + 16 * run
    total = multiply_add(one, splat8(float_at(at)), total)
    total = multiply_add(two, splat8(float_at(at + 4)), total)
    total = multiply_add(three, splat8(float_at(at + 8)), total)
    return multiply_add(four, splat8(float_at(at + 12)), total)
