"""Memory by address, prefetching and distances in vector registers: what the kernels of the index are written on.

Kernels take addresses instead of arrays, so that one compiled kernel serves arrays in memory, read-only arrays mapped from a file, and
rows of every precision. Nothing here checks anything: callers own the arrays and keep ids in range (see `storage`).

Distances are written in LLVM's vector types, 16 lanes wide, with four sums. LLVM splits them where registers are narrower, so that a
machine without AVX-512 runs the same code. Loops in Python vectorise too, but their rests of fewer than 64 elements run one by one.
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

# Kinds of distance beyond those of whole numbers and floats (`layout`): half bytes, look-up by code, bits that differ.
L2_I4, IP_I4, L2_PQ, IP_PQ, HAMMING = range(6, 11)

LINE = 64  # bytes
LANES = 16
SUMS = 4

_F32, _HALF = ir.FloatType(), ir.HalfType()
_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR, _HALVES = ir.VectorType(_F32, LANES), ir.VectorType(_HALF, LANES)
_INTS = ir.VectorType(_I32, LANES)

# A line of words of 64 bits.
WORDS = 8
_WORDS = ir.VectorType(_I64, WORDS)


def _element(builder: Any, address: Any, index: Any, size: int) -> Any:
    """A pointer to element ``index``, of ``size`` bytes, of an array at ``address``."""
    offset = builder.mul(index, ir.Constant(_I64, size))
    return builder.inttoptr(builder.add(address, offset), ir.PointerType())


def _loader(result: Any, kind: Any, size: int, extend: bool = False) -> Callable[..., Any]:
    def typed(typingctx: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.load(_element(builder, arguments[0], arguments[1], size), typ=kind)
            value.align = size
            return builder.sext(value, _I64) if extend else value

        return result(types.int64, types.int64), codegen

    return typed


def _storer(value_type: Any, kind: Any, size: int) -> Callable[..., Any]:
    def typed(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            stored = builder.store(arguments[2], _element(builder, arguments[0], arguments[1], size))
            stored.align = size
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value_type), codegen

    return typed


get_i32 = intrinsic(_loader(types.int64, _I32, 4, extend=True))
get_u8 = intrinsic(_loader(types.uint8, _I8, 1))
get_f32 = intrinsic(_loader(types.float32, _F32, 4))
set_i32 = intrinsic(_storer(types.int32, _I32, 4))
set_u8 = intrinsic(_storer(types.uint8, _I8, 1))


@intrinsic
def prefetch(typingctx, address):
    """Ask for the line of 64 bytes at ``address``."""

    def codegen(context, builder, signature, arguments):
        pointer = ir.PointerType()
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32]), "llvm.prefetch.p0"
        )
        read, near, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], pointer), read, near, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def move(typingctx, to, source, count):
    """Copy ``count`` bytes; the two places may overlap."""

    def codegen(context, builder, signature, arguments):
        pointer = ir.PointerType()
        ends = [builder.inttoptr(address, pointer) for address in arguments[:2]]
        cgutils.raw_memmove(builder, *ends, arguments[2], ir.Constant(_I64, 1))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _chunk(builder: Any, address: Any, offset: Any, kind: Any, size: int) -> Any:
    """LANES elements that start ``offset`` elements behind ``address``."""
    loaded = builder.load(_element(builder, address, offset, size), typ=kind)
    loaded.align = size
    return loaded


def _summed(builder: Any, width: Any, step: Callable[[Any, Any], Any], zero: Any, add: Callable[..., Any]) -> Any:
    """Sum ``step(offset, sum)`` over offsets 0, LANES, ... below ``width`` in SUMS sums that do not wait for each other."""
    sums = [cgutils.alloca_once_value(builder, zero) for _ in range(SUMS)]
    block = ir.Constant(_I64, LANES * SUMS)
    many = builder.udiv(width, block)
    with cgutils.for_range(builder, many, intp=_I64) as loop:
        start = builder.mul(loop.index, block)
        for number, place in enumerate(sums):
            offset = builder.add(start, ir.Constant(_I64, number * LANES))
            builder.store(step(offset, builder.load(place, typ=zero.type)), place)
    start = builder.mul(many, block)
    rest = builder.udiv(builder.sub(width, start), ir.Constant(_I64, LANES))
    with cgutils.for_range(builder, rest, intp=_I64) as loop:
        offset = builder.add(start, builder.mul(loop.index, ir.Constant(_I64, LANES)))
        builder.store(step(offset, builder.load(sums[0], typ=zero.type)), sums[0])
    values = [builder.load(place, typ=zero.type) for place in sums]
    return add(add(values[0], values[1]), add(values[2], values[3]))


def _fused(builder: Any, left: Any, right: Any, total: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32"
    )
    return builder.call(function, [left, right, total])


def _horizontal(builder: Any, value: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_F32, [_F32, _VECTOR]), f"llvm.vector.reduce.fadd.v{LANES}f32"
    )
    return builder.call(function, [ir.Constant(_F32, 0.0), value], fastmath=("reassoc",))


def _float_sum(builder: Any, query: Any, row: Any, width: Any, half: bool, square: bool) -> Any:
    def step(offset: Any, total: Any) -> Any:
        left = _chunk(builder, query, offset, _VECTOR, 4)
        if half:
            right = builder.fpext(_chunk(builder, row, offset, _HALVES, 2), _VECTOR)
        else:
            right = _chunk(builder, row, offset, _VECTOR, 4)
        if square:
            left = right = builder.fsub(left, right)
        return _fused(builder, left, right, total)

    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    return _horizontal(builder, _summed(builder, width, step, zero, builder.fadd))


def _byte_product(builder: Any, query: Any, row: Any, width: Any) -> Any:
    """Dot product of signed bytes, exact; ``width`` is below 2**17, so that it fits 32 bits."""
    wide_bytes, wide_ints = ir.VectorType(_I8, 2 * LANES), ir.VectorType(_I32, 2 * LANES)
    even = ir.Constant(_INTS, [2 * lane for lane in range(LANES)])
    odd = ir.Constant(_INTS, [2 * lane + 1 for lane in range(LANES)])

    # Twice the lanes: neighbours are added first, which is one instruction.
    def step(offset: Any, total: Any) -> Any:
        offset = builder.mul(offset, ir.Constant(_I64, 2))
        left, right = (
            builder.sext(_chunk(builder, address, offset, wide_bytes, 1), wide_ints) for address in (query, row)
        )
        product, nothing = builder.mul(left, right), ir.Constant(wide_ints, ir.Undefined)
        firsts, seconds = (builder.shuffle_vector(product, nothing, lanes) for lanes in (even, odd))
        return builder.add(total, builder.add(firsts, seconds))

    zero = ir.Constant(_INTS, [0] * LANES)
    return _count(builder, _summed(builder, builder.udiv(width, ir.Constant(_I64, 2)), step, zero, builder.add))


def _nibble_product(builder: Any, query: Any, row: Any, width: Any) -> Any:
    """Dot product of signed bytes and half bytes less 8; of each 32 bytes of a row the lower halves come first."""
    size = 2 * LANES
    wide_bytes, wide_ints = ir.VectorType(_I8, size), ir.VectorType(_I32, size)
    low, eight, four = (ir.Constant(wide_bytes, [value] * size) for value in (15, 8, 4))
    nothing = ir.Constant(wide_ints, ir.Undefined)
    even, odd = (ir.Constant(_INTS, [2 * lane + first for lane in range(LANES)]) for first in (0, 1))
    total = cgutils.alloca_once_value(builder, ir.Constant(_INTS, [0] * LANES))
    chunk = ir.Constant(_I64, size)
    with cgutils.for_range(builder, builder.udiv(width, chunk), intp=_I64) as loop:
        place = builder.mul(loop.index, chunk)
        packed = _chunk(builder, row, place, wide_bytes, 1)
        halves = builder.and_(packed, low), builder.lshr(packed, four)
        for number, half in enumerate(halves):
            start = builder.add(builder.mul(place, ir.Constant(_I64, 2)), ir.Constant(_I64, size * number))
            left = builder.sext(_chunk(builder, query, start, wide_bytes, 1), wide_ints)
            product = builder.mul(left, builder.sext(builder.sub(half, eight), wide_ints))
            firsts, seconds = (builder.shuffle_vector(product, nothing, lanes) for lanes in (even, odd))
            found = builder.add(builder.load(total, typ=_INTS), builder.add(firsts, seconds))
            builder.store(found, total)
    return _count(builder, builder.load(total, typ=_INTS))


def _looked_up(builder: Any, table: Any, row: Any, width: Any) -> Any:
    """The sum of one number from each of ``width`` (a multiple of 4) rows of 256, by the codes of a row."""
    sums = [cgutils.alloca_once_value(builder, ir.Constant(_F32, 0.0)) for _ in range(SUMS)]
    with cgutils.for_range(builder, builder.udiv(width, ir.Constant(_I64, SUMS)), intp=_I64) as loop:
        for number, place in enumerate(sums):
            part = builder.add(builder.mul(loop.index, ir.Constant(_I64, SUMS)), ir.Constant(_I64, number))
            code = builder.zext(_chunk(builder, row, part, _I8, 1), _I64)
            entry = builder.add(builder.mul(part, ir.Constant(_I64, 256)), code)
            builder.store(builder.fadd(builder.load(place, typ=_F32), _chunk(builder, table, entry, _F32, 4)), place)
    values = [builder.load(place, typ=_F32) for place in sums]
    return builder.fadd(builder.fadd(values[0], values[1]), builder.fadd(values[2], values[3]))


def _count(builder: Any, value: Any) -> Any:
    """The sum of a vector of integers."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_I32, [_INTS]), f"llvm.vector.reduce.add.v{LANES}i32"
    )
    return builder.call(function, [value])


