"""What is made once of a graph so that many queries are quick: the system of `anabranch.graph.ppr.solve`, eliminated or as it is.

Nodes of few neighbours are eliminated, independent sets at a time: their equations give them in terms of the others, and what remains for
the others (the Schur complement) is an M-matrix again. In graphs of people and papers most nodes go, with little fill: of 51,264 authors of
DBLP 5,240 remain. Dense graphs stay whole, in the order of their degrees. For a few queries neither is worth it, and the graph's own arrays
serve.
"""
# Shapes: N nodes, M stored edges, P eliminated nodes (in their order), C nodes of the core, Z entries

from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np

from anabranch.graph import csr
from anabranch.graph.ppr.rules import NO_WEIGHTS, Transition

# Neighbours of a node that may be eliminated.
FEW = 8

# Of elimination at most.
ROUNDS = 30

# Share of nodes that a round must eliminate.
GAIN = 0.02

# Share of the edges that may remain, else nothing is eliminated.
WORTH = 0.8

# Share of the edges that must be at nodes of few neighbours for a trial.
HOPE = 0.2
NONE = np.empty(0)


@dataclass(frozen=True, eq=False)
class Triangle:
    """Rows of eliminated nodes: entries at later places, with the sign turned so that they are not negative."""

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Core:
    """What remains: diagonal C, and other entries with the sign turned: ``value`` times ``values``, which is empty where all are 1."""

    diagonal_C: np.ndarray
    indptr: np.ndarray
    middle_C: np.ndarray  # where in its row entries above the diagonal begin
    indices: np.ndarray
    values: np.ndarray
    value: float


@dataclass(frozen=True, eq=False)
class Factor:
    """A graph prepared for queries.

    Attributes:
        order_N: nodes in the order of elimination, then the core.
        place_N: where each node stands in it.
        diagonal_P: pivots.
        upper: rows of the eliminated, for the way back.
        lower: columns of the eliminated, for the way there; the same where the graph is undirected.
        core: the rest.
        symmetric: whether conjugate gradients apply.
    """

    order_N: np.ndarray
    place_N: np.ndarray
    diagonal_P: np.ndarray
    upper: Triangle
    lower: Triangle
    core: Core
    symmetric: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        parts = [self.order_N, self.place_N, self.diagonal_P, *vars(self.upper).values()]
        parts += [] if self.lower is self.upper else vars(self.lower).values()
        parts += [part for part in vars(self.core).values() if isinstance(part, np.ndarray)]
        return sum(part.nbytes for part in parts)


def prepare(transition: Transition, few: int = FEW) -> Factor:
    """Eliminate nodes of at most ``few`` neighbours, over and over. Costs about as much as a few dozen rounds of power iteration.

    Memory beside graph and factor is two to three matrices of 12 bytes an entry, of the M + N entries of the system. Where nothing is
    eliminated (``few`` is 0, or too little would go) none of them is kept, and the factor is that of `ordered`.
    """
    from scipy.sparse import csr_array

    symmetric = not transition.graph.is_directed
    if not may_gain(transition, few):
        return ordered(transition)
    entries = len(transition.graph.indices) + transition.num_nodes
    # No name holds the matrix, so that the first round can give it up.
    steps, rest, ids = _eliminate(_system(transition), few, symmetric)
    if not steps or rest.nnz > WORTH * entries:
        return ordered(transition)
    by_degree = np.argsort(np.diff(rest.indptr), kind="stable")
    rest = csr_array(rest[by_degree][:, by_degree])
    order_N = np.concatenate([*(step[0] for step in steps), ids[by_degree]]).astype(np.int64)
    place_N = np.empty(len(order_N), np.int64)
    place_N[order_N] = np.arange(len(order_N))
    upper = _triangle([step[2] for step in steps], place_N)
    lower = upper if symmetric else _triangle([step[3] for step in steps], place_N)
    pivots = np.concatenate([NONE, *(step[1] for step in steps)])
    return Factor(order_N, place_N, pivots, upper, lower, _core(rest), symmetric)


def may_gain(transition: Transition, few: int = FEW) -> bool:
    """Whether eliminating nodes of at most ``few`` neighbours is tried: not where their edges are too few, whatever goes after them."""
    graph = transition.graph
    if not few or graph.is_directed:
        return few > 0
    return bool(2 * graph.degree_N[graph.degree_N <= few].sum() >= HOPE * len(graph.indices))


def as_it_is(transition: Transition) -> Factor:
    """A factor in which nothing is eliminated and nothing moved, for few queries: 24 N bytes, and the arrays of the graph itself.

    Directed graphs and self-loops need rows of their own: for those this is `ordered`.
    """
    graph = transition.graph
    if graph.is_directed or graph.num_self_loops:
        return ordered(transition)
    indptr, indices, weights = transition.into
    indices = indices.view(np.uint32 if indices.dtype.itemsize == 4 else np.uint64)
    middle_C = np.empty(graph.num_nodes, np.int64)
    _find_middle(indptr, indices, middle_C)
    core = Core(_diagonal(transition), indptr, middle_C, indices, _fixed(weights), 1.0 - transition.alpha)
    same_N = np.arange(graph.num_nodes)
    return Factor(same_N, same_N, NONE, _triangle([], same_N), _triangle([], same_N), core, True)


