"""What a strategy or a program asks models for one request: calls with money, limits and ledger rows of their own.

Each is paid out of the request's `Purse` and goes only to models that the request's key may use. How many there may be, and for how long,
says the config (`LimitsConfig`). A call that outlives the decision it was made for is cancelled: what it costs belongs to the request,
whose row is not written before it has ended.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

from anabranch.errors import InputError, LimitError
from anabranch.gateway.asked import Asked
from anabranch.gateway.core.bounds import with_prediction
from anabranch.gateway.core.call_bodies import CallBodies, Looked
from anabranch.gateway.core.call_room import CallRoom
from anabranch.gateway.core.payable import refusal
from anabranch.gateway.core.pieces import AHEAD, drained
from anabranch.gateway.core.purse import Hold, Purse
from anabranch.gateway.dispatch import Dispatcher, Plan, Report
from anabranch.gateway.observe.trace_context import Trace
from anabranch.gateway.prompt_tokens import room_of
from anabranch.gateway.providers.chunks import text_of
from anabranch.gateway.providers.provider import Answer, UpstreamError, UpstreamRequest, Usage, garbage
from anabranch.routers.contract.ask import Answered, Arm, Messages, Purpose, Said, Spent
from anabranch.routers.money import dollars, nano_dollars
from anabranch.web.large_json import LARGE
from anabranch.web.sse import read_data

if TYPE_CHECKING:
    from anabranch.gateway.runtime import Runtime

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

# Less time is none.
LEAST_S = 1e-3

# Fields that are not an arm's to set.
OURS = frozenset({"model", "messages", "n", "best_of", "stream", "stream_options"})


@dataclass(slots=True, kw_only=True)
class ModelCall:
    """One call.

    Attributes:
        id: of its row: the request's, a dot, and its number.
        model: that was asked.
        purpose: what for.
        began_s: seconds after the request began.
        prompt_tokens: of what it was asked, as counted here.
        report: how the answer was come by.
        status: ``ok``, ``error``, or ``cancelled``, as it is until it ends.
        code: of the error, if any.
        latency_s: seconds to its end.
        held_nano: the most that was held for it.
    """

    id: str
    model: str
    purpose: Purpose
    began_s: float
    prompt_tokens: int = 0
    report: Report = field(default_factory=Report)
    status: str = "cancelled"
    code: str = ""
    latency_s: float = 0.0
    held_nano: int = 0


class ModelCalls:
    """Those of one request: the `Ask` that its strategy or program is lent.

    Attributes:
        made: so far, in the order they began; those that no budget had room for are not among them.
        purpose: of those that do not say theirs.
        limit_s: seconds of the request in which such calls may be under way.
        deadline_s: seconds after the request's beginning when all must be over.
        sender: whose they are, as `Plan.sender`.

    Args:
        runtime: that the request began on.
        purse: of the request.
        request_id: of it.
        began: when it began, by `time.perf_counter`.
        may_ask: whether the key of the request may use a model; None if it needs no key.
        keep: has a task end before the gateway does.
        sender: see the attribute.
        trace: of the request; None for none.
    """

    def __init__(
        self,
        runtime: "Runtime",
        purse: Purse,
        request_id: str,
        began: float,
        *,
        may_ask: Callable[[str], bool] | None,
        keep: Callable[[asyncio.Task[Any]], None],
        sender: str = "",
        trace: Trace | None = None,
    ) -> None:
        self._runtime, self._purse, self._request_id, self._began = runtime, purse, request_id, began
        self._may_ask, self._keep, self.sender, self._trace = may_ask, keep, sender, trace
        self.limit_s, self.deadline_s = runtime.config.limits.strategy_calls_s, runtime.config.deadline_s
        self.made: list[ModelCall] = []
        self.purpose: Purpose = "route"
        self._bodies, self._room = CallBodies(runtime, sender), CallRoom()
        self._live: set[asyncio.Task[Answered]] = set()
        self._num_asked = 0
        # Seconds of the request in which at least one was under way; and since when one is.
        self._busy_s = self._busy_since_s = 0.0
        self._is_closed = False
        self._then: Callable[[], None] | None = None

    async def __call__(
        self, arm: Arm | str, messages: Messages, *, purpose: Purpose | None = None, **how: Any
    ) -> Answered:
        """See `Ask`.

        Raises InputError for a model, purpose or setting that there is not, LimitError where the key, a limit or a budget has no room,
        UpstreamError if no answer comes.
        """
        return await self._begun(arm, messages, purpose, how, None)

    async def stream(
        self, arm: Arm | str, messages: Messages, *, purpose: Purpose | None = None, **how: Any
    ) -> AsyncGenerator[Said | Answered, None]:
        """See `Ask`. Raises as a call does. Nothing is read ahead of the reader but `AHEAD` pieces."""
        pieces: asyncio.Queue[Said] = asyncio.Queue(AHEAD)
        task = self._begun(arm, messages, purpose, how, pieces)
        coming = drained(pieces, task)
        async with contextlib.aclosing(coming):
            async for piece in coming:
                if piece is not None:
                    yield piece
        yield task.result()

    @property
    def left(self) -> int:
        """See `Ask`."""
        return max(0, self._runtime.config.limits.strategy_calls - self._num_asked)

    @property
    def spent(self) -> Spent:
        """See `Spent`."""
        usage = sum((call.report.usage for call in self.made), Usage())
        cost = dollars(sum(call.report.cost for call in self.made))
        return Spent(prompt_tokens=usage.prompt, completion_tokens=usage.completion, cost=cost)

    async def most(self, arm: Arm | str, messages: Messages, **how: Any) -> float:
        """Dollars that one attempt at such a call may cost. Raises InputError for settings and messages that cannot be asked."""
        body = body_of(Arm(arm) if isinstance(arm, str) else arm, messages, **how)
        if body["model"] not in self._runtime.models:
            raise InputError(f"a strategy asks for model {body['model']!r}, which is not in the config")
        _, most = bounded(self._runtime, body, await self._bodies.look(body))
        return dollars(worst_nano(self._runtime, body["model"], most))

    def bound(self, usd: float, name: str) -> None:
        """From now on the request may cost so many dollars at most, by all attempts at all calls; ``name`` is the setting that says so."""
        self._purse.bound(nano_dollars(usd), name)

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one was under way."""
        return self._busy_s + (self._elapsed() - self._busy_since_s if self._live else 0.0)

    async def stop(self) -> None:
        """Cancel what is under way, and wait for its end: nobody needs it any more."""
        if self._live:
            self._cancel()
            await asyncio.wait(self._live)

    def close(self, then: Callable[[], None]) -> None:
        """Make no more calls, and cancel those under way. ``then`` is called when all have ended; at once if none is there."""
        self._is_closed = True
        if self._live:
            self._then = then
            self._cancel()
        else:
            then()

    def _begun(
        self,
        arm: Arm | str,
        messages: Messages,
        purpose: Purpose | None,
        how: dict[str, Any],
        pieces: "asyncio.Queue[Said] | None",
    ) -> "asyncio.Task[Answered]":
        """A call as a task of its own, which outlives whoever waits for it as long as its end takes."""
        arm = Arm(arm) if isinstance(arm, str) else arm
        self._check(arm.model, purpose)
        body = body_of(arm, messages, **how)
        if pieces is not None:
            body = {**body, "stream": True, "n": 1}
        deadline_s = self._deadline_s()
        self._num_asked += 1
        if not self._live:
            self._busy_since_s = self._elapsed()
        task = asyncio.ensure_future(self._make(arm.model, body, purpose or self.purpose, deadline_s, pieces))
        self._live.add(task)
        task.add_done_callback(self._ended)
        self._keep(task)
        return task

    def _cancel(self) -> None:
        for task in self._live:
            task.cancel()

    def _ended(self, task: "asyncio.Task[Answered]") -> None:
        self._live.discard(task)
        if not task.cancelled():
            # A stream may have been left before anybody asked how it ended.
            task.exception()
        if self._live:
            return
        self._busy_s += self._elapsed() - self._busy_since_s
        then, self._then = self._then, None
        if then is not None:
            then()

    def _elapsed(self) -> float:
        """Seconds since the request began."""
        return time.perf_counter() - self._began

    def _check(self, model: str, purpose: str | None) -> None:
        most = self._runtime.config.limits.strategy_calls
        if self._is_closed:
            raise InputError("a strategy asks a model for a request that is over")
        if purpose is not None and purpose not in PURPOSES:
            raise InputError(
                f"a strategy asks a model for {purpose!r}; the purpose must be one of {', '.join(PURPOSES)}"
            )
        if model not in self._runtime.models:
            raise InputError(f"a strategy asks for model {model!r}, which is not in the config")
        if self._may_ask is not None and not self._may_ask(model):
            raise LimitError(f"the strategy asks {model}, which the key of this request may not use")
        if self._num_asked >= most:
            raise LimitError(
                f"a strategy may make {most} calls for one request (limits.strategy_calls), and has made them"
            )

    def _deadline_s(self) -> float:
        """Seconds after the request's beginning when a call that begins now must be over. Raises LimitError if that is past."""
        now_s = self._elapsed()
        left_s = self.limit_s - self.busy_s
        if left_s < LEAST_S:
            raise self._too_long()
        return min(self.deadline_s, now_s + left_s)

    def _too_long(self) -> LimitError:
        # Models are not always as slow.
        return LimitError(
            f"calls of a strategy may take {self.limit_s:g} s of one request (limits.strategy_calls_s), and have taken them",
            retry_after_s=1.0,
        )

    async def _make(
        self,
        model: str,
        body: dict[str, Any],
        purpose: Purpose,
        deadline_s: float,
        pieces: "asyncio.Queue[Said] | None",
    ) -> Answered:
        """One call, from its money to its answer."""
        runtime = self._runtime
        try:
            looked = await self._bodies.look(body)
        except InputError:
            # What makes no call is none of those that may be made.
            self._num_asked -= 1
            raise
        body, most = bounded(runtime, body, looked)
        await check_priced(runtime, self._purse, model, looked.asked)
        # Pieces of a stream may wait for a reader who waits for another call.
        sent_bytes = looked.num_bytes if pieces is None and looked.num_bytes > LARGE else 0
        async with self._room.taken(sent_bytes), self._purse.holding(worst_nano(runtime, model, most)) as hold:
            number = len(self.made) + 1
            call = ModelCall(
                id=f"{self._request_id}.{number}",
                model=model,
                purpose=purpose,
                began_s=self._elapsed(),
                prompt_tokens=looked.count.tokens,
            )
            self.made.append(call)
            try:
                deadline = runtime.dispatcher.now() + deadline_s - self._elapsed()
                request = upstream_request(body, call.id, looked)
                plan = paid_plan(runtime, self._purse, hold, model, most, call.report, deadline, self.sender)
                plan = replace(plan, trace=self._trace)
                answer = await (
                    runtime.dispatcher.complete(plan, request)
                    if pieces is None
                    else _streamed(runtime.dispatcher, plan, request, pieces)
                )
                call.status = "ok"
                return answered(model, answer, call.report, self._elapsed() - call.began_s)
            except Exception as error:
                call.status = "error"
                if isinstance(error, UpstreamError):
                    call.code = error.to_dict()["error"]["code"] or ""
                    if error.failure.kind == "deadline" and deadline_s < self.deadline_s:
                        raise self._too_long() from None
                raise
            finally:
                hold.cost_nano, call.held_nano = call.report.cost, hold.most_nano
                call.latency_s = self._elapsed() - call.began_s


