"""SIMD lanes as a numba type, and the operations on them that the soft-DTW kernel needs.

`Lanes` is a 64-byte vector, 16 float32 or 8 float64 values; LLVM splits it where registers are narrower.
Being explicit about vectors makes the kernel's speed independent of what the loop vectoriser recognises.
Exponential and logarithm are polynomials, because calls into the maths library would not vectorise.

numba caches compiled kernels by the time stamp of the kernel's own file: touch that one after changing this.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

VECTOR_BYTES = 64


class Lanes(types.Type):  # type: ignore[misc]
    """One value per sample of a tile."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        self.bits = dtype.bitwidth
        self.count = VECTOR_BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Lanes({dtype})")


def _vector(lanes: Lanes) -> ir.VectorType:
    return ir.VectorType(ir.FloatType() if lanes.bits == 32 else ir.DoubleType(), lanes.count)


def _integers(lanes: Lanes) -> ir.VectorType:
    return ir.VectorType(ir.IntType(lanes.bits), lanes.count)


@register_model(Lanes)
class _LanesModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        super().__init__(dmm, fe_type, _vector(fe_type))


def _constant(lanes: Lanes, value: float) -> ir.Constant:
    return ir.Constant(_vector(lanes), [value] * lanes.count)


def _llvm(builder: Any, name: str, result: Any, *args: Any) -> Any:
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def _multiply_add(builder: Any, lanes: Lanes, a: Any, b: Any, c: Any) -> Any:
    return _llvm(builder, f"llvm.fmuladd.v{lanes.count}f{lanes.bits}", a.type, a, b, c)


