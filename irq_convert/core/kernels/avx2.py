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
I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
F32X8, I32X8 = ir.VectorType(ir.FloatType(), 8), ir.VectorType(I32, 8)
I16X16, I8X32 = ir.VectorType(I16, 16), ir.VectorType(I8, 32)

Emit = Callable[..., Any]


def constant(elem: Any, values: list[Any]) -> ir.Constant:
    return ir.Constant(ir.VectorType(elem, len(values)), values)


def same(wide: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(wide, [value] * wide.count)


def shuffle(builder: Any, one: Any, two: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(one, two, constant(I32, lanes))


def splat(builder: Any, value: Any) -> Any:
    undef = ir.Constant(ir.VectorType(value.type, 8), ir.Undefined)
    return shuffle(builder, builder.insert_element(undef, value, I32(0)), undef, [0] * 8)


def call_by_name(builder: Any, name: str, returns: Any, *args: Any) -> Any:
    signature = ir.FunctionType(returns, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def at_offset(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """The `kind` at `address + offset`, which need not be aligned."""
    where = builder.add(address, ir.Constant(address.type, offset))
    return builder.load(builder.inttoptr(where, kind.as_pointer()), align=1)


def reader(returns: Any, emit: Emit) -> Callable[..., Any]:
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


bytes32 = reader(BYTES, lambda b, at: at_offset(b, at, 0, I8X32))
words16 = reader(WORDS, lambda b, at: at_offset(b, at, 0, I16X16))
floats8 = reader(FLOATS, lambda b, at: at_offset(b, at, 0, F32X8))
float_at = reader(types.float32, lambda b, at: at_offset(b, at, 0, ir.FloatType()))
byte_at = reader(types.uint8, lambda b, at: at_offset(b, at, 0, I8))
word_at = reader(types.uint16, lambda b, at: at_offset(b, at, 0, I16))
floats_of_bytes = reader(
    FLOATS, lambda b, at: b.uitofp(b.zext(at_offset(b, at, 0, ir.VectorType(I8, 8)), I32X8), F32X8)
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
        pointer = builder.inttoptr(args[0], I8.as_pointer())
        read, keep, data = (ir.Constant(I32, number) for number in (0, 3, 1))
        signature = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        call = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
        builder.call(call, [pointer, read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def splat8(typingctx, value):
    """A float in all eight lanes."""
    return FLOATS(types.float32), lambda c, builder, s, args: splat(builder, args[0])


@intrinsic
def pair(typingctx, low, high):
    """A float in the lower four lanes and one in the upper four."""

    def codegen(context, builder, sig, args):
        one, two = (splat(builder, arg) for arg in args)
        return shuffle(builder, one, two, [0] * 4 + [8] * 4)

    return FLOATS(types.float32, types.float32), codegen


@intrinsic
def multiply_add(typingctx, one, two, three):
    """`one * two + three` in every lane, rounded once."""

    def codegen(context, builder, sig, args):
        return call_by_name(builder, "llvm.fma.v8f32", F32X8, *args)

    return FLOATS(FLOATS, FLOATS, FLOATS), codegen


@intrinsic
def multiply_words(typingctx, one, two):
    """Sixteen products of words, neighbours added: eight int32."""

    def codegen(context, builder, sig, args):
        return call_by_name(builder, "llvm.x86.avx2.pmadd.wd", I32X8, *args)

    return INTS(WORDS, WORDS), codegen


@intrinsic
def to_floats(typingctx, value):
    """Eight int32 as the nearest floats."""
    return FLOATS(INTS), lambda c, builder, s, args: builder.sitofp(args[0], F32X8)


@intrinsic
def lanes_total(typingctx, value):
    """The sum of eight lanes, halves first."""

    def codegen(context, builder, sig, args):
        found = args[0]
        for half in (4, 2, 1):
            other = shuffle(builder, found, found, [*range(half, 2 * half), *[0] * (8 - half)])
            found = builder.fadd(found, other)
        return builder.extract_element(found, I32(0))

    return types.float32(FLOATS), codegen
