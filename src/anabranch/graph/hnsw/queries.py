"""Queries, and rows of int8, as kernels take them, worked out by kernels: the same numbers one by one as many at a time."""
# Shapes: N vectors, D dimension

from typing import Any

import numpy as np

from anabranch.graph.hnsw.checks import MAX_LENGTH
from anabranch.graph.hnsw.layout import CENTRE, COSINE, DIM, KIND, L2_F16, L2_I8
from anabranch.graph.hnsw.raw import HAMMING, address, get_f32, helper, jit, kernel, set_f32, set_i8

MAX_SQUARE = np.float32(MAX_LENGTH**2)
ZERO, ONE, LAST = np.float32(0.0), np.float32(1.0), np.float32(127.0)

# Sums, and the largest, may be taken in any order, as vectors of them need it; the second of numbers alone.
unordered = jit(no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath={"reassoc", "nsz"})
finite = jit(no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath={"reassoc", "nsz", "nnan"})


@helper
def less_centre(vector, centre, place):
    """A number of a vector, less that of the centre (addresses; 0: there is none)."""
    value = get_f32(vector, place)
    return value - get_f32(centre, place) if centre != 0 else value


@unordered
def squares(vector, centre, dim):
    """Sum of the squares of a vector less the centre."""
    total = ZERO
    for place in range(dim):
        value = less_centre(vector, centre, place)
        total += value * value
    return total


@finite
def largest_of(vector, centre, dim):
    """The largest size of a number of a vector less the centre; all are finite."""
    largest = ZERO
    for place in range(dim):
        value = abs(less_centre(vector, centre, place))
        largest = value if value > largest else largest
    return largest


@helper
def code_row(vector, centre, dim, codes):
    """Write the int8 codes of a vector less the centre at an address; its scale, and the squared norm of what the codes stand for.

    Not that of the vector: distances are then those between vectors that codes stand for, and errors of rounding are no longer multiplied
    by how far both lie from the centre. Codes that are equal lie at distance 0, to the bit.
    """
    scale = largest_of(vector, centre, dim) / LAST
    by, total = scale if scale > ZERO else ONE, np.int64(0)
    for place in range(dim):
        # Beyond 127 where the scale is too small to be exact.
        code = np.int8(min(max(np.rint(less_centre(vector, centre, place) / by), -LAST), LAST))
        set_i8(codes, place, code)
        total += np.int64(code) * np.int64(code)
    # As `measuring` works out a product.
    return scale, np.float32(total) * (scale * scale)


@helper
def scale_to_one(vector, dim):
    """Bring a vector to length 1, in place, by the same steps as `checks.normalized`; False where it has none."""
    largest = largest_of(vector, np.int64(0), dim)
    if largest == ZERO:
        return False
    total = 0.0
    for place in range(dim):
        value = get_f32(vector, place) / largest
        set_f32(vector, place, value)
        total += np.float64(value) * np.float64(value)
    length = np.sqrt(total)
    for place in range(dim):
        set_f32(vector, place, np.float32(np.float64(get_f32(vector, place)) / length))
    return True


@helper
def take_query(graph, full, short):
    """Make of a query at ``full`` (address of float32 [FULL_WIDTH], zeros behind) what rows are compared with.

    Returns:
        Whether it may be searched for (else an error is due, which others find the words for), and its address, scale and squared norm.
        ``short`` is room for a row of a shorter precision, zeros behind too; of bits, the query itself.
    """
    dim, kind, nowhere = graph[DIM], graph[KIND], np.int64(0)
    # Rows of groups are left to those who search for many (`searching`): a query of them is many.
    if kind >= HAMMING:
        return kind == HAMMING, short, ZERO, ZERO
    # What is no number is not below anything.
    if not squares(full, nowhere, dim) <= MAX_SQUARE or (graph[COSINE] != 0 and not scale_to_one(full, dim)):
        return False, full, ZERO, ZERO
    if kind < L2_F16:
        return True, full, ZERO, ZERO
    centre: Any = graph[CENTRE]
    if kind < L2_I8:
        for place in range(dim):
            set_f32(short, place, less_centre(full, centre, place))
        return True, short, ZERO, ZERO
    scale, norm = code_row(full, centre, dim, short)
    return True, short, scale, norm


@kernel
def code_rows(vector, centre, count, dim, codes_NB, aux_N):
    """Write int8 codes, scales and squared norms of ``count`` vectors, float32 at an address, less the centre (0: none)."""
    for number in range(count):
        aux_N[number, 0], aux_N[number, 1] = code_row(vector + 4 * dim * number, centre, dim, address(codes_NB[number]))
