"""Distances from a query to rows, alone or side by side, in vector registers; the kinds are those of `layout` and `raw`.

They are written in LLVM's vector types, 16 lanes wide, with four sums. LLVM splits them where registers are narrower, so that a machine
without AVX-512 runs the same code. Loops in Python vectorise too, but their rests of fewer than 64 elements run one by one. Rows that are
measured side by side do not wait for each other's sums: a search that decides after every one goes the wrong way now and then, and loses
what it has begun with the next. How much faster that is than loops left to numba was not measured.
"""
# Shapes: widths are counts of elements, padded with zeros to whole lines of 64 bytes

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from anabranch.graph.hnsw.raw import (
    F32,
    HALVES,
    I8,
    I32,
    I64,
    INTS,
    IP_I4,
    IP_PQ,
    L2_I4,
    L2_I4_GROUPS,
    L2_I8_GROUPS,
    L2_PQ,
    LANES,
    VECTOR,
    cgutils,
    chunk_of,
    element,
    intrinsic,
    total_of,
)

SUMS = 4

# Of a query for rows of groups (`groups`): bytes before its codes for each group, and how many groups there are at most, a power of two.
HEAD, MOST = 64, 16

# Rows that are measured side by side.
AT_ONCE = 4

# A line of words of 64 bits.
WORDS = 8
_LINE = ir.VectorType(I64, WORDS)


def _summed(
    builder: Any, width: Any, count: int, step: Callable[[Any, list[Any]], list[Any]], zero: Any, add: Any
) -> Any:
    """For ``count`` rows the sums that ``step(offset, sums)`` adds to, over offsets 0, LANES, ... below ``width``.

    Each is taken as SUMS sums that do not wait for each other, in an order that does not depend on ``count``.
    """
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(count)] for _ in range(SUMS)]
    block = ir.Constant(I64, LANES * SUMS)

    def advance(offset: Any, places: list[Any]) -> None:
        for place, value in zip(
            places, step(offset, [builder.load(one, typ=zero.type) for one in places]), strict=True
        ):
            builder.store(value, place)

    many = builder.udiv(width, block)
    with cgutils.for_range(builder, many, intp=I64) as loop:
        start = builder.mul(loop.index, block)
        for number, places in enumerate(sums):
            advance(builder.add(start, ir.Constant(I64, number * LANES)), places)
    start = builder.mul(many, block)
    rest = builder.udiv(builder.sub(width, start), ir.Constant(I64, LANES))
    with cgutils.for_range(builder, rest, intp=I64) as loop:
        advance(builder.add(start, builder.mul(loop.index, ir.Constant(I64, LANES))), sums[0])
    values = [[builder.load(place, typ=zero.type) for place in places] for places in sums]
    return [add(add(one, two), add(three, four)) for one, two, three, four in zip(*values, strict=True)]


def _fused(builder: Any, left: Any, right: Any, total: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32"
    )
    return builder.call(function, [left, right, total])


def _horizontal(builder: Any, value: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(F32, [F32, VECTOR]), f"llvm.vector.reduce.fadd.v{LANES}f32"
    )
    return builder.call(function, [ir.Constant(F32, 0.0), value], fastmath=("reassoc",))


def _float_sums(builder: Any, query: Any, rows: list[Any], width: Any, half: bool, square: bool) -> list[Any]:
    def step(offset: Any, totals: list[Any]) -> list[Any]:
        query_part, found = chunk_of(builder, query, offset, VECTOR, 4), []
        for row, total in zip(rows, totals, strict=True):
            left = query_part
            if half:
                right = builder.fpext(chunk_of(builder, row, offset, HALVES, 2), VECTOR)
            else:
                right = chunk_of(builder, row, offset, VECTOR, 4)
            if square:
                left = right = builder.fsub(left, right)
            found.append(_fused(builder, left, right, total))
        return found

    zero = ir.Constant(VECTOR, [0.0] * LANES)
    return [_horizontal(builder, value) for value in _summed(builder, width, len(rows), step, zero, builder.fadd)]


