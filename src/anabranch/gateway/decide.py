"""Strategies at work in a server: none may slow, break or mislead it.

A strategy that raises, names a model that is not there, or takes longer than its time is passed over for the default one, and counted.
What may be slow (embedding, learned predictors, third parties) runs in a thread of its own, one per strategy, so that the event loop
goes on; what says that it is fast (`is_fast`) is called in place.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from anabranch.config import to_dict
from anabranch.errors import ConfigError, InputError, LimitError
from anabranch.gateway.config import GatewayConfig, StrategyConfig, make_strategy
from anabranch.gateway.logged_error import raised
from anabranch.gateway.providers.provider import UpstreamError
from anabranch.routers.contract.ask import Ask
from anabranch.routers.contract.knobs import check_knobs
from anabranch.routers.contract.program import Program
from anabranch.routers.contract.query import Candidate, Decision, Outcome, Pool, Query
from anabranch.routers.contract.strategy import Metrics, Strategy
from anabranch.routers.embed import Embedder
from anabranch.routers.fitted import digest_of
from anabranch.web.api_error import wrong

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Characters: longer texts are looked at in the thread, even by strategies that are fast.
SHORT = 20_000

# Observations that may wait for a strategy's thread; more are dropped.
WAITING = 256

# Least time to judge an answer, which took a model longer than that to write.
JUDGING_S = 1.0

# Least time of a strategy that asks models: their answers take longer than any computation may.
ASKING_S = 10.0


class BypassError(Exception):
    """A strategy cannot be asked, or said what cannot be; ``why`` is one word for the counter."""

    def __init__(self, why: str, message: str) -> None:
        super().__init__(message)
        self.why = why


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision as it will be acted on.

    Attributes:
        decision: candidates are all in the pool.
        bypassed: why the strategy that was asked for did not make it; "" if it did.
        query: with its vector, if one was made.
    """

    decision: Decision
    bypassed: str
    query: Query


