"""Battles: who of two models answered a query better. What routers that learn from preferences are fitted on."""
# Shapes: N queries, M models, B battles

from dataclasses import dataclass

import numpy as np

from anabranch.routers.strategies.training import check_compared


@dataclass(frozen=True)
class Battles:
    """Pairs of models that both answered a query.

    Attributes:
        row_B: of the query.
        winner_B: column of the better model; of a tie the earlier column.
        loser_B: column of the other.
        tie_B: bool, equally good.
    """

    row_B: np.ndarray
    winner_B: np.ndarray
    loser_B: np.ndarray
    tie_B: np.ndarray

    def __len__(self) -> int:
        return len(self.row_B)

    def decided(self) -> "Battles":
        """Those that are no tie."""
        kept = ~self.tie_B
        return Battles(self.row_B[kept], self.winner_B[kept], self.loser_B[kept], self.tie_B[kept])


def battles_of(score_NM: np.ndarray, name: str) -> Battles:
    """Every pair of known scores of a query, in the order of queries. Raises DataError if no two models answered the same query."""
    check_compared(score_NM, name)
    first_P, second_P = np.triu_indices(score_NM.shape[1], 1)
    first_NP, second_NP = score_NM[:, first_P], score_NM[:, second_P]
    row_B, pair_B = np.nonzero(np.isfinite(first_NP) & np.isfinite(second_NP))
    gap_B = first_NP[row_B, pair_B] - second_NP[row_B, pair_B]
    winner_B = np.where(gap_B >= 0, first_P[pair_B], second_P[pair_B])
    loser_B = np.where(gap_B >= 0, second_P[pair_B], first_P[pair_B])
    return Battles(row_B, winner_B, loser_B, gap_B == 0)


def win_rates(strength_NM: np.ndarray, known_M: np.ndarray) -> np.ndarray:
    """From strengths (log odds) to the chance of winning against a rival drawn evenly from the other known models; 0.5 where there is none.

    For two models it is the published win probability. -inf for unknown models.
    """
    count = int(known_M.sum())
    if count < 2:
        return np.where(known_M, 0.5, -np.inf) + 0 * strength_NM
    gap_NMM = strength_NM[:, :, None] - strength_NM[:, None]
    rate_NMM = 0.5 * (1 + np.tanh(0.5 * gap_NMM))
    # Without the even match against itself.
    total_NM = rate_NMM[:, :, known_M].sum(axis=2) - 0.5
    return np.where(known_M, total_NM / (count - 1), -np.inf)
