"""Exact scores by elimination and conjugate gradients: the quickest way to one vector where a graph is asked more than once.

The leaky system, with x = z / (1 / strength) and W the weights, is (D - c W^T) z = alpha s, an M-matrix (the diagonal outweighs each
column). Once per graph, nodes of few neighbours are eliminated, independent sets at a time: their equations give them in terms of the
others, and what remains for the others (the Schur complement) is an M-matrix again. In graphs of people and papers most nodes go, with
little fill: of 51,264 authors of DBLP 5,240 remain. What remains is solved by conjugate gradients with symmetric Gauss-Seidel as
preconditioner, both halves of which are done in one pass over the edges (Eisenstat, 1981); for directed graphs by BiCGSTAB. The
residual of the eliminated equations is 0, so that of the rest bounds the L1 error of the whole (`anabranch.graph.ppr.rules`), and it is
computed from its definition before an answer is given.

If the Krylov method does not get there, Gauss-Seidel sweeps do: they converge for every M-matrix.
"""
# Shapes: N nodes, P eliminated nodes (in their order), C nodes of the core, Z entries

from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np

from anabranch.graph.ppr.rules import Transition

# Neighbours of a node that may be eliminated.
FEW = 8

# Of elimination at most.
ROUNDS = 30

# Share of nodes that a round must eliminate.
GAIN = 0.02

# Share of the edges that may remain, else nothing is eliminated.
WORTH = 0.8
NONE = np.empty(0)


@dataclass(frozen=True, eq=False)
class Triangle:
    """Rows of eliminated nodes: entries at later places, with the sign turned so that they are not negative."""

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Core:
    """What remains: diagonal C, and other entries with the sign turned; ``values`` is empty where all equal ``value``."""

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
    """Eliminate nodes of at most ``few`` neighbours, over and over. Costs about as much as a few dozen rounds of power iteration."""
    from scipy.sparse import csr_array, diags_array

    graph = transition.graph
    # Row v: what flows into v.
    weights = graph.reversed.to_scipy(np.float64)
    strength_N = np.where(graph.strength_N > 0, graph.strength_N, 1.0)
    matrix = csr_array(diags_array(strength_N).tocsr() - (1.0 - transition.alpha) * weights)
    matrix.sort_indices()
    symmetric = not graph.is_directed
    steps, rest, ids = _eliminate(matrix, few, symmetric)
    if rest.nnz > WORTH * matrix.nnz:
        steps, rest, ids = [], matrix, np.arange(graph.num_nodes)
    by_degree = np.argsort(np.diff(rest.indptr), kind="stable")
    rest = csr_array(rest[by_degree][:, by_degree])
    order_N = np.concatenate([*(step[0] for step in steps), ids[by_degree]]).astype(np.int64)
    place_N = np.empty(len(order_N), np.int64)
    place_N[order_N] = np.arange(len(order_N))
    upper = _triangle([step[2] for step in steps], place_N)
    lower = upper if symmetric else _triangle([step[3] for step in steps], place_N)
    pivots = np.concatenate([NONE, *(step[1] for step in steps)])
    return Factor(order_N, place_N, pivots, upper, lower, _core(rest), symmetric)


def _eliminate(matrix: Any, few: int, symmetric: bool) -> tuple[list[tuple[Any, ...]], Any, np.ndarray]:
    """(ids, pivots, rows, columns) of each round, what remains, and ids of its nodes."""
    from scipy.sparse import csr_array, diags_array

    steps: list[tuple[Any, ...]] = []
    ids = np.arange(matrix.shape[0])
    for _ in range(ROUNDS):
        pattern = matrix if symmetric else csr_array(abs(matrix) + abs(matrix.T))
        degree = np.diff(pattern.indptr)
        out = _independent(pattern.indptr, pattern.indices, np.argsort(degree, kind="stable"), few)
        if out.sum() < max(GAIN * len(ids), 1):
            break
        gone = np.flatnonzero(out)
        gone, stay = gone[np.argsort(degree[gone], kind="stable")], np.flatnonzero(~out)
        rows, columns, pivots = matrix[gone][:, stay], matrix[stay][:, gone], matrix.diagonal()[gone]
        left = csr_array(matrix[stay][:, stay] - columns @ diags_array(1.0 / pivots) @ rows)
        left.sort_indices()
        ahead = -csr_array(rows)
        behind = ahead if symmetric else -csr_array(columns.T)
        steps.append((ids[gone], pivots, (ahead, ids[stay]), (behind, ids[stay])))
        matrix, ids = left, ids[stay]
    return steps, matrix, ids


