"""The online half: vertex-centric decomposition of a query over fingerprints (VERD in the paper).

With G_u the leaky vector of u and P0 the transition matrix without rows of dead ends, T rounds of the identity
G_u = alpha e_u + c sum_w P0(u, w) G_w give

    G_u = sum_{k < T} alpha c^k e_u P0^k  +  sum_w f_T(w) G_w,    f_T = c^T e_u P0^T,    |f_T|_1 <= c^T,

and the fingerprint of w stands for G_w. Flows below ``eps`` are not followed: they leave alpha of themselves and the rest is dropped, and
counted. Where a node that should be looked up has no fingerprint, its flow goes on for further rounds.
"""
# Shapes: N nodes, M edges, Z entries of the index, Q queries

from typing import Any, NamedTuple, Self

import numba as nb
import numpy as np
from numba.extending import overload

from anabranch.graph.ppr.rules import Transition
from anabranch.graph.rows import grown, id_type, order_top

# Further rounds for nodes without a fingerprint: less than 1e-4 of a flow outlives them.
EXTRA = 64
_HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
_NO_TABLE = np.empty(0, np.float32)


class Lookup(NamedTuple):
    """The index as kernels read it.

    Attributes:
        indptr: int64 [N + 1], empty rows for nodes without a fingerprint.
        ids: [Z]. values: float32 [Z], or the bits of float16 as uint16 (numba has no float16 on processors).
        table: what those bits mean; empty for float32.
        scale_N: float64, what the counts of each row are multiplied with.
    """

    indptr: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    table: np.ndarray
    scale_N: np.ndarray

    @classmethod
    def of(cls, indptr: np.ndarray, ids: np.ndarray, counts: np.ndarray, scale_N: np.ndarray) -> Self:
        """From stored arrays."""
        if counts.dtype == np.float16:
            return cls(indptr, ids, counts.view(np.uint16), _HALVES, scale_N)
        return cls(indptr, ids, counts, _NO_TABLE, scale_N)


class Leaky(NamedTuple):
    """The leaky system of a graph.

    Attributes:
        indptr, ids, weight_M: out-edges; no weights where all are 1.
        inverse_N: float64, 1 over the sum of each node's weights.
        alpha: probability to end before each step.
    """

    indptr: np.ndarray
    ids: np.ndarray
    weight_M: np.ndarray
    inverse_N: np.ndarray
    alpha: float

    @classmethod
    def of(cls, transition: Transition) -> Self:
        """Of the walk on a graph."""
        return cls(*transition.out, transition.inverse_N, transition.alpha)


class Follow(NamedTuple):
    """How far flows are followed: ``rounds``, or with a ``budget`` > 0 as many of them as keep the entries read below it; flows below
    ``eps`` are not; and whether what is left is looked up in the index."""

    rounds: int
    budget: int
    eps: float
    use_index: bool


class QueryBuffers(NamedTuple):
    """Arrays of one thread, clean between queries: 24 bytes of numbers and three ids a node. Ids of what ``result_N`` holds are in
    ``touched_N``."""

    result_N: np.ndarray
    flow_N: np.ndarray
    next_N: np.ndarray
    front_N: np.ndarray
    ahead_N: np.ndarray
    touched_N: np.ndarray

    @classmethod
    def of(cls, num_nodes: int) -> Self:
        """New ones."""
        ids = id_type(num_nodes)
        return cls(*(np.zeros(num_nodes) for _ in range(3)), *(np.empty(num_nodes, ids) for _ in range(3)))


def read_count(values: Any, table: Any, place: Any) -> Any:
    """A stored count. Compiled code picks by type."""
    return table[values[place]] if len(table) else values[place]


@overload(read_count, inline="always")
def _read_overload(values, table, place):
    if isinstance(values.dtype, nb.types.Integer):
        return lambda values, table, place: table[values[place]]
    return lambda values, table, place: values[place]


