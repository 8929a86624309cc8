"""Memory by address, prefetching and moves in vector registers: what the kernels of the index are written on (distances: `measuring`).

Kernels take addresses instead of arrays, so that one compiled kernel serves arrays in memory, read-only arrays mapped from a file, and
rows of every precision. Nothing here checks anything: callers own the arrays and keep ids in range (see `storage`). What the loads, moves
and prefetches that are written as LLVM here are worth beside numba's own was not measured.
"""
# Shapes: widths are counts of elements, padded with zeros to whole lines of 64 bytes

from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils as numba_cgutils
from numba.core import types

# Numba's types do not know of all of its options, nor of what an intrinsic is called with.
jit: Any = nb.njit
intrinsic: Any = extending.intrinsic
cgutils: Any = numba_cgutils

# Called from Python.
kernel = jit(cache=True, nogil=True)

# Called by kernels alone: half the time to compile.
helper = jit(no_cpython_wrapper=True, no_cfunc_wrapper=True)

# A helper that is written into whoever calls it: for what is short, or has one caller. Each other helper is made machine code by itself
# first, with all that it calls (distances of every kind), though nobody asks for that code.
inlined = jit(inline="always", no_cpython_wrapper=True, no_cfunc_wrapper=True)

# Kinds of distance beyond those of whole numbers and floats (`layout`): half bytes, look-up by code, bits that differ.
L2_I4, IP_I4, L2_PQ, IP_PQ, HAMMING = range(6, 11)

# Of int8 and half bytes about the centres of groups (`groups`); even, as all of squared L2.
L2_I8_GROUPS, L2_I4_GROUPS = 12, 14

LINE = 64  # bytes
LANES = 16

F32, HALF = ir.FloatType(), ir.HalfType()
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VECTOR, HALVES = ir.VectorType(F32, LANES), ir.VectorType(HALF, LANES)
INTS = ir.VectorType(I32, LANES)


def int64_at(builder: Any, address: Any) -> Any:
    """A pointer to what lies at an address."""
    return builder.inttoptr(address, ir.PointerType())


def element(builder: Any, address: Any, index: Any, size: int) -> Any:
    """A pointer to element ``index``, of ``size`` bytes, of an array at ``address``."""
    offset = builder.mul(index, ir.Constant(I64, size))
    return builder.inttoptr(builder.add(address, offset), ir.PointerType())


def _loader(result: Any, kind: Any, size: int, extend: bool = False) -> Callable[..., Any]:
    def typed(typingctx: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.load(element(builder, arguments[0], arguments[1], size), typ=kind)
            value.align = size
            return builder.sext(value, I64) if extend else value

        return result(types.int64, types.int64), codegen

    return typed


def _storer(value_type: Any, kind: Any, size: int) -> Callable[..., Any]:
    def typed(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            stored = builder.store(arguments[2], element(builder, arguments[0], arguments[1], size))
            stored.align = size
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value_type), codegen

    return typed


get_i32 = intrinsic(_loader(types.int64, I32, 4, extend=True))
get_u8 = intrinsic(_loader(types.uint8, I8, 1))
get_f32 = intrinsic(_loader(types.float32, F32, 4))
set_i32 = intrinsic(_storer(types.int32, I32, 4))
set_u8 = intrinsic(_storer(types.uint8, I8, 1))
set_i8 = intrinsic(_storer(types.int8, I8, 1))
set_f32 = intrinsic(_storer(types.float32, F32, 4))
get_i64 = intrinsic(_loader(types.int64, I64, 8))


@intrinsic
def prefetch(typingctx, address):
    """Ask for the line of 64 bytes at ``address``."""

    def codegen(context, builder, signature, arguments):
        pointer = ir.PointerType()
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32]), "llvm.prefetch.p0"
        )
        read, near, data = (ir.Constant(I32, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], pointer), read, near, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def shift_up(typingctx, begin, count):
    """Move ``count`` elements of 4 bytes at ``begin`` up by one place, in whole vectors: up to LANES - 1 behind them move along.

    A pool is short, and a call of memmove takes longer than its work there.
    """

    def codegen(context, builder, signature, arguments):
        start, number = arguments
        lanes, one = ir.Constant(I64, LANES), ir.Constant(I64, 1)
        chunks = builder.udiv(builder.add(number, ir.Constant(I64, LANES - 1)), lanes)
        # The last first: nothing is overwritten before it has moved.
        with cgutils.for_range(builder, chunks, intp=I64) as loop:
            offset = builder.mul(builder.sub(builder.sub(chunks, loop.index), one), lanes)
            moved = chunk_of(builder, start, offset, INTS, 4)
            builder.store(moved, element(builder, start, builder.add(offset, one), 4)).align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def chunk_of(builder: Any, address: Any, offset: Any, kind: Any, size: int) -> Any:
    """LANES elements that start ``offset`` elements behind ``address``."""
    loaded = builder.load(element(builder, address, offset, size), typ=kind)
    loaded.align = size
    return loaded


def total_of(builder: Any, value: Any) -> Any:
    """The sum of a vector of integers."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(I32, [INTS]), f"llvm.vector.reduce.add.v{LANES}i32"
    )
    return builder.call(function, [value])


@intrinsic
def widen_f16(typingctx, source, to, width):
    """Write ``width`` half-precision numbers as float32."""

    def codegen(context, builder, signature, arguments):
        begin, end, count = arguments
        with cgutils.for_range(builder, builder.udiv(count, ir.Constant(I64, LANES)), intp=I64) as loop:
            offset = builder.mul(loop.index, ir.Constant(I64, LANES))
            value = builder.fpext(chunk_of(builder, begin, offset, HALVES, 2), VECTOR)
            builder.store(value, element(builder, end, offset, 4)).align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def count_not_above(typingctx, numbers, count, limit):
    """How many of ``count`` floats at ``numbers`` are at most ``limit``; reads whole vectors, so the array is padded with infinity."""

    def codegen(context, builder, signature, arguments):
        address, number, limit = arguments
        sums = cgutils.alloca_once_value(builder, ir.Constant(INTS, [0] * LANES))
        single = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), limit, ir.Constant(I32, 0))
        spread = builder.shuffle_vector(single, ir.Constant(VECTOR, ir.Undefined), ir.Constant(INTS, [0] * LANES))
        chunks = builder.udiv(builder.add(number, ir.Constant(I64, LANES - 1)), ir.Constant(I64, LANES))
        with cgutils.for_range(builder, chunks, intp=I64) as loop:
            offset = builder.mul(loop.index, ir.Constant(I64, LANES))
            found = builder.fcmp_ordered("<=", chunk_of(builder, address, offset, VECTOR, 4), spread)
            builder.store(builder.add(builder.load(sums, typ=INTS), builder.zext(found, INTS)), sums)
        return total_of(builder, builder.load(sums, typ=INTS))

    return types.int32(types.int64, types.int64, types.float32), codegen


@helper
def address(array):
    """Where an array begins."""
    return np.int64(array.ctypes.data)