def _different_bits(builder: Any, query: Any, row: Any, width: Any) -> Any:
    """Bits that differ in ``width`` words of 64: whole lines at once, the rest (rows shorter than a line) word by word."""

    def differing(offset: Any, kind: Any, name: str) -> Any:
        left, right = (_chunk(builder, address, offset, kind, 8) for address in (query, row))
        count = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), f"llvm.ctpop.{name}")
        return builder.call(count, [builder.xor(left, right)])

    line = ir.Constant(_I64, WORDS)
    zero = ir.Constant(_WORDS, [0] * WORDS)
    wide, single = cgutils.alloca_once_value(builder, zero), cgutils.alloca_once_value(builder, ir.Constant(_I64, 0))
    many = builder.udiv(width, line)
    with cgutils.for_range(builder, many, intp=_I64) as loop:
        found = differing(builder.mul(loop.index, line), _WORDS, f"v{WORDS}i64")
        builder.store(builder.add(builder.load(wide, typ=_WORDS), found), wide)
    start = builder.mul(many, line)
    with cgutils.for_range(builder, builder.sub(width, start), intp=_I64) as loop:
        found = differing(builder.add(start, loop.index), _I64, "i64")
        builder.store(builder.add(builder.load(single, typ=_I64), found), single)
    total = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_I64, [_WORDS]), f"llvm.vector.reduce.add.v{WORDS}i64"
    )
    return builder.add(builder.call(total, [builder.load(wide, typ=_WORDS)]), builder.load(single, typ=_I64))