@nb.njit(cache=True, nogil=True)
def decompose(leaky, start_ids, start_value, follow, rows, buffers):
    """One query into ``result_N`` of the buffers. ``rows`` are a `Lookup`.

    Returns how many ids there are, the flow that was dropped, and how many entries were read.
    """
    out_ptr, out_ids, weight_M, inverse_N, alpha = leaky
    rounds, budget, eps, use_index = follow
    row_ptr, row_ids, row_values, table, scale_N = rows
    result_N, flow_N, next_N, front_N, ahead_N, touched_N = buffers
    size, touched, reads, dropped = 0, 0, 0, 0.0
    for place in range(len(start_ids)):
        flow_N[start_ids[place]] = start_value[place]
        front_N[size] = start_ids[place]
        size += 1
    mean_row = row_ptr[-1] / max(len(row_ptr) - 1, 1)
    last = rounds + EXTRA if use_index else rounds
    for number in range(last + 1):
        looking = number >= rounds
        if not looking and budget > 0:
            ahead = 0
            for place in range(size):
                ahead += out_ptr[front_N[place] + 1] - out_ptr[front_N[place]]
            # After this round as many rows are looked up as it reaches nodes, at most.
            if reads + ahead + min(ahead, len(flow_N)) * mean_row > budget:
                rounds, last, looking = number, min(last, number + EXTRA if use_index else number), True
        reached = 0
        for place in range(size):
            node = front_N[place]
            flow = flow_N[node]
            flow_N[node] = 0.0
            if looking and not use_index:
                dropped += flow
                continue
            first, end = row_ptr[node], row_ptr[node + 1]
            if looking and flow >= eps and end > first:
                flow *= scale_N[node]
                reads += end - first
                for entry in range(first, end):
                    target, share = row_ids[entry], flow * read_count(row_values, table, entry)
                    # What underflows to nothing touches nothing: 0 tells what was not touched.
                    if share > 0.0:
                        if result_N[target] == 0.0:
                            touched_N[touched] = target
                            touched += 1
                        result_N[target] += share
                continue
            if alpha * flow > 0.0:
                if result_N[node] == 0.0:
                    touched_N[touched] = node
                    touched += 1
                result_N[node] += alpha * flow
            start, stop = out_ptr[node], out_ptr[node + 1]
            if start == stop:
                continue
            if flow < eps or number == last:
                dropped += (1.0 - alpha) * flow
                continue
            spread = (1.0 - alpha) * flow * inverse_N[node]
            reads += stop - start
            for edge in range(start, stop):
                target, share = out_ids[edge], spread * weight_M[edge] if len(weight_M) else spread
                if share > 0.0:
                    if next_N[target] == 0.0:
                        ahead_N[reached] = target
                        reached += 1
                    next_N[target] += share
        front_N, ahead_N = ahead_N, front_N
        flow_N, next_N = next_N, flow_N
        size = reached
        if size == 0 or (looking and not use_index):
            break
    return touched, dropped, reads


@nb.njit(cache=True, nogil=True)
def decompose_one(leaky, start_ids, start_value, follow, rows, buffers):
    """`decompose` for Python, of plain tuples."""
    return decompose(Leaky(*leaky), start_ids, start_value, Follow(*follow), Lookup(*rows), QueryBuffers(*buffers))


@nb.njit(cache=True, nogil=True)
def take(result_N, touched_N, touched, top_k):
    """Ids (int64) and scores of a query, in order, cut to ``top_k`` (0: all); ``result_N`` is 0 afterwards."""
    ids, values = np.empty(touched, np.int64), np.empty(touched)
    for place in range(touched):
        node = touched_N[place]
        ids[place], values[place] = node, result_N[node]
        result_N[node] = 0.0
    kept = order_top(ids, values, touched, top_k)
    return ids[:kept], values[:kept]


