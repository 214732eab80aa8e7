"""Sixty-four packed codes looked up at once, as words or as floats, with AVX2.

For words codes become places in tables of sixteen bytes. In both registers of places bytes 0 to 7
of a half are codes of its first sixteen, bytes 8 to 15 of its last; a half is thirty-two codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from irq_convert.core.kernels.avx2 import (
    BYTES,
    F32X8,
    FLOATS,
    I8,
    I8X32,
    I16,
    I16X16,
    I32,
    I32X8,
    WORDS,
    Emit,
    at_offset,
    call_by_name,
    constant,
    reader,
    same,
    shuffle,
    splat,
)


def _indices_4(builder: Any, at: Any) -> list[Any]:
    """Even codes and odd ones."""
    found = at_offset(builder, at, 0, I8X32)
    mask = same(I8X32, 15)
    wide = builder.bitcast(found, I16X16)
    upper = builder.bitcast(builder.lshr(wide, same(I16X16, 4)), I8X32)
    return [builder.and_(found, mask), builder.and_(upper, mask)]


def _indices_2(builder: Any, at: Any) -> list[Any]:
    """Pairs of codes, low one first, twice the same: even ones are the lower two bits."""
    wide = builder.zext(at_offset(builder, at, 0, ir.VectorType(I8, 16)), I16X16)
    both = builder.or_(wide, builder.shl(wide, same(I16X16, 4)))
    found = builder.bitcast(builder.and_(both, same(I16X16, 0x0F0F)), I8X32)
    return [found, found]


def _indices_3(builder: Any, at: Any) -> list[Any]:
    """Codes 0 to 7 and 16 to 23 of each half, then the others; the table has to repeat."""
    sixteen = ir.VectorType(I8, 16)
    first, last = (at_offset(builder, at, offset, sixteen) for offset in (0, 8))
    codes = shuffle(builder, first, last, list(range(32)))
    found = []
    for start in (0, 4):
        pairs = [start + i if i < 4 else start + i + 4 for i in range(8)]
        # Each word gets the two bytes that hold a pair of codes, which then go to its top.
        sources = [half + 6 * k // 8 + i for half in (0, 4) for k in pairs for i in (0, 1)]
        order = constant(I8, [byte if byte < 16 else 128 for byte in sources])
        words = builder.bitcast(
            call_by_name(builder, "llvm.x86.avx2.pshuf.b", I8X32, codes, order), I16X16
        )
        shifts = constant(I16, [10 - 6 * k % 8 for k in pairs] * 2)
        words = builder.shl(words, shifts)
        even = builder.lshr(words, same(I16X16, 10))
        odd = builder.and_(builder.lshr(words, same(I16X16, 5)), same(I16X16, 0x0700))
        found.append(builder.bitcast(builder.or_(even, odd), I8X32))
    return found


_TWO_BYTES = types.UniTuple(BYTES, 2)
indices_4 = reader(_TWO_BYTES, _indices_4)
indices_3 = reader(_TWO_BYTES, _indices_3)
indices_2 = reader(_TWO_BYTES, _indices_2)


@intrinsic
def look_up_words(typingctx, index, low, high):
    """The words whose bytes `low` and `high`, tables of 16 in each half, have at `index`.

    Two registers: of bytes 0 to 7 of each half of `index`, and of bytes 8 to 15.
    """
    returns = types.UniTuple(WORDS, 2)

    def codegen(context, builder, sig, args):
        one, two = (
            call_by_name(builder, "llvm.x86.avx2.pshuf.b", I8X32, table, args[0])
            for table in args[1:]
        )
        found = []
        for start in (0, 8):
            bytes_ = range(start, start + 8)
            lanes = [
                half + byte + table for half in (0, 16) for byte in bytes_ for table in (0, 32)
            ]
            found.append(builder.bitcast(shuffle(builder, one, two, lanes), I16X16))
        return context.make_tuple(builder, returns, found)

    return returns(BYTES, BYTES, BYTES), codegen


def _look_up_8(bits: int) -> Emit:
    """Sixty-four floats, eight registers in the order of the codes."""

    def word(builder: Any, at: Any, which: int) -> tuple[Any, int]:
        """An int32 that holds codes `8 * which` and seven more, and where in it they begin."""
        byte = min(which * bits, 8 * bits - 4)
        return splat(builder, at_offset(builder, at, byte, I32)), 8 * (which * bits - byte)

    def emit(builder: Any, at: Any, low: Any, high: Any) -> list[Any]:
        found = []
        for which in range(8):
            codes, start = word(builder, at, which)
            shifts = [start + bits * i for i in range(8)]
            index = builder.lshr(codes, constant(I32, shifts))
            if bits == 2:
                name = "llvm.x86.avx.vpermilvar.ps.256"
                found.append(call_by_name(builder, name, F32X8, low, index))
                continue
            one = call_by_name(builder, "llvm.x86.avx2.permps", F32X8, low, index)
            if bits == 4:
                two = call_by_name(builder, "llvm.x86.avx2.permps", F32X8, high, index)
                top = builder.shl(codes, constant(I32, [28 - shift for shift in shifts]))
                above = builder.icmp_signed("<", top, same(I32X8, 0))
                one = builder.select(above, two, one)
            found.append(one)
        return found

    return emit


def _make_look_up_floats(bits: int) -> Callable[..., Any]:
    emit = _look_up_8(bits)
    returns = types.UniTuple(FLOATS, 8)

    @intrinsic
    def look_up_floats(typingctx, address, low, high):
        def codegen(context, builder, sig, args):
            return context.make_tuple(builder, returns, emit(builder, *args))

        return returns(types.int64, FLOATS, FLOATS), codegen

    return look_up_floats


look_up_floats_4, look_up_floats_3, look_up_floats_2 = map(_make_look_up_floats, (4, 3, 2))
"""`look_up_floats_B(address, low, high)`: the levels of the 64 codes of B bits from `address` on.

They come in their order; `low` and `high` are levels 0 to 7 and 8 to 15, fewer of them repeated."""
