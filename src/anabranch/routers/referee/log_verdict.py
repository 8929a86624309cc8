"""The verdict of a log, in which each question was answered by the model that was drawn for it.

As `judging`, on doubly robust values in place of scores: q(x, chosen) + w (r - q(x, asked)), see `off_policy`, whose mean is the score
that a strategy would have earned; costs likewise. Only rows whose choice was drawn count. Each copy of a question was drawn for itself;
what one question tells is their mean, and it counts as often as it came, but at most `HEAVIEST` times the mean of all, so that no popular
one decides for the others.

The log tells nothing of choices that it cannot have made: there q is a guess. Their share is what the mean weight of a strategy's choices,
model by model, falls short of 1, where it and the best single model part; so much of the range of scores (and of the dearest answer's cost)
is added to the interval on both sides, and a strategy whose choices the log surely cannot have made is not compared. The best single model
is chosen on the part of the log that was learned from.
"""
# Shapes: N rows, R of them drawn, G different questions, S strategies

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Pool
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.data.splits import groups
from anabranch.routers.referee.bounds import Binned
from anabranch.routers.referee.judging import Contender, compared, decide
from anabranch.routers.referee.off_policy import expected, weights
from anabranch.routers.referee.verdict import MARGIN, Kind, Verdict, undecided
from anabranch.routers.score_scale import range_of
from anabranch.routers.strategies.fixed import Static

# Mean weight of a strategy's matches, which is 1 but for chance where the log may have made all of its choices.
LEAST_SUPPORT = 0.95

# Of the mean weight of a question.
HEAVIEST = 3.0

# That a strategy is left out though the log supports it.
_LEVEL = 0.025


@dataclass(frozen=True)
class _Values:
    """What one strategy is worth on each question, and its choices on the drawn rows; ``unfit`` says why it cannot be told."""

    quality_G: np.ndarray
    cost_G: np.ndarray | None
    model_R: np.ndarray
    unfit: str


def bounded(count_G: np.ndarray, heaviest: float = HEAVIEST) -> np.ndarray:
    """Counts, none above ``heaviest`` times their mean, as shares of that mean."""
    count_G = np.asarray(count_G, float)
    while count_G.max() > heaviest * count_G.mean() * (1 + 1e-9):
        count_G = np.minimum(count_G, heaviest * count_G.mean())
    return count_G / count_G.mean()


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
        count_G = np.bincount(self.group_R)
        self.share_G = bounded(count_G)
        # Of a row in a mean over questions.
        self.share_R = (self.share_G / count_G)[self.group_R]
        self.quality_NM = np.clip(expected(log, seed), *range_of(log.score_NM))
        self.cost_NM: np.ndarray | None = None
        if log.cost_NM is not None and np.isfinite(log.cost_NM).any(1).all():
            self.cost_NM = np.clip(expected(replace(log, score_NM=log.cost_NM), seed), 0.0, None)

    @property
    def heaviest(self) -> float:
        """The most that a row of one question may weigh: the inverse of the smallest chance, times what the question counts."""
        return float(self.weight_NM[self.rows].max()) * float(self.share_G.max())

    @property
    def span(self) -> float:
        """Of scores."""
        low, high = range_of(self.log.score_NM)
        return high - low

    @property
    def reach(self) -> float:
        """The most that a question may change: with q between the lowest and the highest score, w times their difference."""
        return self.span * self.heaviest

    def values(self, strategy: Strategy) -> _Values:
        """Of one strategy."""
        rows, log = self.rows, self.log
        model_R = strategy.play(log, self.pool).model_N[rows]
        weight_R = self.weight_NM[rows, model_R]
        cost_G = None
        if self.cost_NM is not None and log.cost_NM is not None:
            cost_G = self._robust(self.cost_NM, log.cost_NM, model_R, weight_R)
        quality_G = self._robust(self.quality_NM, log.score_NM, model_R, weight_R)
        return _Values(quality_G, cost_G, model_R, self._unfit(self._by_question(weight_R)))

    def _unfit(self, weight_G: np.ndarray) -> str:
        """Why the mean weight is not that of choices which the log may have made; "" if it may be."""
        low = Binned.of(weight_G).lower(_LEVEL, 0.0)
        high = -Binned.of(-weight_G).lower(_LEVEL, -self.heaviest)
        if high < LEAST_SUPPORT:
            return f"the log may have made only about {weight_G.mean():.0%} of its choices"
        return "it draws as the log did; judge it with another seed" if low > 1 / LEAST_SUPPORT else ""

    def _robust(
        self, expected_NM: np.ndarray, seen_NM: np.ndarray, model_R: np.ndarray, weight_R: np.ndarray
    ) -> np.ndarray:
        expected_R, seen_R = expected_NM[self.rows, model_R], seen_NM[self.rows, model_R]
        return self._by_question(expected_R + np.where(np.isfinite(seen_R), weight_R * (seen_R - expected_R), 0.0))

    def _by_question(self, value_R: np.ndarray) -> np.ndarray:
        """Means over the copies of each question, times what it counts."""
        return np.bincount(self.group_R, self.share_R * value_R)

    def unsupported(self, model_R: np.ndarray, counts_R: np.ndarray) -> float:
        """Share of all choices that are among ``counts_R``, and that the log cannot have made: by each model, what weights lack of 1."""
        lack_R = np.where(counts_R, self.share_R * (1 - self.weight_NM[self.rows, model_R]), 0.0)
        return float(np.maximum(np.bincount(model_R, lack_R), 0).sum()) / len(self.share_G)

    def contender(self, kind: Kind, name: str, one: _Values, best: _Values) -> Contender:
        """One beside the best single model."""
        parts_R = one.model_R != best.model_R
        share = self.unsupported(one.model_R, parts_R) + self.unsupported(best.model_R, parts_R)
        dearest = 0.0 if self.log.cost_NM is None else float(np.nanmax(self.log.cost_NM, initial=0.0))
        return compared(
            kind,
            name,
            one.quality_G,
            one.cost_G,
            best.quality_G,
            best.cost_G,
            doubt=share * self.span,
            cost_doubt=share * dearest,
            weight=self.heaviest,
        )


