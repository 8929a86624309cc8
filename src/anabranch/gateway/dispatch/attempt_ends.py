"""`AttemptEnds`: the end of each attempt of a request: what it is charged, and what it says of its deployment."""

import asyncio
import logging
from typing import TYPE_CHECKING

from anabranch.gateway.dispatch.billed import FEW, GAVE_UP, broken_off, may_be_billed, whole_at_most
from anabranch.gateway.dispatch.breaker import Outcome
from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.hidden import asks_media, may_hide
from anabranch.gateway.dispatch.late import Exchange, answer_of
from anabranch.gateway.dispatch.plan import Attempt, Plan, Report
from anabranch.gateway.dispatch.provider_fault import as_failure
from anabranch.gateway.dispatch.retry import DISPUTED, DOUBTED, OUTCOME
from anabranch.gateway.prompt_tokens import Answers
from anabranch.gateway.providers.provider import Answer, Failure, FailureKind, UpstreamRequest, Usage

if TYPE_CHECKING:
    from anabranch.gateway.dispatch.dispatcher import Dispatcher

logger = logging.getLogger(__name__)

# We ended it, and the upstream notices; in all else it is the upstream's end that we noticed.
OURS: tuple[FailureKind, ...] = ("timeout", "first_token", "deadline")

# For a provider of this process to stop, and say what it made.
TELL_S = 10.0


