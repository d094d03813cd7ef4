"""Short vectors of floats for Numba: what ``kernels.py`` computes with.

Numba leaves vectorisation to the compiler, which gives up on loops that write several arrays (it cannot prove
that they do not overlap) and, where it does vectorise, treats the last voxels of a row with other instructions
than the first.  Here a vector is a value: ``load`` it, use ``+ - * /``, :func:`fma`, :func:`sqrt`, ``store``
it.  Each lane goes through the same operations wherever the voxel lies in a block, which is why blocks equal
the whole bit for bit.  LLVM turns the vectors into what the processor has (AVX-512, AVX2, NEON, ...).

Offsets and lengths are in elements, into C-contiguous arrays; nothing is checked against the array's end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

WIDE = 32  # two AVX-512 registers: enough independent sums in flight to hide the latency of fma
NARROW = 16  # where a formula keeps many values alive, e.g. eigenvalues in double precision


class FloatVector(types.Type):
    """A Numba type: ``lanes`` floats of ``bits`` bits."""

    def __init__(self, bits: int, lanes: int) -> None:
        self.bits, self.lanes = bits, lanes
        super().__init__(name=f"float{bits}x{lanes}")

    @property
    def llvm(self) -> ir.VectorType:
        """The same in LLVM."""
        return ir.VectorType(ir.FloatType() if self.bits == 32 else ir.DoubleType(), self.lanes)


@register_model(FloatVector)
class _FloatVectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: FloatVector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


def _element_pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, llvm_type: Any) -> Any:
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), llvm_type.as_pointer())


@intrinsic
def load_wide(_: Any, array: Any, offset: Any) -> Any:
    """Read 32 numbers from ``array`` at ``offset``, as float32."""
    return _load(FloatVector(32, WIDE), array, offset)


@intrinsic
def load_narrow(_: Any, array: Any, offset: Any) -> Any:
    """Read 16 numbers from ``array`` at ``offset``, as float32."""
    return _load(FloatVector(32, NARROW), array, offset)


def _load(vector: FloatVector, array: Any, offset: Any) -> tuple[Any, Callable]:
    element = array.dtype
    is_integer = isinstance(element, types.Integer)
    stored = ir.VectorType(ir.IntType(element.bitwidth), vector.lanes) if is_integer else vector.llvm

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1], stored)
        value = builder.load(pointer, align=element.bitwidth // 8)
        if not is_integer:
            return value
        return builder.sitofp(value, vector.llvm) if element.signed else builder.uitofp(value, vector.llvm)

    return vector(array, types.intp), codegen


@intrinsic
def store(_: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write all lanes to ``array`` at ``offset``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1], value.llvm)
        builder.store(args[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def store_first(_: Any, array: Any, offset: Any, value: Any, count: Any) -> Any:
    """Write the first ``count`` lanes to ``array`` at ``offset``: the ragged end of a row."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = ir.VectorType(ir.IntType(32), value.lanes)
        pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1], value.llvm)
        lane = ir.Constant(index, list(range(value.lanes)))
        limit = _splat(builder, builder.trunc(args[3], ir.IntType(32)), index)
        mask = builder.icmp_signed("<", lane, limit)
        name = f"llvm.masked.store.v{value.lanes}f{value.bits}.p0"
        signature_type = ir.FunctionType(ir.VoidType(), [value.llvm, pointer.type, ir.IntType(32), mask.type])
        function = cgutils.get_or_insert_function(builder.module, signature_type, name)
        builder.call(function, [args[2], pointer, ir.Constant(ir.IntType(32), array.dtype.bitwidth // 8), mask])
        return context.get_dummy_value()

    return types.void(array, types.intp, value, types.intp), codegen


def _splat(builder: Any, scalar: Any, vector_type: ir.VectorType) -> Any:
    undefined = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector_type.count), [0] * vector_type.count)
    return builder.shuffle_vector(first, undefined, zeros)


@intrinsic
def splat_like(_: Any, scalar: Any, like: Any) -> Any:
    """Repeat a number in every lane of a vector of the type of ``like``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0], like.llvm)

    return like(types.float32 if like.bits == 32 else types.float64, like), codegen


@intrinsic
def lanes(_: Any, value: Any) -> Any:
    """Return how many lanes a vector has."""
    count = value.lanes
    return types.intp(value), lambda context, builder, signature, args: context.get_constant(types.intp, count)


@intrinsic
def to_double(_: Any, value: Any) -> Any:
    """Convert a vector of float32 to one of float64."""
    wide = FloatVector(64, value.lanes)
    return wide(value), lambda context, builder, signature, args: builder.fpext(args[0], wide.llvm)


@intrinsic
def to_single(_: Any, value: Any) -> Any:
    """Round a vector of float64 to one of float32."""
    narrow = FloatVector(32, value.lanes)
    return narrow(value), lambda context, builder, signature, args: builder.fptrunc(args[0], narrow.llvm)


@intrinsic
def where_negative(_: Any, value: Any, if_negative: Any, otherwise: Any) -> Any:
    """Choose lane by lane by the sign of ``value``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(value.llvm, [0.0] * value.lanes)
        return builder.select(builder.fcmp_ordered("<", args[0], zero), args[1], args[2])

    return if_negative(value, if_negative, if_negative), codegen


def _llvm_intrinsic(name: str, n_arguments: int) -> Callable:
    """Typing and code of an LLVM intrinsic whose arguments and result are vectors of one type."""

    def make(vector: FloatVector) -> tuple[Any, Callable]:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            function_type = ir.FunctionType(vector.llvm, [vector.llvm] * n_arguments)
            full_name = f"llvm.{name}.v{vector.lanes}f{vector.bits}"
            return builder.call(cgutils.get_or_insert_function(builder.module, function_type, full_name), args)

        return vector(*[vector] * n_arguments), codegen

    return make


@intrinsic
def fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    """Compute ``a * b + c``, rounded once where the processor can."""
    return _llvm_intrinsic("fmuladd", 3)(a)


@intrinsic
def sqrt(_: Any, a: Any) -> Any:
    """Square root of every lane."""
    return _llvm_intrinsic("sqrt", 1)(a)


@intrinsic
def minimum(_: Any, a: Any, b: Any) -> Any:
    """Smaller of two vectors, lane by lane."""
    return _llvm_intrinsic("minnum", 2)(a)


@intrinsic
def maximum(_: Any, a: Any, b: Any) -> Any:
    """Larger of two vectors, lane by lane."""
    return _llvm_intrinsic("maxnum", 2)(a)


def _overload_arithmetic(operation: Callable, instruction: str) -> None:
    """Let Numba's ``operation`` work on two vectors of one type."""

    @intrinsic
    def apply(_: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, instruction)(*args)

        return a(a, b), codegen

    @overload(operation)
    def arithmetic(a: Any, b: Any) -> Any:
        def implementation(a: Any, b: Any) -> Any:
            return apply(a, b)

        return implementation if isinstance(a, FloatVector) and a == b else None


for _operation, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _overload_arithmetic(_operation, _instruction)


@njit(nogil=True, cache=True)
def store_at_most(array: Any, offset: Any, value: Any, count: Any) -> Any:
    """Write all lanes, or the first ``count`` where the row ends earlier."""
    if count >= lanes(value):
        store(array, offset, value)
    else:
        store_first(array, offset, value, count)
