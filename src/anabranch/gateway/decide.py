"""All strategies of a config at work in a server: what a request is decided by, where the strategy that was asked for cannot be asked too.

A strategy that raises, names a model that is not there, or takes longer than its time (see `Lane`) is passed over for the default one, and
counted.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from anabranch.errors import AnabranchError, CheckpointError, ConfigError, DataError, InputError, LimitError
from anabranch.gateway.config import GatewayConfig, StrategyConfig, make_strategy
from anabranch.gateway.decision_checks import BypassError
from anabranch.gateway.lane import Lane
from anabranch.gateway.logged_error import plain, raised, words
from anabranch.gateway.made_vectors import MadeVectors
from anabranch.gateway.providers.provider import UpstreamError
from anabranch.registry import kinds
from anabranch.routers.contract.ask import Ask
from anabranch.routers.contract.program import Program
from anabranch.routers.contract.query import Candidate, Decision, Pool, Query
from anabranch.routers.contract.strategy import Metrics, Strategy
from anabranch.routers.embed import Embedder, embed_of
from anabranch.routers.embed.cache import fingerprint
from anabranch.routers.embed.checked import check_dim
from anabranch.routers.fitted import FittedRouter
from anabranch.web.turns import plainly

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision as it will be acted on.

    Attributes:
        decision: candidates are all in the pool.
        bypassed: why the strategy that was asked for did not make it; "" if it did.
        query: with the vector that the strategy that was asked for needs, if one was made.
        lasts: why it was bypassed does not pass.
        headers: what the strategy that was asked for tells the sender of its decision.
    """

    decision: Decision
    bypassed: str
    query: Query
    lasts: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


