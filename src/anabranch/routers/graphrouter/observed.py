"""`Observed`: what a graph router learns from."""
# Shapes: N queries, M models, T tasks, D, V dimensions

from dataclasses import dataclass

import numpy as np

__all__ = ["Observed"]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Queries with what models made of them, and the vectors of tasks and models.

    Attributes:
        vector_ND: unit vectors of queries.
        share_NT: how much of each task they are.
        task_N: their tasks.
        group_N: duplicates share a number.
        held_N: bool, validation queries.
        effect_NM: NaN where not observed.
        cost_NM: scaled.
        task_TV: of tasks.
        model_MV: of models.
    """

    vector_ND: np.ndarray
    share_NT: np.ndarray
    task_N: np.ndarray
    group_N: np.ndarray
    held_N: np.ndarray
    effect_NM: np.ndarray
    cost_NM: np.ndarray
    task_TV: np.ndarray
    model_MV: np.ndarray
