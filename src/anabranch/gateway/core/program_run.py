"""A program at work on one request: its events become an answer in OpenAI's form, whole or as a stream.

It runs in a task of its own, within the request's deadline, and asks models through the request's `ModelCalls`, so that all it does is
paid by the request and written with it. Its reader is never more than a few pieces behind.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from anabranch.errors import InputError, LimitError
from anabranch.gateway.core.model_calls import ModelCalls
from anabranch.gateway.core.pieces import AHEAD, drained
from anabranch.gateway.dispatch import Report
from anabranch.gateway.logged_error import raised, words
from anabranch.gateway.providers.provider import BODY_BYTES, Answer, Failure, UpstreamError, Usage
from anabranch.routers.contract.program import Done, Program, ProgramRequest, Said, Shown, Step
from anabranch.web.sse import DONE, HEARTBEAT, event
from anabranch.web.turns import in_task, plainly_awaited

logger = logging.getLogger(__name__)

# Lines of a trace, and characters of one; more are left out.
STEPS, STEP_CHARACTERS = 256, 4000


class ProgramRun:
    """One run. `open` it, then have the `whole` answer or iterate over it for the bytes of a stream; close it in any case.

    Attributes:
        report: of no attempt of its own: the calls have theirs. ``model`` is whose answer it is, as far as known.
        trace: the steps so far, ready for JSON.
        shown: what the sender is shown beside the answer, likewise.
        failure: what broke its stream.
        first_s: seconds after `open` began to the first piece; None before.

    Args:
        program: that runs.
        request: what for.
        calls: the request's.
        id: of the request.
        left_s: seconds until it must have ended.
        wants_usage: a stream tells tokens at its end.
        beat_s: seconds after which a reader of a stream is given a sign of life.
    """

    def __init__(
        self,
        program: Program,
        request: ProgramRequest,
        calls: ModelCalls,
        *,
        id: str,
        left_s: float,
        wants_usage: bool = False,
        beat_s: float | None = None,
    ) -> None:
        self._program, self._request, self._calls, self._left_s = program, request, calls, left_s
        self._wants_usage, self._beat_s = wants_usage, beat_s
        self._head = {"id": f"chatcmpl-{id}", "created": int(time.time())}
        # Pieces of the answer, and what is shown beside it.
        self._ready: asyncio.Queue[str | dict[str, Any]] = asyncio.Queue(AHEAD)
        self._said: list[str] = []
        self._size = 0
        self._done: Done | None = None
        self._task: asyncio.Task[None] | None = None
        self._pieces: AsyncGenerator[str | dict[str, Any] | None, None] | None = None
        self._first: str | dict[str, Any] | None = None
        self._stream = self._relayed()
        self.report, self.failure, self.first_s = Report(), None, None
        self.trace: list[dict[str, Any]] = []
        self.shown: list[dict[str, Any]] = []

    failure: Failure | None
    first_s: float | None

    async def open(self) -> None:
        """Begin, and wait for the first piece of an answer, or its end. Raises what the program fails with before."""
        began = time.perf_counter()
        # What a program raises is no end of the loop, whatever it is.
        self._task = task = asyncio.ensure_future(plainly_awaited(self._run))
        # A sign of life is for those who have the headers already.
        self._pieces = drained(self._ready, task)
        self._first = await anext(self._pieces, None)
        if self._first is None:
            task.result()
        self.first_s = time.perf_counter() - began
        if self.report.model is None and self._calls.made:
            # Most programs say what the model says that they asked last.
            self.report.model = self._calls.made[-1].model

    async def whole(self) -> Answer:
        """The answer. Raises what the program fails with."""
        assert self._pieces is not None
        assert self._task is not None
        async for _ in self._pieces:
            # All of it is in the end.
            pass
        self._task.result()
        return self.answer()

    @property
    def num_kept(self) -> int:
        """Bytes that `answer` is made of."""
        return self._size

    def answer(self) -> Answer:
        """What was said, as a whole, once it has ended. Raises UpstreamError if it has not."""
        if self._done is None:
            raise UpstreamError(Failure(kind="cut", message="the program did not come to its end"))
        choice = {"index": 0, "message": self._message(), "finish_reason": self._done.finish_reason}
        if self._done.logprobs is not None:
            choice["logprobs"] = self._done.logprobs
        usage = self._usage()
        body = {
            **self._head,
            "object": "chat.completion",
            "model": self.report.model or "",
            "choices": [choice],
            "usage": usage.to_openai(),
            **({"trace": self.shown} if self.shown else {}),
        }
        answer = Answer(body, None, usage)
        answer.report = self.report
        return answer

    def __aiter__(self) -> AsyncGenerator[bytes, None]:
        return self._stream

    async def aclose(self) -> None:
        """Nobody reads on."""
        await self._stream.aclose()
        if self._pieces is not None:
            await self._pieces.aclose()
        self.drop()

    @property
    def spare(self) -> str:
        """Why its answer stands in for another, once it has ended; "" where it does not."""
        done = self._done
        return "" if done is None or not done.is_spare else str(done.why) or "better than none"

    def forget(self) -> None:
        """Nobody asks for its `answer` any more."""
        self._said.clear()

    def drop(self) -> None:
        """Stop, without waiting for the end of it."""
        if self._task is not None:
            self._task.cancel()

    # The program's side

    async def _run(self) -> None:
        """Take events until the end. Raises UpstreamError at the deadline, InputError for what makes no answer."""
        try:
            # In a task that may be left behind: what a program does about its end is its own.
            await in_task(self._take_all, max(0.0, self._left_s))
        except TimeoutError:
            message = "the program has not come to its end within the time that a request may take"
            raise UpstreamError(Failure(kind="deadline", message=message)) from None
        if self._done is None:
            if not self._said:
                raise InputError(f"the program {self._program.name} ended without an answer")
            self._end(Done())

    async def _take_all(self) -> None:
        events: Any = self._program.run(self._request, self._calls)
        async with contextlib.aclosing(events):
            async for one in events:
                if isinstance(one, Done):
                    self._end(one)
                    break
                await self._take(one)

    async def _take(self, one: Any) -> None:
        if isinstance(one, Step):
            self._note(one)
        elif isinstance(one, Shown):
            await self._show(one)
        elif isinstance(one, Said) and isinstance(one.text, str):
            if one.text:
                self._grow(len(one.text))
                self._said.append(one.text)
                await self._ready.put(one.text)
        else:
            raise InputError(f"the program yields {type(one).__name__}; it may yield Said, Shown, Step and Done")

    def _end(self, done: Done) -> None:
        """Take the end. Raises InputError if it does not begin as what was said, or is not ready for JSON."""
        self._done, self.report.is_stopgap = done, done.is_spare
        said, content = "".join(self._said), self._message().get("content")
        if not isinstance(content, str | None):
            raise InputError(f"the program's answer is {type(content).__name__}; its content must be text, or None")
        if not (content or "").startswith(said):
            raise InputError("the program ends with another answer than the one that it began to give")
        try:
            json.dumps([self._message(), done.finish_reason, done.logprobs], allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise InputError("the program's answer is not ready for JSON") from None
        if done.model:
            if done.model not in self._request.pool.names:
                raise InputError(f"the program names {done.model[:80]!r}, which is not in the pool")
            self.report.model = done.model
        elif self._calls.made:
            self.report.model = self._calls.made[-1].model

    def _message(self) -> dict[str, Any]:
        assert self._done is not None
        given = {"content": "".join(self._said)} if self._done.message is None else self._done.message
        return {"role": "assistant", **given}

    def _grow(self, characters: int) -> None:
        self._size += characters
        if self._size > BODY_BYTES:
            raise InputError(f"the program says more than {BODY_BYTES:,} characters")

    async def _show(self, shown: Shown) -> None:
        line = _line(shown, "event")
        self._grow(len(json.dumps(line)))
        if len(self.shown) < STEPS:
            self.shown.append(line)
            await self._ready.put(line)

    def _note(self, step: Step) -> None:
        line = _line(step, "step")
        if len(self.trace) < STEPS:
            is_short = len(json.dumps(line)) <= STEP_CHARACTERS
            self.trace.append(line if is_short else {"step": line["step"], "is_left_out": True})

    # The reader's side

    async def _relayed(self) -> AsyncGenerator[bytes, None]:
        pieces, task = self._pieces, self._task
        assert pieces is not None
        assert task is not None
        head = {**self._head, "object": "chat.completion.chunk", "model": self.report.model or ""}

        def chunk(delta: Mapping[str, Any], reason: str | None = None, **more: Mapping[str, Any]) -> bytes:
            return event({**head, "choices": [{"index": 0, "delta": delta, **more, "finish_reason": reason}]})

        def beside(shown: Mapping[str, Any]) -> bytes:
            return event({**head, "choices": [], "trace": shown})

        try:
            first = self._first
            yield chunk({"role": "assistant", "content": first if isinstance(first, str) else ""})
            if isinstance(first, dict):
                yield beside(first)
            # From here on a reader waits who is to be told that it goes on.
            beating = drained(self._ready, task, self._beat_s)
            async with contextlib.aclosing(beating):
                async for piece in beating:
                    if isinstance(piece, dict):
                        yield beside(piece)
                    else:
                        yield HEARTBEAT if piece is None else chunk({"content": piece})
            error = None if task.cancelled() else task.exception()
            if error is not None:
                self.failure = failure_of(error, self._program.name)
                yield event(UpstreamError(self.failure).to_dict())
            else:
                assert self._done is not None
                rest = self._rest()
                logprobs = {} if self._done.logprobs is None else {"logprobs": self._done.logprobs}
                if rest or logprobs:
                    yield chunk(rest, None, **logprobs)
                yield chunk({}, self._done.finish_reason)
                if self._wants_usage:
                    yield event({**head, "choices": [], "usage": self._usage().to_openai()})
            yield DONE
        finally:
            self.drop()

    def _rest(self) -> dict[str, Any]:
        """Of the message, what was not sent piece by piece."""
        message = self._message()
        missing = (message.pop("content", None) or "")[len("".join(self._said)) :]
        message.pop("role")
        if missing:
            message["content"] = missing
        if isinstance(calls := message.get("tool_calls"), list):
            message["tool_calls"] = [{"index": at, **call} for at, call in enumerate(calls) if isinstance(call, dict)]
        return {name: value for name, value in message.items() if value is not None}

    def _usage(self) -> Usage:
        """Of all its calls."""
        return sum((call.report.usage for call in self._calls.made), Usage())


def _line(one: Step | Shown, kind: str) -> dict[str, Any]:
    """What a program did or shows, ready for JSON. Raises InputError for what is not."""
    name = str(one.name)[:80]
    try:
        return {**json.loads(json.dumps(dict(one.facts), allow_nan=False)), kind: name}
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"the facts of the program's {kind} {name!r} are not ready for JSON") from None


def failure_of(error: BaseException, name: str) -> Failure:
    """What a program failed with after it had said something, as its reader is told it."""
    if isinstance(error, UpstreamError):
        return error.failure
    if isinstance(error, LimitError):
        return Failure(kind="rate_limit", message=words(error))
    logger.warning(
        "program %s failed: %s", name, raised(error) if isinstance(error, Exception) else type(error).__name__
    )
    return Failure(kind="cut", message=f"the program failed ({type(error).__name__}); the log says how")