@nb.njit(cache=True, nogil=True)
def decompose_many(plain_leaky, query_ptr, start_ids, start_value, plain_follow, top_k, plain_rows, plain_buffers):
    """`decompose` and `take` of many queries. Returns lengths, ids, scores (float32), and the largest flow that any dropped."""
    leaky, follow = Leaky(*plain_leaky), Follow(*plain_follow)
    rows, buffers = Lookup(*plain_rows), QueryBuffers(*plain_buffers)
    result_N, touched_N = buffers.result_N, buffers.touched_N
    count = len(query_ptr) - 1
    length_Q = np.empty(count, np.int64)
    ids, values = np.empty(1024, touched_N.dtype), np.empty(1024, np.float32)
    filled, worst = 0, 0.0
    for query in range(count):
        start, end = query_ptr[query], query_ptr[query + 1]
        touched, dropped, _ = decompose(leaky, start_ids[start:end], start_value[start:end], follow, rows, buffers)
        worst = max(worst, dropped)
        ids, values = grown(ids, filled + touched), grown(values, filled + touched)
        for place in range(touched):
            node = touched_N[place]
            ids[filled + place], values[filled + place] = node, result_N[node]
            result_N[node] = 0.0
        kept = order_top(ids[filled : filled + touched], values[filled : filled + touched], touched, top_k)
        length_Q[query] = kept
        filled += kept
    return length_Q, ids[:filled].copy(), values[:filled].copy(), worst


@nb.njit(cache=True, nogil=True)
def pull_level(nodes, leaky, result_N, touched_N, place_N, rows):
    """One level of the backward variant: y_v = alpha e_v + c sum_w P0(v, w) y_w for each of ``nodes``.

    Rows of the level below are read as those of an index; ``place_N`` says which row is a node's (empty: row w is about w).
    Takes a `Leaky` and a `Lookup` as plain tuples. Returns lengths, ids and values (float32), in no order.
    """
    out_ptr, out_ids, weight_M, inverse_N, alpha = leaky
    row_ptr, row_ids, row_values, table, scale_R = rows
    length = np.empty(len(nodes), np.int64)
    ids, values = np.empty(1024, touched_N.dtype), np.empty(1024, np.float32)
    filled = 0
    for number in range(len(nodes)):
        node, touched = nodes[number], 1
        result_N[node] = alpha
        touched_N[0] = node
        for edge in range(out_ptr[node], out_ptr[node + 1]):
            row = place_N[out_ids[edge]] if len(place_N) else np.int64(out_ids[edge])
            share = (1.0 - alpha) * inverse_N[node] * scale_R[row]
            if len(weight_M):
                share *= weight_M[edge]
            for entry in range(row_ptr[row], row_ptr[row + 1]):
                target, value = row_ids[entry], share * read_count(row_values, table, entry)
                if value > 0.0:
                    if result_N[target] == 0.0:
                        touched_N[touched] = target
                        touched += 1
                    result_N[target] += value
        ids, values = grown(ids, filled + touched), grown(values, filled + touched)
        for place in range(touched):
            target = touched_N[place]
            ids[filled + place], values[filled + place] = target, result_N[target]
            result_N[target] = 0.0
        length[number] = touched
        filled += touched
    return length, ids[:filled].copy(), values[:filled].copy()


@nb.njit(cache=True, nogil=True)
def mix_rows(query_ptr, start_ids, start_value, top_k, result_N, touched_N, place_N, rows):
    """Queries as mixtures of rows, a `Lookup` as a plain tuple: lengths, ids and values (float32), in order, cut to ``top_k`` (0: all)."""
    row_ptr, row_ids, row_values, table, scale_R = rows
    count = len(query_ptr) - 1
    length_Q = np.empty(count, np.int64)
    ids, values = np.empty(1024, touched_N.dtype), np.empty(1024, np.float32)
    filled = 0
    for query in range(count):
        touched = 0
        for place in range(query_ptr[query], query_ptr[query + 1]):
            row = place_N[start_ids[place]] if len(place_N) else np.int64(start_ids[place])
            share = start_value[place] * scale_R[row]
            for entry in range(row_ptr[row], row_ptr[row + 1]):
                target, value = row_ids[entry], share * read_count(row_values, table, entry)
                if value > 0.0:
                    if result_N[target] == 0.0:
                        touched_N[touched] = target
                        touched += 1
                    result_N[target] += value
        ids, values = grown(ids, filled + touched), grown(values, filled + touched)
        for place in range(touched):
            node = touched_N[place]
            ids[filled + place], values[filled + place] = node, result_N[node]
            result_N[node] = 0.0
        kept = order_top(ids[filled : filled + touched], values[filled : filled + touched], touched, top_k)
        length_Q[query] = kept
        filled += kept
    return length_Q, ids[:filled].copy(), values[:filled].copy()