def _polynomial(builder: Any, lanes: Lanes, x: Any, coefficients: list[float]) -> Any:
    """Horner's rule, the constant term first in ``coefficients``."""
    result = _constant(lanes, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = _multiply_add(builder, lanes, result, x, _constant(lanes, coefficient))
    return result


class _Arithmetic(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        both = len(args) == 2 and isinstance(args[0], Lanes) and args[0] == args[1]
        return signature(args[0], *args) if both else None


def _define_operator(symbol: Any, instruction: str) -> None:
    infer_global(symbol)(type(f"Lanes_{instruction}", (_Arithmetic,), {}))

    @lower_builtin(symbol, Lanes, Lanes)
    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
_define_operator(operator.truediv, "fdiv")


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _multiply_add(builder, a, *args)

    return a(a, b, c), codegen


@intrinsic
def where_less(typingctx: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """``yes`` in the lanes where a < b, ``no`` in the others"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return a(a, b, yes, no), codegen


def _row_pointer(context: Any, builder: Any, signature: Any, array: Any, row: Any, lanes: Lanes) -> Any:
    data = context.make_array(signature.args[0])(context, builder, array).data
    offset = builder.mul(row, ir.Constant(row.type, lanes.count))
    return builder.bitcast(builder.gep(data, [offset]), _vector(lanes).as_pointer())


@intrinsic
def load(typingctx: Any, scratch: Any, row: Any) -> Any:
    """row number ``row`` of the scratch memory"""
    lanes = Lanes(scratch.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_row_pointer(context, builder, signature, args[0], args[1], lanes), align=VECTOR_BYTES)

    return lanes(scratch, types.intp), codegen


@intrinsic
def store(typingctx: Any, scratch: Any, row: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _row_pointer(context, builder, signature, args[0], args[1], value)
        builder.store(args[2], pointer, align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(scratch, types.intp, value), codegen


@intrinsic
def splat(typingctx: Any, scratch: Any, value: Any) -> Any:
    """the same number in all lanes, in the precision of ``scratch``"""
    lanes = Lanes(scratch.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scalar = context.cast(builder, args[1], value, lanes.dtype)
        single = builder.insert_element(
            ir.Constant(_vector(lanes), ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
        )
        mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes.count), [0] * lanes.count)
        return builder.shuffle_vector(single, ir.Constant(_vector(lanes), ir.Undefined), mask)

    return lanes(scratch, value), codegen


@intrinsic
def exp_nonpositive(typingctx: Any, x: Any) -> Any:
    """exp(x) for x <= 0, -inf included: x = n log 2 + r, Taylor's polynomial for exp(r), n into the exponent"""
    if x.bits == 32:
        mantissa, lowest, degree = 23, -87.0, 7
        log2_high, log2_low = 0.693145751953125, 1.42860682030941723212e-6
    else:
        mantissa, lowest, degree = 52, -708.0, 13
        log2_high, log2_low = 6.93147180369123816490e-01, 1.90821492927058770002e-10
    # adding it leaves the nearest integer in the low mantissa bits
    rounder = 1.5 * 2.0**mantissa

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (value,) = args
        floor = _constant(x, lowest)
        vanishes = builder.fcmp_ordered("<", value, floor)
        value = builder.select(vanishes, floor, value)
        shifted = _multiply_add(builder, x, value, _constant(x, 1.0 / math.log(2.0)), _constant(x, rounder))
        n = builder.fsub(shifted, _constant(x, rounder))
        r = _multiply_add(builder, x, n, _constant(x, -log2_high), value)
        r = _multiply_add(builder, x, n, _constant(x, -log2_low), r)
        mantissas = _polynomial(builder, x, r, [1.0 / math.factorial(k) for k in range(degree + 1)])
        shift = ir.Constant(_integers(x), [mantissa] * x.count)
        exponents = builder.shl(builder.bitcast(shifted, _integers(x)), shift)
        result = builder.add(builder.bitcast(mantissas, _integers(x)), exponents)
        return builder.select(vanishes, _constant(x, 0.0), builder.bitcast(result, _vector(x)))

    return x(x), codegen


@intrinsic
def log_one_to_three(typingctx: Any, x: Any) -> Any:
    """log(x) for 1 <= x <= 3: halve above 1.5, then log(m) = 2 atanh((m - 1) / (m + 1)), |argument| <= 1/5"""
    terms = 6 if x.bits == 32 else 12

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (value,) = args
        one = _constant(x, 1.0)
        large = builder.fcmp_ordered(">", value, _constant(x, 1.5))
        m = builder.select(large, builder.fmul(value, _constant(x, 0.5)), value)
        z = builder.fdiv(builder.fsub(m, one), builder.fadd(m, one))
        series = _polynomial(builder, x, builder.fmul(z, z), [2.0 / (2 * k + 1) for k in range(terms)])
        offset = builder.select(large, _constant(x, math.log(2.0)), _constant(x, 0.0))
        return _multiply_add(builder, x, z, series, offset)

    return x(x), codegen


def _transpose(builder: Any, rows: list[Any], lanes: Lanes) -> list[Any]:
    """Transpose a square of lanes by exchanging ever smaller off-diagonal blocks."""
    rows = list(rows)
    index = ir.VectorType(ir.IntType(32), lanes.count)
    half = lanes.count // 2
    while half:
        upper = [c if not c & half else lanes.count + (c ^ half) for c in range(lanes.count)]
        lower = [c | half if not c & half else lanes.count + c for c in range(lanes.count)]
        for r in range(lanes.count):
            if not r & half:
                a, b = rows[r], rows[r | half]
                rows[r] = builder.shuffle_vector(a, b, ir.Constant(index, upper))
                rows[r | half] = builder.shuffle_vector(a, b, ir.Constant(index, lower))
        half //= 2
    return rows


def _block_pointers(context: Any, builder: Any, array_type: Any, args: Any, lanes: Lanes) -> list[Any]:
    """Addresses of ``array[min(first + lane, last), step, k]`` for all lanes."""
    array, first, last, step, k = args
    struct = context.make_array(array_type)(context, builder, array)
    stride_b, stride_t, _ = cgutils.unpack_tuple(builder, struct.strides)
    byte = builder.bitcast(struct.data, ir.IntType(8).as_pointer())
    itemsize = ir.Constant(k.type, lanes.bits // 8)
    inner = builder.add(builder.mul(step, stride_t), builder.mul(k, itemsize))
    pointers = []
    for lane in range(lanes.count):
        sample = builder.add(first, ir.Constant(first.type, lane))
        sample = builder.select(builder.icmp_signed("<", sample, last), sample, last)
        offset = builder.add(builder.mul(sample, stride_b), inner)
        pointers.append(builder.bitcast(builder.gep(byte, [offset]), _vector(lanes).as_pointer()))
    return pointers


def _inside(builder: Any, count: Any, lanes: Lanes) -> Any:
    """Mask of the lanes below ``count``."""
    index = ir.VectorType(ir.IntType(32), lanes.count)
    single = builder.insert_element(
        ir.Constant(index, ir.Undefined),
        builder.trunc(count, ir.IntType(32)),
        ir.Constant(ir.IntType(32), 0),
    )
    counts = builder.shuffle_vector(single, ir.Constant(index, ir.Undefined), ir.Constant(index, [0] * lanes.count))
    return builder.icmp_signed("<", ir.Constant(index, list(range(lanes.count))), counts)


@intrinsic
def read_block(
    typingctx: Any, array: Any, first: Any, last: Any, step: Any, k: Any, count: Any, scratch: Any, row: Any
) -> Any:
    """array[first:, step, k:k+count], transposed, to the rows from ``row`` on (as many rows as lanes)"""
    lanes = Lanes(array.dtype)
    name = f"llvm.masked.load.v{lanes.count}f{lanes.bits}.p0"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = _inside(builder, args[5], lanes)
        align = ir.Constant(ir.IntType(32), lanes.bits // 8)
        pointers = _block_pointers(context, builder, array, args[:5], lanes)
        zero = _constant(lanes, 0.0)
        rows = [_llvm(builder, name, _vector(lanes), pointer, align, mask, zero) for pointer in pointers]
        data = context.make_array(scratch)(context, builder, args[6]).data
        base = builder.mul(args[7], ir.Constant(args[7].type, lanes.count))
        for r, values in enumerate(_transpose(builder, rows, lanes)):
            offset = builder.add(base, ir.Constant(base.type, r * lanes.count))
            pointer = builder.bitcast(builder.gep(data, [offset]), _vector(lanes).as_pointer())
            builder.store(values, pointer, align=VECTOR_BYTES)
        return context.get_dummy_value()

    i = types.intp
    return types.void(array, i, i, i, i, i, scratch, i), codegen


@intrinsic
def write_block(
    typingctx: Any, array: Any, first: Any, last: Any, step: Any, k: Any, count: Any, scratch: Any, row: Any
) -> Any:
    """the reverse of `read_block`; lanes past the last sample hold its copy and rewrite the same numbers"""
    lanes = Lanes(array.dtype)
    name = f"llvm.masked.store.v{lanes.count}f{lanes.bits}.p0"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = _inside(builder, args[5], lanes)
        align = ir.Constant(ir.IntType(32), lanes.bits // 8)
        data = context.make_array(scratch)(context, builder, args[6]).data
        base = builder.mul(args[7], ir.Constant(args[7].type, lanes.count))
        rows = []
        for r in range(lanes.count):
            offset = builder.add(base, ir.Constant(base.type, r * lanes.count))
            pointer = builder.bitcast(builder.gep(data, [offset]), _vector(lanes).as_pointer())
            rows.append(builder.load(pointer, align=VECTOR_BYTES))
        pointers = _block_pointers(context, builder, array, args[:5], lanes)
        for values, pointer in zip(_transpose(builder, rows, lanes), pointers, strict=True):
            _llvm(builder, name, ir.VoidType(), values, pointer, align, mask)
        return context.get_dummy_value()

    i = types.intp
    return types.void(array, i, i, i, i, i, scratch, i), codegen