@nb.njit(cache=True, nogil=True)
def _independent(indptr, indices, order, few):
    """Nodes of at most ``few`` neighbours, none next to another, in that order of preference."""
    num_nodes = len(indptr) - 1
    taken, barred = np.zeros(num_nodes, np.bool_), np.zeros(num_nodes, np.bool_)
    for node in order:
        # Its own entry is one of them.
        if indptr[node + 1] - indptr[node] > few + 1:
            break
        if barred[node]:
            continue
        taken[node] = True
        for edge in range(indptr[node], indptr[node + 1]):
            barred[indices[edge]] = True
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
    middle_C = _middle(others.indptr, others.indices)
    even = others.nnz and (others.data == others.data[0]).all()
    values, value = (NONE, float(others.data[0])) if even else (others.data, 1.0)
    return Core(
        diagonal_C, others.indptr.astype(np.int64), middle_C, _narrow(others.indices, len(diagonal_C)), values, value
    )


def _narrow(indices: np.ndarray, count: int) -> np.ndarray:
    """The smallest type that fits; unsigned, since numba asks of signed indices whether they count from the end."""
    return indices.astype(np.uint16 if count <= 2**16 else np.uint32 if count <= 2**32 else np.uint64)


@nb.njit(cache=True, nogil=True)
def _middle(indptr, indices):
    middle = np.empty(len(indptr) - 1, np.int64)
    for node in range(len(middle)):
        edge = indptr[node]
        while edge < indptr[node + 1] and indices[edge] < node:
            edge += 1
        middle[node] = edge
    return middle


class Workspace:
    """Arrays that queries use one after another, not two at a time: N + 6 C numbers, or N + 9 C for directed graphs."""

    def __init__(self, factor: Factor) -> None:
        self.right_N = np.empty(len(factor.place_N))
        self.scratch_VC = np.empty((6 if factor.symmetric else 9, len(factor.core.diagonal_C)))


def solve(
    transition: Transition,
    factor: Factor,
    ids: np.ndarray,
    start: np.ndarray,
    tol: float,
    workspace: Workspace | None = None,
) -> tuple[np.ndarray, float, int]:
    """The leaky solution, dense float64 [N], a bound on its L1 error, and passes over the core's edges.

    The bound is below ``tol`` unless rounding (about 1e-15 times the passes) stands against it.
    """
    core, alpha = factor.core, transition.alpha
    num_gone = len(factor.diagonal_P)
    workspace = workspace or Workspace(factor)
    right_N = workspace.right_N
    right_N[:] = 0.0
    right_N[factor.place_N[ids]] = alpha * start
    if num_gone:
        _forward(factor.lower.indptr, factor.lower.indices, factor.lower.values, factor.diagonal_P, right_N)
    right_C, error, passes = right_N[num_gone:], 0.0, 0
    if len(right_C) and right_C.any():
        krylov = _conjugate if factor.symmetric else _bicgstab
        parts = (core.indptr, core.middle_C, core.indices, core.values, core.value, core.diagonal_C, right_C, alpha)
        error, passes = krylov(*parts, alpha * tol, workspace.scratch_VC)
        if not error <= alpha * tol:
            error, more = _sweeps(*parts, alpha * tol, workspace.scratch_VC)
            passes += more
        right_C[:] = workspace.scratch_VC[0]
    if num_gone:
        _backward(factor.upper.indptr, factor.upper.indices, factor.upper.values, factor.diagonal_P, right_N)
    scores_N = np.empty(transition.num_nodes)
    _scale_back(right_N, factor.place_N, transition.graph.strength_N, scores_N)
    return scores_N, error / alpha, passes


# A call would cost as much as a short row.
@nb.njit(inline="always")
def _dot(indices, values, value, vector, start, end):
    """Sum of values times what they point at, in four chains: additions take several cycles, and would wait for each other."""
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    edge = start
    if len(values):
        while edge + 3 < end:
            a += values[edge] * vector[indices[edge]]
            b += values[edge + 1] * vector[indices[edge + 1]]
            c += values[edge + 2] * vector[indices[edge + 2]]
            d += values[edge + 3] * vector[indices[edge + 3]]
            edge += 4
        while edge < end:
            a += values[edge] * vector[indices[edge]]
            edge += 1
        return (a + b) + (c + d)
    while edge + 3 < end:
        a += vector[indices[edge]]
        b += vector[indices[edge + 1]]
        c += vector[indices[edge + 2]]
        d += vector[indices[edge + 3]]
        edge += 4
    while edge < end:
        a += vector[indices[edge]]
        edge += 1
    return value * ((a + b) + (c + d))