async def _streamed(
    dispatcher: Dispatcher, plan: Plan, request: UpstreamRequest, pieces: "asyncio.Queue[Said]"
) -> Answer:
    """The whole answer of a stream whose pieces are given as they come. Raises UpstreamError, also where it breaks off."""
    stream = await dispatcher.stream(replace(plan, keep=True), request)
    try:
        async for block in stream:
            text = text_of(read_data(block))
            if text:
                await pieces.put(Said(text))
        if stream.failure is not None:
            raise UpstreamError(stream.failure, stream.report)
        return stream.answer()
    finally:
        # Also where it is cancelled again while it is closed: its room is others' then.
        try:
            await stream.aclose()
        finally:
            stream.forget()


def body_of(
    arm: Arm,
    messages: Messages,
    *,
    n: int | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    logprobs: int | None = None,
    stop: Sequence[str] = (),
) -> dict[str, Any]:
    """The request of a call in OpenAI's form, not yet looked at. Raises InputError for settings that are none of an arm's."""
    ours = sorted(OURS & arm.settings.keys())
    if ours:
        raise InputError(f"settings of an arm hold {', '.join(ours)}, which the call says itself")
    given = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    if arm.system is not None:
        rest = [one for one in given if one.get("role") not in ("system", "developer")]
        given = [{"role": "system", "content": arm.system}, *rest]
    said = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": list(stop) or None}
    body = {**arm.settings, "model": arm.model, "messages": given}
    body |= {name: value for name, value in said.items() if value is not None}
    if max_tokens is not None:
        body.pop("max_completion_tokens", None)
    if (samples := arm.samples if n is None else n) != 1:
        body["n"] = samples
    if logprobs is not None:
        body |= {"logprobs": True} | ({"top_logprobs": logprobs} if logprobs else {})
    return body


