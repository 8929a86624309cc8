"""Asking models one after another until an answer is good enough: what cascades of all kinds share.

    ask model 1;  if confidence(answer) >= t_1 give it,  else ask model 2;  ...;  the last model's answer is given in any case

A strategy of this family says how sure it is of an answer; here the chain and its thresholds are chosen, and every call is counted.

Chains of up to ``max_length`` models are tried with thresholds at quantiles of the confidence on recorded outcomes (FrugalGPT's
problem: maximise quality under a budget; Chen, Zaharia and Zou 2023, arXiv 2305.05176, eq. 2 and 3). Of all of them the *frontier*
is kept, the upper hull of mean quality over mean cost, and a trade-off or a budget picks a point of it, so that one fitted
strategy serves the whole curve.
"""
# Shapes: N queries, M models, K models of a chain, G cuts, F points of the frontier

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError, DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.knobs import LAMBDA, THRESHOLD, knob_of
from anabranch.routers.contract.query import Decision, Pool, Query
from anabranch.routers.contract.strategy import Arrays, Facts, Played, Strategy, ordered
from anabranch.routers.strategies.rules import by_price
from anabranch.routers.strategies.semantic import listed
from anabranch.routers.strategies.training import check_compared, means, training_set

# A threshold that no confidence reaches; finite, so that JSON can hold it.
NEVER = 1e300


@dataclass(frozen=True)
class Chain:
    """Models in order, with the confidence from which each answer but the last one's is given.

    Attributes:
        models: names.
        thresholds: of all but the last.
        cost: mean dollars a query on the data it was chosen on.
        quality: mean score there.
    """

    models: tuple[str, ...]
    thresholds: tuple[float, ...]
    cost: float = 0.0
    quality: float = 0.0


