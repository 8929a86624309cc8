"""Judged steps, for a probe: their texts, and whether each system's answer was right.

    {"step": "Find 37 x 48.", "right1": 0, "right2": 1}

``right1`` and ``right2`` are numbers from 0 to 1, or true and false (a share of several answers does as well); ``right2`` stands in every
row, or in none. ``text``, ``query`` and ``question`` are other words for ``step``.
"""
# Shapes: N steps

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch.bounds import shown_json
from anabranch.errors import DataError
from anabranch.files import parse_json
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.score_scale import BRING, ScoreScale, unit_score
from anabranch.text_lines import read_lines

TEXTS = ("step", "text", "query", "question")


@dataclass(frozen=True)
class Steps:
    """What a probe learns from.

    Attributes:
        text: of each step.
        right1_N, right2_N: float64, how right each system was, 0 to 1; the second is None where nobody knows.
    """

    text: tuple[str, ...]
    right1_N: np.ndarray
    right2_N: np.ndarray | None

    def __len__(self) -> int:
        return len(self.text)

    def take(self, rows: np.ndarray) -> "Steps":
        """Some of them."""
        right2_N = None if self.right2_N is None else self.right2_N[rows]
        return Steps(tuple(self.text[row] for row in rows), self.right1_N[rows], right2_N)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """From JSON lines, plain or gzipped. Raises DataError that names file and line."""
        path = Path(path)
        rows = []
        for line, text in read_lines(path):
            if text.strip():
                try:
                    rows.append((line, *_row(text)))
                except DataError as error:
                    raise DataError(f"{path}, line {line}: {error}") from None
        if not rows:
            raise DataError(f'{path} holds no steps; a line is {{"step": "...", "right1": 0, "right2": 1}}')
        has_second = rows[0][3] is not None
        for line, _, _, second in rows:
            if (second is not None) != has_second:
                told = "missing" if has_second else "there"
                raise DataError(
                    f"{path}, line {line}: right2 is {told}, unlike before; give it in all rows, or in none"
                )
        right2_N = np.array([row[3] for row in rows], np.float64) if has_second else None
        return cls(tuple(row[1] for row in rows), np.array([row[2] for row in rows], np.float64), right2_N)

    @classmethod
    def of_outcomes(cls, data: Recorded, system1: str, system2: str | None) -> Self:
        """Of recorded outcomes of two models, whose scores are from 0 to 1.

        Raises InputError for a model that is not there, DataError for other scores, or where none is known.
        """
        known = data.only([system1] if system2 is None else [system1, system2])
        rows = np.flatnonzero(np.isfinite(known.score_NM).all(1))
        if not len(rows):
            raise DataError(f"no row has a score of {' and of '.join(known.models)}")
        score_NM = ScoreScale().shares_of(known.take(rows), advice=BRING)
        texts = tuple(known.query[row] for row in rows)
        return cls(texts, score_NM[:, 0], None if system2 is None else score_NM[:, 1])


def _row(text: str) -> tuple[str, float, float | None]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError("a row must be an object with step and right1")
    step = next((found[name] for name in TEXTS if name in found), None)
    if not isinstance(step, str) or not step.strip():
        raise DataError(f"step is {shown_json(step)}; it must be a text that is not empty")
    first = _right("right1", found.get("right1"))
    if first is None:
        raise DataError("right1 is missing: how right System 1's answer was, 0 to 1")
    return step, first, _right("right2", found.get("right2"))


def _right(name: str, value: Any) -> float | None:
    if value is None:
        return None
    found = unit_score(value) if isinstance(value, bool | int | float) else None
    if found is None:
        raise DataError(f"{name} is {shown_json(value)}; it must be from 0 to 1, or true or false")
    return found