class Decider:
    """All strategies of a config.

    Args:
        config: of the gateway.
        embedder: of queries, for strategies that were not fitted with one of their own.
        on_bypass: called with a strategy's name and why.
        strategies: ready-made ones, by name, in place of the config's.
        metrics: where a strategy of a name puts its numbers.

    Raises ConfigError if a strategy cannot be made or has not learned, CheckpointError for a fitted router that cannot be read.
    """

    def __init__(
        self,
        config: GatewayConfig,
        embedder: Embedder | None,
        on_bypass: Callable[[str, str], None] = lambda name, why: None,
        strategies: Mapping[str, Strategy] | None = None,
        metrics: Callable[[str], Metrics] | None = None,
    ) -> None:
        self.default = config.default
        self._on_bypass = on_bypass
        self.lanes: dict[str, Lane] = {}
        for name, wanted in config.strategies.items():
            made, own = (strategies or {}).get(name), embedder
            if made is None:
                made, own = _make(name, wanted, embedder, config)
            if made.needs_vector and own is None:
                raise ConfigError(
                    f"strategies.{name} needs vectors of queries; set embedder.kind: {' or '.join(kinds('embedder'))}"
                )
            if made.keeps_answers and made.keeps_examples and not config.log.prompts:
                raise ConfigError(
                    f"strategies.{name} keeps texts of requests and answers in the store, to show them to models; set log.prompts = true "
                    "to let it, or leave it out (ic_cache keeps none with domains = [])"
                )
            try:
                _set_up(name, lambda: check_dim(made, own))  # noqa: B023
            except (InputError, DataError) as error:
                raise ConfigError(f"strategies.{name}: {words(error)}") from None
            _connect(name, made, own, None if metrics is None else metrics(name))
            self.lanes[name] = _set_up(name, lambda: Lane(name, wanted, made, own))  # noqa: B023

    def news(self, old: "Decider") -> list[Lane]:
        """Strategies that have no predecessor in another one."""
        return [lane for name, lane in self.lanes.items() if name not in old.lanes or not lane.follows(old.lanes[name])]

    def succeed(self, old: "Decider") -> None:
        """Go on with what the strategies of another have learned, where they are made from the same, and owe what those do."""
        for name, lane in self.lanes.items():
            if name in old.lanes and lane.follows(old.lanes[name]):
                lane.succeed(old.lanes[name])
            elif name in old.lanes and lane.can_forget:
                # It may have been made from what knows the same.
                lane.owed.take_over(old.lanes[name].owed)

    async def decide(self, name: str, query: Query, pool: Pool, ask: Ask, made: MadeVectors | None = None) -> Decided:
        """What the strategy says, or the default one in its place, or the order of the config. Raises ApiError for wrong knobs.

        ``ask`` is how it asks models, on account of the request; ``made`` are the vectors of its text that are there.
        """
        made = MadeVectors() if made is None else made
        bypassed, does_last = "", True
        for asked in dict.fromkeys((name, self.default)):
            lane = self.lanes[asked]
            try:
                decision, seen = await lane.decide(
                    query if asked == name else replace(query, knobs={}), pool, ask, made
                )
                told = {} if bypassed else await self._headers(lane, seen, decision)
                # The one that was asked for judges the answer and learns from it, whoever decided.
                seen = self.lanes[name].with_vector(seen, made)
                return Decided(decision, bypassed, seen, bool(bypassed) and does_last, told)
            except BypassError as error:
                self._on_bypass(asked, error.why)
                bypassed, does_last = bypassed or str(error), does_last and error.lasts
        pool = self.lanes[name].narrowed(pool)
        ready = sorted(pool.models, key=lambda model: not model.is_available)
        candidates = tuple(Candidate(model=model.name, score=-float(at)) for at, model in enumerate(ready))
        reason = "the order of the config, since no strategy could decide"
        decision = Decision(candidates=candidates, strategy="order", reason=reason, probability=1.0)
        return Decided(decision, bypassed, self.lanes[name].with_vector(query, made), does_last)

    async def _headers(self, lane: Lane, query: Query, decision: Decision) -> dict[str, str]:
        """What a strategy tells the sender of its decision; nothing where it fails at that, or takes too long."""
        if type(lane.strategy).headers is Strategy.headers:
            return {}
        try:
            return await lane.headers(query, decision)
        except (BypassError, InputError) as error:
            logger.warning("strategy %s has no headers to give: %s", lane.name, words(error))
            return {}

    def program(self, name: str) -> Program | None:
        """The strategy, if it answers itself."""
        strategy = self.lanes[name].strategy
        return strategy if isinstance(strategy, Program) else None

    def bypass(self, name: str, error: Exception) -> str:
        """Count, and tell in a sentence, that a program is passed over for what it failed with."""
        if isinstance(error, LimitError):
            self._on_bypass(name, "limit")
            return words(error)
        is_slow = isinstance(error, UpstreamError) and error.failure.kind == "deadline"
        logger.warning("program %s failed: %s", name, raised(error))
        self._on_bypass(name, "slow" if is_slow else "raised")
        return f"{type(error).__name__} in the program"

    def keeps_answers(self, name: str) -> bool:
        """Whether a strategy wants the texts of answers."""
        return self.lanes[name].strategy.keeps_answers

    async def prepared(self, name: str, query: Query, decision: Decision) -> dict[str, Sequence[Mapping[str, Any]]]:
        """The messages that the strategy wants sent to its candidates, for those where they are not what came."""
        lane = self.lanes[name]
        if type(lane.strategy).prepare is Strategy.prepare or not query.messages:
            return {}
        found = {}
        try:
            for candidate in decision.candidates:
                messages = await lane.prepare(query, candidate.model, decision)
                if messages is not query.messages:
                    found[candidate.model] = messages
        except (BypassError, InputError) as error:
            self._on_bypass(name, error.why if isinstance(error, BypassError) else "raised")
            return {}
        return found

    def acceptance(self, name: str, query: Query, ask: Ask) -> Callable[[str, Any], Awaitable[bool]] | None:
        """What a dispatcher asks after each answer; None if the strategy takes any."""
        lane = self.lanes[name]
        if not lane.strategy.reads_answers:
            return None

        async def accept(model: str, answer: Any) -> bool:
            try:
                return await lane.accept(query, model, answer.text, _details(answer), ask)
            except BypassError as error:
                self._on_bypass(name, error.why)
            except InputError:
                self._on_bypass(name, "raised")
            return True

        return accept

    def close(self) -> None:
        """End the threads once they are idle."""
        for lane in self.lanes.values():
            lane.close()


def _details(answer: Any) -> dict[str, Any]:
    """What the provider said of an answer, as `Strategy.accept` wants it."""
    choices = answer.body.get("choices") or [{}]
    found: dict[str, Any] = {"finish_reason": answer.finish_reason}
    logprobs = choices[0].get("logprobs")
    if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
        found["logprobs"] = logprobs["content"]
    if len(choices) > 1:
        found["samples"] = [(choice.get("message") or {}).get("content") or "" for choice in choices[1:]]
    return found


