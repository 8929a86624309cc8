"""Routing by predicted quality: a `Predictor` says what each model's answer would be worth, `Ranked` does the rest.

Most published routers are one new predictor. What they share is here: predicted quality minus ``trade_off`` times predicted cost decides
(the Lagrangian form of choosing under a budget), models that the predictor does not know are left out, the order is the fallback chain.
"""
# Shapes: N queries, M models the predictor knows, P models of the pool

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.errors import InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.knobs import LAMBDA, THRESHOLD, knob_of, trade_off_of
from anabranch.routers.contract.query import Decision, Model, Outcome, Pool, Query
from anabranch.routers.contract.strategy import Arrays, Facts, Played, Strategy, ordered, playable, played
from anabranch.routers.money import dollars


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a predictor expects of some queries.

    Attributes:
        quality_NM: float64; -inf for a model that must not be asked.
        cost_NM: dollars; None leaves costs to `Ranked`.
        confidence_N: between 0 and 1; None if the predictor has none.
        penalty_NM: taken off the quality when models are ordered, in its units: what counts against a model beside dollars; None for none.
        details: what lies behind the prediction of one query; None leaves that to `Predictor.explain`, which may do the work again.
    """

    quality_NM: np.ndarray
    cost_NM: np.ndarray | None = None
    confidence_N: np.ndarray | None = None
    penalty_NM: np.ndarray | None = None
    details: Facts | None = None


class Predictor(Part, family="predictor"):
    """Interface: queries in, expected quality of each model's answer out.

    Attributes:
        needs_vector: queries must carry vectors.
        models: names it knows, set by ``fit``; columns of its predictions.
        sender_knobs: what it reads of `Query.knobs`, beside those of `Ranked`.
        adds_up: as of `Strategy`, with the same methods.
    """

    @configclass
    class Config(BaseConfig):
        """Nothing in common."""

    needs_vector: ClassVar[bool] = True
    sender_knobs: ClassVar[tuple[str, ...]] = ()
    adds_up: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config
        self.models: tuple[str, ...] = ()

    @property
    def learned_dim(self) -> int | None:
        """As of `Strategy`."""
        return None

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Learn, and set ``models``."""
        raise NotImplementedError

    def predict(self, data: Recorded) -> Prediction:
        """Of every row. Scores and costs in ``data`` are not looked at, and may be anything."""
        raise NotImplementedError

    def predict_one(self, query: Query) -> Prediction:
        """Of one query, N = 1. Override where that is much faster than making a `Recorded` of it."""
        return self.predict(one_row(query, self.models))

    def strengths(self, query: Query) -> np.ndarray | None:
        """Log odds ``[M]`` whose differences say who wins against whom; None where it predicts something else."""
        return None

    def meet(self, pool: Pool) -> None:
        """Take note of the models there are, before each decision, where sizes or prices matter. Must be quick if none changed."""

    def explain(self, query: Query) -> Facts:
        """What lies behind the prediction, ready for JSON."""
        return {}

    def headers(self, decision: Decision) -> Mapping[str, str]:
        """See `Strategy.headers`."""
        return {}

    def observe(self, outcome: Outcome) -> None:
        """Learn from one outcome, if it can."""

    def join(self, model: Model, shots: Recorded | None = None) -> None:
        """See `Strategy.join`; the model is not among ``models``."""
        name = self.kind or type(self).__name__
        raise InputError(f"{name} takes no further model; fit it anew on outcomes of all")

    def state(self) -> tuple[Arrays, Facts]:
        """What it learned, but for ``models``."""
        raise NotImplementedError

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        raise NotImplementedError

    # Where it adds up

    def part(self) -> tuple[Arrays, Facts]:
        """See `Strategy`."""
        raise NotImplementedError

    def hear(self, arrays: Arrays, facts: Facts) -> None:
        """See `Strategy`."""
        raise NotImplementedError

    def joined(self, parts: Sequence[tuple[Arrays, Facts]]) -> tuple[Arrays, Facts]:
        """See `Strategy`."""
        raise NotImplementedError

    def disown(self, arrays: Arrays, facts: Facts) -> None:
        """See `Strategy`."""
        raise NotImplementedError