@nb.njit(cache=True, nogil=True)
def _forward(indptr, indices, values, pivot_P, right_N):
    """Carry the right side of eliminated equations to later ones."""
    for place in range(len(pivot_P)):
        if right_N[place] != 0.0:
            share = right_N[place] / pivot_P[place]
            for edge in range(indptr[place], indptr[place + 1]):
                right_N[indices[edge]] += values[edge] * share


@nb.njit(cache=True, nogil=True)
def _backward(indptr, indices, values, pivot_P, right_N):
    """Solve eliminated equations, last to first; later places hold their solution."""
    for place in range(len(pivot_P) - 1, -1, -1):
        found = _dot(indices, values, 1.0, right_N, indptr[place], indptr[place + 1])
        right_N[place] = (right_N[place] + found) / pivot_P[place]


@nb.njit(cache=True, nogil=True)
def _scale_back(solution_N, place_N, strength_N, scores_N):
    """x = D z, in the order of nodes."""
    for node in range(len(place_N)):
        strength = strength_N[node]
        scores_N[node] = solution_N[place_N[node]] * (strength if strength > 0 else 1.0)


@nb.njit(cache=True, nogil=True)
def _check(indptr, indices, values, value, diagonal_C, right_C, alpha, tol, solution_C, residual_C):
    """The residual from its definition, and its L1 norm after one Jacobi step, which falls by 1 - alpha and costs nothing more.

    The step is made if the norm then is at most ``tol``: (1 - alpha) D_j bounds what column j of the Schur complement has beside D_j,
    since elimination keeps the sum of a column at alpha times the strength or more, and D_j at the strength or less.
    """
    total = 0.0
    for node in range(len(diagonal_C)):
        into = _dot(indices, values, value, solution_C, indptr[node], indptr[node + 1])
        residual_C[node] = right_C[node] + into - diagonal_C[node] * solution_C[node]
        total += abs(residual_C[node])
    total *= 1.0 - alpha
    if total <= tol:
        for node in range(len(diagonal_C)):
            solution_C[node] += residual_C[node] / diagonal_C[node]
    return total


@nb.njit(cache=True, nogil=True)
def _lower_solve(indptr, middle_C, indices, values, value, diagonal_C, right_C, found_C):
    """(D + L)^-1 right."""
    for node in range(len(diagonal_C)):
        before = _dot(indices, values, value, found_C, indptr[node], middle_C[node])
        found_C[node] = (right_C[node] + before) / diagonal_C[node]


@nb.njit(cache=True, nogil=True)
def _apply(indptr, middle_C, indices, values, value, diagonal_C, vector_C, back_C, found_C):
    """Eisenstat: found = (D + L)^-1 K (D + U)^-1 vector and back = (D + U)^-1 vector, reading each entry of K once."""
    for node in range(len(diagonal_C) - 1, -1, -1):
        after = _dot(indices, values, value, back_C, middle_C[node], indptr[node + 1])
        back_C[node] = (vector_C[node] + after) / diagonal_C[node]
    for node in range(len(diagonal_C)):
        before = _dot(indices, values, value, found_C, indptr[node], middle_C[node])
        found_C[node] = (vector_C[node] - diagonal_C[node] * back_C[node] + before) / diagonal_C[node]
    for node in range(len(diagonal_C)):
        found_C[node] += back_C[node]


@nb.njit(cache=True, nogil=True)
def _conjugate(indptr, middle_C, indices, values, value, diagonal_C, right_C, alpha, tol, scratch_VC):
    """Conjugate gradients on (D + L)^-1 K (D + U)^-1, in the inner product of D."""
    size = len(diagonal_C)
    solution_C, residual_C, direction_C = scratch_VC[0], scratch_VC[1], scratch_VC[2]
    back_C, found_C, true_C = scratch_VC[3], scratch_VC[4], scratch_VC[5]
    solution_C[:] = 0.0
    _lower_solve(indptr, middle_C, indices, values, value, diagonal_C, right_C, residual_C)
    square = 0.0
    for node in range(size):
        direction_C[node] = diagonal_C[node] * residual_C[node]
        square += residual_C[node] * direction_C[node]
    # Ratio of the norm that counts to one that is cheap to know.
    error, passes, ratio = np.inf, 0, 1.0
    for _ in range(200):
        if square == 0.0:
            break
        _apply(indptr, middle_C, indices, values, value, diagonal_C, direction_C, back_C, found_C)
        passes += 1
        curve = 0.0
        for node in range(size):
            curve += direction_C[node] * found_C[node]
        if not curve > 0.0:
            break
        step, before, square, cheap = square / curve, square, 0.0, 0.0
        for node in range(size):
            solution_C[node] += step * back_C[node]
            residual_C[node] -= step * found_C[node]
            weighted = residual_C[node] * diagonal_C[node]
            square += residual_C[node] * weighted
            cheap += abs(weighted)
        if ratio * cheap <= tol:
            error = _check(indptr, indices, values, value, diagonal_C, right_C, alpha, tol, solution_C, true_C)
            passes += 1
            if error <= tol:
                break
            ratio = error / cheap if cheap > 0.0 else 0.0
        turn = square / before
        for node in range(size):
            direction_C[node] = diagonal_C[node] * residual_C[node] + turn * direction_C[node]
    return error, passes