def _connect(name: str, strategy: Strategy, embedder: Embedder | None, metrics: Metrics | None) -> None:
    """Give a strategy what it works with. Raises ConfigError for whatever it raises."""

    def connect() -> None:
        strategy.connect(embed=embed_of(embedder))
        if metrics is not None:
            strategy.report_to(metrics)

    _set_up(name, connect)


def _set_up(name: str, work: Callable[[], T]) -> T:
    """``work()``, of a strategy that others may have written. Raises AnabranchError, for whatever it raises."""
    try:
        return plainly(work)
    except Exception as error:
        if isinstance(error, AnabranchError) and type(error).__module__.startswith("anabranch."):
            raise
        # Of others, whose text is written here once: whoever is told of it need not know that it may not be.
        raise ConfigError(f"strategies.{name} cannot be made: {raised(error)}: {words(plain(error))}") from error


def _make(
    name: str, wanted: StrategyConfig, embedder: Embedder | None, config: GatewayConfig
) -> tuple[Strategy, Embedder | None]:
    """The strategy of a config, and what embeds its queries."""
    if wanted.router is not None:
        try:
            models = [model.name for model in config.models]
            strategy, own = _set_up(name, lambda: load_router(name, wanted, embedder, models))
            return strategy, _set_up(name, lambda: _once(own, embedder))
        except CheckpointError as error:
            raise CheckpointError(f"strategies.{name}.router: {words(error)}") from None
    try:
        made: Strategy = _set_up(name, lambda: make_strategy(wanted))
    except ConfigError as error:
        raise ConfigError(f"strategies.{name}: {words(error)}") from None
    if made.needs_fit:
        raise ConfigError(
            f"strategies.{name}: {wanted.use} has to learn first; give router, a folder of anabranch gateway fit"
        )
    return made, embedder


def _once(own: Embedder | None, embedder: Embedder | None) -> Embedder | None:
    """A router's embedder; the config's in its place where both give the same vectors, so that no text is embedded twice."""
    if own is None or embedder is None or type(own) is not type(embedder):
        return own
    return embedder if fingerprint(own) == fingerprint(embedder) else own


def load_router(
    name: str, wanted: StrategyConfig, embedder: Embedder | None, models: Sequence[str]
) -> tuple[Strategy, Embedder | None]:
    """The fitted strategy that one of a name serves, and what embeds its queries.

    Args:
        name: of the strategy.
        wanted: its config, with the file or folder, and at which trade-off.
        embedder: for routers that were fitted without one of their own.
        models: of the gateway.

    Raises ConfigError where it cannot be told which, CheckpointError for one that cannot be read.
    """
    from anabranch.gateway.config.recommended import check_models
    from anabranch.routers.fitted import load_folder
    from anabranch.routers.recommendation import no_recommendation, pick

    place = str(wanted.router)
    picked = pick(place, name)
    if picked is None:
        held = ", ".join(load_folder(place).routers)
        advice = no_recommendation(place, "anabranch gateway")
        raise ConfigError(
            f"strategies.{name}.router is {place!r}, which holds {held}; name the strategy as one of them: {advice}"
        )
    check_models(name, picked, models)
    if picked.choice is not None:
        logger.info("strategy %s: %s", name, picked.why)
    made = picked.router.strategy
    if wanted.trade_off is not None or wanted.budget_usd is not None:
        made = _at(name, picked.router, wanted)
        own = picked.router.embedder or embedder
        made.connect(embed=embed_of(own))
    return made, picked.router.embedder or embedder


def _at(name: str, router: FittedRouter, wanted: StrategyConfig) -> Strategy:
    """A fitted strategy at another trade-off than it was saved with. Raises ConfigError where it has none."""
    from anabranch.routers.strategies.budget import kept_within

    if router.strategy.knob != "trade_off":
        raise ConfigError(f"strategies.{name}: {router.strategy.name} has no trade-off between quality and cost to set")
    if wanted.trade_off is not None:
        return router.strategy.with_knob(wanted.trade_off)
    assert wanted.budget_usd is not None
    spent = [(float(value), float(cost)) for value, cost in router.about.get("spending", ())]
    if not spent:
        raise ConfigError(
            f"strategies.{name}.budget_usd: what {router.strategy.name} spends at which trade-off is not in its file; fit it anew, on "
            "outcomes with costs"
        )
    try:
        return router.strategy.with_knob(kept_within(spent, wanted.budget_usd))
    except InputError as error:
        raise ConfigError(f"strategies.{name}.budget_usd: {words(error)}") from None
