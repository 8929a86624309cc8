"""`Run`: the attempts of one request, one after another, until one works or nothing is left to try.

    for each candidate, up to 1 + retries times:   time left? a deployment free? an extra attempt in the budget? its price allowed?
                                                   -> ask it -> works: done | retry | fall back to the next | give up

There is one deadline, and every wait is cut to what is left of it.
"""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from anabranch.gateway.dispatch.attempt_ends import AttemptEnds
from anabranch.gateway.dispatch.balance import pick
from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.late import Reader
from anabranch.gateway.dispatch.outgoing import Outgoing, outgoing
from anabranch.gateway.dispatch.own_fallbacks import is_free
from anabranch.gateway.dispatch.plan import Attempt, Plan, Report
from anabranch.gateway.dispatch.provider_fault import as_failure
from anabranch.gateway.dispatch.retry import ACTION, IN_VAIN, LASTING, backoff
from anabranch.gateway.dispatch.shared_rooms import NoRoomError, SharedRooms, attempt_id
from anabranch.gateway.observe.trace_context import new_span_id
from anabranch.gateway.providers.provider import (
    Failure,
    FailureKind,
    HttpCall,
    UpstreamError,
    UpstreamRequest,
)

if TYPE_CHECKING:
    from anabranch.gateway.dispatch.dispatcher import Dispatcher, LiveGroup

logger = logging.getLogger(__name__)
Opening = Callable[[Live, UpstreamRequest, HttpCall, Attempt], Awaitable[Any]]


# Names of attempts that processes count together.
_places = itertools.count()

# They take long.
SLOW: tuple[FailureKind, ...] = (
    "timeout",
    "first_token",
)


