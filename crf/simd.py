"""Sixteen float32 lanes as one value inside compiled functions.

The compiler turns plain loops into vector code too, but checks at every loop whether arrays overlap, finishes
rows one element at a time, and uses half the width of the registers. On rows of some 30 grid nodes that costs
more than the arithmetic. Here a row is a few explicit vectors; on processors with narrower registers LLVM splits
them. Callers keep rows padded so that the last vector may run over their end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


class _Vector(types.Type):
    """The type of sixteen float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


_vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    """Kept in a vector register."""

    def __init__(self, manager: Any, type_: types.Type) -> None:
        super().__init__(manager, type_, _VECTOR)


def _lane_pointer(context: Any, builder: Any, array_type: types.Array, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(cgutils.gep_inbounds(builder, data, index), _VECTOR.as_pointer())


@intrinsic
def load(_context: Any, flat: types.Array, index: types.Integer) -> tuple[Any, Callable]:
    """flat[index : index + 16] of a one-dimensional contiguous float32 array; unchecked."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_lane_pointer(context, builder, signature.args[0], args[0], args[1]))
        value.align = 4
        return value

    return _vector(flat, types.intp), code


@intrinsic
def store(_context: Any, flat: types.Array, index: types.Integer, value: types.Type) -> tuple[Any, Callable]:
    """flat[index : index + 16] = value; unchecked."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _lane_pointer(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(flat, types.intp, _vector), code


@intrinsic
def splat(_context: Any, scalar: types.Float) -> tuple[Any, Callable]:
    """The same number in every lane."""

    def code(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        zero = ir.Constant(ir.IntType(32), 0)
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), args[0], zero)
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), lanes)

    return _vector(types.float32), code


@intrinsic
def multiply(_context: Any, a: types.Type, b: types.Type) -> tuple[Any, Callable]:
    """a · b lane by lane."""

    def code(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fmul(args[0], args[1], flags=("contract",))

    return _vector(_vector, _vector), code


@intrinsic
def add_product(_context: Any, total: types.Type, a: types.Type, b: types.Type) -> tuple[Any, Callable]:
    """total + a · b lane by lane, one instruction where the processor has it."""

    def code(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        product = builder.fmul(args[1], args[2], flags=("contract",))
        return builder.fadd(args[0], product, flags=("contract",))

    return _vector(_vector, _vector, _vector), code


@intrinsic
def add(_context: Any, a: types.Type, b: types.Type) -> tuple[Any, Callable]:
    """a + b lane by lane."""

    def code(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1], flags=("contract",))

    return _vector(_vector, _vector), code
