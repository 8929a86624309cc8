"""Many queries of an undirected graph at once, by Chebyshev's iteration: each edge is read once a round for all queries of a block.

With y = x / alpha and z = y / strength the leaky system is z = c P z + q, q = s / strength, whose matrix has real eigenvalues within
[-c, c]: Golub and Varga's three-term recurrence (1961) then takes the root of the rounds that power iteration takes,

    z_(k+1) = z_(k-1) + w_(k+1) (c P z_k + q - z_(k-1)),     w_1 = 1,  w_2 = 1 / (1 - r^2 / 2),  w_(k+1) = 1 / (1 - r^2 w_k / 4).

What walks come to in the long run is known, c / (1 - c) times the share of strength within the component, and is where z starts; so the
eigenvalue 1 has no part in what is left, and r is c times the largest other one of the component, which a few products estimate once per
graph. An estimate that is too small costs rounds and nothing else, since the L1 norm of the residual, from its definition, says when a
query is done. Small components, whose walks may never mix, have r = c; queries of like r share a block.

Where nothing can be eliminated (graphs that are dense and mix well) this takes less time a query than `anabranch.graph.ppr.solve`; a
query's numbers do not depend on what else is in its block.
"""
# Shapes: N nodes, M stored edges, W columns of a block, K components

from collections.abc import Sequence
from typing import Any

import numba as nb
import numpy as np

from anabranch.graph.ppr.leaky import leaky_iteration
from anabranch.graph.ppr.rules import Transition
from anabranch.graph.products import Operator, multiply_block
from anabranch.graph.projection import BLOCK
from anabranch.graph.rows import top_of_dense

# L1 error, times alpha, from which on 32 bits are exact enough; and from which on 64 bits are.
NARROW, LEAST = 1e-5, 1e-14

# Of alpha: with less, rounds are many.
LEAST_ALPHA = 1e-3

# Whose blocks take 256 MB a thread.
MOST_NODES = 1 << 18

# Nodes from which on a component has an estimate of its own.
LARGE = 64

# Products that estimate the second eigenvalue, and what is added to it.
LOOKS, SLACK = 12, 0.03
MOST_ROUNDS = 2000


