"""Exact scores by elimination and conjugate gradients: the quickest way to one vector where a graph is asked more than once.

The leaky system, with x = z / (1 / strength) and W the weights, is (D - c W^T) z = alpha s, an M-matrix (the diagonal outweighs each
column). What remains of it after elimination (`anabranch.graph.ppr.factor`) is solved by conjugate gradients with symmetric Gauss-Seidel as
preconditioner, both halves of which are done in one pass over the edges (Eisenstat, 1981); for directed graphs by BiCGSTAB. The
residual of the eliminated equations is 0, so that of the rest bounds the L1 error of the whole (`anabranch.graph.ppr.rules`), and it is
computed from its definition before an answer is given.

If the Krylov method does not get there, Gauss-Seidel sweeps do: they converge for every M-matrix.
"""
# Shapes: N nodes, C nodes of the core

import numba as nb
import numpy as np

from anabranch.graph.ppr.factor import Factor
from anabranch.graph.ppr.rules import Transition


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
    """``value`` times the sum of values times what they point at, in four chains: additions take cycles, and would wait for each other."""
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
        return value * ((a + b) + (c + d))
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
