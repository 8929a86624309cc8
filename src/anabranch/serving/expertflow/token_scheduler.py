"""The Token Scheduler: two decode batches become two whose tokens go to the same experts.

Of two adjacent batches of T tokens, 2T tokens are split into two batches of T so that the sum over layers and experts of R1 + R2 is
small, R being 1 where any of a batch's tokens goes.
Exact solution is intractable; the paper's approximation is clustering about two medoids with
equal sizes, by similarity 1 - hamming / (L E). Seeding (the two least similar tokens), the number of rounds, and the last pass, which
exchanges pairs of tokens while that helps, are ours.

    plan = TokenScheduler().regroup(chosen_XLE)
    plan.order_X                     # rows of the first batch, then of the second; plan.inverse_X leads back

**Merge and Reindex**: the paper rebuilds the key-value cache. Here `order_X` permutes rows or block tables (`reindex`), and nothing is
copied.

It is decided on whole numbers, differing cells instead of similarities, so that the compiled form (`nn/kernels/regroup.cpp`) and the one in
numpy give the same order, ties too.
"""
# Shapes: X = 2T tokens, T per batch, L routed layers, E experts, K choices, C = L E cells, G groups

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from anabranch.errors import InputError
from anabranch.nn import kernels
from anabranch.nn.kernels.binding import Kernel

A = TypeVar("A")

REGROUP = Kernel(
    "anabranch_regroup",
    """chosen: bool[X, C] array, X, C, size: int64, max_rounds: int64, max_exchanges: int64, order: int64[X] array out,
    objectives: int64[2] array out""",
    result="status",
)


@dataclass(frozen=True)
class Regrouping:
    """Two batches made of two.

    Attributes:
        order_X: old row of each new one; the first T are the first batch.
        objective_before, objective_after: experts that the batches load together, over all layers.
    """

    order_X: np.ndarray
    objective_before: int
    objective_after: int

    @property
    def inverse_X(self) -> np.ndarray:
        """New row of each old one."""
        return np.argsort(self.order_X)


def reindex(rows: Sequence[A], order_X: np.ndarray) -> list[A]:
    """What belongs to the rows (block tables, requests) in another order; the things themselves stay where they are."""
    return [rows[int(row)] for row in order_X]


def objective(chosen_XLE: np.ndarray, first: np.ndarray) -> int:
    """Experts of two batches together; ``first`` says (bool) which rows are in the first one."""
    return int(chosen_XLE[first].any(0).sum() + chosen_XLE[~first].any(0).sum())


def likeliest(prob_TLE: np.ndarray, top_k: Sequence[int]) -> np.ndarray:
    """bool chosen_TLE: the k likeliest experts of each token and layer, ``top_k`` of each layer."""
    chosen_TLE = np.zeros(prob_TLE.shape, bool)
    for places in sorted(set(top_k)):
        layers = [layer for layer, one in enumerate(top_k) if one == places]
        index_TLK = np.argpartition(prob_TLE[:, layers], -places, axis=-1)[..., -places:]
        chosen_TLE[np.arange(len(prob_TLE))[:, None, None], np.array(layers)[:, None], index_TLK] = True
    return chosen_TLE


