"""Single AVX2 registers inside numba kernels: bytes, words and floats at addresses.

`simd.py` leaves the width to LLVM; here the instructions are named, because LLVM does not find
them: look-ups of sixteen or thirty-two codes at once, and products of words that add up in pairs.
Memory is told by its address (int64), so that calling a kernel costs no unboxing of arrays; nothing
here checks bounds. `machine_has("avx2", "fma")` says whether a machine can run these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from irq_convert.core.kernels.simd import Vec

BYTES, WORDS, INTS, FLOATS = Vec("i8", 32), Vec("i16", 16), Vec("i32", 8), Vec("f32", 8)
_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_F32X8, _I32X8 = ir.VectorType(ir.FloatType(), 8), ir.VectorType(_I32, 8)
_I16X16, _I8X32 = ir.VectorType(_I16, 16), ir.VectorType(_I8, 32)

Emit = Callable[..., Any]


def _constant(elem: Any, values: list[Any]) -> ir.Constant:
    return ir.Constant(ir.VectorType(elem, len(values)), values)


def _same(wide: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(wide, [value] * wide.count)


def _shuffle(builder: Any, one: Any, two: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(one, two, _constant(_I32, lanes))


def _splat(builder: Any, value: Any) -> Any:
    undef = ir.Constant(ir.VectorType(value.type, 8), ir.Undefined)
    return _shuffle(builder, builder.insert_element(undef, value, _I32(0)), undef, [0] * 8)


def _call(builder: Any, name: str, returns: Any, *args: Any) -> Any:
    signature = ir.FunctionType(returns, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def _at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """The `kind` at `address + offset`, which need not be aligned."""
    where = builder.add(address, ir.Constant(address.type, offset))
    return builder.load(builder.inttoptr(where, kind.as_pointer()), align=1)


def _reader(returns: Any, emit: Emit) -> Callable[..., Any]:
    """An intrinsic of one address."""

    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, sig, args):
            found = emit(builder, args[0])
            return context.make_tuple(builder, returns, found) if _many(returns) else found

        return returns(types.int64), codegen

    return read


def _many(returns: Any) -> bool:
    return isinstance(returns, types.UniTuple)


bytes32 = _reader(BYTES, lambda b, at: _at(b, at, 0, _I8X32))
words16 = _reader(WORDS, lambda b, at: _at(b, at, 0, _I16X16))
floats8 = _reader(FLOATS, lambda b, at: _at(b, at, 0, _F32X8))
float_at = _reader(types.float32, lambda b, at: _at(b, at, 0, ir.FloatType()))
byte_at = _reader(types.uint8, lambda b, at: _at(b, at, 0, _I8))
word_at = _reader(types.uint16, lambda b, at: _at(b, at, 0, _I16))
floats_of_bytes = _reader(
    FLOATS, lambda b, at: b.uitofp(b.zext(_at(b, at, 0, ir.VectorType(_I8, 8)), _I32X8), _F32X8)
)
"""Eight bytes from 0 to 255 as floats."""


@intrinsic
def write(typingctx, address, value):
    """Put a register or a number to `address`."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], args[1].type.as_pointer())
        builder.store(args[1], pointer, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def seen(typingctx, address):
    """The int64 at `address` that another thread may write, and all that it wrote before it."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def show(typingctx, address, value):
    """Write an int64 for another thread to see, after all that was written before."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], args[1].type.as_pointer())
        builder.store_atomic(args[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at `address`, which may be anywhere."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        read, keep, data = (ir.Constant(_I32, number) for number in (0, 3, 1))
        signature = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        call = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
        builder.call(call, [pointer, read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def splat8(typingctx, value):
    """A float in all eight lanes."""
    return FLOATS(types.float32), lambda c, builder, s, args: _splat(builder, args[0])


@intrinsic
def pair(typingctx, low, high):
    """A float in the lower four lanes and one in the upper four."""

    def codegen(context, builder, sig, args):
        one, two = (_splat(builder, arg) for arg in args)
        return _shuffle(builder, one, two, [0] * 4 + [8] * 4)

    return FLOATS(types.float32, types.float32), codegen


@intrinsic
def multiply_add(typingctx, one, two, three):
    """`one * two + three` in every lane, rounded once."""

    def codegen(context, builder, sig, args):
        return _call(builder, "llvm.fma.v8f32", _F32X8, *args)

    return FLOATS(FLOATS, FLOATS, FLOATS), codegen


@intrinsic
def multiply_words(typingctx, one, two):
    """Sixteen products of words, neighbours added: eight int32."""

    def codegen(context, builder, sig, args):
        return _call(builder, "llvm.x86.avx2.pmadd.wd", _I32X8, *args)

    return INTS(WORDS, WORDS), codegen


@intrinsic
def to_floats(typingctx, value):
    """Eight int32 as the nearest floats."""
    return FLOATS(INTS), lambda c, builder, s, args: builder.sitofp(args[0], _F32X8)


@intrinsic
def lanes_total(typingctx, value):
    """The sum of eight lanes, halves first."""

    def codegen(context, builder, sig, args):
        found = args[0]
        for half in (4, 2, 1):
            other = _shuffle(builder, found, found, [*range(half, 2 * half), *[0] * (8 - half)])
            found = builder.fadd(found, other)
        return builder.extract_element(found, _I32(0))

    return types.float32(FLOATS), codegen


# Sixty-four codes as places in a table of sixteen bytes. In both registers bytes 0 to 7 of a half
# are codes of its first sixteen, bytes 8 to 15 of its last sixteen; a half is thirty-two codes.


def _indices_4(builder: Any, at: Any) -> list[Any]:
    """Even codes and odd ones."""
    found = _at(builder, at, 0, _I8X32)
    mask = _same(_I8X32, 15)
    wide = builder.bitcast(found, _I16X16)
    upper = builder.bitcast(builder.lshr(wide, _same(_I16X16, 4)), _I8X32)
    return [builder.and_(found, mask), builder.and_(upper, mask)]


def _indices_2(builder: Any, at: Any) -> list[Any]:
    """Pairs of codes, low one first, twice the same: even ones are the lower two bits."""
    wide = builder.zext(_at(builder, at, 0, ir.VectorType(_I8, 16)), _I16X16)
    both = builder.or_(wide, builder.shl(wide, _same(_I16X16, 4)))
    found = builder.bitcast(builder.and_(both, _same(_I16X16, 0x0F0F)), _I8X32)
    return [found, found]


def _indices_3(builder: Any, at: Any) -> list[Any]:
    """Codes 0 to 7 and 16 to 23 of each half, then the others; the table has to repeat."""
    sixteen = ir.VectorType(_I8, 16)
    first, last = (_at(builder, at, offset, sixteen) for offset in (0, 8))
    codes = _shuffle(builder, first, last, list(range(32)))
    found = []
    for start in (0, 4):
        pairs = [start + i if i < 4 else start + i + 4 for i in range(8)]
        # Each word gets the two bytes that hold a pair of codes, which then go to its top.
        sources = [half + 6 * k // 8 + i for half in (0, 4) for k in pairs for i in (0, 1)]
        order = _constant(_I8, [byte if byte < 16 else 128 for byte in sources])
        words = builder.bitcast(
            _call(builder, "llvm.x86.avx2.pshuf.b", _I8X32, codes, order), _I16X16
        )
        shifts = _constant(_I16, [10 - 6 * k % 8 for k in pairs] * 2)
        words = builder.shl(words, shifts)
        even = builder.lshr(words, _same(_I16X16, 10))
        odd = builder.and_(builder.lshr(words, _same(_I16X16, 5)), _same(_I16X16, 0x0700))
        found.append(builder.bitcast(builder.or_(even, odd), _I8X32))
    return found


_TWO_BYTES = types.UniTuple(BYTES, 2)
indices_4 = _reader(_TWO_BYTES, _indices_4)
indices_3 = _reader(_TWO_BYTES, _indices_3)
indices_2 = _reader(_TWO_BYTES, _indices_2)


@intrinsic
def look_up_words(typingctx, index, low, high):
    """The words whose bytes `low` and `high`, tables of 16 in each half, have at `index`.

    Two registers: of bytes 0 to 7 of each half of `index`, and of bytes 8 to 15.
    """
    returns = types.UniTuple(WORDS, 2)

    def codegen(context, builder, sig, args):
        one, two = (
            _call(builder, "llvm.x86.avx2.pshuf.b", _I8X32, table, args[0]) for table in args[1:]
        )
        found = []
        for start in (0, 8):
            bytes_ = range(start, start + 8)
            lanes = [
                half + byte + table for half in (0, 16) for byte in bytes_ for table in (0, 32)
            ]
            found.append(builder.bitcast(_shuffle(builder, one, two, lanes), _I16X16))
        return context.make_tuple(builder, returns, found)

    return returns(BYTES, BYTES, BYTES), codegen


def _look_up_8(bits: int) -> Emit:
    """Sixty-four floats, eight registers in the order of the codes."""

    def word(builder: Any, at: Any, which: int) -> tuple[Any, int]:
        """An int32 that holds codes `8 * which` and seven more, and where in it they begin."""
        byte = min(which * bits, 8 * bits - 4)
        return _splat(builder, _at(builder, at, byte, _I32)), 8 * (which * bits - byte)

    def emit(builder: Any, at: Any, low: Any, high: Any) -> list[Any]:
        found = []
        for which in range(8):
            codes, start = word(builder, at, which)
            shifts = [start + bits * i for i in range(8)]
            index = builder.lshr(codes, _constant(_I32, shifts))
            if bits == 2:
                name = "llvm.x86.avx.vpermilvar.ps.256"
                found.append(_call(builder, name, _F32X8, low, index))
                continue
            one = _call(builder, "llvm.x86.avx2.permps", _F32X8, low, index)
            if bits == 4:
                two = _call(builder, "llvm.x86.avx2.permps", _F32X8, high, index)
                top = builder.shl(codes, _constant(_I32, [28 - shift for shift in shifts]))
                above = builder.icmp_signed("<", top, _same(_I32X8, 0))
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