def _byte_products(builder: Any, query: Any, rows: list[Any], width: Any) -> list[Any]:
    """Dot products of signed bytes, exact; ``width`` is below 2**17, so that they fit 32 bits."""
    wide_bytes, wide_ints = ir.VectorType(I8, 2 * LANES), ir.VectorType(I32, 2 * LANES)
    even = ir.Constant(INTS, [2 * lane for lane in range(LANES)])
    odd = ir.Constant(INTS, [2 * lane + 1 for lane in range(LANES)])
    nothing = ir.Constant(wide_ints, ir.Undefined)

    # Twice the lanes: neighbours are added first, which is one instruction.
    def step(offset: Any, totals: list[Any]) -> list[Any]:
        offset = builder.mul(offset, ir.Constant(I64, 2))
        left, found = builder.sext(chunk_of(builder, query, offset, wide_bytes, 1), wide_ints), []
        for row, total in zip(rows, totals, strict=True):
            product = builder.mul(left, builder.sext(chunk_of(builder, row, offset, wide_bytes, 1), wide_ints))
            firsts, seconds = (builder.shuffle_vector(product, nothing, lanes) for lanes in (even, odd))
            found.append(builder.add(total, builder.add(firsts, seconds)))
        return found

    zero = ir.Constant(INTS, [0] * LANES)
    half = builder.udiv(width, ir.Constant(I64, 2))
    return [total_of(builder, value) for value in _summed(builder, half, len(rows), step, zero, builder.add)]


def _nibble_products(builder: Any, query: Any, rows: list[Any], width: Any) -> list[Any]:
    """Dot products of signed bytes and half bytes less 8, one after the other."""
    return [_nibble_product(builder, query, row, width) for row in rows]


def _nibble_product(builder: Any, query: Any, row: Any, width: Any) -> Any:
    """Dot product of signed bytes and half bytes less 8; of each 32 bytes of a row the lower halves come first."""
    size = 2 * LANES
    wide_bytes, wide_ints = ir.VectorType(I8, size), ir.VectorType(I32, size)
    low, eight, four = (ir.Constant(wide_bytes, [value] * size) for value in (15, 8, 4))
    nothing = ir.Constant(wide_ints, ir.Undefined)
    even, odd = (ir.Constant(INTS, [2 * lane + first for lane in range(LANES)]) for first in (0, 1))
    total = cgutils.alloca_once_value(builder, ir.Constant(INTS, [0] * LANES))
    chunk = ir.Constant(I64, size)
    with cgutils.for_range(builder, builder.udiv(width, chunk), intp=I64) as loop:
        place = builder.mul(loop.index, chunk)
        packed = chunk_of(builder, row, place, wide_bytes, 1)
        halves = builder.and_(packed, low), builder.lshr(packed, four)
        for number, half in enumerate(halves):
            start = builder.add(builder.mul(place, ir.Constant(I64, 2)), ir.Constant(I64, size * number))
            left = builder.sext(chunk_of(builder, query, start, wide_bytes, 1), wide_ints)
            product = builder.mul(left, builder.sext(builder.sub(half, eight), wide_ints))
            firsts, seconds = (builder.shuffle_vector(product, nothing, lanes) for lanes in (even, odd))
            found = builder.add(builder.load(total, typ=INTS), builder.add(firsts, seconds))
            builder.store(found, total)
    return total_of(builder, builder.load(total, typ=INTS))


def _looked_up(builder: Any, table: Any, row: Any, width: Any) -> Any:
    """The sum of one number from each of ``width`` (a multiple of 4) rows of 256, by the codes of a row."""
    sums = [cgutils.alloca_once_value(builder, ir.Constant(F32, 0.0)) for _ in range(SUMS)]
    with cgutils.for_range(builder, builder.udiv(width, ir.Constant(I64, SUMS)), intp=I64) as loop:
        for number, place in enumerate(sums):
            part = builder.add(builder.mul(loop.index, ir.Constant(I64, SUMS)), ir.Constant(I64, number))
            code = builder.zext(chunk_of(builder, row, part, I8, 1), I64)
            entry = builder.add(builder.mul(part, ir.Constant(I64, 256)), code)
            builder.store(builder.fadd(builder.load(place, typ=F32), chunk_of(builder, table, entry, F32, 4)), place)
    values = [builder.load(place, typ=F32) for place in sums]
    return builder.fadd(builder.fadd(values[0], values[1]), builder.fadd(values[2], values[3]))


