"""`Run`: the attempts of one request, one after another, until one works or nothing is left to try.

    for each candidate, up to 1 + retries times:   time left? a deployment free? an extra attempt in the budget? its price allowed?
                                                   -> ask it -> works: done | retry | fall back to the next | give up

There is one deadline, and every wait is cut to what is left of it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anabranch.gateway.dispatch.balance import pick
from anabranch.gateway.dispatch.billed import broken_off, may_be_billed, whole_at_most
from anabranch.gateway.dispatch.breaker import Outcome
from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.late import Exchange, answer_of
from anabranch.gateway.dispatch.plan import Attempt, Plan, Report
from anabranch.gateway.dispatch.retry import ACTION, DISPUTED, DOUBTED, IN_VAIN, OUTCOME, backoff
from anabranch.gateway.logged_error import raised
from anabranch.gateway.observe.trace_context import new_span_id
from anabranch.gateway.providers.provider import (
    Answer,
    Failure,
    FailureKind,
    HttpCall,
    UpstreamError,
    UpstreamRequest,
    Usage,
)
from anabranch.web.large_json import LARGE

if TYPE_CHECKING:
    from anabranch.gateway.dispatch.dispatcher import Dispatcher, LiveGroup

logger = logging.getLogger(__name__)
Opening = Callable[[Live, UpstreamRequest, Attempt], Awaitable[Any]]


# They take long.
SLOW: tuple[FailureKind, ...] = (
    "timeout",
    "first_token",
)

# We ended it, and the upstream notices; in all else it is the upstream's end that we noticed.
OURS: tuple[FailureKind, ...] = ("timeout", "first_token", "deadline")


def as_failure(error: Exception, name: str) -> UpstreamError:
    """What went wrong at deployment ``name``. An exception that a provider may not raise is a fault of the provider, not of the request."""
    if isinstance(error, UpstreamError):
        return error
    logger.error("the provider of deployment %s failed", name, exc_info=error)
    return UpstreamError(
        Failure(kind="garbage", message=f"the provider of {name} failed ({type(error).__name__}); the log says how")
    )


async def built(live: Live, request: UpstreamRequest) -> HttpCall:
    """What a deployment is to be sent; a large request is put into its form in another thread.

    Raises UpstreamError, of a kind that is held against nobody but the request. Nothing has been sent yet: whatever goes wrong here
    comes of what is in the request, be it that the provider has a fault that it meets.
    """
    if request.num_bytes > LARGE:
        return await asyncio.to_thread(_built, live, request)
    return _built(live, request)


def _built(live: Live, request: UpstreamRequest) -> HttpCall:
    try:
        return live.provider.build(request)
    except UpstreamError as error:
        failure = error.failure
        kind = failure.kind if OUTCOME[failure.kind] == "ignored" else "request"
        # The status is of no upstream.
        raise UpstreamError(replace(failure, kind=kind, status=None)) from None
    except Exception as error:
        logger.error("the provider of deployment %s cannot send a request: %s", live.name, raised(error))
        message = f"the request cannot be put into the form that {live.name} takes ({type(error).__name__})"
        raise UpstreamError(Failure(kind="unsupported", message=message)) from None


class Run:
    """State of one request between its attempts.

    Attributes:
        report: what has been done.
        request: as it came; another one is sent where a plan says so, or a broken stream is continued.
        avoid: deployments that failed this request; asked again only when no other is free.
    """

    def __init__(self, dispatcher: "Dispatcher", plan: Plan, request: UpstreamRequest) -> None:
        self.dispatcher, self.plan, self.rules = dispatcher, plan, dispatcher.rules
        self.began = dispatcher.now()
        self.report = Report() if plan.report is None else plan.report
        self.request, self.tokens, self._streams = request, request.prompt_tokens, request.stream
        self.avoid: set[str] = set()
        self._at, self._retry = 0, 0
        self._most = plan.most_attempts(self.rules.retries)
        self._holds, self._has_failed = False, False
        self._last: UpstreamError | None = None
        self._causes: set[FailureKind] = set()
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
            live = await self._next()
            try:
                return await self._ask(live, request, opening)
            except UpstreamError as error:
                self.failed(error)

    def failed(self, error: UpstreamError) -> None:
        """Take note of a failure and decide what is next. Raises UpstreamError if that is nothing."""
        self._last, self._has_failed = error, True
        cause = error.failure.cause
        self._causes.add(cause)
        action = ACTION[cause]
        if action == "give_up":
            raise self.ended(error)
        # Asked again, the same deployment would take as much time again, or refuse again.
        is_in_vain = (cause in SLOW and not self.is_last) or cause in IN_VAIN
        if action == "fall_back" or self._retry >= self.rules.retries or (is_in_vain and not self._has_fresh()):
            self._next_model()
        else:
            self._retry += 1

    def _has_fresh(self) -> bool:
        """A deployment of the present model has not been asked yet, and may be."""
        group, now = self.dispatcher.groups.get(self.plan.candidates[self._at]), self.dispatcher.now()
        return group is not None and any(live.name not in self.avoid for live in group.free(now, self.tokens))

    def reject(self) -> None:
        """The answer is not good enough: go on to the next candidate."""
        self._has_failed = False
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

    def _skip(self, model: str, why: str) -> None:
        self.report.skipped.append((model, why))
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
                self._skip(model, "no such model")
                continue
            if not group.free(now, self.tokens):
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
            self._skip(group.name, "no deployment takes requests")

    async def _may_go_on(self, model: str, now: float) -> bool:
        """Whether this attempt may be made; waits as long as a retry has to. Raises UpstreamError if no more may.

        The price is asked for wherever it may differ from what was set aside for the request: after an attempt, and of any candidate
        but the first, also where that was passed over without an attempt.
        """
        if self._has_failed:
            holds, self._holds = self._holds, False
            if not self.dispatcher.budget.take(now, holds, self.plan.sender):
                self.report.skipped.append((model, "the budget of extra attempts is used up"))
                raise self.ended(self._last or self._nothing())
            self._has_failed = False  # paid for
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
        free = group.free(now, self.tokens)
        fresh = [live for live in free if live.name not in self.avoid] or free
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
        return any(not live.is_doubtful(now) for group in later if group for live in group.free(now, self.tokens))

    # Asking

    async def _ask(self, live: Live, request: UpstreamRequest, opening: Opening) -> tuple[Any, Attempt]:
        group = self.dispatcher.groups[live.model]
        is_hedged = self.rules.hedge if self.plan.hedge is None else self.plan.hedge
        delay_s = (group.hedge if self._streams else group.hedge_whole).delay_s if is_hedged else None
        if delay_s is None:
            return await self._one(live, request, opening)
        return await self._race(live, request, opening, delay_s)

    async def _race(
        self, live: Live, request: UpstreamRequest, opening: Opening, delay_s: float
    ) -> tuple[Any, Attempt]:
        """Ask a second deployment beside the first when that is slow; the first to bring something wins."""
        tasks = [self._started(live, request, opening)]
        winner: asyncio.Future[Any] | None = None
        try:
            await asyncio.wait(tasks, timeout=delay_s)
            if not tasks[0].done():
                other = await self._elsewhere(live)
                if other is not None and not tasks[0].done():
                    tasks.append(self._started(other, request, opening, is_hedge=True))
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

    async def _elsewhere(self, live: Live) -> Live | None:
        """Another deployment for a hedge: of the same model, else of the next candidates; None if none may be asked."""
        now = self.dispatcher.now()
        if len(self.report.attempts) >= self._most:
            return None
        for model in filter(self._is_meant, self.plan.candidates[self._at :]):
            group = self.dispatcher.groups.get(model)
            free = [] if group is None else group.free(now, self.tokens)
            free = [other for other in free if other is not live and not other.is_doubtful(now)]
            if group is None or not free:
                continue
            if self.plan.allow is not None and not await self.plan.allow(model, self.report.cost):
                return None
            other = pick(group.balance, free, now, self.dispatcher.rng)
            still_free = other.can_take(self.dispatcher.now(), self.tokens)
            return other if still_free and self.dispatcher.budget.take(now, sender=self.plan.sender) else None
        return None

    def _started(
        self, live: Live, request: UpstreamRequest, opening: Opening, is_hedge: bool = False
    ) -> "asyncio.Future[Any]":
        """One attempt beside others. It is counted in at once: by the time the task runs, another request may have taken its place."""
        attempt = self._begun(live, is_hedge)
        task = asyncio.ensure_future(self._made(live, request, opening, attempt))

        def ended(done: "asyncio.Future[Any]") -> None:
            # Before it ever ran.
            if done.cancelled() and attempt.status == "open":
                self.lost(live, attempt, None)

        task.add_done_callback(ended)
        return task

    async def _one(self, live: Live, request: UpstreamRequest, opening: Opening) -> tuple[Any, Attempt]:
        """One attempt."""
        return await self._made(live, request, opening, self._begun(live))

    def _begun(self, live: Live, is_hedge: bool = False) -> Attempt:
        start = self.dispatcher.now()
        most = None if self.plan.most is None else self.plan.most(live.model)
        attempt = Attempt(
            model=live.model, deployment=live.name, start_s=start - self.began, is_hedge=is_hedge, most=most
        )
        attempt.ticket = live.begin(start, self.tokens)
        self.report.attempts.append(attempt)
        return attempt

    async def _made(
        self, live: Live, request: UpstreamRequest, opening: Opening, attempt: Attempt
    ) -> tuple[Any, Attempt]:
        """An attempt that has begun. Success leaves `Live` to whoever goes on (a stream), or ends it in ``opening``."""
        own = self.plan.requests.get(live.model) if request is self.request else None
        if own is not None:
            request = own if request.stream else own.whole()
        request = request.bounded(self.plan.bounds.get(live.model))
        try:
            return await opening(live, request, attempt), attempt
        except Exception as cause:
            error = as_failure(cause, live.name)
            self.lost(live, attempt, error.failure)
            raise error from None
        except BaseException:
            self.lost(live, attempt, None)
            raise

    async def built(self, live: Live, request: UpstreamRequest, attempt: Attempt) -> HttpCall:
        """What an attempt sends, the trace that it belongs to among it. Raises UpstreamError as `built` does."""
        attempt.call = call = await built(live, request)
        if self.plan.trace is not None:
            attempt.span_id, attempt.time_s = new_span_id(), time.time()
            call.headers = {**call.headers, **self.plan.trace.headers(attempt.span_id)}
        return call

    def leave(self, live: Live, request: UpstreamRequest, attempt: Attempt, exchange: Exchange) -> None:
        """Nobody waits for a whole answer any more; call it before the attempt is `lost`.

        What was sent, and may be billed to its end, is read on for what it costs. All else is stopped.
        """
        call, most, late = attempt.call, attempt.most, self.dispatcher.late

        def known() -> None:
            self._known(live, request, attempt, exchange)

        if call is not None and most is not None and live.bill(most, most):
            attempt.is_late = (
                late.take(exchange, len(call.body), known, sender=self.plan.sender)
                if call.is_sent
                else late.stop(exchange, known)
            )
        if not attempt.is_late:
            # Whatever it ends in, nobody asks.
            exchange.add_done_callback(lambda done: done.cancelled() or done.exception())
            exchange.cancel()

    def _known(self, live: Live, request: UpstreamRequest, attempt: Attempt, exchange: Exchange) -> None:
        """What was read on has come to an end."""
        answer: Answer | None = None
        usage: Usage | None = None
        failure: Failure | None = None
        try:
            answer = answer_of(live.provider, request, exchange)
            usage = self.usage_of(attempt, answer)
        except asyncio.CancelledError:
            logger.debug("an answer of %s that nobody waits for was given up", live.name)
        except Exception as cause:
            failure = as_failure(cause, live.name).failure
        if usage is not None or not may_be_billed(attempt, failure):
            usage = usage or Usage()
            attempt.is_guess = usage.is_estimated
            self.charge(live, attempt, usage)
        attempt.is_late, attempt.call = False, None
        if answer is not None and self.plan.late is not None:
            self.plan.late(attempt, answer)
        self.report.now_known()

    def lost(self, live: Live, attempt: Attempt, failure: Failure | None, usage: Usage | None = None) -> None:
        """End an attempt that brought nothing (more): ``failure``, or None if it was cancelled.

        It is charged for ``usage``, or, of one that brought nothing, for the most that may be billed.
        """
        now, was_heard = self.dispatcher.now(), attempt.first_token_s is not None
        attempt.total_s = now - self.began - attempt.start_s
        if usage is None and (attempt.is_late or may_be_billed(attempt, failure)):
            usage = self._unseen(live, attempt, failure)
        if usage is not None:
            attempt.is_guess = usage.is_estimated
            self.charge(live, attempt, usage, attempt.seen)
        if not attempt.is_late:
            attempt.call = None
        if failure is None:
            attempt.status = "cancelled"
            live.end(attempt.ticket, "ignored", now, was_heard=was_heard)
            return
        attempt.status, attempt.message = failure.kind, failure.message
        attempt.http_status = failure.status or attempt.http_status
        self.avoid.add(live.name)
        if failure.cause in DOUBTED and live.senders.doubted(self.plan.sender, now):
            live.is_doubted = True
        live.end(attempt.ticket, self._outcome(live, attempt, failure), now, failure, was_heard)

    def _unseen(self, live: Live, attempt: Attempt, failure: Failure | None) -> Usage:
        """The most that may be billed of an attempt of which nothing has come."""
        most = attempt.most
        if most is None:
            return Usage(self.tokens, 0, 0, True)
        # We ended it, or the upstream says that it did.
        has_ended = failure is None or (failure.kind in OURS if failure.status is None else attempt.has_begun)
        if attempt.is_whole or not has_ended:
            return broken_off(most, attempt.told, 0, None, 0.0)
        return broken_off(most, attempt.told, 0, live.rate, (attempt.total_s or 0.0) + self.rules.margin_s)

    def _outcome(self, live: Live, attempt: Attempt, failure: Failure) -> Outcome:
        """What a failure says of the deployment: nothing, where it may well be the request's own."""
        sender = self.plan.sender
        if failure.kind in DISPUTED:
            return "fatal" if live.senders.refused(sender) else "ignored"
        outcome = OUTCOME[failure.kind]
        if failure.kind == "deadline" and not self._had_time(live, attempt):
            return "ignored"
        if outcome != "failure":
            return outcome
        is_held_against = live.senders.timed_out if failure.kind in OURS else live.senders.failed
        return outcome if is_held_against(sender, self.dispatcher.now()) else "ignored"

    def _had_time(self, live: Live, attempt: Attempt) -> bool:
        """Whether an attempt that ended with the request's time had at least half of the deployment's own."""
        own = live.deployment
        limit_s = min(own.first_token_timeout_s, own.timeout_s) if self._streams else own.timeout_s
        began_s = attempt.total_s if attempt.total_s is not None and attempt.first_token_s is None else 0.0
        return began_s >= 0.5 * limit_s

    def usage_of(self, attempt: Attempt, answer: Answer) -> Usage:
        """What a whole answer is charged for: what it told, else what it may be billed at most."""
        most = attempt.most
        return answer.usage if most is None else whole_at_most(most, answer, self.rules.bytes_per_token)

    def won(self, live: Live, attempt: Attempt, usage: Usage) -> None:
        """End an attempt that brought a whole answer, of which so many tokens are ``seen`` as are known."""
        now = self.dispatcher.now()
        attempt.status, attempt.total_s = "ok", now - self.began - attempt.start_s
        attempt.call, attempt.is_guess = None, usage.is_estimated
        self.charge(live, attempt, usage, attempt.seen)
        live.senders.answered(self.plan.sender, now)
        live.end(attempt.ticket, "success", now, was_heard=attempt.first_token_s is not None)
        live.timed(attempt.total_s, attempt.first_token_s, usage.completion)
        if attempt.first_token_s is None:
            self.dispatcher.groups[live.model].hedge_whole.observe(attempt.total_s)
        self.report.model, self.report.deployment = live.model, live.name

    def charge(self, live: Live, attempt: Attempt, usage: Usage, made: int | None = None) -> None:
        """What an attempt costs. So many tokens were ``made`` as far as is known, if not all that it is charged for."""
        attempt.usage = usage
        attempt.cost = live.bill(usage, attempt.most)
        live.spent(self.dispatcher.now(), usage.completion if made is None else made)

    def _discard(self, result: Any, attempt: Attempt) -> None:
        """Both were quick: the second result is dropped, and charged."""
        if attempt.status == "ok":
            attempt.status = "cancelled"
        else:
            result.drop()

    # Endings

    def _too_late(self) -> UpstreamError:
        message = f"the time for this request ({self.plan.deadline - self.began:g} s) is up"
        if self._last is not None:
            message += f"; the last failure was: {self._last.failure.message}"
        return UpstreamError(Failure(kind="deadline", message=message), self.report)

    def _nothing(self) -> UpstreamError:
        skipped = "; ".join(f"{model}: {why}" for model, why in self.report.skipped[:5])
        now, groups = self.dispatcher.now(), self.dispatcher.groups
        lives = [live for model in self.plan.candidates if model in groups for live in groups[model].lives]
        waits = [wait for live in lives if 0 < (wait := live.free_in_s(now, self.tokens)) < float("inf")]
        message = f"no model can be asked now ({skipped})"
        return UpstreamError(Failure(kind="unavailable", message=message, retry_after_s=min(waits, default=None)))

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