def _distance_function(module: Any) -> Any:
    """One function per module that is not inlined: its loops, copied to every place that measures, would take seconds to compile."""
    arguments = [_I64, _I64, _F32, _F32, _I64, _I64, _I64, _I64]
    function = cgutils.get_or_insert_function(module, ir.FunctionType(_F32, arguments), "anabranch_hnsw_distance")
    if not function.is_declaration:
        return function
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    function.attributes.add("nounwind")
    kind, query, scale, norm, row, aux, slot, width = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    other = function.append_basic_block("bytes")
    choice = builder.switch(kind, other)
    one, two = ir.Constant(_F32, 1.0), ir.Constant(_F32, 2.0)
    for number, (half, square) in enumerate(((False, True), (False, False), (True, True), (True, False))):
        block = function.append_basic_block(f"kind{number}")
        choice.add_case(ir.Constant(_I64, number), block)
        builder.position_at_end(block)
        total = _float_sum(builder, query, row, width, half, square)
        builder.ret(total if square else builder.fsub(one, total))
    bits = function.append_basic_block("bits")
    choice.add_case(ir.Constant(_I64, HAMMING), bits)
    builder.position_at_end(bits)
    builder.ret(builder.uitofp(_different_bits(builder, query, row, width), _F32))
    codes = function.append_basic_block("codes")
    for number in (L2_PQ, IP_PQ):
        choice.add_case(ir.Constant(_I64, number), codes)
    builder.position_at_end(codes)
    builder.ret(_looked_up(builder, query, row, width))
    nibbles = function.append_basic_block("nibbles")
    for number in (L2_I4, IP_I4):
        choice.add_case(ir.Constant(_I64, number), nibbles)
    for block, product_of in ((nibbles, _nibble_product), (other, _byte_product)):
        builder.position_at_end(block)
        product = builder.sitofp(product_of(builder, query, row, width), _F32)
        beside = builder.mul(slot, ir.Constant(_I64, 2))
        product = builder.fmul(product, builder.fmul(scale, builder.load(_element(builder, aux, beside, 4), typ=_F32)))
        is_product = builder.trunc(kind, ir.IntType(1))
        with builder.if_then(is_product):
            builder.ret(builder.fsub(one, product))
        square = builder.load(_element(builder, aux, builder.add(beside, ir.Constant(_I64, 1)), 4), typ=_F32)
        builder.ret(builder.fsub(builder.fadd(norm, square), builder.fmul(two, product)))
    return function


