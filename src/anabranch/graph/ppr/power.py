"""Power iteration: exact to a tolerance, for one start or for many at once. The oracle, and the quickest way for blocks of many queries.

x <- x + alpha f,   f <- c f P0        from x = 0, f = s;   the error is |f|_1 at most, which falls by c a round at least
"""
# Shapes: N nodes, M stored edges, B columns of a block

from typing import Any

import numba as nb
import numpy as np

from anabranch.graph.coerce import as_graph
from anabranch.graph.ppr.leaky import leaky_iteration
from anabranch.graph.ppr.rules import GOES_ON, Dangling, Transition, check_tol, parse_seeds
from anabranch.graph.rows import SparseRows, check_top_k, top_of_dense

# Columns at once: 8 cache lines a node.
BLOCK = 64


def power_iteration(
    graph: Any,
    seeds: Any,
    alpha: float = 0.15,
    *,
    tol: float = 1e-10,
    dangling: Dangling = "restart",
    max_rounds: int | None = None,
) -> np.ndarray:
    """Personalised PageRank of one query, dense float64 [N], within ``tol`` of the truth in L1.

    Args:
        graph: whatever `as_graph` takes, or its `Transition` (whose alpha and policy then count).
        seeds: see `parse_seeds`.
        alpha: probability to end a walk.
        tol: L1 error allowed.
        dangling: policy, see `anabranch.graph.ppr.rules`.
        max_rounds: fewer rounds, and then a larger error, if given: exactly walks of at most that many steps less one.

    Raises:
        InputError: a bad argument.
    """
    transition = as_transition(graph, alpha, dangling)
    ids, share = parse_seeds(transition.graph, seeds)
    start_N = np.zeros(transition.num_nodes)
    start_N[ids] = transition.start(ids, share)
    found_N, _, _ = leaky_power(transition, start_N, check_tol(tol), max_rounds or 0)
    return transition.finish(found_N, ids, share)


def leaky_power(
    transition: Transition, start_N: np.ndarray, tol: float, max_rounds: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """x, f and the number of rounds until |f|_1 is at most ``tol``. The start becomes f, in place."""
    absorb = transition.dangling == "absorb"
    return leaky_iteration(transition.into, transition.inverse_N, transition.alpha, absorb, start_N, tol, max_rounds)


def power_block(
    graph: Any,
    seeds_list: Any,
    alpha: float = 0.15,
    *,
    tol: float = 1e-10,
    dangling: Dangling = "restart",
    dtype: Any = np.float64,
) -> np.ndarray:
    """`power_iteration` of several queries at once, [N, B]: each edge is read once a round for all of them.

    ``dtype`` float32 takes half the memory and limits the accuracy to about 1e-6. Memory is 3 N B numbers.
    """
    transition = as_transition(graph, alpha, dangling)
    parsed = [parse_seeds(transition.graph, seeds) for seeds in seeds_list]
    flow_NB = np.zeros((transition.num_nodes, len(parsed)), dtype)
    for column, (ids, share) in enumerate(parsed):
        flow_NB[ids, column] = transition.start(ids, share)
    result_NB = np.zeros_like(flow_NB)
    _power_block(
        *transition.into,
        transition.inverse_N,
        transition.alpha,
        check_tol(tol),
        result_NB,
        flow_NB,
        np.empty_like(flow_NB),
    )
    if len(transition.dangling_nodes) and transition.dangling not in GOES_ON:
        for column, (ids, share) in enumerate(parsed):
            result_NB[:, column] = transition.finish(result_NB[:, column].copy(), ids, share)
    return result_NB


def power_rows(
    graph: Any,
    seeds_list: Any,
    alpha: float = 0.15,
    *,
    tol: float = 1e-10,
    dangling: Dangling = "restart",
    top_k: int | None = None,
    block: int = BLOCK,
    dtype: Any = np.float64,
) -> SparseRows:
    """`power_block` for any number of queries, ``block`` at a time, as `SparseRows` of all positive or the ``top_k`` largest scores."""
    transition = as_transition(graph, alpha, dangling)
    seeds_list = list(seeds_list)
    check_top_k(top_k)
    rows = []
    for first in range(0, len(seeds_list), block):
        scores_NB = power_block(transition, seeds_list[first : first + block], tol=tol, dtype=dtype)
        rows += [top_of_dense(np.ascontiguousarray(scores_N), top_k) for scores_N in scores_NB.T]
    return SparseRows.from_rows(rows, transition.num_nodes, dtype=dtype, names=transition.graph.names)


def as_transition(graph: Any, alpha: float, dangling: Dangling) -> Transition:
    """The transition of a graph (whatever `as_graph` takes), or the one that is given."""
    return graph if isinstance(graph, Transition) else Transition(as_graph(graph, allow_negative=True), alpha, dangling)


@nb.njit(cache=True, nogil=True)
def _power_block(indptr, indices, weight_M, inverse_N, alpha, tol, result_NB, flow_NB, share_NB):
    num_nodes, width = flow_NB.shape
    alive_B = np.empty(width)
    total_B = np.empty(width)
    while True:
        alive_B[:] = 0.0
        for node in range(num_nodes):
            scale = (1.0 - alpha) * inverse_N[node]
            for column in range(width):
                flow = flow_NB[node, column]
                alive_B[column] += flow
                result_NB[node, column] += alpha * flow
                share_NB[node, column] = scale * flow
        if width == 0 or (1.0 - alpha) * alive_B.max() <= tol:
            break
        for node in range(num_nodes):
            total_B[:] = 0.0
            for edge in range(indptr[node], indptr[node + 1]):
                weight = weight_M[edge] if len(weight_M) else np.float32(1.0)
                target = indices[edge]
                for column in range(width):
                    total_B[column] += weight * share_NB[target, column]
            for column in range(width):
                flow_NB[node, column] = total_B[column]
