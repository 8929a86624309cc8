"""Centres that one far vector does not move: what is taken off vectors before they are rounded to a few bits.

A mean would do where all vectors are alike. But it follows the farthest: one row of 1e5 among many moves it by so much that all the
others, less it, round to one code. So of each dimension only the middle half of the numbers counts.
"""
# Shapes: S sample, D dimension, N vectors

import numpy as np

# Vectors that a centre is worked out from, which is enough: its error is then a fiftieth of their spread.
ENOUGH = 4096

# A centre is given up where typical vectors, less it, are so many times as large as less another: two bits of each number are then lost.
OFF = 4.0

# So few may all be far by chance, and their middle says little.
FEW = 64


def spread_places(count: int) -> np.ndarray:
    """At most `ENOUGH` of 0 ... count - 1, evenly, rising."""
    return np.arange(count) if count <= ENOUGH else np.linspace(0, count - 1, ENOUGH).astype(np.int64)


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


def better_centre(centre_D: np.ndarray, sample_SD: np.ndarray) -> np.ndarray | None:
    """A centre of these vectors, if one is `OFF` times better for most of them than the one there is."""
    if not len(sample_SD):
        return None
    other_D = centre_of(sample_SD)
    sample_SD = sample_SD[spread_places(len(sample_SD))]
    held, other = (float(np.median(np.abs(sample_SD - one_D).max(1))) for one_D in (centre_D, other_D))
    largest, smaller = float(np.abs(centre_D).max()), float(np.abs(other_D).max())
    return other_D if held > OFF * other or (len(sample_SD) < FEW and largest > OFF * smaller) else None
