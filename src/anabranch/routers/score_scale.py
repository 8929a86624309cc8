"""The scale of scores: from 0 to 1, or another that is said.

What takes scores for shares of a scale (right or wrong, labels of probabilities) is told which. It is not looked up in the data, where one
odd score would move it, and with it every other.
"""
# Shapes: N queries, M models

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded

__all__ = ["BRING", "UNIT", "Scale", "ScoreScale", "range_of", "unit_score"]

# Scores of the worst and the best answer, as a config has them.
Scale = tuple[float, ...]
UNIT: Scale = (0.0, 1.0)

# What to do about a score beyond it: of whoever has a setting for the scale, and of others.
SAY_IT = "mend it, or say the scale of all (scale, the worst and the best score)"
BRING = "bring all to that scale"

# Of a scale: means of scores may be rounded, and scores kept as float32 are, to 6e-8 of themselves at each step.
SLACK = 1e-6


@dataclass(frozen=True)
class ScoreScale:
    """A scale.

    Attributes:
        low, high: scores of the worst and the best answer.
    """

    low: float = 0.0
    high: float = 1.0

    @classmethod
    def of(cls, scale: Scale) -> Self:
        """As a config has it. Raises InputError for what is none: two finite numbers, the lower first."""
        if len(scale) != 2 or not all(map(math.isfinite, scale)) or not scale[0] < scale[1]:
            raise InputError(
                f"scale is {shown(list(scale))}; it must be the scores of the worst and the best answer, the lower one first"
            )
        return cls(float(scale[0]), float(scale[1]))

    def shares(self, score_NM: np.ndarray) -> np.ndarray:
        """Scores, of whatever shape, from 0 (the worst) to 1 (the best); NaN stays."""
        return (score_NM - self.low) / (self.high - self.low)

    def scores(self, share_NM: np.ndarray) -> np.ndarray:
        """The opposite."""
        return self.low + share_NM * (self.high - self.low)

    def are_right(self, score_NM: np.ndarray, right: float) -> np.ndarray:
        """Which scores lie at ``right`` of the scale, from 0 to 1, or above, as far as they can be told from it; NaN does not."""
        return np.asarray(self.shares(score_NM) >= right - SLACK)

    def is_beyond(self, score_NM: np.ndarray) -> np.ndarray:
        """Which scores are none of this scale, rounded as they may be; NaN is not known, and so not among them."""
        slack = SLACK * (self.high - self.low)
        return np.asarray((score_NM < self.low - slack) | (score_NM > self.high + slack))

    def beyond(self, data: Recorded, row: int, model: str, score: float, *, advice: str = SAY_IT) -> DataError:
        """What to raise for a score beyond it, of a row of the outcomes; ``advice`` says what to do."""
        # Its place among these rows says nothing: they may be a part that was drawn.
        where = f" (line {data.line[row]:,} of the file)" if data.line else ""
        return DataError(
            f"a score of {model} for the question {shown(data.query[row])}{where} is {_exact(score)}; scores must lie from "
            f"{_exact(self.low)} to {_exact(self.high)}: {advice}"
        )

    def check(self, data: Recorded, *, advice: str = SAY_IT) -> None:
        """Raises DataError, see `beyond`, for a score of outcomes beyond it."""
        beyond_NM = self.is_beyond(data.score_NM)
        if beyond_NM.any():
            row, column = np.argwhere(beyond_NM)[0]
            raise self.beyond(data, int(row), data.models[column], float(data.score_NM[row, column]), advice=advice)

    def shares_of(self, data: Recorded, *, advice: str = SAY_IT) -> np.ndarray:
        """All scores of outcomes, from 0 to 1, ``[N, M]``. As `check`."""
        self.check(data, advice=advice)
        return np.clip(self.shares(data.score_NM), 0.0, 1.0)


def unit_score(score: float) -> float | None:
    """A score from 0 to 1, rounded as it may be, as one of these; None for one beyond, and for NaN."""
    return min(1.0, max(0.0, float(score))) if -SLACK <= score <= 1 + SLACK else None


def range_of(score_NM: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest score there can be, as far as scores tell: 0 and 1 where all are among them, else those seen."""
    low, high = float(np.nanmin(score_NM)), float(np.nanmax(score_NM))
    return (0.0, 1.0) if low >= -SLACK and high <= 1 + SLACK else (low, high)


def _exact(number: float) -> str:
    """As short as it may be and still be seen to differ from any other."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))