class AttemptEnds:
    """Those of one request.

    Attributes:
        avoid: deployments that failed this request; asked again only when no other is free.

    Args:
        dispatcher: that the request is on.
        plan: of the request.
        request: as it came.
        report: of its attempts.
        began: when it began, on the dispatcher's clock.
    """

    def __init__(
        self, dispatcher: "Dispatcher", plan: Plan, request: UpstreamRequest, report: Report, began: float
    ) -> None:
        self.dispatcher, self.plan, self.rules = dispatcher, plan, dispatcher.rules
        self.report, self.began = report, began
        self.tokens, self._streams = request.prompt_tokens, request.stream
        self._body = request.body
        self._answers = Answers.of(request.endpoint, request.body)
        self.avoid: set[str] = set()

    def has_come(self, live: Live, attempt: Attempt) -> None:
        """An answer is here, and has yet to be read: its place at the deployment is free. That of an attempt that has ended is already."""
        if attempt.status == "open":
            attempt.has_come = True
            live.heard(self.dispatcher.now())
            live.leave(self.plan.sender)
            self._leave_room(live, attempt)

    def _end(self, live: Live, attempt: Attempt, outcome: Outcome, now: float, failure: Failure | None = None) -> None:
        was_heard = attempt.has_come or attempt.first_token_s is not None
        live.end(attempt.ticket, outcome, now, failure, was_heard, self.plan.sender, attempt.has_come)
        self._leave_room(live, attempt)

    def _leave_room(self, live: Live, attempt: Attempt) -> None:
        """Of the attempts that processes count together it is one no more."""
        if self.dispatcher.rooms is not None and attempt.place:
            self.dispatcher.rooms.leave(live.name, attempt.place)
            attempt.place = ""

    def won(self, live: Live, attempt: Attempt, usage: Usage, waited_s: float | None = None) -> None:
        """End an attempt that brought a whole answer, of which so many tokens are ``seen`` as are known.

        ``waited_s`` of the seconds since a stream's first token its upstream was waited for, in the others its reader; None for all.
        """
        now = self.dispatcher.now()
        attempt.status, attempt.total_s = "ok", now - self.began - attempt.start_s
        attempt.call, attempt.is_guess = None, usage.is_estimated
        self.charge(live, attempt, usage, attempt.seen)
        live.senders.answered(self.plan.sender, now)
        self._end(live, attempt, "success", now)
        first_s = None if attempt.first_token_s is None else attempt.own_s(attempt.first_token_s)
        live.timed(attempt.own_s(attempt.total_s), first_s, usage.completion, waited_s)
        if first_s is None:
            self.dispatcher.groups[live.model].hedge_whole.observe(attempt.own_s(attempt.total_s))
        self.report.model, self.report.deployment = live.model, live.name

    def lost(self, live: Live, attempt: Attempt, failure: Failure | None, usage: Usage | None = None) -> None:
        """End an attempt that brought nothing (more): ``failure``, or None if it was cancelled.

        It is charged for ``usage``, or, of one that brought nothing, for the most that may be billed.
        """
        now = self.dispatcher.now()
        attempt.total_s = now - self.began - attempt.start_s
        if usage is None and (attempt.is_late or may_be_billed(attempt, failure)):
            usage = self._unseen(live, attempt, failure)
        if usage is not None:
            attempt.is_guess = usage.is_estimated
            self.charge(live, attempt, usage, attempt.seen)
            if usage.is_estimated and not attempt.is_late:
                self._be_told(live, attempt)
        if not attempt.is_late:
            attempt.call = None
        if failure is None:
            attempt.status = "cancelled"
            self._end(live, attempt, "ignored", now)
            return
        attempt.status, attempt.cause, attempt.message = failure.kind, failure.cause, failure.message
        attempt.http_status = failure.status or attempt.http_status
        self.avoid.add(live.name)
        if failure.cause in DOUBTED and live.senders.doubted(self.plan.sender, now):
            live.is_doubted = True
        self._end(live, attempt, self._outcome(live, attempt, failure), now, failure)

    def _be_told(self, live: Live, attempt: Attempt) -> None:
        """What was made of an attempt takes the place of the most that can have been, where its provider says so once it has stopped."""
        made = None if attempt.call is None else attempt.call.made
        if made is None:
            return
        telling = asyncio.ensure_future(_result(made))

        def known() -> None:
            attempt.is_late, attempt.call = False, None
            if not telling.cancelled():
                usage = telling.result()
                attempt.is_guess = False
                self.charge(live, attempt, usage, max(0, usage.completion - attempt.seen))
                attempt.seen = max(attempt.seen, usage.completion)
            self.report.now_known()

        attempt.is_late = self.dispatcher.late.take(telling, 0, known, TELL_S, self.plan.sender)
        if not attempt.is_late:
            telling.cancel()

    def leave(self, live: Live, request: UpstreamRequest, attempt: Attempt, exchange: Exchange) -> None:
        """Nobody waits for a whole answer any more; call it before the attempt is `lost`.

        What was sent, and may be billed to its end, is read on for what it costs. All else is stopped.
        """
        call, most, late = attempt.call, attempt.most, self.dispatcher.late

        def known() -> None:
            self._known(live, request, attempt, exchange)

        if call is not None and most is not None and live.provider.makes_on and live.bill(most, most):
            attempt.is_late = (
                late.take(exchange, attempt.held_bytes, known, sender=self.plan.sender)
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
            usage = self.usage_of(live, attempt, answer)
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

    def usage_of(self, live: Live, attempt: Attempt, answer: Answer) -> Usage:
        """What a whole answer is charged for: what it told, else what it may be billed at most."""
        most, in_time = attempt.most, 0
        if most is None:
            return answer.usage
        if answer.usage.is_estimated and may_hide(live, self._body, most, self._answers.made):
            in_time = live.speed.at_most(self.dispatcher.now() - self.began - attempt.start_s, self._answers.made)
        return whole_at_most(most, answer, self.rules.bytes_per_token, self._answers.each, in_time)

    def charge(self, live: Live, attempt: Attempt, usage: Usage, made: int | None = None) -> None:
        """What an attempt costs. So many tokens were ``made`` as far as is known, if not all that it is charged for."""
        attempt.usage = usage
        attempt.cost = live.bill(usage, attempt.most)
        made = usage.completion if made is None else made
        now, rooms = self.dispatcher.now(), self.dispatcher.rooms
        live.spent(now, made)
        if rooms is not None:
            rooms.spent(live.deployment, made)
        # It was counted in with what it said of itself; others need not stand back for that longer than until it is known better.
        by = 0 if usage.is_estimated else usage.prompt - self.tokens
        if by:
            since = self.began + attempt.start_s
            live.corrected(now, since, by)
            if rooms is not None:
                rooms.corrected(live.deployment, by, now - since)

    def _unseen(self, live: Live, attempt: Attempt, failure: Failure | None) -> Usage:
        """The most that may be billed of an attempt of which nothing has come."""
        most = attempt.most
        if most is None:
            return Usage(self.tokens, 0, 0, True)
        # We ended it, or the upstream says that it did.
        has_ended = failure is None or (failure.kind in OURS if failure.status is None else attempt.has_begun)
        if attempt.is_whole or not has_ended or not stops(live, failure) or asks_media(self._body):
            return broken_off(most, attempt.told, 0, None)
        unseen = live.speed.at_most((attempt.total_s or 0.0) + self.rules.margin_s, self._answers.made)
        return broken_off(most, attempt.told, 0, unseen + FEW * self._answers.made)

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
        return attempt.own_s(began_s) >= 0.5 * limit_s


def stops(live: Live, failure: Failure | None) -> bool:
    """Whether a stream that ended so, or was cancelled where there is no ``failure``, is made no further: its upstream ended it.

    A proxy before it that gave up waiting did not.
    """
    return live.stops_when_closed or (
        failure is not None and failure.status is not None and failure.status not in GAVE_UP
    )


async def _result(made: "asyncio.Future[Usage]") -> Usage:
    """What is told; whoever gives this up leaves that alone."""
    return await asyncio.shield(made)