@nb.njit(cache=True, nogil=True)
def _bicgstab(indptr, middle_C, indices, values, value, diagonal_C, right_C, alpha, tol, scratch_VC):
    """BiCGSTAB (van der Vorst, 1992) on the same operator, for cores that are not symmetric."""
    size = len(diagonal_C)
    solution_C, residual_C, shadow_C = scratch_VC[0], scratch_VC[1], scratch_VC[2]
    direction_C, moved_C, back_C = scratch_VC[3], scratch_VC[4], scratch_VC[5]
    turned_C, other_C, true_C = scratch_VC[6], scratch_VC[7], scratch_VC[8]
    solution_C[:] = 0.0
    _lower_solve(indptr, middle_C, indices, values, value, diagonal_C, right_C, residual_C)
    shadow_C[:] = residual_C
    direction_C[:] = residual_C
    product = (shadow_C * residual_C).sum()
    error, passes, ratio = np.inf, 0, 1.0
    for _ in range(200):
        _apply(indptr, middle_C, indices, values, value, diagonal_C, direction_C, back_C, moved_C)
        passes += 1
        curve = (shadow_C * moved_C).sum()
        if curve == 0.0:
            break
        step = product / curve
        for node in range(size):
            residual_C[node] -= step * moved_C[node]
            solution_C[node] += step * back_C[node]
        _apply(indptr, middle_C, indices, values, value, diagonal_C, residual_C, other_C, turned_C)
        passes += 1
        upper, lower = 0.0, 0.0
        for node in range(size):
            upper += turned_C[node] * residual_C[node]
            lower += turned_C[node] * turned_C[node]
        smooth = upper / lower if lower > 0.0 else 0.0
        cheap = 0.0
        for node in range(size):
            solution_C[node] += smooth * other_C[node]
            residual_C[node] -= smooth * turned_C[node]
            cheap += abs(residual_C[node]) * diagonal_C[node]
        if ratio * cheap <= tol:
            error = _check(indptr, indices, values, value, diagonal_C, right_C, alpha, tol, solution_C, true_C)
            passes += 1
            if error <= tol:
                break
            ratio = error / cheap if cheap > 0.0 else 0.0
        before, product = product, (shadow_C * residual_C).sum()
        if smooth == 0.0 or product == 0.0 or not np.isfinite(cheap):
            break
        turn = product / before * step / smooth
        for node in range(size):
            direction_C[node] = residual_C[node] + turn * (direction_C[node] - smooth * moved_C[node])
    return error, passes


@nb.njit(cache=True, nogil=True)
def _sweeps(indptr, middle_C, indices, values, value, diagonal_C, right_C, alpha, tol, scratch_VC):
    """Gauss-Seidel from where the Krylov method gave up (from 0 if that is no number), as long as rounding lets the residual fall."""
    solution_C, true_C = scratch_VC[0], scratch_VC[1]
    if not np.isfinite(solution_C).all():
        solution_C[:] = 0.0
    error = _check(indptr, indices, values, value, diagonal_C, right_C, alpha, tol, solution_C, true_C)
    passes = 1
    for _ in range(int(np.log(1e-18) / np.log1p(-alpha)) + 10):
        if error <= tol:
            break
        for node in range(len(diagonal_C)):
            into = _dot(indices, values, value, solution_C, indptr[node], indptr[node + 1])
            solution_C[node] = (right_C[node] + into) / diagonal_C[node]
        error = _check(indptr, indices, values, value, diagonal_C, right_C, alpha, tol, solution_C, true_C)
        passes += 2
    return error, passes