def ordered(transition: Transition) -> Factor:
    """A factor in which nothing is eliminated, nodes of few edges first: 40 N bytes, and 2 or 4 (weighted: 6 or 8) an edge."""
    graph = transition.graph
    indptr, indices, weights = transition.out
    count = graph.num_nodes
    into_N = graph.degree_N if not graph.is_directed else np.bincount(indices, minlength=count)
    order_N = np.argsort(into_N, kind="stable")
    place_N = np.empty(count, np.int64)
    place_N[order_N] = np.arange(count)
    starts, diagonal_N = np.zeros(count + 1, np.int64), _diagonal(transition)
    edges = len(indices) - graph.num_self_loops
    moved, values = np.empty(edges, _narrow_type(count)), np.empty(edges if len(weights) else 0, np.float32)
    _move(indptr, indices, weights, order_N, place_N, 1.0 - transition.alpha, starts, moved, values, diagonal_N)
    middle_C = np.empty(count, np.int64)
    _find_middle(starts, moved, middle_C)
    core = Core(diagonal_N[order_N], _fixed(starts), middle_C, _fixed(moved), _fixed(values), 1.0 - transition.alpha)
    none = _triangle([], place_N)
    return Factor(order_N, place_N, NONE, none, none, core, not graph.is_directed)


def _diagonal(transition: Transition) -> np.ndarray:
    """D, loops not yet counted: the sum of each node's weights, 1 at dangling ones."""
    strength_N = transition.graph.strength_N
    return np.where(strength_N > 0, strength_N, 1.0)


def _fixed(array: np.ndarray) -> np.ndarray:
    """Read-only, as the arrays of a graph are: kernels are compiled for one kind."""
    view = array.view()
    view.flags.writeable = False
    return view


@nb.njit(cache=True, nogil=True)
def _move(indptr, indices, weight_M, order_N, place_N, stay, starts, moved, values, diagonal_N):
    """Rows of what flows into each node, in the new order, filled by rising column so that they are sorted; loops go into the diagonal."""
    for node in range(len(order_N)):
        for edge in range(indptr[node], indptr[node + 1]):
            if indices[edge] != node:
                starts[place_N[indices[edge]] + 1] += 1
    for row in range(len(order_N)):
        starts[row + 1] += starts[row]
    for column in range(len(order_N)):
        node = order_N[column]
        for edge in range(indptr[node], indptr[node + 1]):
            weight = weight_M[edge] if len(weight_M) else np.float32(1.0)
            if indices[edge] == node:
                diagonal_N[node] -= stay * weight
                continue
            row = place_N[indices[edge]]
            moved[starts[row]] = column
            if len(values):
                values[starts[row]] = weight
            # Where rows start is found again below.
            starts[row] += 1
    for row in range(len(order_N), 0, -1):
        starts[row] = starts[row - 1]
    starts[0] = 0


def _system(transition: Transition) -> Any:
    """D - c W^T as `scipy.sparse.csr_array` of float64: made at once, without the matrices that it is the difference of."""
    from scipy.sparse import csr_array

    indptr, indices, weights = transition.out
    count = transition.num_nodes
    entries = len(indices) + count - transition.graph.num_self_loops
    starts, columns = np.empty(count + 1, np.int32), np.empty(entries, np.int32)
    values = np.empty(entries)
    _fill_system(indptr, indices, weights, _diagonal(transition), 1.0 - transition.alpha, starts, columns, values)
    found = csr_array((values, columns, starts), shape=(count, count))
    return csr_array(found.T) if transition.graph.is_directed else found


@nb.njit(cache=True, nogil=True)
def _fill_system(indptr, indices, weight_M, diagonal_N, stay, starts, columns, values):
    place = 0
    starts[0] = 0
    for node in range(len(diagonal_N)):
        own = -1
        for edge in range(indptr[node], indptr[node + 1]):
            if own < 0 and indices[edge] >= node:
                own = place
                columns[place], values[place] = node, diagonal_N[node]
                place += 1
            weight = weight_M[edge] if len(weight_M) else np.float32(1.0)
            if indices[edge] == node:
                values[own] -= stay * weight
            else:
                columns[place], values[place] = indices[edge], -stay * weight
                place += 1
        if own < 0:
            columns[place], values[place] = node, diagonal_N[node]
            place += 1
        starts[node + 1] = place