class Lane:
    """One strategy and its thread.

    Attributes:
        name: ``auto/NAME``.
        settings: of the config.
        learns: `observe` does something.
        made: what it was made from, see `made_from`; "" if what it learns is not kept.
        embedder: of its queries, if it has one.
    """

    def __init__(
        self,
        name: str,
        config: StrategyConfig,
        strategy: Strategy,
        embedder: Embedder | None,
    ) -> None:
        self.name, self.settings, self.strategy = name, config, strategy
        self.timeout_s = max(config.timeout_s, ASKING_S) if strategy.is_async else config.timeout_s
        self._models = frozenset(config.models)
        self.embedder, self._embedder = embedder, embedder if strategy.needs_vector else None
        self.is_fast = strategy.is_fast
        self.learns = strategy.learns
        self._threads = None if self.is_fast else ThreadPoolExecutor(1, thread_name_prefix=f"strategy-{name}")
        # When what runs in the thread began; None if nothing does.
        self._began: float | None = None
        self._waiting = 0
        self._told = [0]
        self.made = made_from(self) if self.learns else ""
        # Another lane goes on with the strategy, in the same thread.
        self._is_left = False

    def narrowed(self, pool: Pool) -> Pool:
        """The models this strategy may choose among."""
        if not self._models:
            return pool
        return Pool(tuple(model for model in pool.models if model.name in self._models), pool.now_s)

    async def decide(self, query: Query, pool: Pool, ask: Ask) -> tuple[Decision, Query]:
        """Ask the strategy. Raises BypassError, and ApiError for knobs the sender set wrong."""
        pool = self.narrowed(pool)
        try:
            check_knobs(query.knobs, self.strategy.sender_knobs, f"auto/{self.name}")
            if self._embedder is not None and query.vector_D is None:
                embedder = self._embedder
                vector_D = (await self._in_thread(lambda: embedder.embed([query.text]), self.timeout_s))[0]
                query = replace(query, vector_D=vector_D)
            if self.strategy.is_async:
                decision = await self._awaited(self.strategy.aroute(query, pool, ask))
            else:
                is_short = len(query.text) <= SHORT
                decision = await self._called(lambda: self.strategy.route(query, pool), self.timeout_s, is_short)
        except InputError as error:
            if query.knobs:
                raise wrong("model", str(error)) from None
            raise BypassError("raised", str(error)) from None
        _check(decision, pool)
        return decision, query

    async def prepare(self, query: Query, model: str, decision: Decision) -> Sequence[Mapping[str, Any]]:
        """What to send to a candidate. Raises BypassError."""
        return await self._called(
            lambda: self.strategy.prepare(query, model, query.messages, decision=decision), self.timeout_s
        )

    async def accept(self, query: Query, model: str, answer: str, details: Mapping[str, Any], ask: Ask) -> bool:
        """Whether an answer is good enough. Raises BypassError."""
        if self.strategy.is_async:
            return bool(await self._awaited(self.strategy.aaccept(query, model, answer, details, ask)))
        wanted = max(self.timeout_s, JUDGING_S)
        return bool(await self._called(lambda: self.strategy.accept(query, model, answer, details), wanted))

    def observe(self, outcome: Outcome) -> None:
        """Let the strategy learn, later and where it disturbs nobody."""
        if not self.learns:
            return
        if self.is_fast or self._threads is None:
            self._observe(outcome)
        elif self._waiting < WAITING:
            self._waiting += 1
            self._threads.submit(self._observe, outcome).add_done_callback(self._observed)

    async def explain(self, query: Query, pool: Pool) -> dict[str, Any]:
        """Why the strategy would decide so. Raises BypassError."""
        return dict(await self._called(lambda: self.strategy.explain(query, self.narrowed(pool)), JUDGING_S))

    def touch(self) -> None:
        """It has learned something beside requests."""
        self._told[0] += 1

    @property
    def told(self) -> int:
        """Outcomes that the strategy was told of."""
        return self._told[0]

    def follows(self, old: "Lane") -> bool:
        """Whether its strategy is made from the same as that of another lane, so that it can go on with that one."""
        return self.learns and (old.strategy is self.strategy or (self.made != "" and old.made == self.made))

    def succeed(self, old: "Lane") -> None:
        """Go on with the strategy of a lane that it `follows`, and what it has learned, in the same thread."""
        if self._threads is not None and self._threads is not old._threads:
            self._threads.shutdown(wait=False)
        self.strategy, self.made, self._told = old.strategy, old.made, old._told
        self._threads, old._is_left = old._threads, True
        self.strategy.connect(embed=None if self.embedder is None else self.embedder.embed)

    @property
    def can_forget(self) -> bool:
        """Whether its strategy keeps anything of texts."""
        return type(self.strategy).forget is not Strategy.forget

    async def forget(self, order: Mapping[str, Any]) -> int:
        """Let its strategy forget what an order is about (`Strategy.forget`); how much there was."""
        count = await self.alone(lambda: self.strategy.forget(**order))
        self.touch()
        return count

    async def alone(self, work: Callable[[], T]) -> T:
        """``work()`` while nothing else touches the strategy, however long it takes."""
        if self.is_fast:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """End the thread once it is idle."""
        if self._threads is not None and not self._is_left:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _observe(self, outcome: Outcome) -> None:
        self._told[0] += 1
        try:
            self.strategy.observe(outcome)
        except Exception as error:
            logger.warning("strategy %s failed to learn: %s", self.name, type(error).__name__)

    def _observed(self, future: object) -> None:
        self._waiting -= 1

    async def _called(self, work: Callable[[], T], limit_s: float, is_short: bool = True) -> T:
        """``work()`` in place or in the thread. Raises BypassError for whatever it raises but InputError."""
        try:
            return work() if self.is_fast and is_short else await self._in_thread(work, limit_s)
        except (BypassError, InputError):
            raise
        except Exception as error:
            raise self._raised(error) from None

    async def _awaited(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await work
        except TimeoutError:
            raise BypassError("slow", f"it took longer than {self.timeout_s:g} s") from None
        except LimitError as error:
            # Of what it asks. The words are ours, and quote nobody.
            raise BypassError("limit", str(error)) from None
        except InputError:
            raise
        except Exception as error:
            raise self._raised(error) from None

    def _raised(self, error: Exception) -> BypassError:
        """The log says what and where, without the texts an exception may quote."""
        logger.warning("strategy %s failed: %s", self.name, raised(error))
        return BypassError("raised", f"{type(error).__name__} in the strategy")

    async def _in_thread(self, work: Callable[[], T], limit_s: float) -> T:
        """``work()`` in the thread. Its time counts from when it begins, and so does that of what it waits for."""
        # A fast strategy that needs vectors.
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix=f"strategy-{self.name}")
        if self._is_stuck(limit_s):
            raise BypassError("slow", f"the call before it has taken longer than {limit_s * 1000:g} ms")
        started: list[float] = []

        def timed() -> T:
            self._began = time.monotonic()
            started.append(self._began)
            try:
                return work()
            finally:
                self._began = None

        future = asyncio.get_running_loop().run_in_executor(self._threads, timed)
        while True:
            begin = started[0] if started else self._began or time.monotonic()
            await asyncio.wait({future}, timeout=max(begin + limit_s - time.monotonic(), 0.001))
            if future.done():
                return future.result()
            if started and time.monotonic() - started[0] >= limit_s:
                break
            if not started and self._is_stuck(limit_s):
                future.cancel()
                break
        # So that it counts as seen.
        future.add_done_callback(lambda late: late.cancelled() or late.exception())
        raise BypassError("slow", f"it took longer than {limit_s * 1000:g} ms")

    def _is_stuck(self, limit_s: float) -> bool:
        began = self._began
        return began is not None and time.monotonic() - began > limit_s