class Escalating(Strategy):
    """Base of cascades. A subclass says ``confidences`` of recorded answers; how live ones are asked for and judged is `Chained`'s."""

    @configclass
    class Config(Strategy.Config):
        """Which chain.

        Attributes:
            models: the chain, in order; empty to choose it in ``fit``, and before that to go from cheap to dear through the pool.
            threshold: confidence from which an answer is given, before ``fit`` chooses thresholds.
            trade_off: score given up to save a dollar on one query.
            budget: dollars a query, on average, that may be spent; takes the place of ``trade_off``.
            max_length: models in a chain that ``fit`` tries.
            num_cuts: thresholds tried for each place in a chain.
        """

        models: tuple[str, ...] = ()
        threshold: float = 0.5
        trade_off: float = Field(default=0.0, ge=0)
        budget: float | None = Field(default=None, gt=0)
        max_length: int = Field(default=2, ge=1, le=3)
        num_cuts: int = Field(default=20, ge=2)

        def __post_init__(self) -> None:
            if len(set(self.models)) < len(self.models):
                raise ConfigError(f"models is {list(self.models)}; a chain asks each model once")

    knob = "trade_off"
    sender_knobs = (LAMBDA, THRESHOLD)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.frontier: list[Chain] = []

    # -- what a kind of cascade says

    def confidences(self, data: Recorded) -> np.ndarray:
        """``[N, M]`` of recorded answers; NaN where unknown, which never passes. Raises DataError if the data do not tell."""
        raise NotImplementedError

    def learn(self, data: Recorded, *, seed: int) -> np.ndarray:
        """Learn to say it, and say it of the same data as if they had not been seen."""
        return self.confidences(data)

    def calls_for(self, is_last: bool) -> float:
        """Calls' worth of cost of one answer and of what is done to judge it. The last answer of a chain is not judged."""
        return 1.0

    # -- learning

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Choose chains and thresholds on recorded outcomes. Raises DataError without costs."""
        training_set(data, self.name, vector=self.needs_vector, cost=True)
        if len(data.models) > 1:
            check_compared(data.score_NM, self.name)
        confidence_NM = self.learn(data, seed=seed)
        unknown = [name for name in self.config.models if name not in data.models]
        if unknown:
            raise InputError(
                f"{self.name}.models has {unknown[0]!r}, which is not among the recorded: {', '.join(data.models)}"
            )
        found = [chain for models in self._chains(data) for chain in self._tried(data, confidence_NM, models)]
        if not found:
            raise DataError(
                f"{self.name} found no chain of models whose scores and costs are known for the same queries"
            )
        self.frontier = frontier_of(found)
        return self

    def _chains(self, data: Recorded) -> Iterator[tuple[int, ...]]:
        """Columns of the chains to try: the written one, or all up to the length, each from cheap to dear."""
        if self.config.models:
            yield tuple(data.models.index(name) for name in self.config.models)
            return
        assert data.cost_NM is not None
        cost_M = means(data.cost_NM)
        usable = [int(at) for at in np.argsort(cost_M, kind="stable") if np.isfinite(cost_M[at])]
        for length in range(1, self.config.max_length + 1):
            yield from itertools.combinations(usable, length)

    def _tried(self, data: Recorded, confidence_NM: np.ndarray, models: tuple[int, ...]) -> Iterator[Chain]:
        """The frontier of one chain over its thresholds."""
        assert data.cost_NM is not None
        columns = list(models)
        rows = np.flatnonzero(
            (np.isfinite(data.score_NM[:, columns]) & np.isfinite(data.cost_NM[:, columns])).all(axis=1)
        )
        if not len(rows):
            return
        names = tuple(data.models[column] for column in columns)
        score_NK, cost_NK = data.score_NM[rows][:, columns], data.cost_NM[rows][:, columns]
        calls_K = np.array([self.calls_for(place == len(columns) - 1) for place in range(len(columns))])
        cuts = [_cuts(confidence_NM[rows, column], self.config.num_cuts) for column in columns[:-1]]
        accept = [
            confidence_NM[rows, column][:, None] >= cut_G for column, cut_G in zip(columns[:-1], cuts, strict=True)
        ]
        quality, cost = outcomes(score_NK, cost_NK * calls_K, accept)
        points = [
            Chain(
                names,
                tuple(float(cut_G[at]) for cut_G, at in zip(cuts, place, strict=True)),
                float(cost[place]),
                float(quality[place]),
            )
            for place in np.ndindex(quality.shape)
        ]
        yield from frontier_of(points)

    # -- deciding

    @property
    def chain(self) -> Chain | None:
        """The point of the frontier that the trade-off or the budget picks; None before ``fit``."""
        return self.chain_at(None)

    def chain_at(self, trade_off: float | None) -> Chain | None:
        """That of a sender's trade-off, within the budget if there is one; None for the strategy's own."""
        if not self.frontier:
            return None
        within, budget = self.frontier, self.config.budget
        if budget is not None:
            within = [chain for chain in self.frontier if chain.cost <= budget] or self.frontier[:1]
            if trade_off is None:
                return within[-1]
        weight = self.config.trade_off if trade_off is None else trade_off
        return max(within, key=lambda chain: chain.quality - weight * chain.cost)

    def route(self, query: Query, pool: Pool) -> Decision:
        """The chain, then the rest of the pool in case all of it fails. Raises InputError if the pool has none of the chain."""
        chain = self.chain_at(knob_of(query.knobs, LAMBDA))
        if chain is None and self.needs_fit:
            raise InputError(f"{self.name} has not learned yet: fit it on recorded outcomes first")
        models = (
            chain.models if chain is not None else self.config.models or tuple(pool.names[at] for at in by_price(pool))
        )
        known = [name for name in models if name in pool.names]
        if not known:
            raise InputError(f"{self.name} asks {', '.join(models)}; the pool has {', '.join(pool.names)}")
        return Decision(
            candidates=ordered(pool, listed(known, pool)),
            strategy=self.name,
            reason=f"{self.name}: {' then '.join(known)}",
            details={"chain": known, "thresholds": {name: self.threshold_of(name, query) for name in known}},
        )

    def threshold_of(self, model: str, query: Query) -> float | None:
        """Confidence from which an answer of this model is given to a query; None if it always is. Raises InputError for odd knobs."""
        wanted = knob_of(query.knobs, THRESHOLD, 1.0)
        chain = self.chain_at(knob_of(query.knobs, LAMBDA))
        if chain is not None:
            own = dict(zip(chain.models, chain.thresholds, strict=False)).get(model)
            return own if own is None or wanted is None else wanted
        if self.config.models and model in self.config.models[-1:]:
            return None
        return self.config.threshold if wanted is None else wanted

    # -- judging

    def knobs(self, data: Recorded) -> list[float]:
        """Trade-offs that pick each point of the frontier once, from dear to cheap."""
        slope = [
            (dear.quality - cheap.quality) / (dear.cost - cheap.cost)
            for cheap, dear in itertools.pairwise(self.frontier)
        ][::-1]
        return (
            [0.0, *(0.5 * (low + high) for low, high in zip(slope, [*slope[1:], slope[-1] * 3], strict=True))]
            if slope
            else [0.0]
        )

    def with_knob(self, value: float) -> "Escalating":
        """What was learned at another trade-off."""
        other: Escalating = self.config.replace(trade_off=value, budget=None).build()
        other.load_state(*self.state())
        return other

    def play(self, data: Recorded, pool: Pool) -> Played:
        """Run the chain on every row, counting every call. Raises InputError before ``fit`` where no chain was written down."""
        chain = self.chain or Chain(self.config.models, (self.config.threshold,) * (len(self.config.models) - 1))
        names = [name for name in chain.models if name in data.models and name in pool.names]
        if not names:
            raise InputError(
                f"{self.name} has no chain of models that are recorded and in the pool; fit it, or set models"
            )
        columns = [data.models.index(name) for name in names]
        calls_K = [self.calls_for(place == len(columns) - 1) for place in range(len(columns))]
        threshold_of = dict(zip(chain.models, chain.thresholds, strict=False))
        confidence_NM = self.confidences(data) if len(columns) > 1 else np.zeros(data.score_NM.shape)
        accept_NK = np.stack(
            [
                confidence_NM[:, column] >= threshold_of.get(name, -np.inf)
                for column, name in zip(columns, names, strict=True)
            ],
            axis=1,
        )
        return run(data, columns, accept_NK, np.array(calls_K))

    def state(self) -> tuple[Arrays, Facts]:
        """The frontier."""
        return {}, {"frontier": [asdict(chain) for chain in self.frontier]}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self.frontier = [
            Chain(tuple(one["models"]), tuple(one["thresholds"]), one["cost"], one["quality"])
            for one in facts["frontier"]
        ]


def run(data: Recorded, columns: list[int], accept_NK: np.ndarray, calls_NK: np.ndarray) -> Played:
    """Ask the columns in order until one is accepted; the last is in any case. ``calls_NK`` is the calls' worth of cost of each."""
    accept_NK = accept_NK.copy()
    accept_NK[:, -1] = True
    stop_N = accept_NK.argmax(axis=1)
    asked_NK = np.arange(len(columns)) <= stop_N[:, None]
    rows, model_N = np.arange(len(data)), np.asarray(columns)[stop_N]
    calls_NM = np.zeros(data.score_NM.shape, bool)
    calls_NM[:, columns] = asked_NK
    cost_N = np.full(len(data), np.nan)
    if data.cost_NM is not None:
        cost_N = np.where(asked_NK, data.cost_NM[:, columns] * calls_NK, 0.0).sum(axis=1)
    return Played(model_N=model_N, quality_N=data.score_NM[rows, model_N], cost_N=cost_N, calls_NM=calls_NM)


