"""Centres that one far vector does not move: what is taken off vectors before they are rounded to a few bits.

A mean would do where all vectors are alike. But it follows the farthest: one row of 1e5 among many moves it by so much that all the
others, less it, round to one code. So of each dimension only the middle half of the numbers counts.

No one centre does where vectors are of groups that lie far from each other (`groups`): then there are more, one for each.
"""
# Shapes: S sample, D dimension, N vectors, G groups

import numpy as np

from anabranch.graph.hnsw import groups
from anabranch.graph.hnsw.measuring import MOST

# Vectors that a centre is worked out from, which is enough: its error is then a fiftieth of their spread.
ENOUGH = 4096

# A centre is given up where typical vectors, less it, are so many times as large as less another: two bits of each number are then lost.
OFF = 4.0

# So few may all be far by chance, and their middle says little.
FEW = 64

# Centres of groups are worth it where one in so many vectors gains by them.
GAINING = 100

# Half of the vectors that groups are looked for among are of the one in so many that lie farthest off.
FAR = 8


def spread_places(count: int, most: int = ENOUGH) -> np.ndarray:
    """At most so many of 0 ... count - 1, evenly, rising."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64)


def centre_of(vector_ND: np.ndarray) -> np.ndarray:
    """The mean of the middle half of the numbers of each dimension, float32 [D]; of two the smaller, zeros of none."""
    sample_DS = np.ascontiguousarray(vector_ND[spread_places(len(vector_ND))].T)
    count = sample_DS.shape[1]
    if not count:
        return np.zeros(len(sample_DS), np.float32)
    if count == 2:
        # Which of them is far nobody can tell, but that it is not the one near zero is likelier.
        return np.where(np.abs(sample_DS[:, 0]) <= np.abs(sample_DS[:, 1]), *sample_DS.T).astype(np.float32)
    cut = count // 4 if count > 3 else (count - 1) // 2
    sample_DS.partition((cut, count - 1 - cut), axis=1)
    return sample_DS[:, cut : count - cut].mean(1, dtype=np.float64).astype(np.float32)


def centres_of(vector_ND: np.ndarray, worth: float | None = None) -> np.ndarray:
    """The centre of vectors, float32 [D]; or [1 + G, D], that and those of groups, where one in `GAINING` is ``worth`` times as large less
    the first as less that of its group. None: there are no groups."""
    middle_D = centre_of(vector_ND)
    if worth is None or len(vector_ND) < 2 * groups.LEAST:
        return middle_D
    sample_SD = vector_ND[spread_places(len(vector_ND))]
    size_S = _size(middle_D, sample_SD)
    some_SD = sample_SD[_looked_at(size_S)]
    parts = groups.parts_of(some_SD)
    if not parts:
        return middle_D
    found = np.stack([middle_D, *(centre_of(some_SD[part]) for part in parts)])
    return found if are_many(size_S > worth * _size(found, sample_SD)) else middle_D


def _looked_at(size_S: np.ndarray) -> np.ndarray:
    """Places of vectors that groups are looked for among, rising: some from all over, and of the largest more."""
    count, half = len(size_S), groups.LOOKED_AT // 2
    if count <= groups.LOOKED_AT:
        return np.arange(count)
    far_S = np.sort(np.argpartition(size_S, count - count // FAR)[count - count // FAR :])
    return np.union1d(spread_places(count, half), far_S[spread_places(len(far_S), half)])


def are_many(is_so_S: np.ndarray) -> bool:
    """Whether so many of a sample are a group, and one in `GAINING`."""
    return int(is_so_S.sum()) >= max(groups.LEAST, len(is_so_S) / GAINING)


def better_centre(held: np.ndarray, sample_SD: np.ndarray, worth: float | None = None) -> np.ndarray | None:
    """A centre, or centres, of these vectors if they are far better than ``held``, which are as `centres_of` gives them.

    That is: `OFF` times for most of them, or ``worth`` times for one in `GAINING` where they are of groups.
    """
    if not len(sample_SD):
        return None
    other = centres_of(sample_SD, worth)
    sample_SD = sample_SD[spread_places(len(sample_SD))]
    held_S, other_S = _size(held, sample_SD), _size(other, sample_SD)
    if worth is not None and other.ndim > 1 and are_many(held_S > worth * other_S):
        # Groups that there were, and that only a sample missed, stay.
        missed_S = other_S > worth * held_S if held.ndim > 1 else np.zeros(len(sample_SD), bool)
        kept = held[1:][np.unique(groups.nearest(sample_SD[missed_S], held[1:]))] if missed_S.any() else held[:0]
        return np.concatenate([other, kept.reshape(-1, other.shape[1])])[: 1 + MOST]
    largest, smaller = (float(np.abs(np.atleast_2d(one)[0]).max()) for one in (held, other))
    is_off = float(np.median(held_S)) > OFF * float(np.median(other_S))
    return other if is_off or (len(sample_SD) < FEW and largest > OFF * smaller) else None


def _size(centres: np.ndarray, sample_SD: np.ndarray) -> np.ndarray:
    """How large the largest number of each vector is, less the centre, or less that of its group: [S]."""
    if centres.ndim == 1:
        return np.abs(sample_SD - centres).max(1)
    return np.abs(sample_SD - centres[1:][groups.nearest(sample_SD, centres[1:])]).max(1)