def verdict_of_log(
    strategies: Mapping[str, Strategy],
    log: Recorded,
    pool: Pool,
    *,
    learned: Recorded | None = None,
    margin: float = MARGIN,
    seed: int = 0,
) -> Verdict:
    """What a log says of fitted strategies.

    Args:
        strategies: by name, fitted on other questions.
        log: each answer as it was chosen, see `replay`.
        pool: models to choose among.
        learned: answers to choose the best single model on; None, or none that was drawn, chooses it on ``log``.
        margin: share of the range of scores within which qualities are equal.
        seed: of what the regressions are learned on.
    """
    low, high = range_of(log.score_NM)
    part, equal = _Log(log, pool, seed), margin * (high - low)
    if not len(part.rows):
        return undecided(
            "Not resolved: no choice of the log was drawn, so it does not tell what other models would have earned.",
            len(part.log),
            equal,
        )
    alone = {name: Static(Static.Config(model=name)) for name in pool.names}
    single = {name: part.values(one) for name, one in alone.items()}
    fit = [name for name, one in single.items() if not one.unfit]
    if not fit:
        return undecided("Not resolved: the log has too few drawn answers of every model.", len(part.share_G), equal)
    before = None if learned is None else _Log(learned, pool, seed)
    chosen_on = "test" if before is None or not len(before.rows) else "train"
    known = single if before is None or chosen_on == "test" else {name: before.values(alone[name]) for name in fit}
    best_name = max(fit, key=lambda name: float(known[name].quality_G.mean()))
    best = single[best_name]
    found = {name: part.values(one) for name, one in strategies.items()}
    contenders = [part.contender("strategy", name, one, best) for name, one in found.items() if not one.unfit]
    others = [[part.contender("model", name, single[name], best)] for name in fit if name != best_name]
    return decide(
        contenders,
        [*([one] for one in contenders), *others],
        best_name,
        questions=len(part.share_G),
        reach=part.reach,
        score_range=(low, high),
        most=part.span,
        chosen_on=chosen_on,
        margin=equal,
        unfit={name: one.unfit for name, one in found.items() if one.unfit},
    )
