"""Sixteen table look-ups at once inside numba kernels.

A table of 16 values of 32 bits is one register with AVX-512 and two with AVX2, and a permutation
instruction looks 16 codes up in it. LLVM does not find that by itself, so the instructions are
emitted here; on other machines `LANES` is 0 and callers look up one code at a time.

Permutations read the lowest four bits (or three, twice) of a lane and ignore the rest, so codes are
only shifted into place. Tables of fewer than 16 values must repeat to fill 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, codegen, config
from numba.extending import intrinsic

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_I32X8, _I32X16 = ir.VectorType(_I32, 8), ir.VectorType(_I32, 16)


def machine_has(*features: str) -> bool:
    """Whether kernels are compiled for a machine with all of `features`, as LLVM calls them."""
    known = getattr(config, "CPU_FEATURES", None)
    those = (codegen.get_host_cpu_features() if known is None else known).split(",")
    return all(f"+{feature}" in those for feature in features)


LANES = 16 if machine_has("avx512f") else 8 if machine_has("avx2") else 0
"""Values that one permutation instruction of this machine looks up; 0 without any."""


def _constant(values: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(values)), values)


def _splat(builder: Any, value: Any) -> Any:
    undef = ir.Constant(_I32X8, ir.Undefined)
    first = builder.insert_element(undef, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undef, _constant([0] * 8))


def _join(builder: Any, low: Any, high: Any) -> Any:
    return builder.shuffle_vector(low, high, _constant(list(range(16))))


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, wide: Any) -> Any:
    """A pointer to `array[index]` as a pointer to `wide`."""
    data = cgutils.create_struct_proxy(kind)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [index]), wide.as_pointer())


def _halves(builder: Any, word: Callable[[int], Any], bits: int) -> tuple[Any, Any]:
    """Two int32 whose lowest bits are the first and the last eight of 16 codes.

    `word(k)` reads the four bytes from byte `k` on; none beyond the `2 * bits` bytes is touched.
    """
    if bits == 4:
        return word(0), word(4)
    if bits == 3:
        return word(0), builder.lshr(word(2), ir.Constant(_I32, 8))
    return word(0), builder.lshr(word(0), ir.Constant(_I32, 16))


def _permute(builder: Any, name: str, kind: Any, values: Any, index: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind, kind]), name
    )
    return builder.call(function, [values, index])


def _look_up(builder: Any, table: Any, first: Any, last: Any, bits: int) -> Any:
    """The 16 values of the codes in `first` and `last`, as a vector of int32."""
    shifts = _constant([bits * i for i in range(8)])
    halves = [builder.lshr(_splat(builder, word), shifts) for word in (first, last)]
    if LANES == 16:
        index = _join(builder, *halves)
        return _permute(builder, "llvm.x86.avx512.permvar.si.512", _I32X16, table, index)
    undef = ir.Constant(_I32X16, ir.Undefined)
    low, high = (
        builder.shuffle_vector(table, undef, _constant(list(range(at, at + 8)))) for at in (0, 8)
    )
    found = []
    for index in halves:
        one, two = (_permute(builder, "llvm.x86.avx2.permd", _I32X8, t, index) for t in (low, high))
        top = builder.and_(index, _constant([8] * 8))
        found.append(builder.select(builder.icmp_unsigned("==", top, _constant([0] * 8)), one, two))
    return _join(builder, *found)


def _make(bits: int) -> Callable[..., Any]:
    @intrinsic
    def look_up(typingctx, table, packed, at, out, to):
        def emit(context, builder, sig, args):
            kinds = sig.args

            def word(offset: int) -> Any:
                index = builder.add(args[2], ir.Constant(args[2].type, offset))
                where = _pointer(context, builder, kinds[1], args[1], index, _I32)
                return builder.load(where, align=1)

            found = _look_up(builder, args[0], *_halves(builder, word, bits), bits)
            if kinds[3].dtype.bitwidth == 16:
                found = builder.trunc(found, ir.VectorType(_I16, 16))
            where = _pointer(context, builder, kinds[3], args[3], args[4], found.type)
            builder.store(found, where, align=2)
            return context.get_dummy_value()

        return types.void(table, packed, at, out, to), emit

    return look_up


look_up_4, look_up_3, look_up_2 = _make(4), _make(3), _make(2)
"""`look_up_B(table, packed, at, out, to)` writes the values of the 16 codes of B bits that begin at
byte `at` of `packed` (uint8) to `out[to : to + 16]` (uint32 or uint16); `table` is a `Vec` of 16
int32."""


@intrinsic
def patterns(typingctx, values):
    """The bit patterns of float32 lanes as int32 lanes."""
    out = values.like("i32")
    wide = ir.VectorType(_I32, values.lanes)
    return out(values), lambda context, builder, sig, args: builder.bitcast(args[0], wide)


@intrinsic
def bfloat16_patterns(typingctx, values):
    """The bit patterns of float32 lanes rounded to bfloat16, to nearest even, as int32 lanes."""
    out = values.like("i32")
    lanes = values.lanes

    def emit(context, builder, sig, args):
        def same(value: int) -> ir.Constant:
            return _constant([value] * lanes)

        bits = builder.bitcast(args[0], ir.VectorType(_I32, lanes))
        odd = builder.and_(builder.lshr(bits, same(16)), same(1))
        rounded = builder.lshr(builder.add(builder.add(bits, same(0x7FFF)), odd), same(16))
        nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.select(nan, same(0x7FC0), rounded)

    return out(values), emit
