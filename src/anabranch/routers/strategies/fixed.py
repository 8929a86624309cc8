"""Ways of routing that look at no text: the baselines every other one is compared with, and useful in their own right.

`Random` with a share of strong calls is the line that RouteLLM (Ong et al. 2024, arXiv 2406.18665, section 5) measures gain from;
`Oracle`, which knows every outcome, is what no strategy can pass. Taxonomy: Varangot-Reille et al. 2025, arXiv 2502.00409.
"""
# Shapes: N queries, M models of recorded data, P models of the pool

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from anabranch.config import Field, Seed, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Decision, Model, Pool, Query
from anabranch.routers.contract.strategy import Arrays, Facts, Played, Strategy, ordered, playable, played
from anabranch.routers.money import dollars
from anabranch.routers.strategies.training import lot, means, share

# Tokens, where a query or the data do not tell.
USUAL_PROMPT, USUAL_COMPLETION = 500, 250


class Static(Strategy, kind="static"):
    """Always one model; the others of the pool, in its order, are the fallback chain."""

    @configclass
    class Config(Strategy.Config):
        """Attributes: ``model``, its name; None for the first of the pool."""

        model: str | None = None

    is_fast = True

    def route(self, query: Query, pool: Pool) -> Decision:
        """Raises InputError if the model is not in the pool."""
        name = self.config.model
        if name is not None and name not in pool.names:
            raise InputError(f"static.model is {name!r}, which is not in the pool: {', '.join(pool.names)}")
        score_P = -np.arange(len(pool), dtype=float)
        if name is not None:
            score_P[pool.names.index(name)] = 1.0
        return Decision(
            candidates=ordered(pool, score_P),
            strategy=self.name,
            reason=f"always {name or 'the first model'}",
            probability=1.0,
        )


class Random(Strategy, kind="random"):
    """A model by lot. The lot is a hash of the seed, the query's text and request id, and the model's name: each request is a lot of its
    own, so that a question that comes often goes to every model, and one request always goes the same way.

    Names that are weighed w are drawn in proportion to w: each gets the key -log(u) / w and the smallest key wins, which orders the
    rest too (Efraimidis and Spirakis 2006).
    """

    @configclass
    class Config(Strategy.Config):
        """What is drawn.

        Attributes:
            strong: drawn with probability ``share``; set both or neither.
            weak: drawn otherwise.
            share: of the strong model.
            weights: of models by name; others are never drawn. Empty for all alike. Not together with ``strong``.
            seed: another seed, another lot.
        """

        strong: str | None = None
        weak: str | None = None
        share: float = Field(default=0.5, ge=0, le=1)
        weights: dict[str, float] = Field(default_factory=dict)
        seed: Seed = 0

        def __post_init__(self) -> None:
            if (self.strong is None) != (self.weak is None):
                raise ConfigError("random.strong and random.weak go together; set both or neither")
            if self.strong is not None and (self.weights or self.strong == self.weak):
                raise ConfigError("random takes two different models strong and weak, or weights; not both")
            if self.weights and not (
                all(np.isfinite(weight) and weight >= 0 for weight in self.weights.values())
                and any(self.weights.values())
            ):
                raise ConfigError(
                    f"random.weights is {self.weights}; weights must be at least 0, and one of them above 0"
                )

    knob = "share"
    is_fast = True

    def route(self, query: Query, pool: Pool) -> Decision:
        """Raises InputError if no model of the pool can be drawn."""
        weight_P = self._weights(pool)
        # In (0, 1].
        uniform_P = np.array([1.0 - share(self.config.seed, name, *lot(query)) for name in pool.names])
        key_P = np.full(len(pool), -np.inf)
        key_P[weight_P > 0] = np.log(uniform_P[weight_P > 0]) / weight_P[weight_P > 0]
        candidates = ordered(pool, key_P)
        if not candidates:
            raise InputError(f"random draws none of the pool's models: {', '.join(pool.names)}")
        first = pool.names.index(candidates[0].model)
        drawn_P = np.isin(pool.names, [candidate.model for candidate in candidates])
        chance = float(weight_P[first] / weight_P[drawn_P].sum())
        return Decision(candidates=candidates, strategy=self.name, reason="drawn by lot", probability=chance)

    def _weights(self, pool: Pool) -> np.ndarray:
        config = self.config
        if config.strong is not None:
            return np.array(
                [{config.strong: config.share, config.weak: 1 - config.share}.get(name, 0.0) for name in pool.names]
            )
        return np.array([config.weights.get(name, 0.0) if config.weights else 1.0 for name in pool.names])

    def knobs(self, data: Recorded) -> Sequence[float]:
        """Shares of the strong model from 1 to 0, where there is one."""
        return np.linspace(1, 0, 21).tolist() if self.config.strong is not None else ()

    def with_knob(self, value: float) -> "Random":
        """At another share."""
        return Random(self.config.replace(share=value))


class RoundRobin(Strategy, kind="round_robin"):
    """Each in turn."""

    is_fast = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.turn = 0

    def route(self, query: Query, pool: Pool) -> Decision:
        """The next of the pool; the ones after it are the fallback chain. Moves the turn on."""
        score_P = -((np.arange(len(pool)) - self.turn) % len(pool)).astype(float)
        self.turn += 1
        # Nothing is left to chance: traffic that comes in turns itself, plan and act, would ask each model of one kind only.
        return Decision(
            candidates=ordered(pool, score_P), strategy=self.name, reason=f"turn {self.turn}", probability=1.0
        )

    def play(self, data: Recorded, pool: Pool) -> Played:
        """From the turn it is at, which stays."""
        columns = playable(data, pool)
        return played(data, columns[(np.arange(len(data)) + self.turn) % len(columns)])

    def explain(self, query: Query, pool: Pool) -> Facts:
        """The next decision, without taking the turn."""
        facts = super().explain(query, pool)
        self.turn -= 1
        return facts

    def state(self) -> tuple[Arrays, Facts]:
        """The turn."""
        return {}, {"turn": self.turn}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self.turn = int(facts["turn"])