def bounded(runtime: "Runtime", body: dict[str, Any], looked: Looked) -> tuple[dict[str, Any], Usage]:
    """A request with an end where it names none, and the most tokens that one attempt at it may be billed for."""
    model, count = runtime.models[body["model"]], looked.count
    most = max(body.get("max_tokens") or 0, body.get("max_completion_tokens") or 0)
    if not most:
        # As for a request: an end that nobody asked for must not make it too long for the model.
        limit = model.max_tokens or runtime.config.limits.max_tokens
        room = room_of(limit, model.context, count)
        body = body if room is None else {**body, "max_tokens": room}
        most = room or model.context or limit
    usage = looked.asked.most(count, (body.get("n") or 1) * most)
    return body, with_prediction(usage, runtime.dispatcher.groups[body["model"]].lives, "chat", body)


def upstream_request(body: dict[str, Any], id: str, looked: Looked) -> UpstreamRequest:
    """The call as its provider is given it: a large one is put into its form in another thread."""
    return UpstreamRequest("chat", body, request_id=id, prompt_tokens=looked.count.tokens, num_bytes=looked.num_bytes)


def answered(model: str, answer: Answer, report: Report, latency_s: float) -> Answered:
    """An answer as strategies and programs see it. Raises UpstreamError if it has no choice."""
    choices = answer.body.get("choices")
    found = tuple(one for one in choices if isinstance(one, dict)) if isinstance(choices, list) else ()
    if not found:
        raise garbage("an answer without choices")
    usage = report.usage
    return Answered(
        model=model,
        choices=found,
        prompt_tokens=usage.prompt,
        completion_tokens=usage.completion,
        cached_tokens=usage.cached,
        cost=dollars(report.cost),
        latency_s=latency_s,
    )


