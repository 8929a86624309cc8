"""Scores of single answers as sums by category and expert: what several processes heard adds up, and can be taken away again."""
# Shapes: K cells, C categories, E experts, 3 count, sum and sum of squares

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.contract.strategy import Arrays, Facts

Cell = tuple[str, str]


class Feedback:
    """See the module.

    Attributes:
        cells: count, sum and sum of squares of the scores of an expert in a category.
    """

    def __init__(self) -> None:
        self.cells: dict[Cell, np.ndarray] = {}

    @classmethod
    def of(cls, scores: Iterable[tuple[str, str, float]]) -> Self:
        """From (category, expert, score)."""
        made = cls()
        for category, expert, score in scores:
            made.add(category, expert, score)
        return made

    @property
    def count(self) -> int:
        """Scores."""
        return round(sum(float(cell[0]) for cell in self.cells.values()))

    def add(self, category: str, expert: str, score: float) -> None:
        """One score."""
        self.take(Feedback._single(category, expert, np.array([1.0, score, score**2])))

    def take(self, other: "Feedback", sign: int = 1) -> None:
        """Add all of another, or, with ``sign`` -1, take it away."""
        for cell, sums_3 in other.cells.items():
            left_3 = self.cells.get(cell, np.zeros(3)) + sign * sums_3
            # Without a score there is nothing left but rounding.
            if round(float(left_3[0])) == 0:
                self.cells.pop(cell, None)
            else:
                self.cells[cell] = left_3

    def holds(self, other: "Feedback") -> bool:
        """Whether it has at least as many scores as another in each cell."""
        return all(sums_3[0] <= self.cells.get(cell, np.zeros(3))[0] + 0.5 for cell, sums_3 in other.cells.items())

    def copy(self) -> "Feedback":
        """One that changes by itself."""
        made = Feedback()
        made.take(self)
        return made

    def split(self, experts: Sequence[str]) -> tuple["Feedback", "Feedback"]:
        """What is of these experts, and what is of others."""
        own, others = Feedback(), Feedback()
        for cell, sums_3 in self.cells.items():
            (own if cell[1] in experts else others).cells[cell] = sums_3
        return own, others

    def sums(self, categories: Sequence[str], experts: Sequence[str]) -> np.ndarray:
        """Float64 ``[3, C, E]``. Raises InputError for a cell that these have no place for."""
        found_3CE = np.zeros((3, len(categories), len(experts)))
        for (category, expert), sums_3 in self.cells.items():
            if category not in categories or expert not in experts:
                raise InputError(f"there are scores of {expert!r} in {category!r}, and no such place in the table")
            found_3CE[:, categories.index(category), experts.index(expert)] = sums_3
        return found_3CE

    def state(self) -> tuple[Arrays, Facts]:
        """Named arrays, and facts ready for JSON."""
        sums_K3 = np.array(list(self.cells.values())).reshape(-1, 3)
        return {"sums_K3": sums_K3}, {"cells": [list(cell) for cell in self.cells]}

    @classmethod
    def read(cls, arrays: Arrays, facts: Facts) -> Self:
        """What `state` gave. Raises InputError for anything else."""
        made = cls()
        try:
            sums_K3, cells = np.array(arrays["sums_K3"], np.float64), facts["cells"]
            made.cells = {
                (str(category), str(expert)): sums_3 for (category, expert), sums_3 in zip(cells, sums_K3, strict=True)
            }
            is_whole = (
                sums_K3.shape == (len(made.cells), 3) and np.isfinite(sums_K3).all() and (sums_K3[:, 0] > 0.5).all()
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"these are no sums of scores: {type(error).__name__}: {error}") from None
        if not is_whole:
            raise InputError("these are no sums of scores: a cell is there twice, or its numbers cannot be")
        return made

    @staticmethod
    def _single(category: str, expert: str, sums_3: np.ndarray) -> "Feedback":
        made = Feedback()
        made.cells[category, expert] = sums_3
        return made
