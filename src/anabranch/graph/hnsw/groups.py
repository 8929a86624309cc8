"""Groups of vectors that lie far from each other, each of which is rounded about a centre of its own.

About one centre the scale of a row is how far its group lies off. Where that is many times the width of the group, most of the few bits of
a number say where the group is, and what is in it is hardly told apart. So where some share of the vectors would be far better off about
centres of their own, a row is rounded about the centre of its group, and so is a query about each of them:

    query    for each group: scale and squared norm (float32) and zeros, `HEAD` bytes; then the codes of the query less that centre
    row      as ever; the number of its group is in the last bits of its squared norm, a millionth of it

Groups are looked for in a sample: parts that lie more than `APART` times as far from each other as nearly all vectors from their third
nearest. Vectors that lie far off alone, or as two or three, are no group; what is in no part is looked at again by itself, since groups
differ in width.
"""
# Shapes: N vectors, D dimension, G groups, S sample, Q queries, B bytes of codes

from collections.abc import Callable

import numpy as np

from anabranch.graph.guarded import held
from anabranch.graph.hnsw.measuring import HEAD, MOST

# Vectors that groups are looked for among: their distances from each other take a millisecond.
LOOKED_AT = 256

# A group has so many vectors of the sample, and one in so many.
LEAST, SHARE = 4, 64

# What is apart from others lies so many times as far from them as nine in ten vectors from the last that a group of the least has beside.
APART, NINE_OF_TEN = 3.0, 0.9

# Looks at what is left.
ROUNDS = 4

# Rows whose group is worked out at once.
PIECE = 1 << 12

Coder = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def parts_of(sample_SD: np.ndarray) -> list[np.ndarray]:
    """Places of a sample (finite float32) that make a group, for each of at most `MOST`, the largest first; none where all is one."""
    place_S = distinct(sample_SD)
    least, found = max(LEAST, -(-len(place_S) // SHARE)), list[np.ndarray]()
    square_SS = squares_between(sample_SD[place_S])
    left_S = np.arange(len(place_S))
    for _ in range(ROUNDS):
        if len(left_S) < least:
            break
        part_S = _parts(square_SS[np.ix_(left_S, left_S)])
        size_P = np.bincount(part_S)
        found += [left_S[part_S == part] for part in np.flatnonzero(size_P >= least)]
        if (size_P < least).all():
            break
        left_S = left_S[size_P[part_S] < least]
    found.sort(key=len, reverse=True)
    return [place_S[part] for part in found[:MOST]] if len(found) > 1 else []


def distinct(sample_SD: np.ndarray) -> np.ndarray:
    """Places of vectors that are no copies of ones before, rising."""
    rows = np.ascontiguousarray(sample_SD)
    return np.sort(np.unique(rows.view(f"V{rows.shape[1] * rows.itemsize}")[:, 0], return_index=True)[1])


def squares_between(sample_SD: np.ndarray) -> np.ndarray:
    """Squared distances between all, float64 [S, S], infinite on the diagonal."""
    off_SD = sample_SD.astype(np.float64) - np.median(sample_SD, axis=0)
    norm_S = np.einsum("sd,sd->s", off_SD, off_SD)
    square_SS = np.maximum(norm_S[:, None] + norm_S - 2 * (off_SD @ off_SD.T), 0)
    np.fill_diagonal(square_SS, np.inf)
    return square_SS


def _parts(square_SS: np.ndarray) -> np.ndarray:
    """The number of the part that each is in, where steps lead only to what is not `APART`."""
    place = min(LEAST - 2, len(square_SS) - 1)
    near = float(np.quantile(np.partition(square_SS, place, axis=1)[:, place], NINE_OF_TEN))
    is_near_SS = square_SS <= APART**2 * near
    part_S, number = np.full(len(square_SS), -1), 0
    while (part_S < 0).any():
        inside_S = np.zeros(len(part_S), bool)
        inside_S[np.argmax(part_S < 0)] = True
        front_S = inside_S
        while front_S.any():
            front_S = is_near_SS[front_S].any(0) & ~inside_S
            inside_S = inside_S | front_S
        part_S[inside_S] = number
        number += 1
    return part_S


def nearest(vector_ND: np.ndarray, centre_GD: np.ndarray) -> np.ndarray:
    """The number of the nearest centre of each vector, int64 [N]."""
    group_N = np.empty(len(vector_ND), np.int64)
    for begin in range(0, len(vector_ND), PIECE):
        part_PD = vector_ND[begin : begin + PIECE]
        square_GP = np.empty((len(centre_GD), len(part_PD)), np.float32)
        for number, centre_D in enumerate(centre_GD):
            off_PD = part_PD - centre_D
            square_GP[number] = np.einsum("pd,pd->p", off_PD, off_PD)
        group_N[begin : begin + PIECE] = square_GP.argmin(0)
    return group_N


def rows_of(vector_ND: np.ndarray, centre_GD: np.ndarray, code: Coder) -> tuple[np.ndarray, np.ndarray]:
    """Codes of rows, uint8 [N, B], each less the centre of its group, and float32 [N, 2] of scale, and squared norm with that group.

    ``code`` makes codes, and scale and squared norm, of what it is given.
    """
    group_N = nearest(vector_ND, centre_GD)
    rows, aux = code(vector_ND - centre_GD[group_N])
    bits_N = aux[:, 1].copy().view(np.uint32)
    aux[:, 1] = ((bits_N & ~np.uint32(MOST - 1)) | group_N.astype(np.uint32)).view(np.float32)
    return rows, aux


def groups_in(aux: np.ndarray) -> np.ndarray:
    """Numbers of the groups of rows, int64 [N], from what stands beside them."""
    return (np.ascontiguousarray(aux[:, 1]).view(np.uint32) & np.uint32(MOST - 1)).astype(np.int64)


def queries_for(vector_QD: np.ndarray, centre_GD: np.ndarray, code: Coder) -> np.ndarray:
    """Queries as kernels take them, uint8 [Q, G (HEAD + B)]."""
    parts = []
    for centre_D in centre_GD:
        codes_QB, aux_Q2 = code(vector_QD - centre_D)
        head_QH = np.zeros((len(codes_QB), HEAD), np.uint8)
        head_QH[:, : aux_Q2.itemsize * 2] = np.ascontiguousarray(aux_Q2).view(np.uint8)
        parts += [head_QH, codes_QB]
    return held(np.ascontiguousarray(np.concatenate(parts, axis=1)))
