"""Many queries at once (the paper's shared decomposition): sparse-sparse products in two orders.

    forward     F <- c F P0, S <- S + alpha F, result S + F X, row by row of F: one query after another, neighbours in a row
    backward    Y_T = X, Y_{t-1} = alpha I + c P0 Y_t, each only at the nodes that the queries demand; the result is rows of Y_0

Backward computes what a node passes on once for all queries that reach it, and gives the same numbers to rounding (float32).
"""
# Shapes: N nodes, Q queries, D demanded nodes

from typing import Any

import numba as nb
import numpy as np

from anabranch.errors import InputError
from anabranch.graph.powerwalk.query import Follow, Lookup, decompose_many, mix_rows, pull_level
from anabranch.graph.powerwalk.stored import Index
from anabranch.graph.ppr.rules import GOES_ON, Transition
from anabranch.graph.rows import SparseRows, order_top
from anabranch.graph.workers import in_order

Parsed = list[tuple[np.ndarray, np.ndarray]]

# Queries of one piece of work.
PIECE = 256

# Nodes below the queries that a piece of the backward variant may demand.
DEMAND = 20_000

# Entries that are pulled per entry that is pushed: about 0.4 at equal time, since rows in between are written and read
# again.
PULL = 0.25
_NO_PLACES, _NO_TABLE = np.empty(0, np.int64), np.empty(0, np.float32)