@intrinsic
def distance(typingctx, kind, query, scale, norm, row, aux, slot, width):
    """From a query (address, and scale and squared norm where it is int8) to the vector at ``row``, which is that of ``slot``."""

    def codegen(context, builder, signature, arguments):
        return builder.call(_distance_function(builder.module), arguments)

    whole, single = types.int64, types.float32
    return single(whole, whole, single, single, whole, whole, whole, whole), codegen


@intrinsic
def widen_f16(typingctx, source, to, width):
    """Write ``width`` half-precision numbers as float32."""

    def codegen(context, builder, signature, arguments):
        begin, end, count = arguments
        with cgutils.for_range(builder, builder.udiv(count, ir.Constant(_I64, LANES)), intp=_I64) as loop:
            offset = builder.mul(loop.index, ir.Constant(_I64, LANES))
            value = builder.fpext(_chunk(builder, begin, offset, _HALVES, 2), _VECTOR)
            builder.store(value, _element(builder, end, offset, 4)).align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def count_not_above(typingctx, numbers, count, limit):
    """How many of ``count`` floats at ``numbers`` are at most ``limit``; reads whole vectors, so the array is padded with infinity."""

    def codegen(context, builder, signature, arguments):
        address, number, limit = arguments
        sums = cgutils.alloca_once_value(builder, ir.Constant(_INTS, [0] * LANES))
        single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), limit, ir.Constant(_I32, 0))
        spread = builder.shuffle_vector(single, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_INTS, [0] * LANES))
        chunks = builder.udiv(builder.add(number, ir.Constant(_I64, LANES - 1)), ir.Constant(_I64, LANES))
        with cgutils.for_range(builder, chunks, intp=_I64) as loop:
            offset = builder.mul(loop.index, ir.Constant(_I64, LANES))
            found = builder.fcmp_ordered("<=", _chunk(builder, address, offset, _VECTOR, 4), spread)
            builder.store(builder.add(builder.load(sums, typ=_INTS), builder.zext(found, _INTS)), sums)
        return _count(builder, builder.load(sums, typ=_INTS))

    return types.int32(types.int64, types.int64, types.float32), codegen


@helper
def address(array):
    """Where an array begins."""
    return np.int64(array.ctypes.data)