def made_from(lane: Lane) -> str:
    """Digest of what a strategy is made from; "" if what it learns cannot be kept."""
    strategy, embedder = lane.strategy, lane.embedder
    try:
        arrays, facts = strategy.state()
        about = {
            "kind": strategy.name, "facts": facts, "config": None if strategy.config is None else to_dict(strategy.config),
            "embedder": None if embedder is None else to_dict(embedder.config),
        }  # fmt: skip
        return digest_of({name: np.asarray(value) for name, value in arrays.items()}, json.dumps(about, sort_keys=True))
    except Exception as error:
        logger.warning("what strategy %s learns cannot be kept: %s: %s", lane.name, type(error).__name__, error)
        return ""


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
                raise ConfigError(f"strategies.{name} needs vectors of queries; set embedder.kind")
            if made.keeps_answers and made.keeps_examples and not config.log.prompts:
                raise ConfigError(
                    f"strategies.{name} keeps texts of requests and answers in the store, to show them to models; set log.prompts = true "
                    "to let it, or leave it out (ic_cache keeps none with domains = [])"
                )
            made.connect(embed=None if own is None else own.embed)
            if metrics is not None:
                made.report_to(metrics(name))
            self.lanes[name] = Lane(name, wanted, made, own)

    def news(self, old: "Decider") -> list[Lane]:
        """Strategies that have no predecessor in another one."""
        return [lane for name, lane in self.lanes.items() if name not in old.lanes or not lane.follows(old.lanes[name])]

    def succeed(self, old: "Decider") -> None:
        """Go on with what the strategies of another have learned, where they are made from the same."""
        for name, lane in self.lanes.items():
            if name in old.lanes and lane.follows(old.lanes[name]):
                lane.succeed(old.lanes[name])

    async def decide(self, name: str, query: Query, pool: Pool, ask: Ask) -> Decided:
        """What the strategy says, or the default one in its place, or the order of the config. Raises ApiError for wrong knobs.

        ``ask`` is how it asks models, on account of the request.
        """
        bypassed = ""
        for asked in dict.fromkeys((name, self.default)):
            lane = self.lanes[asked]
            try:
                decision, seen = await lane.decide(query if asked == name else replace(query, knobs={}), pool, ask)
                return Decided(decision, bypassed, seen)
            except BypassError as error:
                self._on_bypass(asked, error.why)
                bypassed = bypassed or str(error)
        pool = self.lanes[name].narrowed(pool)
        ready = sorted(pool.models, key=lambda model: not model.is_available)
        candidates = tuple(Candidate(model=model.name, score=-float(at)) for at, model in enumerate(ready))
        reason = "the order of the config, since no strategy could decide"
        decision = Decision(candidates=candidates, strategy="order", reason=reason, probability=1.0)
        return Decided(decision, bypassed, query)

    def program(self, name: str) -> Program | None:
        """The strategy, if it answers itself."""
        strategy = self.lanes[name].strategy
        return strategy if isinstance(strategy, Program) else None

    def bypass(self, name: str, error: Exception) -> str:
        """Count, and tell in a sentence, that a program is passed over for what it failed with."""
        if isinstance(error, LimitError):
            self._on_bypass(name, "limit")
            return str(error)
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

    def headers(self, name: str, decision: Decision) -> dict[str, str]:
        """What a strategy tells the sender of its decision."""
        strategy = self.lanes[name].strategy
        if type(strategy).headers is Strategy.headers:
            return {}
        try:
            return {header: str(value) for header, value in strategy.headers(decision).items()}
        except Exception as error:
            logger.warning("strategy %s has no headers to give: %s", name, type(error).__name__)
            return {}

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


