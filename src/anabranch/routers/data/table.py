"""Gathers rows, whatever file they come from, into a `Recorded`."""
# Shapes: N queries, M models

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import DataError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model
from anabranch.routers.data.prices import estimated_tokens
from anabranch.routers.money import dollars

PARTS = ("score", "cost", "prompt", "completion", "latency")

# Tokens of an answer whose length nobody recorded, as GraphRouter reckons (arXiv 2410.03834).
USUAL_COMPLETION = 512


@dataclass
class Row:
    """One query: its values by part and model. A value of None is one that is not known. ``samples`` are scores of single answers,
    ``texts`` what those say.

    ``is_conversation`` says that the query is only the last text of what was asked: the answers are to all of it. ``is_vouched`` says that
    they may be learned from all the same. ``unread`` are fields that mean nothing here. ``line`` is where it stands in its file, from 1.
    """

    query: str
    task: str | None = None
    values: dict[str, dict[str, float | None]] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    signals: dict[str, dict[str, float | None]] = field(default_factory=dict)
    samples: dict[str, tuple[float, ...]] = field(default_factory=dict)
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    is_conversation: bool = False
    is_vouched: bool = False
    unread: tuple[str, ...] = ()
    line: int | None = None


def number(value: Any, what: str, *, low: float = -math.inf, is_known: bool = False) -> float | None:
    """A finite number, true and false counting as 1 and 0; None stays unless it ``is_known``.

    Raises DataError, of which ``what`` is the subject.
    """
    if value is None and not is_known:
        return None
    if isinstance(value, bool | int | float) and low <= value and abs(value) <= sys.float_info.max:
        return float(value)
    allowed = "a finite number" if low == -math.inf else f"a number of at least {low:g}"
    unknown = "leave out what is not known" if is_known else "or null if it is not known"
    raise DataError(
        f"{what} is {'null' if value is None else repr(value)}; it must be {allowed}{';' if is_known else ','} {unknown}"
    )


def gather(rows: list[Row], path: Path, prices: Mapping[str, Model] | None) -> Recorded:
    """All rows as one table, models in the order in which they first appear.

    Args:
        rows: at least one, each with at least one score.
        path: named in errors.
        prices: models with prices, for rows without costs; None leaves costs unknown.
    """
    if not rows:
        raise DataError(f"{path} holds no rows; each line needs a query and scores")
    models = list(dict.fromkeys(name for row in rows for name in row.values.get("score", ())))
    if not models:
        raise DataError(f"{path} holds no scores")
    table = {part: _column([row.values.get(part, {}) for row in rows], part, models, path) for part in PARTS}
    named = sorted({name for row in rows for name in row.signals})
    signals = {name: _column([row.signals.get(name, {}) for row in rows], name, models, path) for name in named}
    tokens_NM2 = np.stack([table["prompt"], table["completion"]], axis=2)
    cost_NM = table["cost"]
    if prices is not None:
        priced_NM = _priced([row.query for row in rows], models, tokens_NM2, prices, path)
        cost_NM = np.where(np.isfinite(cost_NM), cost_NM, priced_NM)
    lines = [row.line for row in rows]
    return Recorded(
        query=tuple(row.query for row in rows),
        models=tuple(models),
        task=tuple(row.task for row in rows),
        score_NM=table["score"],
        cost_NM=_known(cost_NM),
        tokens_NM2=_known(tokens_NM2),
        latency_NM=_known(table["latency"]),
        answers=tuple(row.answers for row in rows) if any(row.answers for row in rows) else (),
        samples=tuple(row.samples for row in rows) if any(row.samples for row in rows) else (),
        texts=tuple(row.texts for row in rows) if any(row.texts for row in rows) else (),
        signals=signals,
        line=() if None in lines else tuple(line for line in lines if line is not None),
    )


def _column(values: list[dict[str, float | None]], part: str, models: list[str], path: Path) -> np.ndarray:
    """Values of each row by model as ``[N, M]``."""
    table_NM = np.full((len(values), len(models)), np.nan)
    at = {name: column for column, name in enumerate(models)}
    for row, of_model in enumerate(values):
        for name, value in of_model.items():
            if name not in at:
                raise DataError(f"{path} has a {part} of {name!r}, which has no score in any row")
            table_NM[row, at[name]] = np.nan if value is None else value
    return table_NM


def _known(table: np.ndarray) -> np.ndarray | None:
    return table if np.isfinite(table).any() else None


def _priced(
    queries: list[str], models: list[str], tokens_NM2: np.ndarray, prices: Mapping[str, Model], path: Path
) -> np.ndarray:
    """Dollars by price: of recorded tokens where there are some, else of an estimated prompt and the usual answer."""
    missing = [name for name in models if name not in prices]
    if missing:
        raise DataError(f"{path} has the model {missing[0]!r}, which the price file does not know: {', '.join(prices)}")
    prompt_N = np.array([estimated_tokens(text) for text in queries], float)
    cost_NM = np.empty(tokens_NM2.shape[:2])
    for column, name in enumerate(models):
        prompt_column = np.where(np.isfinite(tokens_NM2[:, column, 0]), tokens_NM2[:, column, 0], prompt_N)
        completion = np.where(np.isfinite(tokens_NM2[:, column, 1]), tokens_NM2[:, column, 1], USUAL_COMPLETION)
        price = prices[name].price
        for row, (asked, answered) in enumerate(zip(prompt_column.tolist(), completion.tolist(), strict=True)):
            cost_NM[row, column] = dollars(price.cost(round(asked), round(answered)))
    return cost_NM