class _OfModel(Strategy):
    """Base of strategies that go by one learned number per model where the pool has no live one."""

    is_fast = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.models: tuple[str, ...] = ()
        self.value_M = np.zeros(0)

    def learned(self, name: str) -> float:
        """The number of a model; NaN if unknown."""
        return float(self.value_M[self.models.index(name)]) if name in self.models else np.nan

    def state(self) -> tuple[Arrays, Facts]:
        """The numbers."""
        return {"value_M": self.value_M}, {"models": list(self.models)}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self.value_M, self.models = arrays["value_M"], tuple(facts["models"])


class LeastLatency(_OfModel, kind="least_latency"):
    """The model that answers soonest: smoothed seconds to a whole answer, lengthened by the load when that passes 1.

    A model that has not answered yet, live or in recorded data, goes first, so that its latency becomes known.
    """

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Mean latency of each model, where recorded."""
        self.models = data.models
        self.value_M = np.full(len(data.models), np.nan) if data.latency_NM is None else means(data.latency_NM)
        return self

    def route(self, query: Query, pool: Pool) -> Decision:
        """As the class says; live latency before recorded."""
        latency = [self.learned(model.name) if model.latency_s is None else model.latency_s for model in pool.models]
        waiting_P = np.nan_to_num(np.array(latency), nan=0.0) * np.array(
            [max(1.0, model.load) for model in pool.models]
        )
        candidates = ordered(pool, -waiting_P)
        return Decision(
            candidates=candidates,
            strategy=self.name,
            reason=f"{candidates[0].model} answers in {-candidates[0].score:.2f} s",
            probability=1.0,
        )


class Cheapest(_OfModel, kind="cheapest"):
    """The model that costs least for this prompt and an answer of the usual length.

    By its price; by its mean recorded cost where it has none, or the prompt was not counted.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.completion_M = np.zeros(0)

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Mean cost and mean length of the answers of each model, where recorded."""
        unknown_M = np.full(len(data.models), np.nan)
        self.models = data.models
        self.value_M = unknown_M if data.cost_NM is None else means(data.cost_NM)
        self.completion_M = unknown_M if data.tokens_NM2 is None else means(data.tokens_NM2[..., 1])
        return self

    def route(self, query: Query, pool: Pool) -> Decision:
        """As the class says."""
        cost_P = np.array([self._cost(query, model) for model in pool.models])
        candidates = ordered(pool, -cost_P, cost=cost_P)
        reason = f"{candidates[0].model} costs least: {candidates[0].cost:.2g} dollars"
        return Decision(candidates=candidates, strategy=self.name, reason=reason, probability=1.0)

    def _cost(self, query: Query, model: Model) -> float:
        learned = self.learned(model.name)
        if np.isfinite(learned) and (query.prompt_tokens is None or not (model.price.input or model.price.output)):
            return learned
        length = self.completion_M[self.models.index(model.name)] if model.name in self.models else np.nan
        completion = (
            round(float(length)) if np.isfinite(length) else min(query.max_tokens or USUAL_COMPLETION, USUAL_COMPLETION)
        )
        prompt = USUAL_PROMPT if query.prompt_tokens is None else query.prompt_tokens
        return dollars(model.price.cost(prompt, completion))

    def state(self) -> tuple[Arrays, Facts]:
        """Costs and lengths."""
        arrays, facts = super().state()
        return {**arrays, "completion_M": self.completion_M}, facts

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        super().load_state(arrays, facts)
        self.completion_M = arrays["completion_M"]


class Oracle(Strategy, kind="oracle"):
    """The best outcome of every recorded query, which only recorded data can tell; of equals the cheapest."""

    @configclass
    class Config(Strategy.Config):
        """Attributes: ``trade_off``, score given up to save a dollar on one query."""

        trade_off: float = Field(default=0.0, ge=0)

    knob = "trade_off"

    def route(self, query: Query, pool: Pool) -> Decision:
        """Raises InputError: it cannot."""
        raise InputError(
            "oracle knows answers before they are given; it only plays recorded outcomes, use another strategy"
        )

    def knobs(self, data: Recorded) -> Sequence[float]:
        """0, then ten to a power of ten around what a dollar buys between the dearest and the cheapest model."""
        cost_M = np.zeros(1) if data.cost_NM is None else means(data.cost_NM)
        spread = np.nanmax(cost_M) - np.nanmin(cost_M) if np.isfinite(cost_M).any() else 0.0
        return [0.0, *(np.logspace(-3, 3, 61) / spread).tolist()] if spread > 0 else [0.0]

    def with_knob(self, value: float) -> "Oracle":
        """At another trade-off."""
        return Oracle(self.config.replace(trade_off=value))

    def play(self, data: Recorded, pool: Pool) -> Played:
        """Quality - trade_off * cost at its largest in every row, both as recorded; unknown scores are never chosen where one is known."""
        columns = playable(data, pool)
        cost_NC = (
            np.zeros((len(data), len(columns))) if data.cost_NM is None else np.nan_to_num(data.cost_NM[:, columns])
        )
        score_NC = data.score_NM[:, columns]
        value_NC = np.where(np.isfinite(score_NC), score_NC - self.config.trade_off * cost_NC, -np.inf)
        best_N1 = value_NC.max(axis=1, keepdims=True, initial=-np.inf)
        return played(data, columns[np.argmin(np.where(value_NC == best_N1, cost_NC, np.inf), axis=1)])
