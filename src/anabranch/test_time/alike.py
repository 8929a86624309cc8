"""What outcomes tell that are all the same: bounds of the share that is solved, and nothing else.

Of Q questions none of which was another, more than 1 - tail^(1/Q) of all are so with a chance of less than tail, however samples of one
question go together. What further samples may bring follows from gains that fall, whatever the curve is.
"""

import math
from dataclasses import dataclass

import numpy as np

from anabranch.test_time.figures import LEAST


@dataclass(frozen=True)
class Unknown:
    """What so few questions tell of others that no interval of it can be given: what holds of every curve.

    Attributes:
        ceiling: that is known; None if not.
    """

    ceiling: float | None

    def parameters(self, names: tuple[str, ...]) -> dict[str, tuple[float, float]]:
        """From where to where each may lie at all."""
        told = {name: (0.0, math.inf) if name in ("a", "b") else (LEAST, 1.0) for name in names}
        return told | {"f_max": (LEAST, 1.0) if self.ceiling is None else (self.ceiling, self.ceiling)}

    def stop(self, eps: float) -> tuple[float, float]:
        """Of N*: gain(n) <= F(n + 1) / (n + 1)."""
        return 0.0, float(max(0, math.ceil((self.ceiling or 1.0) / eps) - 1))

    def band(self, n_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of F(n), which is 0 at first."""
        return np.zeros(len(n_N)), np.where(n_N > 0, self.ceiling or 1.0, 0.0)


@dataclass(frozen=True)
class Alike:
    """Outcomes of which none was another.

    Attributes:
        outcome: 0 or 1.
        num_questions: Q.
        num_points: samples of each that were looked at.
        num_draws: all samples.
        ceiling: that is known; None if not.
        tail: chance of bounds that do not hold.
    """

    outcome: int
    num_questions: int
    num_points: int
    num_draws: int
    ceiling: float | None
    tail: float

    @property
    def least(self) -> float:
        """Of all questions, those that are as the ones seen."""
        return self.tail ** (1 / self.num_questions)

    def parameters(self, names: tuple[str, ...]) -> dict[str, tuple[float, float]]:
        """From where to where each may lie; of wrong answers the first of them where the ceiling is that which is known, or 1.

        Below a ceiling f a mean is at most (1 - least) / f. Of a single p each draw counts: without a ceiling (1 - p)^draws = tail.
        """
        told = {name: (0.0, 1.0 if name == "rho" else math.inf) for name in names}
        is_single, is_wrong = names == ("p",), self.outcome == 0
        if is_wrong:
            most = min(1.0, (1 - self.least) / (self.ceiling or 1.0))
            told[names[0]] = LEAST, 1 - (1 - most) ** (self.num_questions / self.num_draws) if is_single else most
        else:
            told[names[0]] = self.tail ** (1 / self.num_draws) if is_single else self.least, 1.0
        unknown = (LEAST, 1.0) if is_wrong else (self.least, 1.0)
        return told | {"f_max": unknown if self.ceiling is None else (self.ceiling, self.ceiling)}

    def stop(self, eps: float) -> tuple[float, float]:
        """Of N*: gain(n) <= F(n + 1) / (n + 1), and behind a first sample that solved all but 1 - F(1), gain(n) <= (1 - F(1)) / n."""
        enough = math.ceil((1 - self.least) / eps)
        if self.outcome == 1:
            return float(self.least > eps), float(max(1, enough))
        if enough > self.num_points:
            enough = math.ceil((self.ceiling or 1.0) / eps)
        return 0.0, float(max(0, enough - 1))

    def band(self, n_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of F(n), which is 0 at first and rises no faster than before."""
        low_N, high_N = np.full(len(n_N), self.least), np.full(len(n_N), self.ceiling or 1.0)
        if self.outcome == 0:
            low_N, high_N = (
                np.zeros(len(n_N)),
                np.minimum(high_N, (1 - self.least) * np.maximum(1.0, n_N / self.num_points)),
            )
        return np.where(n_N > 0, low_N, 0.0), np.where(n_N > 0, high_N, 0.0)
