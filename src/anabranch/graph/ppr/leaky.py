"""The leaky system by power iteration on arrays: what all forms of personalised PageRank here come down to.

x <- x + alpha f,   f <- c f P0        from x = 0, f = s;   the error is |f|_1 at most, which falls by c a round at least

Sweeps do the same node by node, in place: what a node hands on is there for those that come after it in the same round. They take
two vectors and out-edges alone, so that a directed graph need not be turned around.
"""
# Shapes: N nodes, M stored edges

import numba as nb
import numpy as np

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]


def leaky_iteration(
    into: Edges, inverse_N: np.ndarray, alpha: float, absorb: bool, start_N: np.ndarray, tol: float, max_rounds: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """x, f and the number of rounds until |f|_1 is at most ``tol``. The start becomes f, in place.

    Args:
        into: indptr, indices and weights (empty: all 1) of in-edges.
        inverse_N: float64, 1 over the sum of each node's out-weights; 0 at dead ends.
        alpha: probability to end a walk.
        absorb: whether what stands at dead ends is done with at once.
        start_N: float64, s.
        tol: as said.
        max_rounds: rounds at most; 0 for no limit.
    """
    result_N, flow_N = np.zeros_like(start_N), start_N
    rounds = _power(*into, inverse_N, alpha, absorb, inverse_N == 0, tol, max_rounds, result_N, flow_N)
    return result_N, flow_N, rounds


def from_anywhere(
    out: Edges, strength_N: np.ndarray, alpha: float, absorb: bool, tol: float
) -> tuple[np.ndarray, float]:
    """x for the uniform start, [N], in two vectors, and a bound on its L1 error of at most ``tol`` times its sum.

    Args:
        out: indptr, indices and weights (empty: all 1) of out-edges.
        strength_N: float64, the sum of each node's weights.
        alpha, absorb, tol: as of `leaky_iteration`.
    """
    size = len(strength_N)
    result_N, flow_N, wanted = np.zeros(size), np.full(size, 1.0 / size), tol
    while True:
        alive = _sweep(*out, strength_N, alpha, absorb, wanted, result_N, flow_N)
        wanted = tol * float(result_N.sum())
        if alive <= wanted:
            return result_N, float(alive)


@nb.njit(cache=True, nogil=True)
def _power(indptr, indices, weight_M, inverse_N, alpha, absorb, is_dead_N, tol, max_rounds, result_N, flow_N):
    num_nodes = len(flow_N)
    share_N = np.empty(num_nodes)
    rounds = 0
    while True:
        alive = 0.0
        for node in range(num_nodes):
            # What stands at a dead end is done with: it ends there (absorb) or has no further part in the leaky system.
            alive += alpha * flow_N[node] if is_dead_N[node] and not absorb else flow_N[node]
        if rounds > 0 and alive <= tol:
            break
        if max_rounds > 0 and rounds == max_rounds:
            break
        for node in range(num_nodes):
            result_N[node] += alpha * flow_N[node]
            share_N[node] = (1.0 - alpha) * flow_N[node] * inverse_N[node]
        for node in range(num_nodes):
            total = 0.0
            if len(weight_M):
                for edge in range(indptr[node], indptr[node + 1]):
                    total += weight_M[edge] * share_N[indices[edge]]
            else:
                for edge in range(indptr[node], indptr[node + 1]):
                    total += share_N[indices[edge]]
            flow_N[node] = total
        rounds += 1
    return rounds


@nb.njit(cache=True, nogil=True)
def _sweep(indptr, indices, weight_M, strength_N, alpha, absorb, tol, result_N, flow_N):
    rounds = 0
    while True:
        alive = 0.0
        for node in range(len(flow_N)):
            # As in `_power`.
            alive += flow_N[node] if strength_N[node] > 0.0 or absorb else alpha * flow_N[node]
        if rounds > 0 and alive <= tol:
            return alive
        for node in range(len(flow_N)):
            flow = flow_N[node]
            if flow == 0.0:
                continue
            flow_N[node] = 0.0
            result_N[node] += alpha * flow
            start, end = indptr[node], indptr[node + 1]
            if start == end:
                continue
            spread = (1.0 - alpha) * flow / strength_N[node]
            if len(weight_M):
                for edge in range(start, end):
                    flow_N[indices[edge]] += spread * weight_M[edge]
            else:
                for edge in range(start, end):
                    flow_N[indices[edge]] += spread
        rounds += 1
