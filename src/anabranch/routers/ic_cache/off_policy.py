"""The log of decisions, and what another policy would have earned on it.

Each row holds the chance with which each arm could have been chosen, so that the value of another policy pi can be estimated from the
one arm that was (Horvitz and Thompson 1952; Swaminathan and Joachims 2015; Dudik, Langford and Li 2011):

    ips      mean  w r,   w = pi(arm) / p(arm), cut off at ``clip``
    snips    sum w r / sum w
    dr       mean  sum_i pi(i) mu_i + w (r - mu_arm)
"""
# Shapes: N rows, M arms

import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import DataError
from anabranch.files import atomic_write_text, parse_json

Row = dict[str, Any]


class DecisionLog:
    """The last so many decisions, ready for JSON.

    Args:
        capacity: rows.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        self._rows: deque[Row] = deque(maxlen=capacity)
        self._by_id: dict[str, Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Row]:
        """Oldest first."""
        return list(self._rows)

    def append(self, row: Row) -> None:
        """Add a decision: ``id``, ``arm``, ``arms``, ``probability``, ``mu``, and whatever else; its ``reward`` is not known yet."""
        if len(self._rows) == self._rows.maxlen:
            self._by_id.pop(self._rows[0]["id"], None)
        row = {**row, "reward": None}
        self._rows.append(row)
        self._by_id[row["id"]] = row

    def reward(self, id: str, value: float) -> None:
        """Say what a decision earned; an unknown one is passed over."""
        if id in self._by_id:
            self._by_id[id]["reward"] = value

    def forget(self, matches: Callable[[Row], bool]) -> int:
        """Remove rows; returns how many."""
        kept = [row for row in self._rows if not matches(row)]
        gone = len(self._rows) - len(kept)
        self._rows = deque(kept, maxlen=self._rows.maxlen)
        self._by_id = {row["id"]: row for row in kept}
        return gone

    def write(self, path: str | Path) -> None:
        """As JSON lines, all or nothing."""
        atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows))

    @staticmethod
    def read(path: str | Path) -> list[Row]:
        """Rows of a file. Raises DataError for what is no such file."""
        try:
            return [parse_json(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read decisions from {path}: {error}") from error


@dataclass(frozen=True)
class Value:
    """An estimate of what a policy earns per decision.

    Attributes:
        mean: estimate.
        error: standard error.
        count: rows with a reward.
        effective: (sum w)^2 / sum w^2: how many rows it rests on.
    """

    mean: float
    error: float
    count: int
    effective: float


def evaluate(
    rows: list[Row], policy: Callable[[Row], Mapping[str, float]], *, method: str = "snips", clip: float = 50.0
) -> Value:
    """What ``policy`` would have earned.

    Args:
        rows: of a `DecisionLog`; those without a reward are passed over.
        policy: row -> the chance of each arm.
        method: "ips", "snips" or "dr".
        clip: largest weight of a row.

    Raises DataError if no row has a reward, or a chance of 0 for the arm that was chosen.
    """
    rated = [row for row in rows if row["reward"] is not None]
    if not rated:
        raise DataError("no decision has a reward yet; give feedback first")
    chosen = [row["arms"].index(row["arm"]) for row in rated]
    chance_N = np.array([row["probability"][at] for row, at in zip(rated, chosen, strict=True)])
    if not (chance_N > 0).all():
        raise DataError(f"decision {rated[int(np.argmin(chance_N))]['id']} was made with no chance; the log is damaged")
    target = [[policy(row).get(arm, 0.0) for arm in row["arms"]] for row in rated]
    reward_N = np.array([row["reward"] for row in rated], np.float64)
    weight_N = np.minimum(np.array([t[at] for t, at in zip(target, chosen, strict=True)]) / chance_N, clip)
    if method == "dr":
        model_N = np.array([np.dot(t, row["mu"]) for t, row in zip(target, rated, strict=True)])
        own_N = np.array([row["mu"][at] for row, at in zip(rated, chosen, strict=True)])
        term_N = model_N + weight_N * (reward_N - own_N)
    elif method == "ips":
        term_N = weight_N * reward_N
    elif method == "snips":
        mean = float(weight_N @ reward_N / weight_N.sum()) if weight_N.sum() > 0 else math.nan
        term_N = mean + weight_N * (reward_N - mean) / max(weight_N.mean(), 1e-300)
    else:
        raise DataError(f"method is {method!r}; it must be one of ips, snips, dr")
    count = len(rated)
    effective = float(weight_N.sum() ** 2 / max((weight_N**2).sum(), 1e-300))
    error = float(term_N.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf
    return Value(float(term_N.mean()), error, count, effective)
