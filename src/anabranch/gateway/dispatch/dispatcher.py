"""`Dispatcher`: calls upstreams for the gateway, with retries, fallbacks, hedges and breakers, under one deadline."""

import asyncio
import inspect
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from anabranch.errors import AnabranchError, ConfigError
from anabranch.gateway.dispatch.deployment_state import TOLD, Live
from anabranch.gateway.dispatch.deployments import Balance, DispatchRules, Group
from anabranch.gateway.dispatch.hedge import HedgeDelay
from anabranch.gateway.dispatch.kept_stream import room_for_streams
from anabranch.gateway.dispatch.large_answers import LargeAnswers
from anabranch.gateway.dispatch.late import Exchange, Late, answer_of, exchanged
from anabranch.gateway.dispatch.plan import Attempt, Plan
from anabranch.gateway.dispatch.retry import RetryBudget
from anabranch.gateway.dispatch.run import Run
from anabranch.gateway.dispatch.shared_rooms import SharedRooms
from anabranch.gateway.dispatch.stream import Stream, linger
from anabranch.gateway.dispatch.upstream_beside import UpstreamBeside
from anabranch.gateway.logged_error import words
from anabranch.gateway.providers.answer_bounds import most_bytes
from anabranch.gateway.providers.provider import (
    Answer,
    HttpCall,
    Provider,
    Reply,
    Transport,
    UpstreamError,
    UpstreamRequest,
    Usage,
)
from anabranch.routers.contract.query import Model, Pool
from anabranch.routers.money import Price
from anabranch.web.answer_room import AnswerRoom
from anabranch.web.own_task import all_ended
from anabranch.web.turns import Turns, plainly_awaited

logger = logging.getLogger(__name__)

# Large requests are written and large answers read here, one after another: the more threads want Python's lock, the longer the event loop
# waits for it.
_READERS = ThreadPoolExecutor(1, "large-answer")

# Changes of breakers that are remembered.
CHANGES = 500


@dataclass(slots=True)
class LiveGroup:
    """A model with its deployments as they are now."""

    group: Group
    lives: tuple[Live, ...]
    hedge: HedgeDelay  # by first tokens of streams
    hedge_whole: HedgeDelay  # by whole answers

    @property
    def name(self) -> str:
        """Of the model."""
        return self.group.name

    @property
    def balance(self) -> Balance:
        """How a deployment is chosen."""
        return self.group.balance

    def free(self, now: float, tokens: int, sender: str | None = None) -> list[Live]:
        """Deployments that take a request of so many tokens now, of a sender or (None) of anybody."""
        return [live for live in self.lives if live.can_take(now, tokens, sender)]

    def worst_nano(self, most: Usage) -> int:
        """The most nano-dollars that one call may cost of the dearest deployment."""
        return max(live.bill(most, most) for live in self.lives)

    def seen(self, now: float) -> Model:
        """The model as strategies see it."""
        group, lives = self.group, self.lives
        latencies = [live.latency_s for live in lives if live.latency_s is not None]
        return Model(
            name=group.name,
            price=group.price,
            parameters=group.parameters,
            description=group.description,
            context=group.context,
            is_available=any(live.can_take(now, 0) for live in lives),
            in_flight=sum(live.in_flight for live in lives),
            load=min(live.load(now) for live in lives),
            latency_s=min(latencies) if latencies else None,
            is_priced=any(live.deployment.is_priced for live in lives),
        )


