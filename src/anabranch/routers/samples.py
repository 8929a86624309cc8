"""Single answers of recorded outcomes as right or wrong: what a curve, a prior and a difficulty are learned from."""
# Shapes: Q questions, each with samples of its own number

import math
from dataclasses import dataclass

import numpy as np

from anabranch.bounds import finite, shown
from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded

__all__ = ["RIGHT", "UNIT", "Drawn", "Scale", "check_scale", "drawn"]

Scale = tuple[float, ...]
# Scores of the worst and the best answer, and of that scale where an answer begins to count as right.
UNIT: Scale = (0.0, 1.0)
RIGHT = 0.5


@dataclass(frozen=True)
class Drawn:
    """A model's answers to the questions it was asked.

    Attributes:
        model: that answered.
        row_Q: int64, rows of the outcomes.
        task_Q: of each question; "" for none.
        right: of each question bool ``[M]``, its samples in their order.
        texts: of each question what they say; none where that is not known of all.
    """

    model: str
    row_Q: np.ndarray
    task_Q: np.ndarray
    right: tuple[np.ndarray, ...]
    texts: tuple[tuple[str, ...], ...]

    @property
    def correct_Q(self) -> np.ndarray:
        """Right samples."""
        return np.array([int(one.sum()) for one in self.right], np.int64)

    @property
    def samples_Q(self) -> np.ndarray:
        """Samples."""
        return np.array([len(one) for one in self.right], np.int64)

    def take(self, places: np.ndarray) -> "Drawn":
        """Of these questions."""
        right, texts = tuple(self.right[at] for at in places), tuple(self.texts[at] for at in places)
        return Drawn(self.model, self.row_Q[places], self.task_Q[places], right, texts)


def check_scale(scale: Scale) -> tuple[float, float]:
    """Of scores. Raises InputError for what is none: two finite numbers, the lower first."""
    if len(scale) != 2 or not all(map(math.isfinite, scale)) or not scale[0] < scale[1]:
        raise InputError(
            f"scale is {shown(list(scale))}; it must be the scores of the worst and the best answer, the lower one first"
        )
    return float(scale[0]), float(scale[1])


def drawn(data: Recorded, model: str, *, right: float = RIGHT, scale: Scale = UNIT) -> Drawn:
    """What a model answered.

    Args:
        data: outcomes.
        model: whose.
        right: where on the scale, from 0 to 1, an answer begins to count as right.
        scale: scores of the worst and the best answer. It is said and not looked up in the data, where one odd score would move it, and
            with it every other answer.

    Raises InputError for a threshold or a scale that is none, DataError for a score beyond the scale.
    """
    right, (low, high), column = finite("right", right, 0.0, 1.0), check_scale(scale), data.models.index(model)
    # Means of scores may be rounded.
    slack = 1e-9 * (high - low)
    rows, answers, texts = [], [], []
    for row in range(len(data)):
        scores = data.samples_of(row, column)
        if scores:
            beyond = next((score for score in scores if not low - slack <= score <= high + slack), None)
            if beyond is not None:
                raise DataError(
                    f"a score of {model} for question {row + 1:,} of {len(data):,} ({shown(data.query[row])}) is {beyond:g}; scores must "
                    f"lie from {low:g} to {high:g}: mend it, or say the scale of all (scale, the worst and the best score)"
                )
            rows.append(row)
            answers.append((np.array(scores) - low) / (high - low) >= right)
            texts.append(data.texts_of(row, column))
    task_Q = np.array([data.task[row] or "" for row in rows], dtype=object)
    return Drawn(model, np.array(rows, np.int64), task_Q, tuple(answers), tuple(texts))