def _different_bits(builder: Any, query: Any, row: Any, width: Any) -> Any:
    """Bits that differ in ``width`` words of 64: whole lines at once, the rest (rows shorter than a line) word by word."""

    def differing(offset: Any, kind: Any, name: str) -> Any:
        left, right = (chunk_of(builder, address, offset, kind, 8) for address in (query, row))
        count = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), f"llvm.ctpop.{name}")
        return builder.call(count, [builder.xor(left, right)])

    line = ir.Constant(I64, WORDS)
    zero = ir.Constant(_LINE, [0] * WORDS)
    wide, single = cgutils.alloca_once_value(builder, zero), cgutils.alloca_once_value(builder, ir.Constant(I64, 0))
    many = builder.udiv(width, line)
    with cgutils.for_range(builder, many, intp=I64) as loop:
        found = differing(builder.mul(loop.index, line), _LINE, f"v{WORDS}i64")
        builder.store(builder.add(builder.load(wide, typ=_LINE), found), wide)
    start = builder.mul(many, line)
    with cgutils.for_range(builder, builder.sub(width, start), intp=I64) as loop:
        found = differing(builder.add(start, loop.index), I64, "i64")
        builder.store(builder.add(builder.load(single, typ=I64), found), single)
    total = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(I64, [_LINE]), f"llvm.vector.reduce.add.v{WORDS}i64"
    )
    return builder.add(builder.call(total, [builder.load(wide, typ=_LINE)]), builder.load(single, typ=I64))


Given = dict[str, Any]
Done = Callable[[Any, list[Any]], None]


def _write_common(builder: Any, rows: list[tuple[Any, Any]], given: Given, done: Done) -> None:
    """Write what measures ``rows`` (address and slot of each) of floats and bytes, ending by ``done(builder, distances)``.

    ``given`` are the arguments of the function, by name. The builder comes back where other kinds go on.
    """
    function, places = builder.function, [row for row, _ in rows]
    other = function.append_basic_block("other")
    choice = builder.switch(given["kind"], other)
    for number, (half, square) in enumerate(((False, True), (False, False), (True, True), (True, False))):
        block = function.append_basic_block(f"kind{number}")
        choice.add_case(ir.Constant(I64, number), block)
        builder.position_at_end(block)
        totals = _float_sums(builder, given["query"], places, given["width"], half, square)
        done(builder, totals if square else [builder.fsub(ir.Constant(F32, 1.0), total) for total in totals])
    block = function.append_basic_block("bytes")
    for number in (4, 5):
        choice.add_case(ir.Constant(I64, number), block)
    builder.position_at_end(block)
    _end_scaled(builder, rows, _byte_products(builder, given["query"], places, given["width"]), given, done)
    builder.position_at_end(other)


def _write_other(builder: Any, row: tuple[Any, Any], given: Given, done: Done) -> None:
    """Write what measures one row of any other kind."""
    function, query, width = builder.function, given["query"], given["width"]
    bits, codes, nibbles = (function.append_basic_block(name) for name in ("bits", "codes", "nibbles"))
    choice = builder.switch(given["kind"], bits)
    for numbers, block in (((L2_PQ, IP_PQ), codes), ((L2_I4, IP_I4), nibbles)):
        for number in numbers:
            choice.add_case(ir.Constant(I64, number), block)
    for number, products, share in ((L2_I8_GROUPS, _byte_products, 1), (L2_I4_GROUPS, _nibble_products, 2)):
        block = function.append_basic_block(f"groups{share}")
        choice.add_case(ir.Constant(I64, number), block)
        builder.position_at_end(block)
        asked = _for_group(builder, row[1], given, share)
        _end_scaled(builder, [row], products(builder, asked["query"], [row[0]], width), asked, done)
    builder.position_at_end(bits)
    done(builder, [builder.uitofp(_different_bits(builder, query, row[0], width), F32)])
    builder.position_at_end(codes)
    done(builder, [_looked_up(builder, query, row[0], width)])
    builder.position_at_end(nibbles)
    _end_scaled(builder, [row], _nibble_products(builder, query, [row[0]], width), given, done)


def _for_group(builder: Any, slot: Any, given: Given, share: int) -> Given:
    """What is given, of that part of a query which is for the group of a slot (`groups`): of so many bytes for each byte of a row."""
    beside = builder.add(builder.mul(slot, ir.Constant(I64, 2)), ir.Constant(I64, 1))
    norm = builder.load(element(builder, given["aux"], beside, 4), typ=I32)
    group = builder.zext(builder.and_(norm, ir.Constant(I32, MOST - 1)), I64)
    size = builder.add(builder.mul(given["width"], ir.Constant(I64, share)), ir.Constant(I64, HEAD))
    begin = builder.add(given["query"], builder.mul(group, size))
    found = {**given, "query": builder.add(begin, ir.Constant(I64, HEAD))}
    for place, name in enumerate(("scale", "norm")):
        found[name] = builder.load(element(builder, begin, ir.Constant(I64, place), 4), typ=F32)
    return found