class Dispatcher:
    """Calls upstreams.

    Args:
        groups: the models.
        rules: of retries and breakers.
        http: carries calls; None for a pool of connections of its own.
        clock: seconds, never running back.
        seed: of jitter and of drawing deployments; None for a new one each time.
        previous: the one whose place it takes; what is known of deployments of the same name and provider is carried over.

    Raises ConfigError if a name of a model or deployment is there twice, or a provider cannot be made.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        rules: DispatchRules | None = None,
        *,
        http: Transport | None = None,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
        previous: "Dispatcher | None" = None,
    ) -> None:
        self.rules = rules or DispatchRules()
        self.now = clock
        # What strategies keep outlives the process, and is dated by a clock that does.
        self._wall = time.time if clock is time.monotonic else clock
        self.rng = random.Random(seed)
        self.budget = RetryBudget(self.rules.extra, self.rules.min_extra, self.rules.window_s)
        self.changes: deque[dict[str, Any]] = deque(maxlen=CHANGES)
        # Told of each change of a breaker that this process found itself.
        self.on_change: Callable[[Live], None] = lambda live: None
        # Limits of deployments that are kept with other processes; None where each keeps its own.
        self.rooms: SharedRooms | None = None
        self._http: Transport = UpstreamBeside() if http is None else http
        self._owns_http = http is None
        self._lingering: set[asyncio.Future[None]] = set()
        self.turns = Turns(_READERS)
        self.room: LargeAnswers = LargeAnswers() if previous is None else previous.room
        self.kept: AnswerRoom = room_for_streams() if previous is None else previous.kept
        self.late = Late(self.rules.read_on_s, self.rules.read_on)
        self.groups: dict[str, LiveGroup] = {}
        names: set[str] = set()
        for group in groups:
            twice = group.name in self.groups or any(one.name in names for one in group.deployments)
            if twice:
                raise ConfigError(
                    f"a name in model {group.name!r} is there twice; models and deployments need their own"
                )
            names.update(one.name for one in group.deployments)
            lives = tuple(
                Live(group.name, one, group.price, self.rules.breaker, self._http, self._changed)
                for one in group.deployments
            )
            self.groups[group.name] = LiveGroup(group, lives, self._hedge_delay(), self._hedge_delay())
        if previous is not None:
            self._adopt(previous)

    def price_of(self, model: str | None, deployment: str | None) -> Price | None:
        """What a model costs at one of its deployments, else in general; None if that is not known."""
        group = self.groups.get(model or "")
        if group is None:
            return None
        lives = [live for live in group.lives if live.name == deployment] or list(group.lives)
        known = [live.price for live in lives if live.deployment.is_priced]
        return (known[0] if lives[0].name == deployment else group.group.price) if known else None

    def _hedge_delay(self) -> HedgeDelay:
        rules = self.rules
        return HedgeDelay(rules.hedge_quantile, rules.hedge_min_s, rules.hedge_samples)

    def _adopt(self, previous: "Dispatcher") -> None:
        known = {live.name: live for group in previous.groups.values() for live in group.lives}
        for group in self.groups.values():
            for live in group.lives:
                old = known.get(live.name)
                if old is not None and old.deployment.provider == live.deployment.provider:
                    live.adopt(old)
        self.changes.extend(previous.changes)

    def _changed(self, live: Live, before: str, why: str, now: float) -> None:
        self.changes.append(
            {
                "time_s": time.time(),
                "model": live.model,
                "deployment": live.name,
                "from": before,
                "to": live.breaker.phase,
                "why": why,
            }
        )
        if why != TOLD:
            self.on_change(live)

    async def start(self) -> None:
        """Have providers get ready what takes long, one after another; calls of the others may be made meanwhile.

        A model of whose context the config says nothing has that which its providers know of. Raises ConfigError that names the deployment;
        `close` ends what has begun.
        """
        for group in self.groups.values():
            for live in group.lives:
                try:
                    await plainly_awaited(live.provider.start)
                except AnabranchError as error:
                    raise ConfigError(f"deployment {live.name} cannot start: {words(error)}") from error
            known = [context for live in group.lives if (context := live.context()) is not None]
            if known and group.group.context is None:
                group.group = replace(group.group, context=min(known))

    async def release(self) -> None:
        """Have providers give back what `start` got."""
        await close_providers(live.provider for live in self.lives())

    # Asking

    async def complete(self, plan: Plan, request: UpstreamRequest) -> Answer:
        """A whole answer.

        Raises UpstreamError, with the report, when all that may be tried has failed. If answers came but none was accepted, the last
        one is given.
        """
        request = request.whole()
        run, last = Run(self, plan, request), None
        try:
            while True:
                try:
                    answer, attempt = await run.obtain(request, lambda *given: self._whole(run, *given))
                except UpstreamError:
                    if last is None:
                        raise
                    answer, attempt = last
                    attempt.status, run.report.is_stopgap = "ok", True
                    break
                if plan.accept is None or run.is_last:
                    break
                accepted = plan.accept(attempt.model, answer)
                if await accepted if inspect.isawaitable(accepted) else accepted:
                    break
                attempt.status, last = "rejected", (answer, attempt)
                run.reject()
            run.report.model, run.report.deployment = attempt.model, attempt.deployment
            answer.report = run.report
            return answer
        finally:
            run.close()

    async def _whole(self, run: Run, live: Live, request: UpstreamRequest, call: HttpCall, attempt: Attempt) -> Answer:
        """One attempt at a whole answer."""
        limit_s = live.deployment.timeout_s
        attempt.is_whole = True
        reader = run.reader(live, request, attempt)
        exchange: Exchange = asyncio.ensure_future(
            plainly_awaited(lambda: exchanged(live.transport, call, attempt, reader, most_bytes(request)))
        )
        try:
            async with attempt.time.limited(limit_s, run.left_s):
                await asyncio.wait((exchange,))
        except TimeoutError:
            # It may have come at this moment.
            if not exchange.done():
                run.ends.leave(live, request, attempt, exchange)
                raise run.timed_out(live, limit_s, "timeout") from None
        except asyncio.CancelledError:
            run.ends.leave(live, request, attempt, exchange)
            raise
        answer = answer_of(live.provider, request, exchange)
        attempt.seen = answer.usage.completion
        run.ends.won(live, attempt, run.ends.usage_of(live, attempt, answer))
        return answer

    async def stream(self, plan: Plan, request: UpstreamRequest) -> Stream:
        """A stream whose first token has come. Read it to the end, or close it, and `forget` it where the plan keeps it.

        Where the plan judges answers, each but the last candidate's is whole before any of it is given; the last one's comes as it is made.
        Raises UpstreamError, with the report, when all that may be tried has failed before a first token.
        """
        run = Run(self, plan, request)
        stream = Stream(run, request)
        try:
            await stream.open()
        except BaseException:
            stream.forget()
            run.close()
            raise
        return stream

    def linger(self, reply: Reply) -> None:
        """Let a stream that has said its last come to its end, while nobody waits for it."""
        task = asyncio.ensure_future(linger(reply))
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)

    # Looking

    def pool(self) -> Pool:
        """The models as strategies see them, now."""
        now = self.now()
        return Pool(tuple(group.seen(now) for group in self.groups.values()), self._wall())

    def lives(self) -> list[Live]:
        """All deployments."""
        return [live for group in self.groups.values() for live in group.lives]

    def states(self) -> list[dict[str, Any]]:
        """Each deployment, for the page and for metrics."""
        now = self.now()
        return [live.state(now) for group in self.groups.values() for live in group.lives]

    async def close(self) -> None:
        """End all connections. Answers that are read on are given up."""
        await self.late.close()
        await asyncio.gather(*self._lingering)
        # What replies do about their ends comes before the ends of their providers.
        await all_ended()
        await self.release()
        if self._owns_http:
            await self._http.close()  # type: ignore[attr-defined]


async def close_providers(providers: Iterable[Provider]) -> None:
    """Have each give back what it got. One that fails keeps no other from it."""
    for provider in providers:
        try:
            await plainly_awaited(provider.close)
        except Exception as error:
            logger.error("%r could not be closed", provider, exc_info=error)
