"""Means of values from 0 to 1 that may be looked at at any time: confidence sequences by betting, and a test of two means.

Whoever bets on values being above m has the capital K+(m) = prod_i (1 + bet_i (x_i - m)), each bet fixed before its value is seen. If the
mean is m or less, that is a supermartingale that begins at 1, so with probability at least 1 - level it never reaches 1 / level (Ville);
K-(m), which bets on values below m, likewise. Bets are those of Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting", JRSS-B 86(1), 2024 (arXiv 2010.09686), eq. 25 and 26: by the variance seen so far, and cut at half of what could ruin.

- The confidence sequence of a mean holds each m where neither capital has ever reached 2 / alpha.
- Arm b has the larger mean if for every m the capital that bets on b being above m, times the one that bets on a being below m, reaches
  2 / alpha: under mu_b <= mu_a it is a supermartingale at any m between the two. For a the same the other way round, so that a difference
  is told where there is none with probability at most alpha, however often one looks, and it stays told.

Between points of a grid, K+ is bounded by its value at the upper one and K- by that at the lower one, since they fall and rise with m.
"""
# Shapes: T values in the order in which they came, G points of the grid; any dimensions before them are repetitions

from dataclasses import dataclass

import numpy as np

POINTS = 401

# Of what could lose everything.
CUT = 0.5

# Numbers held at a time.
_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Found:
    """What a test of two means has come to.

    Attributes:
        better: ``a``, ``b``, or None where that is not resolved.
        at: how many values of both had come when it was; all of them if it is not.
        p: anytime-valid, two-sided.
    """

    better: str | None
    at: int
    p: float


def bets(value_T: np.ndarray, is_mine_T: np.ndarray, alpha: float) -> np.ndarray:
    """What is staked on each value, ``[..., T]``, by the values of the same arm before it."""
    mine_T = is_mine_T.astype(float)
    count_T = np.cumsum(mine_T, -1)
    mean_T = (0.5 + np.cumsum(value_T * mine_T, -1)) / (count_T + 1)
    variance_T = (0.25 + np.cumsum(mine_T * (value_T - mean_T) ** 2, -1)) / (count_T + 1)
    before_T = np.concatenate([np.full_like(variance_T[..., :1], 0.25), variance_T[..., :-1]], -1)
    count_T = np.maximum(count_T, 1)
    return np.sqrt(2 * np.log(2 / alpha) / (before_T * count_T * np.log1p(count_T)))


def log_steps(value_T: np.ndarray, bet_T: np.ndarray, point_G: np.ndarray, *, above: bool) -> np.ndarray:
    """Logarithm of what each value multiplies the capital by, ``[..., T, G]``, that bets on the mean being above (or below) each point."""
    value_T1, bet_T1 = value_T[..., None], bet_T[..., None]
    room_G = point_G if above else 1 - point_G
    stake_TG = np.minimum(bet_T1, CUT / np.maximum(room_G, 1e-12))
    return np.log1p((stake_TG if above else -stake_TG) * (value_T1 - point_G))


def confidence_sequence(value_T: np.ndarray, alpha: float, points: int = POINTS) -> tuple[float, float]:
    """Lower and upper end of the mean, 0 and 1 before anything is known. Both hold at all times together with probability 1 - alpha."""
    point_G = np.linspace(0, 1, points)
    bet_T = bets(value_T, np.ones(value_T.shape, bool), alpha)
    ends = []
    for above in (True, False):
        total_G, most_G = np.zeros(points), np.full(points, -np.inf)
        for part in _parts(len(value_T), points):
            path_TG = total_G + np.cumsum(log_steps(value_T[part], bet_T[part], point_G, above=above), 0)
            total_G, most_G = path_TG[-1], np.maximum(most_G, path_TG.max(0))
        left_out = point_G[most_G >= np.log(2 / alpha)]
        ends.append((left_out.max() if above else left_out.min()) if len(left_out) else (0.0 if above else 1.0))
    return float(ends[0]), float(ends[1])


def two_means(value_T: np.ndarray, is_b_T: np.ndarray, alpha: float, points: int = POINTS) -> Found:
    """Which of two arms has the larger mean.

    Args:
        value_T: of both arms, in the order in which they came.
        is_b_T: whose each is.
        alpha: of both directions together.
        points: G.
    """
    bet_T = np.where(is_b_T, bets(value_T, is_b_T, alpha), bets(value_T, ~is_b_T, alpha))
    first: list[tuple[int, str]] = []
    most = 0.0
    for better, is_first_T in (("b", is_b_T), ("a", ~is_b_T)):
        total_G = np.zeros(points - 1)
        for part in _parts(len(value_T), points):
            path_TG = total_G + np.cumsum(evidence_steps(value_T[part], is_first_T[part], bet_T[part], points), 0)
            total_G, least_T = path_TG[-1], path_TG.min(1)
            most = max(most, float(least_T.max()))
            reached = np.flatnonzero(least_T >= np.log(2 / alpha))
            if len(reached) and better not in [side for _, side in first]:
                first.append((part.start + int(reached[0]) + 1, better))
    # Whichever was told first: a test may end there.
    at, found = min(first, default=(len(value_T), None))
    return Found(found, at, float(min(1.0, 2 * np.exp(-most))))


def evidence_steps(value_T: np.ndarray, is_first_T: np.ndarray, bet_T: np.ndarray, points: int = POINTS) -> np.ndarray:
    """Logarithm of what each value does for the claim that the first arm's mean is the larger, between the points: ``[..., T, G - 1]``."""
    point_G = np.linspace(0, 1, points)
    return np.where(
        is_first_T[..., None],
        log_steps(value_T, bet_T, point_G[1:], above=True),
        log_steps(value_T, bet_T, point_G[:-1], above=False),
    )


def _parts(count: int, points: int) -> list[slice]:
    """So many values at a time that not too much is held."""
    step = max(1, _AT_ONCE // points)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