class _Queries:
    """Distinct queries, near ones side by side, as starts of the leaky system."""

    def __init__(self, transition: Transition, parsed: Parsed) -> None:
        keys: dict[bytes, int] = {}
        # Of each query among the distinct ones, as they came.
        self.place_Q = np.empty(len(parsed), np.int64)
        distinct: Parsed = []
        for number, (ids, share) in enumerate(parsed):
            key = ids.tobytes() + share.tobytes()
            if key not in keys:
                keys[key] = len(distinct)
                distinct.append((ids, share))
            self.place_Q[number] = keys[key]
        order = _near(transition, np.array([ids[0] for ids, _ in distinct], np.int64))
        self.place_Q = np.argsort(order)[self.place_Q] if distinct else self.place_Q
        self.parsed = [distinct[number] for number in order]
        self.indptr = np.append(0, np.cumsum([len(ids) for ids, _ in self.parsed])).astype(np.int64)
        self.ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in self.parsed)])
        starts = (transition.start(ids, share) for ids, share in self.parsed)
        self.values = np.concatenate([np.empty(0), *starts])

    def __len__(self) -> int:
        return len(self.parsed)

    def piece(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """indptr, ids and values of some of them."""
        start, end = self.indptr[first], self.indptr[last]
        return self.indptr[first : last + 1] - start, self.ids[start:end], self.values[start:end]


def forward_rows(
    index: Index, parsed: Parsed, rounds: int, budget: int, eps: float, top_k: int, workers: int
) -> SparseRows:
    """Decompose every query by itself, in compiled code."""
    transition, queries = index.transition, _Queries(index.transition, parsed)
    plain = _is_plain(transition)

    def work(first: int) -> tuple[np.ndarray, ...]:
        buffers = index.take_buffers()
        piece, kept = queries.piece(first, min(first + PIECE, len(queries))), top_k if plain else 0
        follow = tuple(Follow(rounds, budget, eps, use_index=True))
        found = decompose_many(tuple(index.leaky), *piece, follow, kept, tuple(index.lookup), tuple(buffers))
        index.spare.append(buffers)
        return found[:3]

    firsts = range(0, len(queries), PIECE)
    parts = list(in_order(work, firsts, workers))
    return _gathered(transition, queries, parts, top_k)


def backward_rows(index: Index, parsed: Parsed, rounds: int, top_k: int, workers: int) -> SparseRows:
    """Propagate demand ``rounds`` levels down, pull fingerprints back. Raises InputError where one that is needed is not there."""
    transition, queries = index.transition, _Queries(index.transition, parsed)
    plain = _is_plain(transition)

    def work(bounds: tuple[int, int]) -> tuple[np.ndarray, ...]:
        return _pull(index, queries.piece(*bounds), rounds, top_k if plain else 0)

    pieces = _pieces(transition, queries, rounds)
    parts = list(in_order(work, pieces, workers))
    return _gathered(transition, queries, parts, top_k)


def _pull(index: Index, piece: tuple[np.ndarray, ...], rounds: int, top_k: int) -> tuple[np.ndarray, ...]:
    transition, (query_ptr, seeds, starts) = index.transition, piece
    demand = [np.unique(seeds)]
    for _ in range(rounds):
        demand.append(_neighbours(transition, demand[-1]))
    missing = demand[-1][~index.has_N[demand[-1]]]
    if len(missing):
        raise InputError(
            f"node {missing[0]} has no fingerprint, which the backward variant needs; use method='forward'"
        )
    buffers = index.take_buffers()
    result_N, touched_N = buffers.result_N, buffers.touched_N
    leaky, place_N, below = tuple(index.leaky), _NO_PLACES, index.lookup
    for nodes in reversed(demand[:-1]):
        length, ids, values = pull_level(nodes, leaky, result_N, touched_N, place_N, tuple(below))
        place_N = np.empty(transition.num_nodes, np.int64)
        place_N[nodes] = np.arange(len(nodes))
        indptr = np.append(0, np.cumsum(length)).astype(np.int64)
        below = Lookup(indptr, ids, values, _NO_TABLE, np.ones(len(nodes)))
    found = mix_rows(query_ptr, seeds, starts, top_k, result_N, touched_N, place_N, tuple(below))
    index.spare.append(buffers)
    return found


def prefers_backward(index: Index, parsed: Parsed, rounds: int, reads: float) -> bool:
    """Whether pulling is likely to be quicker than ``reads`` entries a query: where neighbourhoods of the queries are mostly shared.

    Reckons levels from the bottom: rows of d neighbours' rows have up to d times their entries, and at most N.
    """
    transition = index.transition
    if rounds < 2 or not len(parsed) or not index.has_N.all():
        return False
    degree_N, num_nodes = transition.graph.degree_N, transition.num_nodes
    levels = [np.unique(np.concatenate([ids for ids, _ in parsed]))]
    for _ in range(rounds - 1):
        levels.append(_neighbours(transition, levels[-1]))
    length, pulled = len(index.ids) / num_nodes, 0.0
    # Walks of isolated nodes have none below.
    for nodes in reversed([nodes for nodes in levels if len(nodes)]):
        pulled += float(degree_N[nodes].sum()) * length
        length = min(float(num_nodes), 1.0 + float(degree_N[nodes].mean()) * length)
    return pulled < PULL * reads * len(parsed)


def _near(transition: Transition, seeds: np.ndarray) -> np.ndarray:
    """An order of queries in which near ones follow each other, so that rows they share are still in the cache: by the most connected
    neighbour, and that one's."""
    indptr, indices, _ = transition.out
    hub = _hubs(indptr, indices, seeds)
    return np.lexsort((seeds, hub, _hubs(indptr, indices, hub)))


@nb.njit(cache=True, nogil=True)
def _hubs(indptr, indices, nodes):
    """Of each node, the neighbour with most edges; itself where it has none."""
    found = np.empty(len(nodes), np.int64)
    for number in range(len(nodes)):
        node, most = nodes[number], -1
        found[number] = node
        for edge in range(indptr[node], indptr[node + 1]):
            target = indices[edge]
            degree = indptr[target + 1] - indptr[target]
            if degree > most:
                found[number], most = target, degree
    return found


def _pieces(transition: Transition, queries: _Queries, rounds: int) -> list[tuple[int, int]]:
    """Bounds of pieces whose queries have at most `DEMAND` neighbours in all (rows of level 1 are what takes memory)."""
    degree_N = transition.graph.degree_N
    pieces, first, load = [], 0, 0
    for number in range(len(queries)):
        ids = queries.ids[queries.indptr[number] : queries.indptr[number + 1]]
        more = int(degree_N[ids].sum()) if rounds > 1 else len(ids)
        if number > first and load + more > DEMAND:
            pieces.append((first, number))
            first, load = number, 0
        load += more
    if first < len(queries):
        pieces.append((first, len(queries)))
    return pieces


def _neighbours(transition: Transition, nodes: np.ndarray) -> np.ndarray:
    """All that edges of ``nodes`` lead to, rising, each once."""
    indptr, indices, _ = transition.out
    length = indptr[nodes + 1] - indptr[nodes]
    starts = np.append(0, np.cumsum(length))[:-1]
    edges = np.repeat(indptr[nodes] - starts, length) + np.arange(length.sum())
    is_there_N = np.zeros(transition.num_nodes, bool)
    is_there_N[indices[edges]] = True
    return np.flatnonzero(is_there_N)


def _is_plain(transition: Transition) -> bool:
    """Whether a leaky solution is the answer as it is."""
    return transition.dangling in GOES_ON or not len(transition.dangling_nodes)


def _gathered(transition: Transition, queries: _Queries, parts: list[Any], top_k: int) -> SparseRows:
    """Rows in the order of the queries as they were given."""
    length = np.concatenate([np.empty(0, np.int64), *(part[0] for part in parts)])
    indptr = np.append(0, np.cumsum(length)).astype(np.int64)
    ids = np.concatenate([np.empty(0, transition.graph.indices.dtype), *(part[1] for part in parts)])
    values = np.concatenate([np.empty(0, np.float32), *(part[2] for part in parts)])
    rows = SparseRows(indptr, ids, values, transition.num_nodes)
    if not _is_plain(transition):
        finished = []
        for (found, value), (seeds, share) in zip(rows, queries.parsed, strict=True):
            more, score = transition.finish_sparse(found.astype(np.int64), value.astype(np.float64), seeds, share)
            kept = order_top(more, score, len(more), top_k)
            finished.append((more[:kept], score[:kept]))
        rows = SparseRows.from_rows(finished, transition.num_nodes)
    return rows.take(queries.place_Q)