@dataclass(frozen=True)
class TokenScheduler:
    """Regroups two batches.

    Attributes:
        max_rounds: of assignment and new medoids; after none the batches are as given.
        max_exchanges: pairs exchanged after that; 0 for the paper's method alone.
    """

    max_rounds: int = 10
    max_exchanges: int = 32

    def regroup(self, chosen_XLE: np.ndarray, num_first: int | None = None) -> Regrouping:
        """Split these tokens anew; the given order is kept where nothing better is found.

        Args:
            chosen_XLE: bool, the (predicted) routes; the first batch's tokens first.
            num_first: T of the first batch; half of them, rounded up, by default.

        Raises InputError for another shape.
        """
        if chosen_XLE.ndim != 3:
            raise InputError(f"routes have {chosen_XLE.ndim} axes; they are [tokens, layers, experts]")
        number = len(chosen_XLE)
        size = -(-number // 2) if num_first is None else num_first
        if not 0 <= size <= number:
            raise InputError(f"num_first is {size}; with {number} tokens it is 0 to {number}")
        if number < 2 or size in (0, number):
            before = objective(chosen_XLE, np.arange(number) < size)
            return Regrouping(np.arange(number), before, before)
        return self._plain(chosen_XLE, size) if kernels.load() is None else self._compiled(chosen_XLE, size)

    def _compiled(self, chosen_XLE: np.ndarray, size: int) -> Regrouping:
        cell_XC = np.ascontiguousarray(chosen_XLE, bool).reshape(len(chosen_XLE), -1)
        order_X, objectives = np.empty(len(cell_XC), np.int64), np.empty(2, np.int64)
        REGROUP(cell_XC, size, self.max_rounds, self.max_exchanges, order_X, objectives)
        return Regrouping(order_X, *objectives.tolist())

    def _plain(self, chosen_XLE: np.ndarray, size: int) -> Regrouping:
        """As the compiled one, where that could not be compiled."""
        given = np.arange(len(chosen_XLE)) < size
        before = objective(chosen_XLE, given)
        cell_XC = chosen_XLE.reshape(len(chosen_XLE), -1).astype(np.float32)
        best, best_value = given, before
        for start in (given, self._clustered(cell_XC, given)):
            found = self._exchanged(cell_XC, start)
            value = objective(chosen_XLE, found)
            if value < best_value:
                best, best_value = found, value
        return Regrouping(np.concatenate((np.flatnonzero(best), np.flatnonzero(~best))), before, best_value)

    def _clustered(self, cell_XC: np.ndarray, given: np.ndarray) -> np.ndarray:
        """bool, which tokens are in the first batch, which has the size of the one ``given``."""
        ones_X, size, first = cell_XC.sum(1), int(given.sum()), given
        hamming_XX = (ones_X[:, None] + ones_X[None, :] - 2 * cell_XC @ cell_XC.T).astype(np.int64)
        medoids = tuple(map(int, np.unravel_index(np.argmax(hamming_XX), hamming_XX.shape)))
        for _ in range(self.max_rounds):
            nearer_X = hamming_XX[medoids[0]] - hamming_XX[medoids[1]]
            first = np.zeros(len(cell_XC), bool)
            first[np.argsort(nearer_X, kind="stable")[:size]] = True
            found = tuple(self._medoid(hamming_XX, side) for side in (first, ~first))
            if found == medoids:
                break
            medoids = found
        return first

    @staticmethod
    def _medoid(hamming_XX: np.ndarray, side: np.ndarray) -> int:
        """The token of a side that is most like the others there."""
        members = np.flatnonzero(side)
        return int(members[np.argmin(hamming_XX[np.ix_(members, members)].sum(1))])

    def _exchanged(self, cell_XC: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Exchange the pair that helps most, again and again."""
        first = first.copy()
        for _ in range(self.max_exchanges):
            a, b = np.flatnonzero(first), np.flatnonzero(~first)
            gain_AB = _exchange_gain(cell_XC[a], cell_XC[b])
            best = int(np.argmax(gain_AB))
            if gain_AB.flat[best] <= 0:
                break
            row, column = divmod(best, len(b))
            first[a[row]], first[b[column]] = False, True
        return first


def _exchange_gain(one_AC: np.ndarray, two_BC: np.ndarray) -> np.ndarray:
    """gain_AB: cells that the two batches lose together when a token of one and a token of the other change places."""
    count_one_C, count_two_C = one_AC.sum(0), two_BC.sum(0)
    # Batch one loses the cells that only its leaving token has and the coming one has not, and gets those that only the latter has.
    alone_AC, alone_BC = one_AC * (count_one_C == 1), two_BC * (count_two_C == 1)
    lost_AB = alone_AC.sum(1)[:, None] - alone_AC @ two_BC.T + alone_BC.sum(1)[None, :] - one_AC @ alone_BC.T
    got_AB = (two_BC @ (count_one_C == 0))[None, :] + (one_AC @ (count_two_C == 0))[:, None]
    return lost_AB - got_AB