def outcomes(score_NK: np.ndarray, cost_NK: np.ndarray, accept: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean quality and cost of a chain at every choice of cuts, ``[G_1, ..., G_K-1]``.

    From the last model backwards: value_k = score_k where accepted, else value_k+1. The first place is summed out by a product of matrices.

    Args:
        score_NK: of each model's answer.
        cost_NK: of asking each model.
        accept: bool ``[N, G]`` for every place but the last.
    """
    count = len(score_NK)
    value, spent = score_NK[:, -1:], cost_NK[:, -1:]  # [N, cuts of later places, flattened]
    shape: tuple[int, ...] = ()
    for place in range(len(accept) - 1, -1, -1):
        stop_NG = accept[place].astype(float)
        shape = (stop_NG.shape[1], *shape)
        if place == 0:
            quality = (score_NK[:, 0] @ stop_NG)[:, None] + (1 - stop_NG).T @ value
            cost = cost_NK[:, 0].sum() + (1 - stop_NG).T @ spent
            return (quality / count).reshape(shape), (cost / count).reshape(shape)
        go_on = (1 - stop_NG)[:, :, None]
        value = (score_NK[:, place, None, None] * (1 - go_on) + go_on * value[:, None]).reshape(count, -1)
        spent = (cost_NK[:, place, None, None] + go_on * spent[:, None]).reshape(count, -1)
    return value.mean(0).reshape(shape), spent.mean(0).reshape(shape)


def frontier_of(chains: list[Chain]) -> list[Chain]:
    """Upper hull of quality over cost, from cheap to dear, quality rising; of equals the shorter chain."""
    order = sorted(chains, key=lambda chain: (chain.cost, -chain.quality, len(chain.models)))
    kept: list[Chain] = []
    for chain in order:
        if kept and chain.quality <= kept[-1].quality:
            continue
        while len(kept) > 1 and _is_below(kept[-2], kept[-1], chain):
            kept.pop()
        kept.append(chain)
    return kept


def _is_below(left: Chain, middle: Chain, right: Chain) -> bool:
    """Whether the middle point does not lie above the line between the others."""
    rise = (middle.quality - left.quality) * (right.cost - left.cost)
    return rise <= (right.quality - left.quality) * (middle.cost - left.cost)


def _cuts(confidence_N: np.ndarray, count: int) -> np.ndarray:
    """Thresholds to try: accept all, quantiles, accept none."""
    known = confidence_N[np.isfinite(confidence_N)]
    if not len(known):
        return np.array([NEVER])
    return np.unique(
        np.concatenate(
            ([known.min()], np.quantile(known, np.linspace(0, 1, count + 1)[1:-1], method="higher"), [NEVER])
        )
    )