async def check_priced(runtime: "Runtime", purse: Purse, model: str, asked: Asked) -> None:
    """Raises LimitError for a model of which nobody knows what it costs, where money is limited, or what it costs for what is asked."""
    error = await refusal(runtime, model, asked, purse.is_limited)
    if error is not None:
        raise LimitError(str(error))


def worst_nano(runtime: "Runtime", model: str, most: Usage) -> int:
    """The most nano-dollars of one attempt that may be billed for so many tokens."""
    return runtime.dispatcher.groups[model].worst_nano(most)


def paid_plan(
    runtime: "Runtime",
    purse: Purse,
    hold: Hold,
    model: str,
    most: Usage,
    report: Report,
    deadline: float,
    sender: str,
) -> Plan:
    """A plan to ask one model, every attempt at it paid out of a purse.

    Args:
        purse: holds the first attempt's worst already, in ``hold``, and is asked before each further one.
        most: tokens that one attempt may be billed for.
        report: filled as attempts are made; in the end their cost is the hold's.
        deadline: on the dispatcher's clock.
        sender: as in `Plan`.
    """
    worst = worst_nano(runtime, model, most)

    async def allow(_: str, spent_nano: int) -> bool:
        num_open = sum(attempt.status == "open" for attempt in report.attempts)
        return await purse.can_raise(hold, spent_nano + (num_open + 1) * worst)

    return Plan(candidates=(model,), deadline=deadline, report=report, allow=allow, most=lambda _: most, sender=sender)
