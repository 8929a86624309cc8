"""`Lane`: one strategy at work in a server, which may not slow, break or mislead it.

What may be slow (embedding, learned predictors, third parties) runs in a thread of its own, one per strategy, so that the event loop
goes on, and there keys take turns (`Turns`): however many requests one has waiting, those of another wait for one of them. What says that
it is fast (`is_fast`) is called in place. A strategy that raises, names a model that is not there, or takes longer than its time cannot be
asked: `BypassError`.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from anabranch.config import to_dict
from anabranch.errors import AnabranchError, BudgetError, InputError, LimitError, RateError
from anabranch.gateway.config import StrategyConfig
from anabranch.gateway.decision_checks import BypassError, plain_decision, plain_messages
from anabranch.gateway.dispatch.senders import own_sender
from anabranch.gateway.logged_error import plain, raised, words
from anabranch.gateway.made_vectors import MadeVectors
from anabranch.gateway.owed import FORGETTING_S, Order, Owed
from anabranch.gateway.strategy_headers import strategy_headers
from anabranch.gateway.strategy_thread import StrategyThread
from anabranch.routers.contract.ask import Ask
from anabranch.routers.contract.knobs import check_knobs
from anabranch.routers.contract.query import Decision, Outcome, Pool, Query
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.embed import Embedder, embed_of, unit_vectors
from anabranch.routers.fitted import digest_of
from anabranch.web.api_error import wrong
from anabranch.web.turns import in_task, plainly

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Characters: longer texts are looked at in the thread, even by strategies that are fast.
SHORT = 20_000

# Observations that may wait for a strategy's thread; more are dropped. With all else that only the strategy itself wants, they are one
# sender there, whose work is done in the order it came.
WAITING = 256
LEARNING = own_sender("learning")

# Least time to judge an answer, which took a model longer than that to write.
JUDGING_S = 1.0

# Least time of a strategy that asks models: their answers take longer than any computation may.
ASKING_S = 10.0


def lasts(error: Exception) -> bool:
    """Whether a strategy meets the same limit whenever it is asked the same: one of the config's or the key's, which no waiting changes."""
    if isinstance(error, BudgetError):
        return error.subject == "request"
    return isinstance(error, LimitError) and not isinstance(error, RateError) and error.retry_after_s is None


class Lane:
    """One strategy and its thread.

    Attributes:
        name: ``auto/NAME``.
        settings: of the config.
        learns: `observe` does something.
        made: what it was made from, see `made_from`; "" if what it learns is not kept.
        embedder: of its queries, if it has one.
        owed: orders to forget that the strategy has not obeyed yet; what it keeps meanwhile is not to be stored.
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
        self._thread = StrategyThread(name).take()
        self._is_closed = False
        self._waiting = 0
        self._told = [0]
        self.owed = Owed(self._forgotten)
        self.made = made_from(self) if self.learns else ""

    def narrowed(self, pool: Pool) -> Pool:
        """The models this strategy may choose among."""
        if not self._models:
            return pool
        return Pool(tuple(model for model in pool.models if model.name in self._models), pool.now_s)

    def with_vector(self, query: Query, made: MadeVectors) -> Query:
        """The query with the vector that its strategy needs: of its own embedder and no other; without one where none was made."""
        found = None if self._embedder is None else made.get(self._embedder, query.text)
        return query if found is query.vector_D else replace(query, vector_D=found)

    async def decide(
        self, query: Query, pool: Pool, ask: Ask, made: MadeVectors | None = None
    ) -> tuple[Decision, Query]:
        """Ask the strategy. Raises BypassError, and ApiError for knobs the sender set wrong.

        The vector that it needs is taken from ``made``, or put there.
        """
        pool, made = self.narrowed(pool), MadeVectors() if made is None else made
        try:
            check_knobs(query.knobs, self.strategy.sender_knobs, f"auto/{self.name}")
            query = self.with_vector(query, made)
            if self._embedder is not None and query.vector_D is None:
                made.put(self._embedder, query.text, await self._vector(self._embedder, query))
                query = self.with_vector(query, made)
            if self.strategy.is_async:
                decision = await self._awaited(lambda: self.strategy.aroute(query, pool, ask))
            else:
                is_short = len(query.text) <= SHORT
                decision = await self._called(
                    query.tenant, lambda: self.strategy.route(query, pool), self.timeout_s, is_short
                )
        except InputError as error:
            if query.knobs:
                raise wrong("model", words(error)) from None
            raise BypassError("raised", words(error)) from None
        try:
            return plainly(lambda: plain_decision(decision, pool)), query
        except BypassError:
            raise
        except Exception as error:
            # Of what looking at it runs.
            raise self._raised(error) from None

    async def _vector(self, embedder: Embedder, query: Query) -> np.ndarray:
        """Of the text. Raises BypassError, also for what is none: the strategy would learn from it, for all senders."""
        try:
            return await self._called(
                query.tenant, lambda: unit_vectors(embedder, [query.text])[0], self.timeout_s, is_short=False
            )
        except InputError as error:
            # No knob of the sender's is to blame for it.
            raise self._raised(error) from None

    async def prepare(self, query: Query, model: str, decision: Decision) -> Sequence[Mapping[str, Any]]:
        """What to send to a candidate. Raises BypassError, also for what no messages can be."""

        def made() -> Sequence[Mapping[str, Any]]:
            given = self.strategy.prepare(query, model, query.messages, decision=decision)
            return given if given is query.messages else plain_messages(given, query.messages)

        return await self._called(query.tenant, made, self.timeout_s)

    async def headers(self, query: Query, decision: Decision) -> dict[str, str]:
        """What it tells the sender of a decision of its own. Raises BypassError."""

        def made() -> dict[str, str]:
            return strategy_headers(self.name, self.strategy.headers(decision))

        return await self._called(query.tenant, made, self.timeout_s)

    async def accept(self, query: Query, model: str, answer: str, details: Mapping[str, Any], ask: Ask) -> bool:
        """Whether an answer is good enough. Raises BypassError."""
        strategy = self.strategy
        if strategy.is_async:

            async def judged() -> bool:
                return bool(await strategy.aaccept(query, model, answer, details, ask))

            return await self._awaited(judged)
        wanted = max(self.timeout_s, JUDGING_S)
        return await self._called(query.tenant, lambda: bool(strategy.accept(query, model, answer, details)), wanted)

    def observe(self, outcome: Outcome) -> None:
        """Let the strategy learn, later and where it disturbs nobody."""
        if not self.learns:
            return
        self._later(lambda: self.strategy.observe(outcome))

    @property
    def compares(self) -> bool:
        """Whether its strategy learns from preferences."""
        return self.learns and type(self.strategy).prefer is not Strategy.prefer

    def prefer(self, outcome: Outcome, better: str, worse: str) -> None:
        """As `observe`, of a preference."""
        if self.compares:
            self._later(lambda: self.strategy.prefer(outcome, better, worse))

    def _later(self, work: Callable[[], None]) -> None:
        if self.is_fast:
            self._learn(work)
        elif self._waiting < WAITING:
            self._waiting += 1
            timed = self._thread.timed(lambda: self._learn(work))
            self._thread.turns.put(LEARNING, timed).add_done_callback(self._observed)

    async def explain(self, query: Query, pool: Pool) -> dict[str, Any]:
        """Why the strategy would decide so. Raises BypassError."""
        found = await self._called(query.tenant, lambda: self.strategy.explain(query, self.narrowed(pool)), JUDGING_S)
        return dict(found)

    def touch(self) -> None:
        """It has learned something beside requests."""
        self._told[0] += 1

    @property
    def told(self) -> int:
        """Outcomes that the strategy was told of."""
        return self._told[0]

    def follows(self, old: "Lane") -> bool:
        """Whether its strategy is that of another lane, or learns and is made from the same, so that it can go on with that one."""
        return old.strategy is self.strategy or (self.learns and self.made != "" and old.made == self.made)

    def succeed(self, old: "Lane") -> None:
        """Go on with the strategy of a lane that it `follows`, and what it has learned, in the same thread."""
        self.strategy, self.made, self._told, self.owed = old.strategy, old.made, old._told, old.owed
        self.owed.forget = self._forgotten
        before, self._thread = self._thread, old._thread.take()
        before.release()
        try:
            plainly(lambda: self.strategy.connect(embed=embed_of(self.embedder)))
        except Exception as error:
            # It has what it was connected with before, which was made from the same.
            logger.warning("strategy %s could not be connected anew: %s", self.name, raised(error))

    @property
    def can_forget(self) -> bool:
        """Whether its strategy keeps anything of texts."""
        return type(self.strategy).forget is not Strategy.forget

    async def forget(self, order: Order, limit_s: float = FORGETTING_S) -> int:
        """Let its strategy forget what an order is about (`Strategy.forget`); how much there was.

        Raises what the strategy does, and TimeoutError after ``limit_s`` seconds; then it owes the order.
        """
        return await self.owed.tell(order, limit_s)

    async def obey(self) -> int:
        """`forget`, of each that it owes; what it fails at is said in the log."""
        failed: list[Exception] = []
        count = await self.owed.tell_again(FORGETTING_S, failed.append)
        if failed:
            logger.error(
                "strategy %s failed again to forget (%d orders): %s", self.name, len(failed), raised(failed[0])
            )
        return count

    async def _forgotten(self, order: Order) -> int:
        count = await self.alone(lambda: _counted(self.strategy.forget(**order)))
        self.touch()
        return count

    async def expire(self, before_s: float) -> int:
        """Let its strategy forget what is older (`Strategy.expire`); how much there was. Raises what the strategy does."""
        return await self.alone(lambda: _counted(self.strategy.expire(before_s)))

    async def alone(self, work: Callable[[], T]) -> T:
        """``work()`` while nothing else touches the strategy, however long it takes.

        Raises AnabranchError where its thread has ended, since a reload took the strategy out: whoever asks goes on with the others.
        """
        if self.is_fast:
            return plainly(work)
        with self._thread.used() as turns:
            future = turns.put(LEARNING, self._thread.timed(work))
            try:
                # Not the future itself: that it is cancelled is not that whoever waits is.
                await asyncio.wait({future})
            finally:
                if not future.done():
                    turns.drop(LEARNING, future)
        if future.cancelled():
            raise AnabranchError(f"the thread of strategy {self.name} has ended")
        return future.result()

    def close(self) -> None:
        """Let the thread end once it is idle, and nobody else uses it. A second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._thread.release()

    def _learn(self, work: Callable[[], None]) -> None:
        self._told[0] += 1
        try:
            plainly(work)
        except Exception as error:
            logger.warning("strategy %s failed to learn: %s", self.name, type(error).__name__)

    def _observed(self, future: object) -> None:
        self._waiting -= 1

    async def _called(self, whose: str, work: Callable[[], T], limit_s: float, is_short: bool = True) -> T:
        """``work()`` in place or in the thread. Raises BypassError for whatever it raises but InputError."""
        try:
            return plainly(work) if self.is_fast and is_short else await self._in_thread(whose, work, limit_s)
        except (BypassError, InputError):
            raise
        except Exception as error:
            raise self._raised(error) from None

    async def _awaited(self, work: Callable[[], Awaitable[T]]) -> T:
        try:
            return await in_task(work, self.timeout_s)
        except TimeoutError:
            raise BypassError("slow", f"it took longer than {self.timeout_s:g} s") from None
        except LimitError as error:
            # Of what it asks. The words are ours, and quote nobody.
            raise BypassError("limit", words(error), lasts(error)) from None
        except InputError:
            raise
        except Exception as error:
            raise self._raised(error) from None

    def _raised(self, error: BaseException) -> BypassError:
        """The log says what and where, without the texts an exception may quote."""
        error = plain(error)
        logger.warning("strategy %s failed: %s", self.name, raised(error))
        return BypassError("raised", f"{type(error).__name__} in the strategy")

    async def _in_thread(self, whose: str, work: Callable[[], T], limit_s: float) -> T:
        """``work()`` in the thread. Its time counts from when it begins, and so does that of what it waits for."""
        thread = self._thread
        if _is_stuck(thread, limit_s):
            raise BypassError("slow", f"the call before it has taken longer than {limit_s * 1000:g} ms")
        started: list[float] = []

        def begun() -> T:
            started.append(time.monotonic())
            return work()

        with thread.used() as turns:
            future = turns.put(whose, thread.timed(begun))
            try:
                while True:
                    begin = started[0] if started else thread.began or time.monotonic()
                    await asyncio.wait({future}, timeout=max(begin + limit_s - time.monotonic(), 0.001))
                    if future.done():
                        break
                    is_late = started and time.monotonic() - started[0] >= limit_s
                    if is_late or (not started and _is_stuck(thread, limit_s)):
                        raise BypassError("slow", f"it took longer than {limit_s * 1000:g} ms")
            finally:
                turns.drop(whose, future)
        if future.cancelled():
            raise BypassError("gone", "its thread has ended")
        return future.result()


def _counted(told: object) -> int:
    """How much a strategy says it forgot, as far as that is a number."""
    return told if isinstance(told, int) else 0


def _is_stuck(thread: StrategyThread, limit_s: float) -> bool:
    """What runs in it has taken longer than so many seconds."""
    began = thread.began
    return began is not None and time.monotonic() - began > limit_s


def made_from(lane: Lane) -> str:
    """See `made_of`."""
    return made_of(lane.name, lane.strategy, lane.embedder)


def made_of(name: str, strategy: Strategy, embedder: Embedder | None) -> str:
    """Digest of what a strategy is made from; "" if what it learns cannot be kept."""
    try:
        arrays, facts = plainly(strategy.state)
        about = {
            "kind": strategy.name,
            "facts": facts,
            "config": None if strategy.config is None else to_dict(strategy.config),
            "embedder": None if embedder is None else to_dict(embedder.config),
        }
        return digest_of({name: np.asarray(value) for name, value in arrays.items()}, json.dumps(about, sort_keys=True))
    except Exception as error:
        logger.warning("what strategy %s learns cannot be kept: %s: %s", name, type(error).__name__, words(error))
        return ""
