"""The verdict of a log, in which each question was answered by the model that was drawn for it.

As `verdict`, on doubly robust values in place of scores: q(x, chosen) + w (r - q(x, asked)), see `replay`, whose mean is the score that a
strategy would have earned; costs likewise. Only rows whose choice was drawn count, copies of a question together. A strategy whose
choices the log cannot have made is not compared. The best single model is chosen on the part of the log that was learned from.
"""
# Shapes: N rows, G different questions, S strategies

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Pool
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.data.splits import groups
from anabranch.routers.referee.compare import bootstrap, holm
from anabranch.routers.referee.off_policy import expected, weights
from anabranch.routers.referee.verdict import MARGIN, Verdict, compared, decide, reach_of, undecided
from anabranch.routers.strategies.fixed import Static

# Mean weight of a strategy's matches, which is 1 but for chance where the log may have made all of its choices.
LEAST_SUPPORT = 0.95
_Z = 1.96


@dataclass(frozen=True)
class _Values:
    """What one strategy is worth on each question; ``unfit`` says why it cannot be told."""

    quality_G: np.ndarray
    cost_G: np.ndarray | None
    unfit: str


class _Log:
    """Rows that were drawn, and what is expected of each model there."""

    def __init__(self, log: Recorded, pool: Pool, seed: int) -> None:
        known_NM = np.isfinite(log.score_NM)
        log = log.take(np.flatnonzero(known_NM.any(1)))
        self.log, self.pool = log, pool
        self.weight_NM, self.drawn_N = weights(log, np.isfinite(log.score_NM))
        self.rows = np.flatnonzero(self.drawn_N)
        if not len(self.rows):
            return
        self.group_R = np.unique(groups(log)[self.rows], return_inverse=True)[1]
        self.count_G = np.bincount(self.group_R)
        self.quality_NM = expected(log, seed)
        self.cost_NM: np.ndarray | None = None
        if log.cost_NM is not None and np.isfinite(log.cost_NM).any(1).all():
            self.cost_NM = expected(replace(log, score_NM=log.cost_NM), seed)

    @property
    def reach(self) -> float:
        """The most that a question may change."""
        heaviest = float(self.weight_NM[self.rows].max())
        return reach_of(self.log.score_NM) * (1 + heaviest) * float(self.count_G.max() / self.count_G.mean())

    def values(self, strategy: Strategy) -> _Values:
        """Of one strategy."""
        rows, log = self.rows, self.log
        model_R = strategy.play(log, self.pool).model_N[rows]
        weight_R = self.weight_NM[rows, model_R]
        cost_G = None
        if self.cost_NM is not None and log.cost_NM is not None:
            cost_G = self._robust(self.cost_NM, log.cost_NM, model_R, weight_R)
        quality_G = self._robust(self.quality_NM, log.score_NM, model_R, weight_R)
        support_G = self._by_question(weight_R)
        half = _Z * float(support_G.std()) / np.sqrt(len(support_G))
        mean, unfit = float(support_G.mean()), ""
        if mean + half < LEAST_SUPPORT:
            unfit = f"the log may have made only about {mean:.0%} of its choices"
        elif mean - half > 1 / LEAST_SUPPORT:
            unfit = "it draws as the log did; judge it with another seed"
        return _Values(quality_G, cost_G, unfit)

    def _robust(
        self, expected_NM: np.ndarray, seen_NM: np.ndarray, model_R: np.ndarray, weight_R: np.ndarray
    ) -> np.ndarray:
        expected_R, seen_R = expected_NM[self.rows, model_R], seen_NM[self.rows, model_R]
        return self._by_question(expected_R + np.where(np.isfinite(seen_R), weight_R * (seen_R - expected_R), 0.0))

    def _by_question(self, value_R: np.ndarray) -> np.ndarray:
        """So that the mean over questions is that over rows."""
        return np.bincount(self.group_R, value_R) / self.count_G.mean()


def verdict_of_log(
    strategies: Mapping[str, Strategy], log: Recorded, pool: Pool, *, learned: Recorded | None = None, margin: float = MARGIN, seed: int = 0
) -> Verdict:  # fmt: skip
    """What a log says of fitted strategies.

    Args:
        strategies: by name, fitted on other questions.
        log: each answer as it was chosen, see `replay`.
        pool: models to choose among.
        learned: answers to choose the best single model on; None, or none that was drawn, chooses it on ``log``.
        margin: share of the range of scores within which qualities are equal.
        seed: of what the regressions are learned on.
    """
    part, equal = _Log(log, pool, seed), margin * reach_of(log.score_NM)
    if not len(part.rows):
        return undecided("Not resolved: no choice of the log was drawn, so it does not tell what other models would have earned.",
                         len(part.log), equal)  # fmt: skip
    alone = {name: Static(Static.Config(model=name)) for name in pool.names}
    single = {name: part.values(one) for name, one in alone.items()}
    fit = [name for name, one in single.items() if not one.unfit]
    if not fit:
        return undecided("Not resolved: the log has too few drawn answers of every model.", len(part.count_G), equal)
    before = None if learned is None else _Log(learned, pool, seed)
    chosen_on = "test" if before is None or not len(before.rows) else "train"
    known = single if before is None or chosen_on == "test" else {name: before.values(alone[name]) for name in fit}
    best_name = max(fit, key=lambda name: float(known[name].quality_G.mean()))
    best = single[best_name]
    found = {name: part.values(one) for name, one in strategies.items()}
    judged = {name: one for name, one in found.items() if not one.unfit}
    contenders = [
        compared("strategy", name, one.quality_G, one.cost_G, best.quality_G, best.cost_G)
        for name, one in judged.items()
    ]
    others = [
        [compared("model", name, single[name].quality_G, single[name].cost_G, best.quality_G, best.cost_G)]
        for name in fit
        if name != best_name
    ]
    gain_GS = np.column_stack([one.quality_G - best.quality_G for one in judged.values()]) if judged else None
    corrected = [] if gain_GS is None else holm([one.p for one in bootstrap(gain_GS)])
    return decide(
        contenders, [*([one] for one in contenders), *others], best_name, dict(zip(judged, corrected, strict=True)),
        questions=len(part.count_G), reach=part.reach, chosen_on=chosen_on, margin=equal,
        unfit={name: one.unfit for name, one in found.items() if one.unfit},
    )  # fmt: skip
