"""Fixed-width vectors inside numba kernels.

numba leaves vectorization to LLVM, which gives up on loops whose arrays may overlap. These
intrinsics emit LLVM vector instructions directly: a value of type `Vec` lives in registers, LLVM
splits it to the width of the machine (AVX-512, AVX2, NEON), and the arithmetic is plain IEEE
float32 without contraction, so results do not depend on the machine. Callers keep arrays long
enough for whole vectors; nothing here checks bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from irq_convert.core.codebook import MOST_LEVELS

_LLVM = {
    "f32": ir.FloatType(),
    **{f"i{width}": ir.IntType(width) for width in (1, 8, 16, 32, 64)},
}
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


class Vec(types.Type):
    """`lanes` values of `elem` ("f32", "i8", "i16", "i32", "i64" or the mask type "i1")."""

    def __init__(self, elem: str, lanes: int) -> None:
        self.elem, self.lanes = elem, lanes
        super().__init__(name=f"Vec({elem}x{lanes})")

    def like(self, elem: str) -> Vec:
        """The vector type with as many lanes of another element."""
        return Vec(elem, self.lanes)


def _llvm(vec: Vec) -> ir.VectorType:
    return ir.VectorType(_LLVM[vec.elem], vec.lanes)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vec) -> None:
        super().__init__(dmm, fe_type, _llvm(fe_type))


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    wide = ir.VectorType(value.type, lanes)
    undef = ir.Constant(wide, ir.Undefined)
    first = builder.insert_element(undef, value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(first, undef, zeros)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data
    return builder.gep(data, [index])


def _make_splat(elem: str, scalar: types.Type, lanes: int) -> Callable[..., Any]:
    @intrinsic
    def splat(typingctx, value):
        return Vec(elem, lanes)(scalar), lambda c, b, s, a: _splat(b, a[0], lanes)

    return splat


def _make_load(elem: str, lanes: int) -> Callable[..., Any]:
    @intrinsic
    def load(typingctx, array, index):
        vec = Vec(elem, lanes)

        def codegen(context, builder, sig, args):
            ptr = _address(context, builder, sig.args[0], args[0], args[1])
            return builder.load(builder.bitcast(ptr, _llvm(vec).as_pointer()), align=4)

        return vec(array, types.intp), codegen

    return load


def _make_binary(emit: Callable[..., Any], result: str | None = None) -> Callable[..., Any]:
    @intrinsic
    def operation(typingctx, left, right):
        out = left if result is None else left.like(result)
        return out(left, right), lambda c, b, s, a: emit(b, a[0], a[1])

    return operation


splat64 = _make_splat("f32", types.float32, 64)
splat16 = _make_splat("f32", types.float32, 16)
isplat64 = _make_splat("i32", types.int32, 64)
isplat16 = _make_splat("i32", types.int32, 16)
lsplat16 = _make_splat("i64", types.int64, 16)
load64 = _make_load("f32", 64)
load16 = _make_load("f32", 16)

# Where lanes are not candidates or blocks but the levels of a codebook, or the bounds between them.
splat_levels = _make_splat("f32", types.float32, MOST_LEVELS)
isplat_levels = _make_splat("i32", types.int32, MOST_LEVELS)
load_levels = _make_load("f32", MOST_LEVELS)
iload_levels = _make_load("i32", MOST_LEVELS)

fadd = _make_binary(lambda b, x, y: b.fadd(x, y))
fsub = _make_binary(lambda b, x, y: b.fsub(x, y))
fmul = _make_binary(lambda b, x, y: b.fmul(x, y))
fless = _make_binary(lambda b, x, y: b.fcmp_ordered("<", x, y), "i1")
fmin = _make_binary(lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
fmax = _make_binary(lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), y, x))
iadd = _make_binary(lambda b, x, y: b.add(x, y))
isub = _make_binary(lambda b, x, y: b.sub(x, y))
imul = _make_binary(lambda b, x, y: b.mul(x, y))


@intrinsic
def store(typingctx, array, index, value):
    """Write the lanes of `value` to `array[index:]`."""

    def codegen(context, builder, sig, args):
        ptr = _address(context, builder, sig.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(ptr, args[2].type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def count(typingctx, total, mask):
    """`total + mask`, lane by lane, with the mask as 0 or 1."""

    def codegen(context, builder, sig, args):
        return builder.sub(args[0], builder.sext(args[1], args[0].type))

    return total(total, mask), codegen


@intrinsic
def choose(typingctx, mask, yes, no):
    """`yes` where the mask is set, `no` elsewhere."""
    return yes(mask, yes, no), lambda c, b, s, a: b.select(a[0], a[1], a[2])


@intrinsic
def widen_mul(typingctx, left, right):
    """Exact int64 product of two int32 vectors."""
    wide = left.like("i64")

    def codegen(context, builder, sig, args):
        x, y = (builder.sext(arg, _llvm(wide)) for arg in args)
        return builder.mul(x, y)

    return wide(left, right), codegen


@intrinsic
def round_to_int(typingctx, value):
    """float32 lanes to the nearest int32, ties to even; the caller keeps them in range."""
    out = value.like("i32")

    def codegen(context, builder, sig, args):
        vec = _llvm(value)
        name = f"llvm.rint.v{value.lanes}f32"
        rint = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vec, [vec]), name)
        return builder.fptosi(builder.call(rint, [args[0]]), _llvm(out))

    return out(value), codegen


@intrinsic
def gather(typingctx, table, index):
    """`table[index]` for every lane; `table` is a contiguous int32 array."""
    lanes = index.lanes

    def codegen(context, builder, sig, args):
        data = cgutils.create_struct_proxy(sig.args[0])(context, builder, value=args[0]).data
        wide = ir.VectorType(_I64, lanes)
        base = _splat(builder, builder.ptrtoint(data, _I64), lanes)
        offset = builder.shl(builder.zext(args[1], wide), ir.Constant(wide, [2] * lanes))
        pointers = ir.VectorType(_I32.as_pointer(), lanes)
        address = builder.inttoptr(builder.add(base, offset), pointers)
        values, mask = _llvm(index), ir.VectorType(ir.IntType(1), lanes)
        signature = ir.FunctionType(values, [pointers, _I32, mask, values])
        name = f"llvm.masked.gather.v{lanes}i32.v{lanes}p0"
        call = cgutils.get_or_insert_function(builder.module, signature, name)
        every, undef = ir.Constant(mask, [1] * lanes), ir.Constant(values, ir.Undefined)
        return builder.call(call, [address, ir.Constant(_I32, 4), every, undef])

    return index(table, index), codegen


@intrinsic
def float_bits(typingctx, value):
    """The bits of a float32 as an int32."""
    return types.int32(types.float32), lambda c, b, s, a: b.bitcast(a[0], _I32)


@intrinsic
def bits_float(typingctx, bits):
    """The float32 with the bits of an int32."""
    return types.float32(types.int32), lambda c, b, s, a: b.bitcast(a[0], ir.FloatType())


@intrinsic
def lane_sum(typingctx, value):
    """Sum of the lanes of an int64 vector."""

    def codegen(context, builder, sig, args):
        name = f"llvm.vector.reduce.add.v{value.lanes}i64"
        signature = ir.FunctionType(_I64, [_llvm(value)])
        reduce = cgutils.get_or_insert_function(builder.module, signature, name)
        return builder.call(reduce, [args[0]])

    return types.int64(value), codegen
