"""One step of a random walk, for kernels, and what they know of a graph.

Kernels that work together take arrays in records with names (`Walk`, ...), not one by one. What Python calls takes plain tuples in their
order, and makes the records itself: numba tells those by their bytes, and named ones by slow Python.
"""
# Shapes: N nodes, M edges

from typing import NamedTuple

import numba as nb
import numpy as np

from anabranch.graph.alias import pick
from anabranch.graph.random import below
from anabranch.graph.store import Graph

_NO_FLOATS, _NO_INTS = np.empty(0, np.float32), np.empty(0, np.int32)


class Walk(NamedTuple):
    """A graph, as walks see it.

    Attributes:
        indptr: int64 [N + 1].
        indices: [M].
        keep_M, other_M: alias tables of its weights, float32 and ids; empty where all edges count the same.
    """

    indptr: np.ndarray
    indices: np.ndarray
    keep_M: np.ndarray
    other_M: np.ndarray


def walk_arrays(graph: Graph) -> Walk:
    """What walks see of a graph; tables are made at the first call."""
    table = graph.alias
    keep_M, other_M = (_NO_FLOATS, _NO_INTS) if table is None else (table.keep_M, table.other_M)
    return Walk(graph.indptr, graph.indices, keep_M, other_M)


@nb.njit(inline="always")
def step(bits, node, indptr, indices, keep_M, other_M):
    """The node that a walk goes to from ``node``, by weight, with one 64-bit draw; -1 where it has no edge."""
    start = indptr[node]
    count = indptr[node + 1] - start
    if count == 0:
        return np.int64(-1)
    if len(keep_M) == 0:
        return np.int64(indices[start + below(bits, count)])
    return np.int64(indices[pick(bits, start, count, keep_M, other_M)])