def _eliminate(matrix: Any, few: int, symmetric: bool) -> tuple[list[tuple[Any, ...]], Any, np.ndarray]:
    """(ids, pivots, rows, columns) of each round, what remains, and ids of its nodes."""
    from scipy.sparse import csr_array, diags_array

    steps: list[tuple[Any, ...]] = []
    ids = np.arange(matrix.shape[0])
    for _ in range(ROUNDS):
        degree, turned_ptr, turned = _neighbours(matrix, symmetric)
        order = np.argsort(degree, kind="stable")
        out = _independent(matrix.indptr, matrix.indices, turned_ptr, turned, degree, order, few)
        del turned_ptr, turned, order
        if out.sum() < max(GAIN * len(ids), 1):
            break
        gone = np.flatnonzero(out)
        gone, stay = gone[np.argsort(degree[gone], kind="stable")], np.flatnonzero(~out)
        rows, pivots = matrix[gone][:, stay], matrix.diagonal()[gone]
        # One large matrix goes as the next one comes.
        matrix = matrix[stay]
        columns = matrix[:, gone]
        matrix = matrix[:, stay]
        matrix = csr_array(matrix - columns @ diags_array(1.0 / pivots) @ rows)
        matrix.sort_indices()
        ahead = -csr_array(rows)
        behind = ahead if symmetric else -csr_array(columns.T)
        steps.append((ids[gone], pivots, (ahead, ids[stay]), (behind, ids[stay])))
        ids = ids[stay]
    return steps, matrix, ids


def _neighbours(matrix: Any, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries of each node's row and column, one that is in both counted once; starts and ids of columns (of rows where symmetric)."""
    if symmetric:
        return np.diff(matrix.indptr), matrix.indptr, matrix.indices
    starts, turned = np.zeros_like(matrix.indptr), np.empty_like(matrix.indices)
    csr.transpose(matrix.indptr, matrix.indices, NO_WEIGHTS, starts, turned, NO_WEIGHTS)
    degree = np.empty(matrix.shape[0], np.int64)
    _count_union(matrix.indptr, matrix.indices, starts, turned, degree)
    return degree, starts, turned


@nb.njit(cache=True, nogil=True)
def _count_union(indptr, indices, turned_ptr, turned, degree):
    """How many ids are in a node's row, its column, or both; all in rising order."""
    for node in range(len(degree)):
        here, there, found = indptr[node], turned_ptr[node], 0
        while here < indptr[node + 1] or there < turned_ptr[node + 1]:
            found += 1
            if there >= turned_ptr[node + 1] or (here < indptr[node + 1] and indices[here] < turned[there]):
                here += 1
            elif here >= indptr[node + 1] or turned[there] < indices[here]:
                there += 1
            else:
                here += 1
                there += 1
        degree[node] = found


@nb.njit(cache=True, nogil=True)
def _independent(indptr, indices, turned_ptr, turned, degree, order, few):
    """Nodes of at most ``few`` neighbours, none next to another, in that order of preference."""
    taken, barred = np.zeros(len(degree), np.bool_), np.zeros(len(degree), np.bool_)
    for node in order:
        # Its own entry is one of them.
        if degree[node] > few + 1:
            break
        if barred[node]:
            continue
        taken[node] = True
        for edge in range(indptr[node], indptr[node + 1]):
            barred[indices[edge]] = True
        for edge in range(turned_ptr[node], turned_ptr[node + 1]):
            barred[turned[edge]] = True
    return taken


def _triangle(parts: list[tuple[Any, np.ndarray]], place_N: np.ndarray) -> Triangle:
    lengths = [np.diff(part.indptr) for part, _ in parts]
    indptr = np.append(0, np.cumsum(np.concatenate([np.empty(0, np.int64), *lengths]))).astype(np.int64)
    indices = np.concatenate([np.empty(0, np.int64), *(place_N[ids[part.indices]] for part, ids in parts)])
    values = np.concatenate([NONE, *(part.data for part, _ in parts)])
    return Triangle(indptr, _narrow(indices, len(place_N)), values)


def _core(matrix: Any) -> Core:
    from scipy.sparse import csr_array, diags_array

    diagonal_C = matrix.diagonal()
    others = csr_array(diags_array(diagonal_C).tocsr() - matrix)
    others.eliminate_zeros()
    others.sort_indices()
    even = others.nnz and (others.data == others.data[0]).all()
    values, value = (NONE, float(others.data[0])) if even else (others.data, 1.0)
    indptr, indices = others.indptr.astype(np.int64), _narrow(others.indices, len(diagonal_C))
    middle_C = np.empty(len(diagonal_C), np.int64)
    _find_middle(indptr, indices, middle_C)
    return Core(diagonal_C, _fixed(indptr), middle_C, _fixed(indices), _fixed(values), value)


def _narrow_type(count: int) -> type[np.unsignedinteger]:
    """The smallest type that fits; unsigned, since numba asks of signed indices whether they count from the end."""
    return np.uint16 if count <= 2**16 else np.uint32 if count <= 2**32 else np.uint64


def _narrow(indices: np.ndarray, count: int) -> np.ndarray:
    return indices.astype(_narrow_type(count))


@nb.njit(cache=True, nogil=True)
def _find_middle(indptr, indices, middle):
    for node in range(len(middle)):
        edge = indptr[node]
        while edge < indptr[node + 1] and indices[edge] < node:
            edge += 1
        middle[node] = edge
