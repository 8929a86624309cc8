"""Where the parts of an index lie, as kernels see it: one row of int64 with addresses, sizes and the entry point; and distances to a slot.

The places of the row have their names here; it is no record with fields: all in it fits an int64, and a copy of it (`linked_by`) is another
view of the same index.

Kinds of distance are 2 * precision + metric: precision 0 float32, 1 float16, 2 int8; metric 0 squared L2, 1 for 1 - <a, b>. Of bits it is
`HAMMING`, how many differ; a row is then of words of 64, whose number is WIDTH. Codes (`coded`) are only searched: half bytes, where WIDTH
is bytes of a row, and bytes to look up, where it is their number.

A row of int8 holds c = round(x / s) with s = max |x| / 127 of that row; beside it stand s and |s c|^2 ("aux"). Then

    <q, x> ~ s_q s_x <c_q, c_x>          |q - x|^2 ~ |s_q c_q|^2 + |s_x c_x|^2 - 2 s_q s_x <c_q, c_x>
"""
# Shapes: N slots, C capacity; a slot is the number of an element within the arrays

import numpy as np

from anabranch.graph.hnsw.raw import LINE, get_f32, get_i32, helper, prefetch, widen_f16

# Places in the row that describes an index
(
    KIND,  # of distance
    # Address of vectors as they are searched, [C, STRIDE bytes].
    ROWS,
    STRIDE,
    # Elements of a row, zeros at the end included.
    WIDTH,
    # Address of float32 [C, 2]: scale and squared norm of int8 rows.
    AUX,
    # Address of int32 [C, CAP0], links on level 0; -1 behind the last.
    LINKS,
    # Most links on level 0.
    CAP0,
    # Address of int32 [rows, CAP], links on levels above, one row per (slot, level).
    UPPER,
    # Most links on a level above 0, and of a new element on every level (M).
    CAP,
    # Address of int32 [C]: the row of level 1 of a slot in UPPER.
    FIRST,
    # Address of int32 [C]: the top level of a slot, -1 where it is in no list.
    LEVEL,
    # Slot of the entry point, -1 where there is none.
    ENTRY,
    TOP,  # its level
    COUNT,  # N
    # ef_construction.
    EF,
    # Address of uint8 [C].
    DELETED,
    NUM_DELETED,
    # 1: the nearest M instead of the heuristic (paper, algorithm 3).
    SIMPLE,
    # 1: consider neighbours of candidates too (paper, algorithm 4).
    EXTEND,
    # 1: fill up with the nearest rejected (paper, algorithm 4).
    KEEP,
    # Address of float32 vectors to measure again by, 0 where rows are final.
    FULL,
    FULL_STRIDE,
    FULL_WIDTH,
    # Numbers in a vector.
    DIM,
    # 1: queries are brought to length 1.
    COSINE,
    # Address of float32 [DIM] that rows of a shorter precision are less by, 0 where there is none.
    CENTRE,
    # Address of int64 [C], ids outside.
    LABEL,
    CAPACITY,  # C
    # Deleted, and in no list.
    NUM_VACANT,
    # Rises whenever slots come, go, or have other ids.
    VERSION,
    # Address of uint8 [C], marks of what walks may miss, see `suspects`.
    SUSPECT,
    # Address of uint8 [C / 2^BLOCK, rounded up]: all marks that a slot of each block of so many has, or had.
    BLOCKS,
    FIELDS,
) = range(33)

# A block of slots is looked through for marks where one of it may have some: 2^BLOCK of them.
BLOCK = 10

# Bytes of a row that are asked for ahead.
ASKED = 256

# Kinds of distance that a graph is linked by; `raw` has the others.
L2_F32, IP_F32, L2_F16, IP_F16, L2_I8, IP_I8 = range(6)


@helper
def as_query(graph, slot, scratch):
    """The vector of a slot as a query: address, scale, squared norm. ``scratch`` has room for WIDTH floats."""
    row = graph[ROWS] + slot * graph[STRIDE]
    kind = graph[KIND]
    if kind == L2_F16 or kind == IP_F16:
        widen_f16(row, scratch, graph[WIDTH])
        return scratch, np.float32(0.0), np.float32(0.0)
    if kind == L2_I8 or kind == IP_I8:
        return row, get_f32(graph[AUX], 2 * slot), get_f32(graph[AUX], 2 * slot + 1)
    return row, np.float32(0.0), np.float32(0.0)


@helper
def links_of(graph, slot, level):
    """Address of the links of a slot on a level that it has."""
    if level == 0:
        return graph[LINKS] + slot * graph[CAP0] * 4
    return graph[UPPER] + (get_i32(graph[FIRST], slot) + level - 1) * graph[CAP] * 4


@helper
def cap_of(graph, level):
    """Most links of a slot on a level."""
    return graph[CAP0] if level == 0 else graph[CAP]


@helper
def touch(row, stride):
    """Ask for the first lines of a row; the processor goes on by itself."""
    for line in range(0, min(stride, ASKED), LINE):
        prefetch(row + line)
