"""Single answers of recorded outcomes as right or wrong: what a curve, a prior and a difficulty are learned from."""
# Shapes: Q questions, each with samples of its own number

from dataclasses import dataclass

import numpy as np

from anabranch.bounds import finite
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.score_scale import UNIT, Scale, ScoreScale

__all__ = ["RIGHT", "Drawn", "drawn"]

# Where on the scale an answer begins to count as right.
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


def drawn(data: Recorded, model: str, *, right: float = RIGHT, scale: Scale = UNIT) -> Drawn:
    """What a model answered.

    Args:
        data: outcomes.
        model: whose.
        right: where on the scale, from 0 to 1, an answer begins to count as right.
        scale: scores of the worst and the best answer.

    Raises InputError for a threshold or a scale that is none, DataError for a score beyond the scale.
    """
    right, column = finite("right", right, 0.0, 1.0), data.models.index(model)
    on = ScoreScale.of(scale)
    rows, answers, texts = [], [], []
    for row in range(len(data)):
        scores = np.array(data.samples_of(row, column))
        if len(scores):
            beyond = np.flatnonzero(on.is_beyond(scores))
            if len(beyond):
                raise on.beyond(data, row, model, float(scores[beyond[0]]))
            rows.append(row)
            answers.append(on.are_right(scores, right))
            texts.append(data.texts_of(row, column))
    task_Q = np.array([data.task[row] or "" for row in rows], dtype=object)
    return Drawn(model, np.array(rows, np.int64), task_Q, tuple(answers), tuple(texts))
