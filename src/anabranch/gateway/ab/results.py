"""Both arms of A/B tests, from the decisions and the feedback in a store.

What is compared are keys (or users): each counts once, with the mean of its first answers that can be valued, from the moment it has so
many. What has been seen is thus never changed by what comes later, as a test that may be looked at at any time needs it, and a key
that asks much weighs no more than one that asks little. Answers of a strategy that was passed over, since it failed or was slow, count for
its arm.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from anabranch.config import from_dict
from anabranch.errors import AnabranchError
from anabranch.gateway.ab.assignment import version_of
from anabranch.gateway.ab.sequential import confidence_sequence, two_means
from anabranch.gateway.config.ab import ABConfig
from anabranch.gateway.store.arms import ArmRow, read_arms
from anabranch.routers.money import dollars
from anabranch.web.turns import in_thread

if TYPE_CHECKING:
    from anabranch.gateway.config import GatewayConfig
    from anabranch.gateway.store import Store


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One arm.

    Attributes:
        strategy: its name.
        requests: that came to it. cost_usd: mean dollars of one; None for none.
        units: keys (or users) that count. waiting: those that have too few answers yet.
        mean: over units: score, share of successes, or dollars; None for none.
        low, high: confidence sequence of the mean.
    """

    strategy: str
    requests: int
    cost_usd: float | None
    units: int
    waiting: int
    mean: float | None
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ABResult:
    """One test.

    Attributes:
        name: of it.
        metric, unit, share, answers, alpha: see `ABConfig`.
        a, b: both arms.
        found: ``a``, ``b`` (which is better) or ``not resolved``.
        p: anytime-valid. at: units that had come when it was resolved.
        most: upper end of the mean: 1, or the dollars that count as the worst.
        uncounted: requests with neither key nor user.
    """

    name: str
    metric: str
    unit: str
    share: float
    answers: int
    alpha: float
    a: ArmResult
    b: ArmResult
    found: str
    p: float
    at: int
    most: float
    uncounted: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, with the sentence."""
        return {**asdict(self), "sentence": self.sentence()}

    def sentence(self) -> str:
        """What it has come to."""
        units = self.a.units + self.b.units
        if self.found == "not resolved":
            each = "1 answer" if self.answers == 1 else f"{self.answers} answers"
            return (
                f"Not resolved: {units:,} {self.unit}s with {each} each leave it open whether {self.a.strategy} (a) or "
                f"{self.b.strategy} (b) is better (p {self.p:.2g}); look again whenever you like."
            )
        better, other = (self.a, self.b) if self.found == "a" else (self.b, self.a)
        what = {"score": "scored better", "success": "answers more often", "cost": "costs less"}[self.metric]
        return (
            f"{better.strategy} ({self.found}) {what} than {other.strategy}: found after {self.at:,} {self.unit}s, and right with "
            f"{1 - self.alpha:.0%} at whatever moment one looks (p {self.p:.2g})."
        )


async def results_of(store: "Store", config: "GatewayConfig") -> list[ABResult]:
    """The tests of a config as they are now; answers under other settings of a test are those of another test."""
    rows = await store.look(read_arms)
    tests = [(name, test, version_of(name, test)) for name, test in config.ab.items()]
    # Beside the event loop: of many units it takes seconds.
    return await in_thread(_results, rows, tests)


async def results_of_store(store: "Store") -> list[ABResult]:
    """All tests that a store knows, each with the settings it had last."""
    rows = await store.look(read_arms)
    newest = {row.arm["test"]: row for row in rows if isinstance(row.arm.get("test"), str)}
    tests = []
    for name, last in newest.items():
        try:
            tests.append((name, from_dict(ABConfig, last.arm.get("config")), str(last.arm.get("version"))))
        except AnabranchError:
            # Written by a version that knows other settings.
            continue
    return await in_thread(_results, rows, tests)


def _results(rows: Sequence[ArmRow], tests: Sequence[tuple[str, ABConfig, str]]) -> list[ABResult]:
    return [result_of(name, test, [row for row in rows if _is_of(row, name, version)]) for name, test, version in tests]


def result_of(name: str, config: ABConfig, rows: Sequence[ArmRow]) -> ABResult:
    """One test from its rows, in the order of the ledger."""
    counted = [row for row in rows if row.arm.get("unit") and row.arm.get("arm") in ("a", "b")]
    values = unit_means(counted, config)
    is_b_T = np.array([side == "b" for side, _ in values], bool)
    value_T = np.array([value for _, value in values], float)
    found = two_means(value_T, is_b_T, config.alpha) if len(values) else None
    arms = {side: _arm(side, config, counted, value_T[is_b_T == (side == "b")]) for side in ("a", "b")}
    return ABResult(
        name=name,
        metric=config.metric,
        unit=config.unit,
        share=config.share,
        answers=config.answers,
        alpha=config.alpha,
        **arms,
        found=(found.better if found else None) or "not resolved",
        p=found.p if found else 1.0,
        at=found.at if found else 0,
        most=config.most_usd or 1.0,
        uncounted=len(rows) - len(counted),
    )


def _is_of(row: ArmRow, name: str, version: str) -> bool:
    return row.arm.get("test") == name and row.arm.get("version") == version


def unit_means(rows: Iterable[ArmRow], config: ABConfig) -> list[tuple[str, float]]:
    """Arm and mean of each unit that counts, in the order in which they came to count; larger is better, from 0 to 1."""
    valued = [(order, row, value) for row in rows for order, value in [_valued(row, config)] if value is not None]
    held: dict[tuple[str, str], list[float]] = {}
    found = []
    for _, row, value in sorted(valued, key=lambda item: (item[0], item[1].seq)):
        unit = (row.arm["arm"], row.arm["unit"])
        answers = held.setdefault(unit, [])
        answers.append(value)
        if len(answers) == config.answers:
            found.append((unit[0], sum(answers) / len(answers)))
    return found


def _valued(row: ArmRow, config: ABConfig) -> tuple[int, float | None]:
    """When an answer could be valued, and what it is worth; None if it cannot be."""
    if config.metric == "score":
        return row.score_seq or 0, None if row.score is None else min(1.0, max(0.0, row.score))
    if config.metric == "success":
        # A sender who left had no answer, and may have left since none came. What was refused came to no model, and what a process left
        # behind when it stopped is no fault of an arm.
        return row.seq, {"ok": 1.0, "error": 0.0, "cancelled": 0.0}.get(row.status)
    # Lost calls are charged too; what failed for nothing is no cheap answer.
    is_paid, most = row.status == "ok" or row.cost_nano > 0, config.most_usd or 1.0
    return row.seq, 1 - min(1.0, dollars(row.cost_nano) / most) if is_paid else None


def _arm(side: str, config: ABConfig, rows: Sequence[ArmRow], value_T: np.ndarray) -> ArmResult:
    mine = [row for row in rows if row.arm["arm"] == side]
    seen = len({row.arm["unit"] for row in mine})
    low, high = confidence_sequence(value_T, config.alpha) if len(value_T) else (0.0, 1.0)
    mean = float(value_T.mean()) if len(value_T) else None
    if config.metric == "cost":
        most = config.most_usd or 1.0
        low, high = most * (1 - high), most * (1 - low)
        mean = None if mean is None else most * (1 - mean)
    return ArmResult(
        strategy=config.a if side == "a" else config.b,
        requests=len(mine),
        units=len(value_T),
        waiting=seen - len(value_T),
        cost_usd=dollars(sum(row.cost_nano for row in mine)) / len(mine) if mine else None,
        mean=mean,
        low=low,
        high=high,
    )
