"""The graph of what was observed: edges with effect and cost, how costs are scaled, what an edge is worth, how it is split."""
# Shapes: N queries, M models, T tasks (and one row more for queries of no known task), E edges

from dataclasses import dataclass
from typing import Literal

import numpy as np

from anabranch.errors import InputError

Scenario = Literal["performance", "balance", "cost"]

# The paper's three.
WEIGHTS: dict[str, tuple[float, float]] = {
    "performance": (1.0, 0.0),
    "balance": (0.5, 0.5),
    "cost": (0.2, 0.8),
}


def utility(effect_NM: np.ndarray, cost_NM: np.ndarray, scenario: Scenario) -> np.ndarray:
    """Weight of effect times effect - weight of cost times scaled cost; a cost of weight 0 may be unknown."""
    effect, cost = WEIGHTS[scenario]
    return effect * effect_NM - (cost * cost_NM if cost else 0.0)


def best(utility_NM: np.ndarray) -> np.ndarray:
    """Bool [N, M]: the models of most utility for each query, all of them where several tie; none where nothing is known."""
    known_NM = np.isfinite(utility_NM)
    filled_NM = np.where(known_NM, utility_NM, -np.inf)
    return known_NM & (filled_NM == filled_NM.max(1, keepdims=True))


@dataclass(frozen=True)
class CostScale:
    """Costs to [0, 1] by the least and the most of each task, as seen in what it was fitted on; a constant cost to 0.

    Attributes:
        low_T: float64 [T + 1], dollars; the last row is over all tasks, for queries of no known one.
        span_T: the most less the least, 0 where they are one.
    """

    low_T: np.ndarray
    span_T: np.ndarray

    @classmethod
    def fit(cls, cost_NM: np.ndarray, task_N: np.ndarray, num_tasks: int) -> "CostScale":
        """From training costs alone (NaN where unknown); a task without any takes the row of all."""
        low_T, high_T = np.zeros(num_tasks + 1), np.zeros(num_tasks + 1)
        for task in [num_tasks, *range(num_tasks)]:
            cost = cost_NM if task == num_tasks else cost_NM[task_N == task]
            known = cost[np.isfinite(cost)]
            if known.size:
                low_T[task], high_T[task] = known.min(), known.max()
            elif task != num_tasks:
                low_T[task], high_T[task] = low_T[-1], high_T[-1]
        return cls(low_T, high_T - low_T)

    def scale(self, cost_NM: np.ndarray, task_N: np.ndarray) -> np.ndarray:
        """Dollars to shares; beyond [0, 1] where a call is cheaper or dearer than any seen. ``task_N`` -1 is no known task."""
        low_N1, span_N1 = self.low_T[task_N][:, None], self.span_T[task_N][:, None]
        return np.where(
            span_N1 > 0,
            (cost_NM - low_N1) / np.where(span_N1 > 0, span_N1, 1.0),
            np.where(np.isnan(cost_NM), np.nan, 0.0),
        )

    def dollars(self, share_NM: np.ndarray, task_N: np.ndarray) -> np.ndarray:
        """Shares back to dollars, at least 0."""
        return np.maximum(self.low_T[task_N][:, None] + share_NM * self.span_T[task_N][:, None], 0.0)


def hold_out(group_N: np.ndarray, task_N: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Bool [N]: about ``share`` of each task's queries, whole groups of duplicates together, at least one row left of all.

    Raises InputError if ``share`` is not below 1.
    """
    if not 0 <= share < 1:
        raise InputError(f"the share held out is {share}; it must be at least 0 and below 1")
    rng = np.random.default_rng(seed)
    held_N = np.zeros(len(group_N), bool)
    taken: set[int] = set()
    for task in np.unique(task_N):
        rows = np.flatnonzero(task_N == task)
        free = [int(group) for group in dict.fromkeys(group_N[rows].tolist()) if group not in taken]
        # A question that stands under two tasks goes where the first one puts it.
        taken.update(free)
        chosen = rng.permutation(len(free))[: round(share * len(free))]
        held_N |= np.isin(group_N, np.asarray(free, np.int64)[chosen])
    return held_N if not held_N.all() else np.zeros(len(group_N), bool)