class Blocks:
    """A graph made ready. One object serves several threads.

    Memory beside the graph: 28 N bytes, 4 or 8 an edge where weights are needed in 64 bits, and of each thread four blocks of
    `BLOCK` columns, 1,024 N bytes (half of that in 32 bits).

    Args:
        transition: of a graph that it `suits`.
        tol: L1 error allowed.
    """

    def __init__(self, transition: Transition, tol: float) -> None:
        graph = transition.graph
        self.transition, self.tol = transition, tol
        self.dtype: Any = np.float32 if tol * transition.alpha >= NARROW else np.float64
        self.strength_N = np.where(graph.strength_N > 0, graph.strength_N, 1.0).astype(self.dtype)
        stay = 1.0 - transition.alpha
        weights = np.empty(0, self.dtype) if graph.weights is None else graph.weights.astype(self.dtype, copy=False)
        self.operator = Operator(graph.indptr, graph.indices, weights, (stay * transition.inverse_N).astype(self.dtype))
        self.label_N = graph.components()
        strength_K = np.bincount(self.label_N, graph.strength_N)
        self.level_K = np.divide(stay / (1.0 - stay), strength_K, out=np.zeros(len(strength_K)), where=strength_K > 0)
        self.reach_K = self._reach()
        self._left: list[np.ndarray] = []

    @staticmethod
    def suits(transition: Transition, tol: float) -> bool:
        """Whether it can answer within ``tol``; whether it is quickest is another question."""
        is_exact = transition.alpha >= LEAST_ALPHA and tol * transition.alpha >= LEAST
        return is_exact and not transition.graph.is_directed and transition.num_nodes <= MOST_NODES

    def rows(
        self, parsed: Sequence[tuple[np.ndarray, np.ndarray]], top_k: int | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and float64 scores, largest first, of each query (as `parse_seeds` gives it), in their order."""
        reach_Q = np.array([self.reach_K[self.label_N[ids]].max() for ids, _ in parsed])
        order, found = np.argsort(reach_Q, kind="stable"), [(np.empty(0, np.int64), np.empty(0))] * len(parsed)
        for first in range(0, len(parsed), BLOCK):
            numbers = order[first : first + BLOCK].tolist()
            found_WN = self._solve([parsed[number] for number in numbers], reach_Q[numbers])
            for number, score_N in zip(numbers, found_WN, strict=True):
                leaky_N = score_N.astype(np.float64)
                found[number] = top_of_dense(self.transition.finish(leaky_N, *parsed[number]), top_k)
        return found

    def _solve(self, chosen: Sequence[tuple[np.ndarray, np.ndarray]], reach_W: np.ndarray) -> np.ndarray:
        """Leaky solutions of at most `BLOCK` queries, [W, N]; each by its own r."""
        try:
            scratch = self._left.pop()
        except IndexError:
            scratch = np.empty((3, len(self.strength_N), BLOCK), self.dtype)
        here, before, next_NW = scratch
        here[:] = 0.0
        before[:] = 0.0
        seeds, columns, values = self._begin(chosen, here)
        found_WN = np.empty((len(chosen), len(self.strength_N)), self.dtype)
        is_done_W = np.zeros(BLOCK, bool)
        is_done_W[len(chosen) :] = True
        residual_W, weight_W, square_W = np.empty(BLOCK), np.ones(BLOCK), np.zeros(BLOCK)
        square_W[: len(chosen)] = reach_W**2
        for round_ in range(MOST_ROUNDS):
            multiply_block(self.operator, here, next_NW)
            _add(next_NW, seeds, columns, values)
            _round(here, next_NW, before, self.strength_N, weight_W.astype(self.dtype), residual_W)
            # What a product makes of z is right to c times z's residual.
            fresh = ~is_done_W & ((1.0 - self.transition.alpha) * residual_W <= self.tol)
            if fresh.any():
                _take(next_NW, self.strength_N, self.transition.alpha, np.flatnonzero(fresh), found_WN)
                is_done_W |= fresh
                if is_done_W.all():
                    break
            here, before = before, here
            weight_W = 1.0 / (1.0 - square_W * (0.5 if round_ == 0 else 0.25 * weight_W))
        self._left.append(scratch)
        if not is_done_W.all():
            self._finish(chosen, is_done_W, found_WN)
        return found_WN

    def _begin(
        self, chosen: Sequence[tuple[np.ndarray, np.ndarray]], here: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """z_0 into ``here``; nodes, columns and values of q."""
        seeds = np.concatenate([ids for ids, _ in chosen])
        columns = np.repeat(np.arange(len(chosen)), [len(ids) for ids, _ in chosen])
        starts = np.concatenate([self.transition.start(ids, share) for ids, share in chosen])
        values = (starts / self.strength_N[seeds]).astype(self.dtype)
        level_K = np.zeros(len(self.level_K))
        for column, (ids, share) in enumerate(chosen):
            label = self.label_N[ids]
            np.add.at(level_K, label, self.transition.start(ids, share) * self.level_K[label])
            _fill_level(here, column, self.label_N, level_K)
            level_K[label] = 0.0
        _add(here, seeds, columns, values)
        return seeds, columns, values

    def _finish(
        self, chosen: Sequence[tuple[np.ndarray, np.ndarray]], is_done_W: np.ndarray, found_WN: np.ndarray
    ) -> None:
        """What rounding kept from the tolerance, by power iteration."""
        for column in np.flatnonzero(~is_done_W).tolist():
            ids, share = chosen[column]
            start_N = np.zeros(len(self.strength_N))
            start_N[ids] = self.transition.start(ids, share)
            of, absorb = self.transition, self.transition.dangling == "absorb"
            found_WN[column], _, _ = leaky_iteration(of.into, of.inverse_N, of.alpha, absorb, start_N, self.tol, 0)

    def _reach(self) -> np.ndarray:
        """[K]: c times the largest eigenvalue of P, in size, but for 1, about; c for small components."""
        stay = 1.0 - self.transition.alpha
        is_large_K = np.bincount(self.label_N, minlength=len(self.level_K)) >= LARGE
        large = int(is_large_K.sum())
        number_N = np.where(is_large_K, np.cumsum(is_large_K) - 1, -1)[self.label_N]
        here = np.random.default_rng(0).standard_normal((len(number_N), BLOCK)).astype(self.dtype)
        next_NW, grown = np.empty_like(here), np.zeros(large)
        for _ in range(LOOKS if large else 0):
            _without_level(here, self.strength_N, number_N, large)
            _scale(here, self.strength_N, number_N, grown)
            multiply_block(self.operator, here, next_NW)
            here, next_NW = next_NW, here
        _scale(here, self.strength_N, number_N, grown)
        reach_K = np.full(len(is_large_K), stay)
        reach_K[is_large_K] = np.minimum(grown + SLACK, stay)
        return reach_K


@nb.njit(cache=True, nogil=True)
def _add(block_NW, seeds, columns, values):
    for place in range(len(seeds)):
        block_NW[seeds[place], columns[place]] += values[place]


@nb.njit(cache=True, nogil=True)
def _fill_level(here_NW, column, label_N, level_K):
    for node in range(len(label_N)):
        here_NW[node, column] = level_K[label_N[node]]


@nb.njit(cache=True, nogil=True)
def _round(here_NW, next_NW, before_NW, strength_N, weight_W, residual_W):
    """before <- before + weight (next - before); and the L1 norm of strength times (next - here), by column."""
    residual_W[:] = 0.0
    for node in range(len(strength_N)):
        strength = strength_N[node]
        for column in range(here_NW.shape[1]):
            new, old = next_NW[node, column], before_NW[node, column]
            residual_W[column] += strength * abs(new - here_NW[node, column])
            before_NW[node, column] = old + weight_W[column] * (new - old)


@nb.njit(cache=True, nogil=True)
def _take(next_NW, strength_N, alpha, columns, found_WN):
    for node in range(len(strength_N)):
        scale = alpha * strength_N[node]
        for place in range(len(columns)):
            found_WN[columns[place], node] = scale * next_NW[node, columns[place]]


@nb.njit(cache=True, nogil=True)
def _without_level(here_NW, strength_N, number_N, components):
    """Take its mean, weighted by strength, from each component of each column; those of number -1 stay."""
    total, mean = np.zeros(components), np.zeros((components, here_NW.shape[1]))
    for node in range(len(number_N)):
        place = number_N[node]
        if place >= 0:
            total[place] += strength_N[node]
            for column in range(here_NW.shape[1]):
                mean[place, column] += strength_N[node] * here_NW[node, column]
    for node in range(len(number_N)):
        place = number_N[node]
        if place >= 0:
            for column in range(here_NW.shape[1]):
                here_NW[node, column] -= mean[place, column] / total[place]


@nb.njit(cache=True, nogil=True)
def _scale(here_NW, strength_N, number_N, largest):
    """Bring each column of each component to length 1 (weighted by strength); ``largest`` is what they had, by component."""
    square = np.zeros((len(largest), here_NW.shape[1]))
    for node in range(len(number_N)):
        place = number_N[node]
        if place >= 0:
            for column in range(here_NW.shape[1]):
                square[place, column] += strength_N[node] * here_NW[node, column] * here_NW[node, column]
    for place in range(len(largest)):
        largest[place] = np.sqrt(square[place].max())
        for column in range(here_NW.shape[1]):
            square[place, column] = 1.0 / np.sqrt(square[place, column]) if square[place, column] > 0.0 else 0.0
    for node in range(len(number_N)):
        place = number_N[node]
        for column in range(here_NW.shape[1]):
            here_NW[node, column] *= square[place, column] if place >= 0 else 0.0