def _end_scaled(builder: Any, rows: list[tuple[Any, Any]], exact: list[Any], given: Given, done: Done) -> None:
    """End with distances by products of whole numbers: |q|^2 + |x|^2 - 2 <q, x>, or 1 - <q, x> where the kind is odd."""
    one, two, products, norms = ir.Constant(F32, 1.0), ir.Constant(F32, 2.0), [], []
    for (_, slot), product in zip(rows, exact, strict=True):
        beside = builder.mul(slot, ir.Constant(I64, 2))
        by = builder.fmul(given["scale"], builder.load(element(builder, given["aux"], beside, 4), typ=F32))
        products.append(builder.fmul(builder.sitofp(product, F32), by))
        behind = builder.add(beside, ir.Constant(I64, 1))
        norms.append(builder.load(element(builder, given["aux"], behind, 4), typ=F32))
    with builder.if_then(builder.trunc(given["kind"], ir.IntType(1))):
        done(builder, [builder.fsub(one, product) for product in products])
    sums = [builder.fadd(given["norm"], norm) for norm in norms]
    pairs = zip(sums, products, strict=True)
    done(builder, [builder.fsub(total, builder.fmul(two, product)) for total, product in pairs])


def _shared_function(module: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """One function per module that is not inlined: its loops, copied to every place that measures, would take seconds to compile."""
    function = cgutils.get_or_insert_function(module, ir.FunctionType(result, arguments), name)
    if function.is_declaration:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        function.attributes.add("nounwind")
    return function


def _distance_function(module: Any) -> Any:
    arguments = [I64, I64, F32, F32, I64, I64, I64, I64]
    function = _shared_function(module, "anabranch_hnsw_distance", F32, arguments)
    if function.is_declaration:
        names = ("kind", "query", "scale", "norm", "row", "aux", "slot", "width")
        given = dict(zip(names, function.args, strict=True))
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        row = given["row"], given["slot"]

        def done(builder: Any, values: list[Any]) -> None:
            builder.ret(values[0])

        _write_common(builder, [row], given, done)
        _write_other(builder, row, given, done)
    return function


def _distances_function(module: Any) -> Any:
    arguments = [I64, I64, F32, F32, I64, I64, I64, I64, I64, I64]
    function = _shared_function(module, "anabranch_hnsw_distances", ir.VoidType(), arguments)
    if function.is_declaration:
        names = ("kind", "query", "scale", "norm", "rows", "stride", "aux", "slots", "width", "out")
        given = dict(zip(names, function.args, strict=True))
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        found = []
        for number in range(AT_ONCE):
            slot = builder.load(element(builder, given["slots"], ir.Constant(I64, number), 4), typ=I32)
            slot.align = 4
            slot = builder.sext(slot, I64)
            found.append((builder.add(given["rows"], builder.mul(slot, given["stride"])), slot))

        def done(builder: Any, values: list[Any]) -> None:
            for number, value in enumerate(values):
                builder.store(value, element(builder, given["out"], ir.Constant(I64, number), 4)).align = 4
            builder.ret_void()

        _write_common(builder, found, given, done)
        # The rest gains nothing from being written out, and takes long to compile.
        one, first = _distance_function(module), [given[name] for name in ("kind", "query", "scale", "norm")]
        last = [builder.call(one, [*first, row, given["aux"], slot, given["width"]]) for row, slot in found]
        done(builder, last)
    return function


@intrinsic
def distance(typingctx, kind, query, scale, norm, row, aux, slot, width):
    """From a query (address, and scale and squared norm where it is int8) to the vector at ``row``, which is that of ``slot``."""

    def codegen(context, builder, signature, arguments):
        return builder.call(_distance_function(builder.module), arguments)

    whole, single = types.int64, types.float32
    return single(whole, whole, single, single, whole, whole, whole, whole), codegen


@intrinsic
def distances(typingctx, kind, query, scale, norm, rows, stride, aux, slots, width, out):
    """`distance`, the same bits, to AT_ONCE slots, whose numbers (int32) are at an address, written (float32) at another."""

    def codegen(context, builder, signature, arguments):
        builder.call(_distances_function(builder.module), arguments)
        return context.get_dummy_value()

    whole, single = types.int64, types.float32
    return types.void(whole, whole, single, single, *[whole] * 6), codegen


@intrinsic
def room_for_some(typingctx):
    """Address of room for AT_ONCE numbers of 4 bytes, until the function that asks for it ends."""

    def codegen(context, builder, signature, arguments):
        return builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(F32, AT_ONCE)), I64)

    return types.int64(), codegen
