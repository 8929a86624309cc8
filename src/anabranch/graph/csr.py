"""Compressed rows: the kernels that every way of building a graph goes through, so that all of them give the same bytes.

A build counts the stored edges of each row, puts each edge into its row in the order given, then sorts each row (stably) and merges what is
there more than once. Sums are taken in float64 in the order given and rounded once, so a build in pieces (`anabranch.graph.formats.build`)
equals a build at once, and both rows of an undirected edge get the same weight.
"""
# Shapes: R rows, E edges as given, M stored edges

from collections.abc import Callable, Iterable

import numba as nb
import numpy as np

from anabranch.errors import InputError

INT32 = np.iinfo(np.int32).max
DUPLICATES = {"add": 0, "max": 1, "first": 2, "error": 3}
NO_WEIGHTS = np.empty(0, np.float32)

_FINE, _TWICE, _TOO_LARGE, _CANCELLED = range(4)

# Rows up to here are sorted by insertion.
_SHORT = 24

# source_E, target_E, weight_E.
Chunk = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def id_type(num_nodes: int, num_stored: int) -> type[np.signedinteger]:
    """int32 where nodes and stored edges fit, int64 otherwise."""
    return np.int32 if max(num_nodes, num_stored) <= INT32 else np.int64


def compress(
    chunks: Callable[[], Iterable[Chunk]],
    num_nodes: int,
    *,
    directed: bool,
    is_weighted: bool,
    duplicates: str = "add",
    drop_zero: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rows of edges that come in chunks: ``indptr``, ``indices`` and ``weights`` of a `Graph`.

    Args:
        chunks: gives the chunks from the first on; called twice. Ids are known to be 0 ... num_nodes - 1, weights to be float32 and finite.
        num_nodes: rows.
        directed: False puts every edge into both its rows.
        is_weighted: whether chunks have weights.
        duplicates: what becomes of an edge given several times, see `Graph.from_edges`.
        drop_zero: leave out edges whose weights cancel (where negative ones are there).

    Raises:
        InputError: duplicates where none may be, or weights that add up to 0 or beyond float32.
    """
    indptr = np.zeros(num_nodes + 1, np.int64)
    for source_E, target_E, _ in chunks():
        count_rows(source_E, target_E, not directed, indptr[1:])
    np.cumsum(indptr, out=indptr)
    stored = int(indptr[-1])
    indices = np.empty(stored, id_type(num_nodes, stored))
    weights = np.empty(stored if is_weighted else 0, np.float32)
    place_R = indptr[:-1].copy()
    for source_E, target_E, weight_E in chunks():
        fill_rows(
            source_E, target_E, NO_WEIGHTS if weight_E is None else weight_E, not directed, place_R, indices, weights
        )
    del place_R
    kept = merge(indptr, indices, weights, duplicates, drop_zero)
    # In place: no copy of a large array.
    indices.resize(kept, refcheck=False)
    if indices.dtype == np.int64 and id_type(num_nodes, kept) is np.int32:
        indices = indices.astype(np.int32)
    if is_weighted:
        weights.resize(kept, refcheck=False)
    return indptr, indices, weights if is_weighted else None


def merge(
    indptr: np.ndarray, indices: np.ndarray, weights: np.ndarray, duplicates: str, drop_zero: bool, first_row: int = 0
) -> int:
    """Sort and merge rows in place; the edges that remain. ``first_row`` is the node of row 0, for messages. Raises InputError."""
    kept, problem, row, column = merge_rows(indptr, indices, weights, DUPLICATES[duplicates], drop_zero)
    if problem == _FINE:
        return kept
    edge = f"the edge ({row + first_row}, {column})"
    if problem == _TWICE:
        raise InputError(
            f"{edge} is given more than once; duplicates='add', 'max' or 'first' says what to do with that"
        )
    if problem == _TOO_LARGE:
        raise InputError(f"the weights of {edge} add up to more than a 32-bit number holds (3.4e38); scale them down")
    raise InputError(f"the weights of {edge} add up to 0; drop_zero=True leaves such edges out")


@nb.njit(cache=True, nogil=True)
def count_rows(source_E, target_E, both, count_R):
    """Add to ``count_R`` how many stored edges each row gets; with ``both``, an edge is in two rows, a self-loop in one."""
    for edge in range(len(source_E)):
        count_R[source_E[edge]] += 1
        if both and source_E[edge] != target_E[edge]:
            count_R[target_E[edge]] += 1


@nb.njit(cache=True, nogil=True)
def fill_rows(source_E, target_E, weight_E, both, place_R, indices, weights):
    """Put edges where ``place_R`` says their rows go on, in the order given."""
    weighted = len(weights) > 0
    for edge in range(len(source_E)):
        source, target = source_E[edge], target_E[edge]
        place = place_R[source]
        place_R[source] = place + 1
        indices[place] = target
        if weighted:
            weights[place] = weight_E[edge]
        if both and source != target:
            place = place_R[target]
            place_R[target] = place + 1
            indices[place] = source
            if weighted:
                weights[place] = weight_E[edge]


@nb.njit(cache=True, nogil=True)
def merge_rows(indptr, indices, weights, rule, drop_zero):
    """Sort each row, merge duplicates, close the gaps. Returns edges kept, a problem, and the row and column it is at."""
    weighted = len(weights) > 0
    kept, start = 0, 0
    for row in range(len(indptr) - 1):
        end = indptr[row + 1]
        _sort_row(indices, weights, start, end, weighted)
        place = start
        while place < end:
            column, after = indices[place], place + 1
            while after < end and indices[after] == column:
                after += 1
            if after > place + 1 and rule == 3:
                return kept, _TWICE, row, np.int64(column)
            if weighted:
                value = np.float64(weights[place])
                for other in range(place + 1, after):
                    if rule == 0:
                        value += weights[other]
                    elif rule == 1:
                        value = max(value, np.float64(weights[other]))
                rounded = np.float32(value)
                if np.isinf(rounded):
                    return kept, _TOO_LARGE, row, np.int64(column)
                if rounded == 0:
                    if not drop_zero:
                        return kept, _CANCELLED, row, np.int64(column)
                    place = after
                    continue
                weights[kept] = rounded
            indices[kept] = column
            kept += 1
            place = after
        start = end
        indptr[row + 1] = kept
    return kept, _FINE, 0, np.int64(0)


@nb.njit(cache=True, nogil=True)
def _sort_row(indices, weights, start, end, weighted):
    """Sort ``start ... end - 1`` by id, weights along; equal ids keep their order."""
    place = start + 1
    while place < end and indices[place - 1] <= indices[place]:
        place += 1
    if place >= end:
        return
    if end - start <= _SHORT:
        for place in range(start + 1, end):
            column, hole = indices[place], place
            weight = weights[place] if weighted else np.float32(0)
            while hole > start and indices[hole - 1] > column:
                indices[hole] = indices[hole - 1]
                if weighted:
                    weights[hole] = weights[hole - 1]
                hole -= 1
            indices[hole] = column
            if weighted:
                weights[hole] = weight
    elif weighted:
        order = np.argsort(indices[start:end], kind="mergesort")
        indices[start:end] = indices[start:end][order]
        weights[start:end] = weights[start:end][order]
    else:
        indices[start:end].sort()


@nb.njit(cache=True, nogil=True)
def transpose(indptr, indices, weights, turned_indptr, turned_indices, turned_weights):
    """Turn every edge around. Rows come out sorted, since they are filled in the order of their columns."""
    weighted = len(weights) > 0
    rows = len(indptr) - 1
    for place in range(len(indices)):
        turned_indptr[indices[place] + 1] += 1
    for row in range(rows):
        turned_indptr[row + 1] += turned_indptr[row]
    next_R = turned_indptr[:-1].copy()
    for row in range(rows):
        for place in range(indptr[row], indptr[row + 1]):
            there = next_R[indices[place]]
            next_R[indices[place]] = there + 1
            turned_indices[there] = row
            if weighted:
                turned_weights[there] = weights[place]


@nb.njit(cache=True, nogil=True)
def count_asymmetric(indptr, indices, weights):
    """How many edges have no equal edge the other way."""
    weighted = len(weights) > 0
    found = 0
    for row in range(len(indptr) - 1):
        for place in range(indptr[row], indptr[row + 1]):
            column = indices[place]
            low, high = indptr[column], indptr[column + 1]
            while low < high:
                middle = (low + high) // 2
                if indices[middle] < row:
                    low = middle + 1
                else:
                    high = middle
            if low >= indptr[column + 1] or indices[low] != row or (weighted and weights[low] != weights[place]):
                found += 1
    return found


@nb.njit(cache=True, nogil=True)
def find_fault(indptr, indices, num_edges):
    """The first row that is not one of a graph: ends out of order or range, ids out of range or not rising; -1 if all are."""
    rows = len(indptr) - 1
    if rows < 0 or indptr[0] != 0 or indptr[rows] != num_edges:
        return 0
    for row in range(rows):
        if indptr[row + 1] < indptr[row] or indptr[row + 1] > num_edges:
            return row
        for place in range(indptr[row], indptr[row + 1]):
            if indices[place] < 0 or indices[place] >= rows:
                return row
            if place > indptr[row] and indices[place] <= indices[place - 1]:
                return row
    return -1


@nb.njit(cache=True, nogil=True)
def select_rows(indptr, indices, weights, nodes, new_id_N, new_indptr, new_indices, new_weights, count_only):
    """Rows ``nodes`` with columns that have a new id (not -1); first count them into ``new_indptr``, then fill. Columns unsorted."""
    weighted = len(weights) > 0
    kept = 0
    for row in range(len(nodes)):
        for place in range(indptr[nodes[row]], indptr[nodes[row] + 1]):
            column = new_id_N[indices[place]]
            if column >= 0:
                if not count_only:
                    new_indices[kept] = column
                    if weighted:
                        new_weights[kept] = weights[place]
                kept += 1
        new_indptr[row + 1] = kept


@nb.njit(cache=True, nogil=True)
def sum_rows(indptr, weights, sum_R):
    """The sum of each row's weights, in float64 without a copy of them."""
    for row in range(len(sum_R)):
        total = 0.0
        for place in range(indptr[row], indptr[row + 1]):
            total += weights[place]
        sum_R[row] = total


@nb.njit(cache=True, nogil=True)
def count_loops(indptr, indices):
    """Edges from a node to itself."""
    found = 0
    for row in range(len(indptr) - 1):
        for place in range(indptr[row], indptr[row + 1]):
            found += indices[place] == row
    return found


@nb.njit(cache=True, nogil=True)
def sort_rows(indptr, indices, weights):
    """Sort the ids of each row, weights along."""
    for row in range(len(indptr) - 1):
        _sort_row(indices, weights, indptr[row], indptr[row + 1], len(weights) > 0)
