"""Best model per task: a model's expected score is its mean score on the task the query is said to be of.

    quality_M = (sum of scores of M in the task + prior mean_M) / (rows of the task + prior)

Uses the true task, where the sender or the data names one, and no vector: coarse domain structure alone, which is most of what
routers gain (LLMRouterBench; Varangot-Reille et al. 2025, arXiv 2502.00409). For a task never seen, or none, the overall mean.
"""
# Shapes: N queries, M models, T tasks

from typing import Any, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.strategies.training import closed, means, shrunk, totals, training_set


class TaskBest(Predictor, kind="task"):
    """Mean score of a model in the query's task, pulled to its overall mean."""

    @configclass
    class Config(Predictor.Config):
        """Attributes: ``prior``, rows' worth of pull of a task's mean to the overall mean."""

        prior: float = Field(default=5.0, ge=0)

    needs_vector = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tasks: dict[str, int] = {}
        self.score_TM, self.cost_TM = np.zeros((1, 0)), np.zeros((1, 0))
        self.count_T = np.zeros(1)

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Means of every task over what is known; the last row is for unknown tasks."""
        training_set(data, "task", vector=False)
        self.models = data.models
        self.tasks = {task: at for at, task in enumerate(sorted({task for task in data.task if task is not None}))}
        group_N = self._groups(data)
        self.count_T = np.bincount(group_N, minlength=len(self.tasks) + 1).astype(float)
        self.score_TM = self._means(data.score_NM, group_N)
        self.cost_TM = (
            np.zeros((len(self.tasks) + 1, 0)) if data.cost_NM is None else self._means(data.cost_NM, group_N)
        )
        return self

    def _groups(self, data: Recorded) -> np.ndarray:
        """Row of each query's task."""
        return np.array(
            [self.tasks.get(task, len(self.tasks)) if task is not None else len(self.tasks) for task in data.task],
            np.int64,
        )

    def _means(self, value_NM: np.ndarray, group_N: np.ndarray) -> np.ndarray:
        mean_M = means(value_NM)
        mean_TM = shrunk(*totals(value_NM, group_N, len(self.tasks) + 1), self.config.prior, mean_M)
        mean_TM[-1] = mean_M
        mean_TM[:, np.isnan(mean_M)] = np.nan
        return mean_TM

    def predict(self, data: Recorded) -> Prediction:
        """Of every row."""
        group_N = self._groups(data)
        cost_NM = self.cost_TM[group_N] if self.cost_TM.shape[1] else None
        return Prediction(quality_NM=closed(self.score_TM[group_N], self.score_TM[-1]), cost_NM=cost_NM)

    def explain(self, query: Query) -> Facts:
        """The task, and how many recorded queries it goes by."""
        at = self.tasks.get(query.task or "", -1)
        return {
            "task": query.task,
            "is_known": at >= 0,
            "queries": int(self.count_T[at] if at >= 0 else self.count_T.sum()),
        }

    def state(self) -> tuple[Arrays, Facts]:
        """Tasks and means."""
        return {"score_TM": self.score_TM, "cost_TM": self.cost_TM, "count_T": self.count_T}, {
            "tasks": list(self.tasks)
        }

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self.score_TM, self.cost_TM, self.count_T = arrays["score_TM"], arrays["cost_TM"], arrays["count_T"]
        self.tasks = {task: at for at, task in enumerate(facts["tasks"])}
