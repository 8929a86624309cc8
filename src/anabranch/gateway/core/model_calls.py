"""What a strategy asks models for one request: calls with money, limits and ledger rows of their own.

Each is paid out of the request's `Purse` and goes only to models that the request's key may use. How many there may be, and for how long,
says the config (`LimitsConfig`). A call that outlives the decision it was made for is cancelled: what it costs belongs to the request,
whose row is not written before it has ended.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from anabranch.errors import InputError, LimitError
from anabranch.gateway.dispatch import Plan, Report
from anabranch.gateway.prompt_tokens import count_prompt
from anabranch.gateway.providers.provider import Answer, UpstreamError, UpstreamRequest, Usage
from anabranch.gateway.purse import Hold, Purse
from anabranch.routers.contract.strategy import Purpose

if TYPE_CHECKING:
    from anabranch.gateway.runtime import Runtime

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

# Less time is none.
LEAST_S = 1e-3


@dataclass(slots=True, kw_only=True)
class ModelCall:
    """One call.

    Attributes:
        id: of its row: the request's, a dot, and its number.
        model: that was asked.
        purpose: what for.
        began_s: seconds after the request began.
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
    report: Report = field(default_factory=Report)
    status: str = "cancelled"
    code: str = ""
    latency_s: float = 0.0
    held_nano: int = 0


class ModelCalls:
    """Those of one request.

    Attributes:
        made: so far, in the order they began; those that no budget had room for are not among them.
        purpose: of those that do not say theirs.

    Args:
        runtime: that the request began on.
        purse: of the request.
        request_id: of it.
        began: when it began, by `time.perf_counter`.
        may_ask: whether the key of the request may use a model; None if it needs no key.
        keep: has a task end before the gateway does.
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
    ) -> None:
        self._runtime, self._purse, self._request_id, self._began = runtime, purse, request_id, began
        self._may_ask, self._keep = may_ask, keep
        self.made: list[ModelCall] = []
        self.purpose: Purpose = "route"
        self._live: set[asyncio.Task[str]] = set()
        self._num_asked = 0
        # Seconds of the request in which at least one was under way; and since when one is.
        self._busy_s = self._busy_since_s = 0.0
        self._is_closed = False
        self._then: Callable[[], None] | None = None

    async def ask(self, model: str, prompt: str, max_tokens: int, temperature: float, purpose: Purpose | None) -> str:
        """See `Complete`.

        Raises InputError for a model or purpose that is not there, LimitError where the key, a limit or a budget has no room,
        UpstreamError if no answer comes.
        """
        self._check(model, purpose)
        deadline_s = self._deadline_s()
        self._num_asked += 1
        if not self._live:
            self._busy_since_s = self._elapsed()
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        task = asyncio.ensure_future(self._make(model, body, purpose or self.purpose, deadline_s))
        self._live.add(task)
        task.add_done_callback(self._ended)
        self._keep(task)
        return await task

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

    def _cancel(self) -> None:
        for task in self._live:
            task.cancel()

    def _ended(self, task: "asyncio.Task[str]") -> None:
        self._live.discard(task)
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
        config, now_s = self._runtime.config, self._elapsed()
        busy_s = self._busy_s + (now_s - self._busy_since_s if self._live else 0.0)
        left_s = config.limits.strategy_calls_s - busy_s
        if left_s < LEAST_S:
            raise self._too_long()
        return min(config.deadline_s, now_s + left_s)

    def _too_long(self) -> LimitError:
        most_s = self._runtime.config.limits.strategy_calls_s
        return LimitError(
            f"calls of a strategy may take {most_s:g} s of one request (limits.strategy_calls_s), and have taken them"
        )

    async def _make(self, model: str, body: dict[str, Any], purpose: Purpose, deadline_s: float) -> str:
        """One call, from its money to its answer."""
        runtime = self._runtime
        count = count_prompt(body)
        most = Usage(count.at_most, body["max_tokens"], 0, True)
        async with self._purse.holding(worst_nano(runtime, model, most)) as hold:
            number = len(self.made) + 1
            call = ModelCall(id=f"{self._request_id}.{number}", model=model, purpose=purpose, began_s=self._elapsed())
            self.made.append(call)
            try:
                deadline = runtime.dispatcher.now() + deadline_s - self._elapsed()
                request = UpstreamRequest("chat", body, request_id=call.id, prompt_tokens=count.tokens)
                answer = await paid(runtime, self._purse, hold, model, request, most, call.report, deadline)
                call.status = "ok"
                return answer.text
            except Exception as error:
                call.status = "error"
                if isinstance(error, UpstreamError):
                    call.code = error.to_dict()["error"]["code"] or ""
                    if error.failure.kind == "deadline" and deadline_s < runtime.config.deadline_s:
                        raise self._too_long() from None
                raise
            finally:
                call.held_nano = hold.most_nano
                call.latency_s = self._elapsed() - call.began_s


def worst_nano(runtime: "Runtime", model: str, most: Usage) -> int:
    """The most nano-dollars of one attempt that may be billed for so many tokens."""
    return runtime.dispatcher.groups[model].worst_nano(most)


async def paid(
    runtime: "Runtime",
    purse: Purse,
    hold: Hold,
    model: str,
    request: UpstreamRequest,
    most: Usage,
    report: Report,
    deadline: float,
) -> Answer:
    """The answer of one model, every attempt at it paid out of a purse. Raises UpstreamError if none comes.

    Args:
        purse: holds the first attempt's worst already, in ``hold``, and is asked before each further one.
        most: tokens that one attempt may be billed for.
        report: filled as attempts are made; however it ends, their cost is then the hold's.
        deadline: on the dispatcher's clock.
    """
    worst = worst_nano(runtime, model, most)

    async def allow(_: str, spent_nano: int) -> bool:
        num_open = sum(attempt.status == "open" for attempt in report.attempts)
        return await purse.can_raise(hold, spent_nano + (num_open + 1) * worst)

    plan = Plan(candidates=(model,), deadline=deadline, report=report, allow=allow, most=lambda _: most)
    try:
        return await runtime.dispatcher.complete(plan, request)
    finally:
        hold.cost_nano = report.cost
