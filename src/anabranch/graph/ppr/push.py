"""Forward push: scores of the neighbourhood that matters, without a look at the rest of the graph.

After Andersen, Chung and Lang, "Local graph partitioning using PageRank vectors" (FOCS 2006). A node whose residual is large against its
degree keeps alpha of it and hands the rest to its neighbours; nodes wait in a queue. The threshold falls in steps (as in "Unifying the
global and local approaches", Wu et al., SIGMOD 2021), so that large residuals merge before they are pushed, and the push ends as soon as
the residual, which is the L1 error to the digit, is at most the tolerance.
"""
# Shapes: N nodes, M stored edges

from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np

from anabranch.graph.ppr.power import as_transition
from anabranch.graph.ppr.rules import Dangling, Transition, answer, check_tol, parse_seeds
from anabranch.graph.rows import check_top_k, order_top

# Of the threshold on its way down.
STEPS = 8


@dataclass(frozen=True)
class Scores:
    """Scores of one query.

    Attributes:
        ids: nodes by falling score: int64 ids, or names where the seeds were names.
        scores: float64, theirs.
        error: bound on the L1 distance of all scores to the truth, before ``top_k`` cut them; 0 is never claimed.
        edges: edges that were read.
    """

    ids: np.ndarray
    scores: np.ndarray
    error: float
    edges: int


class PushBuffers:
    """Arrays of N numbers that a push leaves as clean as it found them."""

    def __init__(self, num_nodes: int) -> None:
        self.result_N = np.zeros(num_nodes)
        self.flow_N = np.zeros(num_nodes)
        # Bit 0: touched, bit 1: waits in the queue.
        self.state_N = np.zeros(num_nodes, np.uint8)
        self.queue_N = np.empty(num_nodes, np.int64)
        self.touched_N = np.empty(num_nodes, np.int64)


def forward_push(
    graph: Any,
    seeds: Any,
    alpha: float = 0.15,
    *,
    tol: float = 1e-4,
    dangling: Dangling = "restart",
    top_k: int | None = None,
    max_edges: int | None = None,
    buffers: PushBuffers | None = None,
) -> Scores:
    """Personalised PageRank of one query by forward push.

    Args:
        graph: whatever `as_graph` takes, or its `Transition` (whose alpha and policy then count).
        seeds: see `parse_seeds`.
        alpha: probability to end a walk.
        tol: L1 error allowed.
        dangling: policy.
        top_k: only the largest scores; None for all positive ones.
        max_edges: stop once that many edges were read, whatever the error is then.
        buffers: to use again between calls of one thread.

    Raises:
        InputError: a bad argument.
    """
    transition = as_transition(graph, alpha, dangling)
    ids, share = parse_seeds(transition.graph, seeds)
    kept = check_top_k(top_k)
    buffers = buffers or PushBuffers(transition.num_nodes)
    touched, error, edges = push_into(transition, ids, transition.start(ids, share), check_tol(tol), max_edges, buffers)
    found, value = take_sparse(buffers, touched)
    found, value = transition.finish_sparse(found, value, ids, share)
    kept = order_top(found, value, len(found), kept)
    return Scores(answer(transition.graph, found[:kept], seeds), value[:kept], error, edges)


def push_into(
    transition: Transition, ids: np.ndarray, start: np.ndarray, tol: float, max_edges: int | None, buffers: PushBuffers
) -> tuple[int, float, int]:
    """Push from ``start`` at ``ids``; x and f stay in the buffers. Returns nodes touched, the bound, and edges read."""
    limit = np.iinfo(np.int64).max if max_edges is None else max_edges
    touched, error, edges = _push(
        *transition.out,
        transition.inverse_N,
        transition.alpha,
        transition.dangling == "absorb",
        ids,
        start,
        tol,
        limit,
        buffers.result_N,
        buffers.flow_N,
        buffers.state_N,
        buffers.queue_N,
        buffers.touched_N,
    )
    return int(touched), float(error), int(edges)


def take_residual(buffers: PushBuffers, touched: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and flows of what a push has left, in no order; the buffers stay as they are."""
    ids = buffers.touched_N[:touched].copy()
    flow = buffers.flow_N[ids]
    kept = flow > 0
    return ids[kept], flow[kept]


def take_sparse(buffers: PushBuffers, touched: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and scores of what was pushed, in no order; the buffers are clean afterwards."""
    ids = buffers.touched_N[:touched].copy()
    value = buffers.result_N[ids]
    for array in (buffers.result_N, buffers.flow_N, buffers.state_N):
        array[ids] = 0
    kept = value > 0
    return (ids, value) if kept.all() else (ids[kept], value[kept])


@nb.njit(cache=True, nogil=True)
def _push(
    indptr,
    indices,
    weight_M,
    inverse_N,
    alpha,
    absorb,
    start_ids,
    start_value,
    tol,
    max_edges,
    result_N,
    flow_N,
    state_N,
    queue_N,
    touched_N,
):
    num_nodes, num_edges = len(flow_N), max(len(indices), 1)
    touched, edges, alive = 0, 0, 0.0
    for place in range(len(start_ids)):
        node = start_ids[place]
        flow_N[node] = start_value[place]
        state_N[node] = 1
        touched_N[touched] = node
        touched += 1
        alive += start_value[place]
    # A residual of at most `threshold` times its degree everywhere sums to `threshold` M at most.
    last = tol / (num_edges + num_nodes)
    first = 1.0 / (num_edges + num_nodes)
    falls = max(STEPS if last < first else 1, 1)
    for number in range(1, falls + 1):
        threshold = first * (last / first) ** (number / falls)
        head, waiting = 0, 0
        for place in range(touched):
            node = touched_N[place]
            if flow_N[node] > threshold * (indptr[node + 1] - indptr[node] + 1):
                queue_N[waiting] = node
                waiting += 1
                state_N[node] |= 2
        while waiting > 0:
            node = queue_N[head]
            head = head + 1 if head + 1 < num_nodes else 0
            waiting -= 1
            state_N[node] &= 1
            flow = flow_N[node]
            flow_N[node] = 0.0
            result_N[node] += alpha * flow
            start, end = indptr[node], indptr[node + 1]
            if start == end:
                alive -= flow
                continue
            alive -= alpha * flow
            spread = (1.0 - alpha) * flow * inverse_N[node]
            edges += end - start
            for edge in range(start, end):
                target = indices[edge]
                if state_N[target] == 0:
                    state_N[target] = 1
                    touched_N[touched] = target
                    touched += 1
                flow_N[target] += spread * weight_M[edge] if len(weight_M) else spread
                if state_N[target] < 2 and flow_N[target] > threshold * (indptr[target + 1] - indptr[target] + 1):
                    state_N[target] |= 2
                    place = head + waiting
                    queue_N[place if place < num_nodes else place - num_nodes] = target
                    waiting += 1
            if edges >= max_edges or alive <= 0.99 * tol:
                break
        for place in range(waiting):
            at = head + place
            state_N[queue_N[at if at < num_nodes else at - num_nodes]] &= 1
        # The running sum has rounding in it: add up what there is.
        alive = 0.0
        for place in range(touched):
            alive += flow_N[touched_N[place]]
        if edges >= max_edges or alive <= tol:
            break
    return touched, alive, edges
