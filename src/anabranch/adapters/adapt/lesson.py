"""`Lesson`: what a step learns of a batch besides the answers of its rows, in the one pass that a step may make.

    class Mine(Method, kind="mine"):
        def lessons(self, batch):
            def losses(seen, own): return {"mine": seen.nats_R[own].mean()}
            return [Lesson(losses, rows=rows_made_of(batch))]

A lesson may bring rows, which stand behind those of the batch, and makes losses of what the pass gave. It may ask that all rows stand in
the pass twice: what is learned else is of the first half then.
"""
# Shapes: B rows of a batch, R of a pass, L positions, M tokens of answers

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from anabranch.adapters.adapt.answers import Rows, joined, mean_of_rows

__all__ = ["Lesson", "Lessons", "Seen"]


@dataclass(frozen=True)
class Seen:
    """What a pass gave, of the tokens of answers.

    Attributes:
        nats_M: -log p of each.
        nats_R: their mean over each row's answer.
        apart_M: how far the two passes are from each other at each, where all rows stand there twice, see `Answers`; else 0.
        row_M: the row of each.
        num_rows: R.
    """

    nats_M: Tensor
    nats_R: Tensor
    apart_M: Tensor
    row_M: Tensor
    num_rows: int

    @classmethod
    def of(cls, nats_M: Tensor, apart_M: Tensor, row_M: Tensor, num_rows: int) -> Self:
        """With ``nats_R``."""
        return cls(nats_M, mean_of_rows(nats_M, row_M, num_rows), apart_M, row_M, num_rows)

    def mean_R(self, value_M: Tensor) -> Tensor:
        """The mean over each row's answer."""
        return mean_of_rows(value_M, self.row_M, self.num_rows)


@dataclass(frozen=True)
class Lesson:
    """One.

    Attributes:
        losses: by name, weighted, of (what the pass gave, the places of the lesson's own rows among all).
        rows: that it brings; None for none.
        again: where all rows are to stand in the pass twice, what layers are told then, of (2 R, L); None where once will do.
    """

    losses: Callable[[Seen, slice], dict[str, Tensor]]
    rows: Rows | None = None
    again: Callable[[int, int], dict[str, Any]] | None = None


class Lessons:
    """Those of one step.

    Args:
        batch: the rows whose answers are learned.
        lessons: what is learned besides; one of them at most wants all rows twice.

    Attributes:
        rows: of the pass, each once: those of the batch first.
        again: see `Lesson`.
    """

    def __init__(self, batch: Rows, lessons: Sequence[Lesson]) -> None:
        self.lessons = lessons
        self.rows = joined([batch, *(lesson.rows for lesson in lessons if lesson.rows is not None)])
        self.again = next((lesson.again for lesson in lessons if lesson.again is not None), None)
        self._first = len(batch[0])

    @property
    def told(self) -> Rows:
        """The rows of the pass, twice where somebody wants that."""
        return self.rows if self.again is None else joined([self.rows, self.rows])

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        """Of all, by name."""
        found: dict[str, Tensor] = {}
        first = self._first
        for lesson in self.lessons:
            own = slice(first, first + (0 if lesson.rows is None else len(lesson.rows[0])))
            found |= lesson.losses(seen, own)
            first = own.stop
        return found