def one_row(query: Query, models: tuple[str, ...]) -> Recorded:
    """A query as a table of one row without outcomes."""
    vector_ND = None if query.vector_D is None else query.vector_D[None]
    return Recorded(
        query=(query.text,),
        task=(query.task,),
        models=models,
        score_NM=np.full((1, len(models)), np.nan),
        vector_ND=vector_ND,
        answers=(query.answers,) if query.answers else (),
    )


class Ranked(Strategy, kind="ranked"):
    """Order models by predicted quality - trade_off * predicted cost."""

    @configclass
    class Config(Strategy.Config):
        """What to predict with, and what a dollar is worth.

        Attributes:
            predictor: what says the quality.
            trade_off: score given up to save a dollar on one query; 0 looks at quality alone.
            budget: dollars a query, on average, that may be spent: ``fit`` puts the trade-off that keeps it on what it learned from in
                the place of ``trade_off``. None leaves that.
        """

        predictor: Predictor.Config
        trade_off: float = Field(default=0.0, ge=0)
        budget: float | None = Field(default=None, gt=0)

    needs_fit = True
    knob = "trade_off"

    def __init__(self, config: Any, predictor: Predictor | None = None) -> None:
        super().__init__(config)
        self.predictor: Predictor = config.predictor.build() if predictor is None else predictor
        self.cost_M, self.completion_M = np.zeros(0), np.zeros(0)

    @property
    def name(self) -> str:
        """That of the predictor."""
        return self.predictor.kind or type(self.predictor).__name__

    @property
    def needs_vector(self) -> bool:  # type: ignore[override]
        """As its predictor."""
        return self.predictor.needs_vector

    @property
    def learned_dim(self) -> int | None:
        """As its predictor."""
        return self.predictor.learned_dim

    @property
    def learns(self) -> bool:
        """As its predictor."""
        return type(self.predictor).observe is not Predictor.observe

    @property
    def adds_up(self) -> bool:  # type: ignore[override]
        """As its predictor."""
        return self.predictor.adds_up

    @property
    def sender_knobs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The predictor's too; a threshold where that says who wins."""
        wins = type(self.predictor).strengths is not Predictor.strengths
        return (LAMBDA, *((THRESHOLD,) if wins else ()), *self.predictor.sender_knobs)

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Fit the predictor, and the mean cost and length of each model's answers.

        Raises InputError for a budget below what the cheapest choices cost, DataError for one without costs.
        """
        self.predictor.fit(data, seed=seed)
        self.cost_M = _means(data.cost_NM, len(data.models))
        self.completion_M = _means(None if data.tokens_NM2 is None else data.tokens_NM2[..., 1], len(data.models))
        if self.config.budget is not None:
            from anabranch.routers.strategies.budget import within_budget

            pool = Pool(tuple(Model(name=name) for name in data.models))
            found = within_budget(self, data, pool, self.config.budget)
            self.config = self.config.replace(trade_off=found.config.trade_off)
        return self

    def route(self, query: Query, pool: Pool) -> Decision:
        """As the class says; the sender's knob ``lambda`` takes the place of ``trade_off``, and ``threshold`` that of the order of two."""
        self._checked(query)
        self.predictor.meet(pool)
        self._grow()
        prediction = self.predictor.predict_one(query)
        columns = {name: column for column, name in enumerate(self.predictor.models)}
        known = [columns.get(name, -1) for name in pool.names]
        quality_P = np.array([-np.inf if at < 0 else prediction.quality_NM[0, at] for at in known])
        cost_P = np.array(
            [self._cost(query, model, at, prediction) for model, at in zip(pool.models, known, strict=True)]
        )
        trade_off = trade_off_of(query.knobs, self.config.trade_off)
        worth_P = quality_P - trade_off * _weighed(cost_P)
        if prediction.penalty_NM is not None:
            worth_P = worth_P - [prediction.penalty_NM[0, max(at, 0)] for at in known]
        worth_P, why = self._by_threshold(query, pool, np.array(known), worth_P)
        candidates = ordered(pool, worth_P, quality=quality_P, cost=cost_P)
        if not candidates:
            raise InputError(
                f"{self.name} knows none of the models {', '.join(pool.names)}; it learned of {', '.join(self.predictor.models)}"
            )
        best = candidates[0]
        confidence = None if prediction.confidence_N is None else float(prediction.confidence_N[0])
        reason = f"{self.name} expects {best.quality:.3f} of {best.model}" + (
            why or (f", a dollar weighing {trade_off:g}" if trade_off else "")
        )
        return Decision(
            candidates=candidates,
            strategy=self.name,
            reason=reason,
            confidence=confidence,
            details=self.predictor.explain(query) if prediction.details is None else prediction.details,
            probability=1.0,
        )

    def _by_threshold(
        self, query: Query, pool: Pool, known_P: np.ndarray, worth_P: np.ndarray
    ) -> tuple[np.ndarray, str]:
        """RouteLLM's rule, where the sender sets a threshold: of the dearest and the cheapest, the dearest if it wins often enough.

        The others come behind, as they would without. Returns the worth and why; that as it is and "" without a threshold.
        """
        threshold = knob_of(query.knobs, THRESHOLD, 1.0)
        if threshold is None:
            return worth_P, ""
        if LAMBDA in query.knobs:
            raise InputError("threshold and lambda are set; a query has one of them")
        strength_M = self.predictor.strengths(query)
        prices = [model.price.input + model.price.output for model in pool.models]
        open_P = [at for at, model in enumerate(pool.models) if model.is_available and np.isfinite(worth_P[at])]
        if strength_M is None or len(open_P) < 2:
            return worth_P, ""
        cheap, dear = min(open_P, key=lambda at: prices[at]), max(open_P, key=lambda at: prices[at])
        if prices[cheap] == prices[dear]:
            raise InputError("threshold asks for a dear and a cheap model; all of these cost the same")
        wins = 0.5 * (1 + np.tanh(0.5 * (strength_M[known_P[dear]] - strength_M[known_P[cheap]])))
        first, second = (dear, cheap) if wins >= threshold else (cheap, dear)
        worth_P = worth_P.copy()
        worth_P[first], worth_P[second] = worth_P[open_P].max() + 2.0, worth_P[open_P].max() + 1.0
        return (
            worth_P,
            f": {pool.names[dear]} wins with {wins:.3f} against {pool.names[cheap]}, threshold {threshold:g}",
        )

    def _grow(self) -> None:
        """Models that the predictor learned of after ``fit`` have no usual cost."""
        more = len(self.predictor.models) - len(self.cost_M)
        if more > 0:
            self.cost_M = np.append(self.cost_M, np.full(more, np.nan))
            self.completion_M = np.append(self.completion_M, np.full(more, np.nan))

    def _checked(self, query: Query) -> Query:
        if not self.predictor.models:
            raise InputError(f"{self.name} has not learned yet: fit it on recorded outcomes first")
        if self.needs_vector and query.vector_D is None:
            raise InputError(f"{self.name} needs the vector of a query; give the gateway an embedder")
        return query

    def _cost(self, query: Query, model: Model, at: int, prediction: Prediction) -> float:
        """Dollars: as predicted, else by the price of this prompt and the usual answer, else the usual cost."""
        if at < 0:
            return np.nan
        if prediction.cost_NM is not None:
            return float(prediction.cost_NM[0, at])
        length = self.completion_M[at]
        if query.prompt_tokens is not None and np.isfinite(length) and (model.price.input or model.price.output):
            return dollars(model.price.cost(query.prompt_tokens, round(float(length))))
        return float(self.cost_M[at])

    def knobs(self, data: Recorded) -> list[float]:
        """0, then values between which the order of some pair of models may turn, ten to a power of ten."""
        if not np.isfinite(self.cost_M).any():
            return [0.0]
        spread = np.nanmax(self.cost_M) - np.nanmin(self.cost_M)
        return [0.0, *(np.logspace(-3, 3, 61) / spread).tolist()] if spread > 0 else [0.0]

    def with_knob(self, value: float) -> "Ranked":
        """The same predictor at another trade-off."""
        other = Ranked(self.config.replace(trade_off=value, budget=None), self.predictor)
        other.cost_M, other.completion_M = self.cost_M, self.completion_M
        return other

    def play(self, data: Recorded, pool: Pool) -> Played:
        """All rows at once. Costs are the predicted or usual ones, since recorded ones are not known beforehand."""
        self.predictor.meet(pool)
        return self._played(data, pool, self.predictor.predict(data))

    def play_knobs(self, data: Recorded, values: list[float], pool: Pool | None = None) -> list[Played]:
        """`play` at many values of the knob, predicting once; ``pool`` None stands for all models of the data."""
        if pool is not None:
            self.predictor.meet(pool)
        prediction = self.predictor.predict(data)
        return [self.with_knob(value)._played(data, pool, prediction) for value in values]

    def _played(self, data: Recorded, pool: Pool | None, prediction: Prediction) -> Played:
        self._grow()
        columns = playable(data, pool, self.predictor.models)
        at = [self.predictor.models.index(data.models[column]) for column in columns]
        cost_NM = prediction.cost_NM
        if cost_NM is None:
            cost_NM = np.broadcast_to(self.cost_M, prediction.quality_NM.shape)
        value_NM = prediction.quality_NM - self.config.trade_off * _weighed(cost_NM)
        if prediction.penalty_NM is not None:
            value_NM = value_NM - prediction.penalty_NM
        return played(data, columns[np.argmax(value_NM[:, at], axis=1)])

    def explain(self, query: Query, pool: Pool) -> Facts:
        """The decision, and the trade-off it was made at."""
        return {**super().explain(query, pool), "trade_off": trade_off_of(query.knobs, self.config.trade_off)}

    def headers(self, decision: Decision) -> Mapping[str, str]:
        """The predictor's."""
        return self.predictor.headers(decision)

    def observe(self, outcome: Outcome) -> None:
        """Pass it on."""
        self.predictor.observe(outcome)

    def join(self, model: Model, shots: Recorded | None = None) -> None:
        """By the predictor; its usual cost and length are those of its outcomes."""
        if not self.predictor.models:
            raise InputError(f"{self.name} has not learned yet: fit it on recorded outcomes first")
        if model.name in self.predictor.models:
            raise InputError(f"{self.name} knows {model.name!r} already")
        self.predictor.join(model, shots)
        self._grow()
        if shots is not None:
            tokens_NM = None if shots.tokens_NM2 is None else shots.tokens_NM2[..., 1]
            self.cost_M[-1], self.completion_M[-1] = _means(shots.cost_NM, 1)[0], _means(tokens_NM, 1)[0]

    def part(self) -> tuple[Arrays, Facts]:
        """The predictor's."""
        return self.predictor.part()

    def hear(self, arrays: Arrays, facts: Facts) -> None:
        """Pass it on."""
        self.predictor.hear(arrays, facts)

    def joined(self, parts: Sequence[tuple[Arrays, Facts]]) -> tuple[Arrays, Facts]:
        """By the predictor."""
        return self.predictor.joined(parts)

    def disown(self, arrays: Arrays, facts: Facts) -> None:
        """Pass it on."""
        self.predictor.disown(arrays, facts)

    def state(self) -> tuple[Arrays, Facts]:
        """The predictor's, with the usual costs and lengths."""
        arrays, facts = self.predictor.state()
        own = {"ranked.cost_M": self.cost_M, "ranked.completion_M": self.completion_M}
        return {**arrays, **own}, {**facts, "models": list(self.predictor.models)}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self.cost_M, self.completion_M = arrays["ranked.cost_M"], arrays["ranked.completion_M"]
        self.predictor.models = tuple(facts["models"])
        self.predictor.load_state(
            {name: value for name, value in arrays.items() if not name.startswith("ranked.")}, facts
        )


def _means(value_NM: np.ndarray | None, num_models: int) -> np.ndarray:
    """Mean of each column over what is known; NaN where nothing is."""
    if value_NM is None:
        return np.full(num_models, np.nan)
    known_NM = np.isfinite(value_NM)
    count_M = known_NM.sum(0)
    return np.where(count_M > 0, np.where(known_NM, value_NM, 0).sum(0) / np.maximum(count_M, 1), np.nan)


def _weighed(cost: np.ndarray) -> np.ndarray:
    """Costs, where those nobody knows weigh like the dearest that is known: a model does not become cheap by being unknown."""
    known = np.isfinite(cost)
    dearest = cost[known].max() if known.any() else 0.0
    return np.where(known, cost, dearest)
