"""`ModelAnswer`: one model's answer to a request, with the fallbacks behind it, and the money that each attempt at it may cost."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from anabranch.errors import BudgetError
from anabranch.gateway.core.cached_answers import CachedAnswers
from anabranch.gateway.core.choice import allowed, fits
from anabranch.gateway.core.engine_counts import engine_count
from anabranch.gateway.core.payable import payable
from anabranch.gateway.core.purse import Hold
from anabranch.gateway.core.request_state import RequestState
from anabranch.gateway.dispatch import Plan, Report
from anabranch.gateway.logged_error import words
from anabranch.gateway.providers.anthropic_request import LEAST_BUDGET
from anabranch.gateway.providers.provider import Answer, UpstreamRequest


class ModelAnswer:
    """See the module. `reserve`, then `ask`.

    Args:
        state: of the request, which has been decided on. It is told the candidates that are left, and the report.
        cached: of the same request.
    """

    def __init__(self, state: RequestState, cached: CachedAnswers) -> None:
        self._state, self._cached = state, cached
        # Of the call for the answer, its further attempts among it.
        self._hold = Hold()
        self._is_poor = False

    async def reserve(self) -> None:
        """Set aside the most that the first candidate may cost; a strategy's candidates that no budget has room for are passed over.

        Raises BudgetError if none has room, ApiError if none may be asked.
        """
        state = self._state
        assert state.decided is not None
        usable = allowed(state, state.decided.decision.candidates)
        candidates = await payable(state.runtime, state.asked, usable, state.purse.is_limited)
        refused: BudgetError | None = None
        for at, candidate in enumerate(candidates):
            await self._count(candidate.model)
            try:
                self._hold = await state.purse.hold(state.bounds.worst_nano(candidate.model, state.report))
            except BudgetError as error:
                refused = refused or self._with_way_out(error, candidate.model)
                if state.target.model is not None:
                    break
                continue
            state.candidates = tuple(one.model for one in candidates[at:])
            # There was no money for what would have answered.
            self._is_poor = at > 0
            return
        assert refused is not None
        raise refused

    def _with_way_out(self, error: BudgetError, model: str) -> BudgetError:
        """A refusal that says with how many tokens the request would have had room, where it would."""
        state = self._state
        most = state.bounds.fitting(model, state.report, error.remaining_nano)
        if not most:
            return error
        return BudgetError(
            f"{words(error)}; "
            f"with {_limit_name(state)} = {most} or less{_thoughts_within(state.body, most)} it may cost no more than is left",
            subject=error.subject,
            period=error.period,
            limit_nano=error.limit_nano,
            remaining_nano=error.remaining_nano,
            resets_s=error.resets_s,
            retry_after_s=error.retry_after_s,
        )

    async def ask(self) -> Any:
        """The whole answer, or the stream of it, past its first token. Raises UpstreamError."""
        state = self._state
        assert state.decided is not None
        dispatcher, strategy = state.runtime.dispatcher, state.target.strategy
        judge = (
            None if strategy is None else state.runtime.decider.acceptance(strategy, state.decided.query, state.calls)
        )
        state.dispatched, state.calls.purpose = state.elapsed(), "judge"
        request = self._request()
        state.report = Report(is_stopgap=self._is_poor)
        plan = self._plan(request, state.report, judge)
        return await (dispatcher.stream(plan, request) if request.stream else dispatcher.complete(plan, request))

    def _request(self) -> UpstreamRequest:
        state = self._state
        return UpstreamRequest(
            state.endpoint,
            state.body,
            request_id=state.id,
            prompt_tokens=state.count.tokens,
            num_bytes=state.num_bytes,
            native=state.native,
        )

    async def _count(self, model: str) -> None:
        """How long its prompt is to a model of this process, which is known before it is paid for."""
        state, bounds = self._state, self._state.bounds
        if model not in bounds.counted:
            request, said = self._request(), state.prepared.get(model)
            request = request if said is None else request.with_body(messages=list(said))
            bounds.counted[model] = await engine_count(
                state.runtime, model, request, bounds.count_of(model), state.sender
            )

    def _plan(
        self, request: UpstreamRequest, report: Report, judge: Callable[[str, Any], Awaitable[bool]] | None
    ) -> Plan:
        state, bounds = self._state, self._state.bounds
        return Plan(
            candidates=state.candidates,
            only_after=self._reserved_for(),
            report=report,
            deadline=state.runtime.dispatcher.now() + state.deadline_s - state.elapsed(),
            accept=None if judge is None else partial(self._accept, judge),
            allow=self._allow,
            most=lambda model: bounds.most(model, report),
            keep=request.stream and (self._cached.wants_streams or state.keeps_texts or state.strategy_keeps),
            sender=state.sender,
            trace=state.trace,
            requests={model: request.with_body(messages=list(said)) for model, said in state.prepared.items()},
            bounds={model: most for model in state.candidates if (most := bounds.bound(model)) is not None},
            late=self._cached.come_late if self._cached.is_named else None,
            mid_stream="restart" if self._may_restart else None,
        )

    def _reserved_for(self) -> Mapping[str, frozenset[Any]]:
        """Candidates that are for prompts of a kind, unless this one is known to be of it."""
        state, named = self._state, self._state.target.model
        return {} if named is None else state.runtime.config.only_after(named, is_too_long=not fits(state, named))

    @property
    def _may_restart(self) -> bool:
        """Whether a stream that breaks off may begin anew: the config lets it, and who reads it knows what that looks like."""
        state = self._state
        is_theirs = state.shown_as == state.endpoint and state.headers.get("x-mid-stream", "").lower() == "restart"
        return is_theirs and state.runtime.config.mid_stream == "restart"

    async def _allow(self, model: str, spent_nano: int) -> bool:
        """Whether a further attempt may be paid for, asked before each one but the first; not while the store cannot write."""
        state = self._state
        await self._count(model)
        worst = state.bounds.worst_nano(model, state.report)
        return await state.purse.can_raise(self._hold, spent_nano + self._open_nano() + worst)

    def _open_nano(self) -> int:
        """The most that attempts under way may cost: a hedge is paid beside the first."""
        state = self._state
        attempts = () if state.report is None else state.report.attempts
        return sum(
            state.bounds.worst_nano(attempt.model, state.report) for attempt in attempts if attempt.status == "open"
        )

    async def _accept(self, judge: Callable[[str, Any], Awaitable[bool]], model: str, answer: Answer) -> bool:
        """Whether the strategy takes an answer. What the attempts so far did not need may be spent on asking about it."""
        state = self._state
        assert state.report is not None
        state.purse.lower_to(self._hold, state.report.cost + self._open_nano())
        try:
            return await judge(model, answer)
        finally:
            await state.calls.stop()


def _thoughts_within(body: Mapping[str, Any], most: int) -> str:
    """What else so few tokens take of a sender who names how many of them may be thoughts: providers refuse more of these than of all."""
    thinking = body.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
    if type(budget) is not int or budget < most:
        return ""
    return ", and thinking.budget_tokens below that," if most > LEAST_BUDGET else ", and no thinking,"


def _limit_name(state: RequestState) -> str:
    """What the sender says how long an answer may be with: the larger of two counts, so both."""
    if state.shown_as == "responses":
        return "max_output_tokens"
    sent = [name for name in ("max_tokens", "max_completion_tokens") if state.body.get(name)]
    return " and ".join(sent) or "max_tokens"