class Run:
    """State of one request between its attempts.

    Attributes:
        report: what has been done.
        request: as it came; another one is sent where a plan says so, or a broken stream is continued.
        ends: what is done as attempts end.
    """

    def __init__(self, dispatcher: "Dispatcher", plan: Plan, request: UpstreamRequest) -> None:
        self.dispatcher, self.plan, self.rules = dispatcher, plan, dispatcher.rules
        self.began = dispatcher.now()
        self.report = Report() if plan.report is None else plan.report
        self.request, self.tokens, self._streams = request, request.prompt_tokens, request.stream
        self.ends = AttemptEnds(dispatcher, plan, request, self.report, self.began)
        self._at, self._retry = 0, 0
        self._most = plan.most_attempts(self.rules.retries)
        self._holds, self._owes = False, False
        # Models that it went on to for what is its own.
        self._further = 0
        self._last: UpstreamError | None = None
        self._causes: set[FailureKind] = set()
        # Deployments that have as many attempts under way as they may, elsewhere too.
        self._crowded: set[str] = set()
        dispatcher.budget.request(self.began, plan.sender)

    @property
    def left_s(self) -> float:
        """Seconds to the deadline."""
        return self.plan.deadline - self.dispatcher.now()

    @property
    def is_last(self) -> bool:
        """No candidate comes after the present one."""
        return not any(self._is_meant(model) for model in self.plan.candidates[self._at + 1 :])

    def _is_meant(self, model: str) -> bool:
        """Whether a candidate is for what has been met so far."""
        kinds = self.plan.only_after.get(model)
        return kinds is None or not kinds.isdisjoint(self._causes)

    async def obtain(self, request: UpstreamRequest, opening: Opening) -> tuple[Any, Attempt]:
        """The next result, with the attempt that brought it. Raises UpstreamError when nothing is left to try."""
        while True:
            sent = await self._written(await self._next(), request)
            if not self._is_free(sent.live):
                # It was when it was chosen, and nothing was held while the request was written.
                continue
            try:
                found, attempt = await self._ask(sent, request, opening)
                # Of several beside each other another model may have been the first.
                self.report.is_stopgap |= attempt.model != self.plan.candidates[self._at]
                return found, attempt
            except NoRoomError:
                # No attempt was made.
                continue
            except UpstreamError as error:
                self.failed(error)

    def failed(self, error: UpstreamError) -> None:
        """Take note of a failure and decide what is next. Raises UpstreamError if that is nothing."""
        cause = error.failure.cause
        self._last, self._owes = error, not is_free(error.failure, self._further)
        # Where it is not supported nothing was sent.
        self._further += not self._owes and cause != "unsupported"
        self._causes.add(cause)
        action = ACTION[cause]
        if action == "give_up":
            raise self.ended(error)
        # Asked again, the same deployment would take as much time again, or refuse again.
        is_in_vain = (cause in SLOW and not self.is_last) or cause in IN_VAIN
        if action == "fall_back" or self._retry >= self.rules.retries or (is_in_vain and not self._has_fresh()):
            self.report.is_stopgap |= cause not in LASTING
            self._next_model()
        else:
            self._retry += 1

    def _has_fresh(self) -> bool:
        """A deployment of the present model has not been asked yet, and may be."""
        group, now = self.dispatcher.groups.get(self.plan.candidates[self._at]), self.dispatcher.now()
        return group is not None and any(live.name not in self.ends.avoid for live in self._free(group, now))

    def _free(self, group: "LiveGroup", now: float) -> list[Live]:
        """Deployments that take this request now."""
        return [live for live in group.free(now, self.tokens, self.plan.sender) if live.name not in self._crowded]

    def _is_free(self, live: Live) -> bool:
        """Whether a deployment takes this request now."""
        takes = live.can_take(self.dispatcher.now(), self.tokens, self.plan.sender)
        return takes and live.name not in self._crowded

    def reject(self) -> None:
        """The answer is not good enough: go on to the next candidate."""
        self._owes = False
        self._next_model()

    def close(self) -> None:
        """Give back what is held; call it once, whatever came of the request."""
        if self._holds:
            self._holds = False
            self.dispatcher.budget.release(self.plan.sender)

    def ended(self, error: UpstreamError) -> UpstreamError:
        """The error for whoever asked."""
        return UpstreamError(error.failure, self.report)

    def _next_model(self) -> None:
        self._at, self._retry = self._at + 1, 0

    def _skip(self, model: str, why: str, passes_s: float = 0.0) -> None:
        """On to the next candidate. What is in the way passes after so many seconds: 0 if nobody knows, infinity if it never does."""
        self.report.skipped.append((model, why))
        if math.isfinite(passes_s):
            self.report.is_stopgap = True
            self.report.passes_s = max(self.report.passes_s, passes_s)
        self._next_model()

    # Which deployment is next

    async def _next(self) -> Live:
        """A deployment to ask now. Raises UpstreamError if there is none."""
        while self._at < len(self.plan.candidates):
            now = self.dispatcher.now()
            if now >= self.plan.deadline:
                raise self._too_late()
            if len(self.report.attempts) >= self._most:
                break
            model = self.plan.candidates[self._at]
            if not self._is_meant(model):
                # Not one that was passed over: it is for other cases.
                self._next_model()
                continue
            group = self.dispatcher.groups.get(model)
            if group is None:
                self._skip(model, "no such model", math.inf)
                continue
            if not self._free(group, now):
                await self._wait_or_skip(group, now)
                continue
            if not await self._may_go_on(model, now):
                continue
            live = self._pick(group)
            if live is not None:
                return live
        raise self.ended(self._last or self._nothing())

    async def _wait_or_skip(self, group: "LiveGroup", now: float) -> None:
        """Nothing of the group is free: go on to the next candidate; behind the last, wait a little if that helps."""
        wait_s = min(live.free_in_s(now, self.tokens) for live in group.lives)
        if self.is_last and 0 < wait_s <= min(self.rules.max_backoff_s, self.left_s):
            await asyncio.sleep(wait_s)
        else:
            passes_s = min(self._passes_s(live, now) for live in group.lives)
            is_full = all(live.name in self._crowded for live in group.free(now, self.tokens))
            why = "no deployment takes requests" if is_full else "this sender has its part of what its deployments take"
            self._skip(group.name, why, passes_s)

    def _passes_s(self, live: Live, now: float) -> float:
        """As `_skip`: never for a prompt of more tokens than it may have in a minute, nor where it is thought broken for what lasts."""
        is_lasting = live.is_shut(now) and live.failed_of in LASTING
        return math.inf if is_lasting else live.free_in_s(now, self.tokens)

    async def _may_go_on(self, model: str, now: float) -> bool:
        """Whether this attempt may be made; waits as long as a retry has to. Raises UpstreamError if no more may.

        The price is asked for wherever it may differ from what was set aside for the request: after an attempt, and of any candidate
        but the first, also where that was passed over without an attempt.
        """
        if self._owes:
            holds, self._holds = self._holds, False
            if not self.dispatcher.budget.take(now, holds, self.plan.sender):
                self.report.skipped.append((model, "the budget of extra attempts is used up"))
                raise self.ended(self._last or self._nothing())
            self._owes = False
            if self._retry:
                wait_s = backoff(self._retry - 1, self.rules.backoff_s, self.rules.max_backoff_s, self.dispatcher.rng)
                await asyncio.sleep(min(wait_s, max(self.left_s, 0.0)))
        is_new = bool(self.report.attempts) or model != self.plan.candidates[0]
        if is_new and self.plan.allow is not None and not await self.plan.allow(model, self.report.cost):
            failure = Failure(kind="refused", message=f"no budget is left for {model}")
            self._last = self._last or UpstreamError(failure)
            self._skip(model, "its price is not allowed")
            return False
        return True

    def _pick(self, group: "LiveGroup") -> Live | None:
        """One of the group, or None and on to the next candidate."""
        now = self.dispatcher.now()
        free = self._free(group, now)
        fresh = [live for live in free if live.name not in self.ends.avoid] or free
        if not fresh:
            return None
        live = pick(group.balance, fresh, now, self.dispatcher.rng)
        if live.is_doubtful(now) and not self._holds:
            # If this fails, one more attempt must be paid for; where that cannot be promised, it had better be elsewhere.
            at_risk = live.waiting if live.is_silent(now) else 0
            if self.dispatcher.budget.hold(now, at_risk, self.plan.sender):
                self._holds = True
            elif steady := [other for other in fresh if not other.is_doubtful(now)]:
                live = pick(group.balance, steady, now, self.dispatcher.rng)
            elif self._has_steady_later(now):
                self._skip(group.name, "it fails, and the budget of extra attempts is used up")
                return None
        return live

    def _has_steady_later(self, now: float) -> bool:
        names = filter(self._is_meant, self.plan.candidates[self._at + 1 :])
        later = (self.dispatcher.groups.get(model) for model in names)
        return any(not live.is_doubtful(now) for group in later if group for live in self._free(group, now))

    # Asking

    async def _written(self, live: Live, request: UpstreamRequest) -> Outgoing:
        """What is to be sent to a deployment. A large request waits for its turn, and holds no place at the deployment meanwhile.

        Raises UpstreamError if the time for the request is up before that.
        """
        own = self.plan.requests.get(live.model) if request is self.request else None
        if own is not None:
            request = own if request.stream else own.whole()
        request = request.bounded(self.plan.bounds.get(live.model))
        try:
            async with asyncio.timeout(max(self.left_s, 0.0)):
                return await outgoing(live, request, self.dispatcher.turns, self.plan.sender)
        except TimeoutError:
            raise self._too_late() from None

    async def _ask(self, sent: Outgoing, request: UpstreamRequest, opening: Opening) -> tuple[Any, Attempt]:
        """``request`` is what others would be sent, who are asked beside it."""
        group = self.dispatcher.groups[sent.live.model]
        is_hedged = self.rules.hedge if self.plan.hedge is None else self.plan.hedge
        delay_s = (group.hedge if self._streams else group.hedge_whole).delay_s if is_hedged else None
        if delay_s is None:
            return await self._made(sent, opening, self._begun(sent.live))
        return await self._race(sent, request, opening, delay_s)

    async def _race(
        self, sent: Outgoing, request: UpstreamRequest, opening: Opening, delay_s: float
    ) -> tuple[Any, Attempt]:
        """Ask a second deployment beside the first when that is slow; the first to bring something wins."""
        tasks = [self._started(sent, opening)]
        winner: asyncio.Future[Any] | None = None
        try:
            await asyncio.wait(tasks, timeout=delay_s)
            if not tasks[0].done():
                other = await self._elsewhere(sent.live, request, tasks[0])
                if other is not None:
                    tasks.append(self._started(other, opening, is_hedge=True))
            pending = set(tasks)
            while pending and winner is None:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                winner = next((task for task in tasks if task in done and task.exception() is None), None)
        finally:
            try:
                await _stopped(tasks)
            except asyncio.CancelledError:
                # Nobody will take what was won.
                winner = None
                raise
            finally:
                for task in tasks:
                    if task is not winner and task.done() and not task.cancelled() and task.exception() is None:
                        self._discard(*task.result())
        # Without a winner, raises what the first failed of.
        return (winner or tasks[0]).result()

    async def _elsewhere(self, live: Live, request: UpstreamRequest, first: "asyncio.Future[Any]") -> Outgoing | None:
        """Another deployment for a hedge: of the same model, else of the next candidates; None if none may be asked.

        Nor is one where the ``first`` is done by the time that the other could be asked.
        """
        now = self.dispatcher.now()
        if len(self.report.attempts) >= self._most:
            return None
        for model in filter(self._is_meant, self.plan.candidates[self._at :]):
            group = self.dispatcher.groups.get(model)
            free = [] if group is None else self._free(group, now)
            free = [other for other in free if other is not live and not other.is_doubtful(now)]
            if group is None or not free:
                continue
            if self.plan.allow is not None and not await self.plan.allow(model, self.report.cost):
                return None
            other = pick(group.balance, free, now, self.dispatcher.rng)
            writing = asyncio.ensure_future(self._written(other, request))
            writing.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                await asyncio.wait((first, writing), return_when=asyncio.FIRST_COMPLETED)
            finally:
                writing.cancel()
            if first.done() or writing.exception() is not None or not self._is_free(other):
                return None
            may_ask = self.dispatcher.budget.take(self.dispatcher.now(), sender=self.plan.sender)
            return writing.result() if may_ask else None
        return None

    def _started(self, sent: Outgoing, opening: Opening, is_hedge: bool = False) -> "asyncio.Future[Any]":
        """One attempt beside others. It is counted in at once: by the time the task runs, another request may have taken its place."""
        attempt = self._begun(sent.live, is_hedge)
        task = asyncio.ensure_future(self._made(sent, opening, attempt))

        def ended(done: "asyncio.Future[Any]") -> None:
            # Before it ever ran.
            if done.cancelled() and attempt.status == "open":
                self.ends.lost(sent.live, attempt, None)

        task.add_done_callback(ended)
        return task

    def _begun(self, live: Live, is_hedge: bool = False) -> Attempt:
        start = self.dispatcher.now()
        most = None if self.plan.most is None else self.plan.most(live.model)
        attempt = Attempt(
            model=live.model, deployment=live.name, start_s=start - self.began, is_hedge=is_hedge, most=most
        )
        attempt.ticket = live.begin(start, self.tokens, self.plan.sender)
        self.report.attempts.append(attempt)
        return attempt

    async def _made(self, sent: Outgoing, opening: Opening, attempt: Attempt) -> tuple[Any, Attempt]:
        """An attempt that has begun. Success leaves `Live` to whoever goes on (a stream), or ends it in ``opening``."""
        live, has_room = sent.live, False
        try:
            if self.dispatcher.rooms is not None and live.deployment.is_limited:
                await self._take_room(live, attempt, self.dispatcher.rooms)
            has_room = True
            attempt.call = call = self._marked(sent.call(), attempt)
            return await opening(live, sent.request, call, attempt), attempt
        except Exception as cause:
            # From a provider of others it is a fault like any other.
            if isinstance(cause, NoRoomError) and not has_room:
                raise
            error = as_failure(cause, live.name)
            self.ends.lost(live, attempt, error.failure)
            raise error from None
        except BaseException:
            self.ends.lost(live, attempt, None)
            raise

    async def _take_room(self, live: Live, attempt: Attempt, rooms: SharedRooms) -> None:
        """Count an attempt in for all processes. Raises NoRoomError, and it never was, where they have used up the deployment's limits."""
        place = attempt_id(next(_places), self.plan.sender)
        full = await rooms.take(live.deployment, place, self.tokens)
        if full is None:
            attempt.place = place
            return
        live.back_out(attempt.ticket, self.dispatcher.now(), self.tokens, full, self.plan.sender)
        if full.wait_s is None:
            self._crowded.add(live.name)
        self.report.attempts[:] = [one for one in self.report.attempts if one is not attempt]
        raise NoRoomError

    def _marked(self, call: HttpCall, attempt: Attempt) -> HttpCall:
        """What an attempt sends: whose it is, and the trace that it belongs to."""
        call.sender = self.plan.sender
        if self.plan.trace is not None:
            attempt.span_id, attempt.time_s = new_span_id(), time.time()
            call.headers = {**call.headers, **self.plan.trace.headers(attempt.span_id)}
        return call

    def _discard(self, result: Any, attempt: Attempt) -> None:
        """Both were quick: the second result is dropped, and charged."""
        if attempt.status == "ok":
            attempt.status = "cancelled"
        else:
            result.drop()

    def reader(self, live: Live, request: UpstreamRequest, attempt: Attempt) -> Reader:
        """What reads a deployment's whole answer to a request."""
        dispatcher, sender = self.dispatcher, self.plan.sender
        has_come = partial(self.ends.has_come, live, attempt)
        return Reader(live.provider, request, dispatcher.turns, sender, dispatcher.room, attempt.time, has_come)

    # Endings

    def _too_late(self) -> UpstreamError:
        message = f"the time for this request ({max(0.0, self.plan.deadline - self.began):g} s) is up"
        if self._last is not None:
            message += f"; the last failure was: {self._last.failure.message}"
        return UpstreamError(Failure(kind="deadline", message=message), self.report)

    def _nothing(self) -> UpstreamError:
        skipped = "; ".join(f"{model}: {why}" for model, why in self.report.skipped[:5])
        now, groups = self.dispatcher.now(), self.dispatcher.groups
        lives = [live for model in self.plan.candidates if model in groups for live in groups[model].lives]
        waits = [wait for live in lives if 0 < (wait := live.free_in_s(now, self.tokens)) < float("inf")]
        message = f"no model can be asked now ({skipped})"
        is_crowded = any(not live.is_shut(now) for live in lives)
        failure = Failure(
            kind="unavailable", message=message, retry_after_s=min(waits, default=None), is_crowded=is_crowded
        )
        return UpstreamError(failure)

    def timed_out(self, live: Live, limit_s: float, kind: Any) -> UpstreamError:
        """The failure of a wait that ended: the deployment's limit, or the deadline of all."""
        if self.left_s <= 1e-3:
            return self._too_late()
        what = "no first token" if kind == "first_token" else "no answer"
        return UpstreamError(Failure(kind=kind, message=f"{live.name} brought {what} within {limit_s:g} s"))


async def _stopped(tasks: Sequence["asyncio.Future[Any]"]) -> None:
    """Cancel those that are not done, and wait until they are."""
    losers = [task for task in tasks if not task.done()]
    for task in losers:
        task.cancel()
    if losers:
        await asyncio.gather(*losers, return_exceptions=True)
