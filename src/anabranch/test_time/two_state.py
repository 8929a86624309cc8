"""Rounds that may also lose a right answer: the sequential model with a way back.

    p = P(right | wrong before)      q = P(wrong | right before)
    F(N) = pi (1 - (1 - p - q)^N),   pi = p / (p + q)                          right after N rounds, the first of which begins wrong

With q = 0 it is the paper's sequential model (arXiv 2505.20522), where what is right stays right. The way back is ours: small models do
talk themselves out of right answers. Where p + q > 1 the curve swings, and a further round may lose.
"""
# Shapes: Q questions, T rounds

from typing import Any, Self

import numpy as np

from anabranch.errors import InputError
from anabranch.test_time.curves import too_many
from anabranch.test_time.figures import count, given_back, log_unsolved, numbers, positive, refuse, share, whole_back
from anabranch.test_time.hits import outcomes_of


class TwoStateTTSPM:
    """See the module.

    Attributes:
        p: above 0 and at most 1.
        q: at least 0 and at most 1.
        first: share right in the first round; p where it is not told.

    Args:
        p, q, first: see above. A first round that is better than rethinking makes F(N) = pi + (first - pi) (1 - p - q)^(N - 1).

    Raises InputError.
    """

    def __init__(self, p: Any, q: Any = 0.0, first: Any = None) -> None:
        self._p, self._q = share("p", p), numbers("q", q)
        refuse("q", self._q, ~((self._q >= 0) & (self._q <= 1)), "a share from 0 to 1")
        self._first = self._p if first is None else numbers("first", first)
        refuse("first", self._first, ~((self._first >= 0) & (self._first <= 1)), "a share from 0 to 1")

    p = property(lambda self: given_back(self._p))
    q = property(lambda self: given_back(self._q))
    first = property(lambda self: given_back(self._first))

    @property
    def plateau(self) -> Any:
        """pi: the share that is right after many rounds."""
        return given_back(self._p / (self._p + self._q))

    def __repr__(self) -> str:
        return f"TwoStateTTSPM(p={self.p!r}, q={self.q!r}, first={self.first!r})"

    def value(self, n: Any) -> Any:
        """Share right after round ``n``; 0 before the first. Raises InputError."""
        n = count("n", n)
        pi = self._p / (self._p + self._q)
        later = self._first + (pi - self._first) * -self._power_less_one(np.maximum(n - 1, 0))
        return given_back(np.where(n == 0, 0.0, later))

    def gain(self, n: Any) -> Any:
        """What one more round after ``n`` adds; below 0 where it takes away. Raises InputError."""
        n = count("n", n)
        later = self._p - (self._p + self._q) * self._first
        power = 1 + self._power_less_one(np.maximum(n - 1, 0))
        return given_back(np.where(n == 0, self._first, later * power))

    def saturation(self, eps: Any) -> Any:
        """The smallest number of rounds after which one more gains at most ``eps``. Raises InputError as `TTSPM.saturation`."""
        eps = positive("eps", eps)
        later = self._p - (self._p + self._q) * self._first
        rate = 1 - self._p - self._q
        with np.errstate(divide="ignore", invalid="ignore"):
            far = 1 + np.ceil(np.log(eps / later) / np.log(np.abs(rate)))
        # Where p + q is 1 or more, the gain after the second round is 0 or below.
        n = np.where(later <= eps, 1.0, np.where(rate <= 0, 2.0, np.maximum(far, 1.0)))
        n = np.where(self._first <= eps, 0.0, n)
        if n.max(initial=0.0) > 2.0**53:
            raise too_many(eps)
        for _ in range(2):
            n = np.where((n > 0) & (self.gain(np.maximum(n - 1, 0)) <= eps), n - 1, n)
        for _ in range(2):
            n = np.where(self.gain(n) > eps, n + 1, n)
        return whole_back(n)

    def budget(self, v: Any, c: Any) -> Any:
        """Rounds that pay, for a right answer worth ``v`` and a round that costs ``c``. Raises InputError unless both are above 0."""
        v, c = positive("v", v), positive("c", c)
        with np.errstate(over="ignore", under="ignore"):
            ratio = np.clip(c / v, np.finfo(float).tiny, np.finfo(float).max)
        return self.saturation(ratio)

    def _power_less_one(self, n: np.ndarray) -> np.ndarray:
        """(1 - p - q)^n - 1."""
        total = self._p + self._q
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(total < 1, np.expm1(log_unsolved(np.minimum(total, 1.0), n)), (1 - total) ** n - 1)

    @classmethod
    def fit(cls, right_QT: Any) -> Self:
        """From outcomes of rounds, 0 and 1: shares of steps that won, and that lost, an answer.

        Raises InputError for fewer than two rounds, and where no answer was wrong before another round, which leaves p unknown.
        """
        right_QT = outcomes_of("right_QT", right_QT)
        if right_QT.shape[1] < 2:
            raise InputError(
                f"right_QT has shape {list(right_QT.shape)}; one round tells nothing of rethinking, give two or more"
            )
        before, after = right_QT[:, :-1], right_QT[:, 1:]
        if before.all():
            raise InputError("every answer was right before each further round; p cannot be told")
        p = max(float(after[~before].mean()), 1e-12)
        q = float((~after)[before].mean()) if before.any() else 0.0
        return cls(p, q, float(right_QT[:, 0].mean()))
