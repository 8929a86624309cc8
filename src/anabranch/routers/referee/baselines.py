"""What every router must be held against: random choice, each single model, the best of them, the best for each task, mixing, the oracle.

The best single model and the best of each task are chosen on the outcomes that routers learn from, where there are some, and judged
on the test: they are routers too, only simple ones.
"""
# Shapes: N queries, M models, P points of a curve

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anabranch.routers.contract.dataset import Recorded

# Of the oracle's curve.
TRADE_OFFS = 61


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Outcome of a rule on the test.

    Attributes:
        quality_N: of each query.
        cost_N: dollars of each; None where costs are not known.
        curve_P2: points of mean cost and quality; None where costs are not known.
        facts: what else to say, ready for JSON.
    """

    quality_N: np.ndarray
    cost_N: np.ndarray | None
    curve_P2: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def point(self) -> tuple[float, float] | None:
        """Mean cost and quality; None where costs are not known."""
        return None if self.cost_N is None else (float(self.cost_N.mean()), float(self.quality_N.mean()))


def random_choice(test: Recorded) -> Baseline:
    """Every model alike, in expectation."""
    return _at_points(test.score_NM.mean(1), None if test.cost_NM is None else test.cost_NM.mean(1))


def single(test: Recorded, model: str) -> Baseline:
    """Always this one."""
    return _chosen(test, np.full(len(test), test.models.index(model)), {"model": model})


def best_single(learned: Recorded, test: Recorded) -> Baseline:
    """The model with the best mean score of what is ``learned`` from; of equals the cheaper one."""
    return single(test, test.models[_best(learned.only(test.models), np.arange(len(learned)))])


def best_per_task(learned: Recorded, test: Recorded) -> Baseline | None:
    """The best model of each query's true task, the best single one for tasks not seen; None if no task is known."""
    learned = learned.only(test.models)
    task_N = np.array([task or "" for task in learned.task], dtype=object)
    if not any(learned.task):
        return None
    best = {task: _best(learned, np.flatnonzero(task_N == task)) for task in sorted(set(task_N))}
    otherwise = _best(learned, np.arange(len(learned)))
    chosen_N = np.array([best.get(task or "", otherwise) for task in test.task])
    named = {task: test.models[model] for task, model in best.items() if task}
    return _chosen(test, chosen_N, {"models": named})


def oracle(test: Recorded) -> Baseline:
    """The best answer of each query, the cheapest of equals; its curve gives up quality for cost in hindsight."""
    tie = 0.0 if test.cost_NM is None else 1e-9 * test.cost_NM / max(float(test.cost_NM.max()), 1e-300)
    found = _chosen(test, np.argmax(test.score_NM - tie, axis=1), {})
    if test.cost_NM is None:
        return found
    span = float(np.ptp(test.cost_NM)) or 1.0
    worth_KNM = [test.score_NM - trade_off * test.cost_NM for trade_off in np.logspace(-3, 3, TRADE_OFFS) / span]
    points = [_chosen(test, np.argmax(worth_NM, axis=1), {}).point for worth_NM in worth_KNM]
    return Baseline(quality_N=found.quality_N, cost_N=found.cost_N, curve_P2=np.array([found.point, *points]))


def mixing(test: Recorded) -> np.ndarray | None:
    """``[M, 2]``: cost and quality of each model alone. Its hull is what drawing among them at random can reach."""
    return None if test.cost_NM is None else np.column_stack([test.cost_NM.mean(0), test.score_NM.mean(0)])


def _chosen(test: Recorded, model_N: np.ndarray, facts: dict[str, Any]) -> Baseline:
    rows = np.arange(len(test))
    cost_N = None if test.cost_NM is None else test.cost_NM[rows, model_N]
    return _at_points(test.score_NM[rows, model_N], cost_N, facts)


def _at_points(quality_N: np.ndarray, cost_N: np.ndarray | None, facts: dict[str, Any] | None = None) -> Baseline:
    curve_P2 = None if cost_N is None else np.array([[cost_N.mean(), quality_N.mean()]])
    return Baseline(quality_N=quality_N, cost_N=cost_N, curve_P2=curve_P2, facts=facts or {})


def _best(data: Recorded, rows: np.ndarray) -> int:
    """The model with the best mean score of these rows, over what is known; of equals the cheaper one."""
    score_M = _mean(data.score_NM[rows])
    cost_M = np.zeros(len(score_M)) if data.cost_NM is None else np.nan_to_num(_mean(data.cost_NM[rows]), nan=np.inf)
    best = np.nanmax(score_M) if np.isfinite(score_M).any() else np.nan
    equal = np.flatnonzero(score_M >= best - 1e-12)
    return int(equal[np.argmin(cost_M[equal])]) if len(equal) else 0


def _mean(value_NM: np.ndarray) -> np.ndarray:
    known_NM = np.isfinite(value_NM)
    count_M = known_NM.sum(0)
    return np.where(count_M > 0, np.where(known_NM, value_NM, 0).sum(0) / np.maximum(count_M, 1), np.nan)