def _check(decision: Any, pool: Pool) -> None:
    """Raises BypassError for what is no decision on this pool."""
    if not isinstance(decision, Decision) or not decision.candidates:
        raise BypassError("empty", "it named no model")
    names = [candidate.model for candidate in decision.candidates]
    unknown = next((name for name in names if name not in pool.names), None)
    if unknown is not None:
        raise BypassError("unknown_model", f"it named {str(unknown)[:80]!r}, which is not in the pool")
    if len(set(names)) < len(names):
        raise BypassError("twice", "it named a model twice")
    sure, numbers = decision.confidence, [one for at in decision.candidates for one in (at.score, at.quality, at.cost)]
    if not isinstance(decision.reason, str) or not all(
        one is None or isinstance(one, int | float) for one in (sure, *numbers)
    ):
        raise BypassError("odd", "its reason is no text, or a figure is no number")
    chance = decision.probability
    if chance is not None and not (isinstance(chance, int | float) and 0 < chance <= 1):
        raise BypassError("odd", "its probability is not above 0 and at most 1")
    try:
        json.dumps(dict(decision.details), default=str)
    except (TypeError, ValueError, RecursionError):
        raise BypassError("odd", "its details are not ready for JSON") from None


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


def _make(
    name: str, wanted: StrategyConfig, embedder: Embedder | None, config: GatewayConfig
) -> tuple[Strategy, Embedder | None]:
    """The strategy of a config, and what embeds its queries."""
    if wanted.router is not None:
        return _load(name, wanted.router, embedder, [model.name for model in config.models])
    try:
        made: Strategy = make_strategy(wanted)
    except ConfigError as error:
        raise ConfigError(f"strategies.{name}: {error}") from None
    if made.needs_fit:
        raise ConfigError(
            f"strategies.{name}: {wanted.use} has to learn first; give router, a folder of anabranch gateway fit"
        )
    return made, embedder


def _load(name: str, place: str, embedder: Embedder | None, models: Sequence[str]) -> tuple[Strategy, Embedder | None]:
    from anabranch.gateway.config.recommended import check_models
    from anabranch.routers.fitted import load_folder
    from anabranch.routers.recommendation import no_recommendation, pick

    picked = pick(place, name)
    if picked is None:
        held = ", ".join(load_folder(place).routers)
        raise ConfigError(
            f"strategies.{name}.router is {place!r}, which holds {held}; name the strategy as one of them: {no_recommendation(place)}"
        )
    check_models(name, picked, models)
    if picked.choice is not None:
        logger.info("strategy %s: %s", name, picked.why)
    return picked.router.strategy, picked.router.embedder or embedder
