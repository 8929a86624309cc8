"""One step of a random walk, for kernels; and what walks do where a node has no way out."""

import numba as nb
import numpy as np

from anabranch.graph.alias import pick
from anabranch.graph.random import below
from anabranch.graph.store import Graph

_NO_FLOATS, _NO_INTS = np.empty(0, np.float32), np.empty(0, np.int32)


def walk_arrays(graph: Graph) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """indptr, indices, and the alias tables (empty without weights): what `step` takes."""
    table = graph.alias
    keep_M, other_M = (_NO_FLOATS, _NO_INTS) if table is None else (table.keep_M, table.other_M)
    return graph.indptr, graph.indices, keep_M, other_M


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
