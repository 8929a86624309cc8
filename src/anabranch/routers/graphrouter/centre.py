"""What an edge says of its model once the query's difficulty is taken out: score = mean of model + level of query + what is left.

The level against which an edge is held comes from the *other* edges of its query, and from a guess where there are few; so a lone edge
counts, though for less. With ``kappa`` = variance of what is left / variance of levels, and n edges of a query:

    level_(q, m) = (sum_{m' != m} (s_qm' - mean_m') + kappa guess_q) / (n - 1 + kappa)
    left_(q, m)  = s_qm - mean_m - level_(q, m)             weight (n - 1 + kappa) / (n + kappa)
    level_q      = (sum_m (s_qm - mean_m) + kappa guess_q) / (n + kappa)    weight n / (n + kappa)

Works on numpy arrays and torch tensors alike.
"""
# Shapes: N queries, M models, C = 1 + M columns: the level first, then what is left of each model

from typing import Any

import numpy as np

KAPPA = (0.05, 20.0)  # bounds


def centred(excess_NM: Any, seen_NM: Any, kappa: float, guess_N: Any = 0.0) -> tuple[Any, Any, Any, Any]:
    """Level [N], its weight [N], what is left [N, M] and its weight [N, M]; zeros where nothing was seen.

    Args:
        excess_NM: score less mean of the model; 0 where not seen.
        seen_NM: 1 where seen, else 0.
        kappa: see above.
        guess_N: the level expected beforehand.
    """
    total_N, count_N = excess_NM.sum(1) + kappa * guess_N, seen_NM.sum(1)
    others_NM = count_N[:, None] - seen_NM + kappa
    left_NM = (excess_NM - (total_N[:, None] - excess_NM) / others_NM) * seen_NM
    weight_NM = seen_NM * others_NM / (others_NM + 1)
    return total_N / (count_N + kappa), count_N / (count_N + kappa), left_NM, weight_NM


def means(score_NM: np.ndarray, kappa: float, rounds: int = 3) -> np.ndarray:
    """Mean of each model, [M], at queries of the usual level; that of all models for one without edges. NaN is no edge."""
    seen_NM = np.isfinite(score_NM)
    filled_NM, count_M = np.where(seen_NM, score_NM, 0.0), seen_NM.sum(0)
    overall = filled_NM.sum() / max(seen_NM.sum(), 1)
    level_N, mean_M = np.zeros(len(score_NM)), np.full(score_NM.shape[1], overall)
    for _ in range(rounds):
        mean_M = np.where(
            count_M > 0, ((filled_NM - level_N[:, None]) * seen_NM).sum(0) / np.maximum(count_M, 1), overall
        )
        level_N = ((filled_NM - mean_M) * seen_NM).sum(1) / (seen_NM.sum(1) + kappa)
    return mean_M


def kappa_of(score_NM: np.ndarray) -> float:
    """Variance of what is left over variance of levels, from queries with two edges or more; 1 where there are too few."""
    seen_NM = np.isfinite(score_NM)
    rows = seen_NM.sum(1) >= 2
    if rows.sum() < 2:
        return 1.0
    excess_NM = np.where(seen_NM, score_NM - means(score_NM, 1.0), 0.0)[rows]
    count_N = seen_NM[rows].sum(1)
    level_N = excess_NM.sum(1) / count_N
    within = (((excess_NM - level_N[:, None]) * seen_NM[rows]) ** 2).sum() / (count_N - 1).sum()
    between = level_N.var() - within * (1 / count_N).mean()
    return float(np.clip(within / max(between, 1e-12), *KAPPA))
