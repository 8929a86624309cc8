"""`Stream`: an answer relayed event by event, and what is done when it breaks.

Until the first token a failure is an ordinary one, and another deployment is asked (`Opened` reads that far). After it, whole events are
passed on as they come. Nothing is read ahead of the reader beyond what the transport buffers, so a slow reader slows the upstream and costs
no memory. A stream that ends with ``[DONE]`` was whole.

A stream that breaks after its first token:

    error       an error event, and the end (the default)
    continue    another model is given the partial answer and told to go on; the report says ``is_stitched``
    restart     an event named ``restart``, then a new answer from its beginning; only for senders that opted in
"""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.kept_stream import KeptStream
from anabranch.gateway.dispatch.plan import Attempt, Report
from anabranch.gateway.dispatch.provider_fault import as_failure, refusal
from anabranch.gateway.dispatch.run import Run
from anabranch.gateway.dispatch.upstream_stream import Opened, read_chunk
from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.chunks import text_of
from anabranch.gateway.providers.native_events import whole_of
from anabranch.gateway.providers.provider import (
    Answer,
    Failure,
    HttpCall,
    Json,
    Reply,
    UpstreamError,
    UpstreamRequest,
    Usage,
    read_error,
)
from anabranch.gateway.providers.sse import DONE_DATA, events
from anabranch.web.large_json import LARGE
from anabranch.web.sse import DONE, HEARTBEAT, event
from anabranch.web.turns import plainly_awaited

STITCHED = b": x-stitched\n\n"
RESTART = b'event: restart\ndata: {"object":"stream.restart"}\n\n'

# How long the end of the connection is waited for after [DONE], so that it can be used again.
LINGER_S, LINGER_PIECES = 0.2, 100
CONTINUE = (
    "Continue your last message exactly where it broke off. Do not repeat anything and do not comment on the break."
)


class Stream:
    """Iterate over it for server-sent events as bytes, ``[DONE]`` at the end among them.

    Attributes:
        report: as `Answer.report`; whole once the stream is over.
        failure: what broke it; None while and if it is well.
    """

    def __init__(self, run: Run, request: UpstreamRequest) -> None:
        self._run, self._request, self._now = run, request, run.dispatcher.now
        mode = run.plan.mid_stream or run.rules.mid_stream
        self._mode = "error" if mode == "restart" and run.plan.mid_stream is None else mode
        keeps = run.plan.keep or run.plan.accept is not None or self._mode == "continue"
        self._kept = KeptStream(run.dispatcher.kept, run.plan.sender) if keeps else None
        self._answer: Answer | None = None
        # Of what the reader got: streams that broke and were gone on from, and the last.
        self._parts: list[Opened] = []
        self._stitch: Json | None = None
        self._opened: Opened | None = None
        self._coming: asyncio.Future[tuple[Opened, Attempt]] | None = None
        self._quiet_since: float | None = None
        # Since when the reader waits for a block or a heartbeat.
        self._mute_since: float | None = None
        # Signs of life of the upstream when it was last waited for: bytes that never make an event are none.
        self._heard = 0
        self._events = self._relay()
        self.failure: Failure | None = None

    @property
    def report(self) -> Report:
        """What has been done so far."""
        return self._run.report

    @property
    def usage(self) -> Usage:
        """Tokens of what the reader got: the prompt once, and the completions of all parts."""
        used = [part.counted() for part in self._parts] or [Usage(is_estimated=True)]
        completion, is_estimated = sum(one.completion for one in used), any(one.is_estimated for one in used)
        return replace(used[0], completion=completion, is_estimated=is_estimated)

    async def open(self) -> None:
        """Get to the first token; where the plan judges answers, to the end of one that is accepted. Raises UpstreamError."""
        # Whole answers that nobody has taken yet: the last that was rejected, and the one that is judged.
        held: list[Opened] = []
        try:
            self._take(await self._accepted(held))
        finally:
            for opened in held:
                if opened is not self._opened:
                    self._run.dispatcher.linger(opened.reply)

    async def _accepted(self, held: list[Opened]) -> Opened:
        """As `open`; of those that are not accepted the last, if no other answer comes."""
        run, accept, rejected = self._run, self._run.plan.accept, None
        while True:
            try:
                opened, attempt = await run.obtain(self._request, self._opening)
                if accept is None or run.is_last:
                    return opened
                beside = 0 if rejected is None else len(rejected[0].first)
                try:
                    await opened.read_whole(partial(self._has_room, beside))
                except UpstreamError as error:
                    run.failed(error)
                    continue
            except UpstreamError:
                if rejected is None:
                    raise
                # Better than none.
                opened, attempt = rejected
                attempt.status, run.report.is_stopgap = "ok", True
                run.report.model, run.report.deployment = attempt.model, attempt.deployment
                return opened
            held.append(opened)
            accepted = accept(attempt.model, _whole(_chunks([opened.first]), self._request, opened.counted()))
            if await accepted if inspect.isawaitable(accepted) else accepted:
                return opened
            attempt.status = "rejected"
            if rejected is not None:
                held.remove(rejected[0])
                run.dispatcher.linger(rejected[0].reply)
            rejected = opened, attempt
            run.reject()

    def _has_room(self, beside: int, num_bytes: int) -> bool:
        """Whether so many bytes of a whole answer may be kept beside those of another."""
        return self._kept is None or self._kept.has_room(beside + num_bytes)

    def _take(self, opened: Opened) -> None:
        self._opened = opened
        self._parts.append(opened)

    def __aiter__(self) -> AsyncGenerator[bytes, None]:
        return self._events

    async def aclose(self) -> None:
        """Stop: the upstream's connection is dropped, and what it made so far is charged."""
        coming = self._coming
        await self._events.aclose()
        self.drop()
        if coming is not None:
            await asyncio.wait((coming,))

    @property
    def num_kept(self) -> int:
        """Bytes that `answer` is made of."""
        return 0 if self._kept is None else self._kept.size

    def answer(self) -> Answer:
        """What the stream said, as a whole answer; needs ``Plan.keep`` or ``Plan.accept``.

        It is put together once; in another thread, too, if the stream has ended. Raises UpstreamError if it is none, or is not kept, since
        it is too long or there is no room for it.
        """
        if self._answer is None:
            answer = _whole(self._said(), self._request, self.usage)
            answer.report = self._run.report
            # A whole answer of steps is written in steps.
            answer.is_large = self.num_kept > LARGE
            self._answer = answer
        return self._answer

    def forget(self) -> None:
        """Nobody asks for its `answer` any more: call it at the end of whatever the stream is of."""
        if self._kept is not None:
            self._kept.close()

    def drop(self) -> None:
        """Stop at once, as `aclose` does, without waiting for what is under way to notice."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.drop()
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.cancel()
            coming.add_done_callback(_forget)
        self._run.close()

    # One upstream

    async def _opening(self, live: Live, request: UpstreamRequest, call: HttpCall, attempt: Attempt) -> Opened:
        limit_s = min(live.deployment.first_token_timeout_s, live.deployment.timeout_s)
        reply: Reply | None = None
        opened: Opened | None = None
        try:
            async with attempt.time.limited(limit_s, self._run.left_s):
                call.is_sent = True
                came = await plainly_awaited(lambda: live.transport.open(call))
                reply = came
                attempt.http_status = came.status
                if not 200 <= came.status < 300:
                    status, headers, body = came.status, came.headers, await read_error(came)
                    raise refusal(live.provider, status, headers, body)
                opened = Opened(self._run, live, attempt, request, came, self._stitch)
                if "json" in came.headers.get("content-type", ""):
                    attempt.is_whole = True
                    opened.from_answer(await self._run.reader(live, request, attempt).read(came))
                else:
                    await opened.until_content()
        except TimeoutError:
            _leave(opened, reply)
            raise self._run.timed_out(live, limit_s, "first_token") from None
        except asyncio.CancelledError:
            _leave(opened, reply)
            raise
        except BaseException:
            _close(reply)
            raise
        attempt.first_token_s = self._now() - self._run.began - attempt.start_s
        if not attempt.has_come:
            live.heard(self._now())
        self._run.dispatcher.groups[live.model].hedge.observe(attempt.own_s(attempt.first_token_s))
        return opened

    async def _relay(self) -> AsyncGenerator[bytes, None]:
        try:
            while self._opened is not None or self._coming is not None:
                try:
                    while not await self._has_come():
                        yield HEARTBEAT
                    opened = self._opened
                    assert opened is not None
                    if opened.first:
                        yield self._noted(opened.first)
                    while not opened.is_done:
                        block = self._ready(opened) or await self._some(opened)
                        if block:
                            yield self._noted(block)
                except Exception as error:
                    yield self._broke(error)
                    continue
                self._opened = None
                opened.settle()
                self._run.dispatcher.linger(opened.reply)
                if self._request.wants_usage and not opened.has_given_usage:
                    yield self._usage_chunk()
                yield DONE
        finally:
            self.drop()

    def _noted(self, block: bytes) -> bytes:
        self._mute_since = None
        if block is not HEARTBEAT:
            self._quiet_since = None
            if self._kept is not None:
                self._kept.add(block)
        return block

    def _said(self) -> list[Json]:
        """Chunks that were passed on. Raises UpstreamError (``excess``, ``busy``) if they were too much to keep."""
        return list(_chunks(() if self._kept is None else self._kept.blocks()))

    def _ready(self, opened: Opened) -> bytes:
        """What is there without waiting. Raises UpstreamError."""
        if self._run.left_s <= 0:
            raise self._run.timed_out(opened.live, opened.live.deployment.idle_s, "timeout")
        return opened.ready()

    async def _some(self, opened: Opened) -> bytes:
        """What comes next, which may be empty, or a sign of life if that takes long. Raises UpstreamError when it takes too long."""
        now, limit_s, beat_s = self._now(), opened.live.deployment.idle_s, self._run.rules.heartbeat_s
        if self._quiet_since is None or opened.num_signs != self._heard:
            # Since we wait: until then it may have been the reader who was slow. Pings and comments are a sign of life too.
            self._quiet_since, self._heard = now, opened.num_signs
        if self._mute_since is None:
            # What an upstream sends of which nothing is passed on is no sign of life to the reader.
            self._mute_since = now
        left_s = min(self._quiet_since + limit_s - now, self._run.left_s)
        if left_s <= 0:
            raise self._run.timed_out(opened.live, limit_s, "timeout")
        beat_s = max(self._mute_since + beat_s - now, 0.0)
        try:
            async with asyncio.timeout(min(left_s, beat_s)):
                return await opened.next()
        except TimeoutError:
            return HEARTBEAT if left_s > beat_s else b""

    # After a break

    def _broke(self, cause: Exception) -> bytes:
        """Go on elsewhere as the mode says, and say so; where that cannot be, the error event that ends it all."""
        opened, self._opened = self._opened, None
        error = as_failure(cause, "" if opened is None else opened.live.name)
        try:
            # Nothing could be found to go on with.
            if opened is None:
                raise error
            opened.drop(error.failure)
            if self._mode == "error" or error.failure.kind == "deadline":
                raise error
            self._run.failed(error)
            request = self._request if self._mode == "restart" else self._continued(error)
        except UpstreamError as last:
            self.failure = last.failure
            return event(last.to_dict())
        if self._mode == "restart":
            self._parts.clear()
            if self._kept is not None:
                self._kept.begin_anew()
        else:
            self._stitch = self._parts[0].head
        self._coming = asyncio.ensure_future(self._run.obtain(request, self._opening))
        return RESTART if self._mode == "restart" else STITCHED

    async def _has_come(self) -> bool:
        """Wait for the upstream that goes on, no longer than a heartbeat. Raises UpstreamError if there is none."""
        if self._coming is None:
            return True
        done, _ = await asyncio.wait((self._coming,), timeout=self._run.rules.heartbeat_s)
        if not done:
            return False
        coming, self._coming = self._coming, None
        opened, _ = coming.result()
        self.report.is_stitched = self._stitch is not None
        self._take(opened)
        return True

    def _continued(self, broke: UpstreamError) -> UpstreamRequest:
        """The request with what has been said so far. Raises UpstreamError where that cannot be told (tool calls, several choices), and
        what ``broke`` it where it was not kept."""
        try:
            body, chunks = self._request.body, self._said()
        except UpstreamError:
            raise broke from None
        text = text_of(chunks)
        is_plain = (body.get("n") or 1) == 1 and not any(_has_calls(chunk) for chunk in chunks)
        if (
            not text
            or not is_plain
            or (self._request.endpoint == "completions" and not isinstance(body["prompt"], str))
        ):
            message = "the stream broke off, and this kind of answer cannot be continued"
            raise UpstreamError(Failure(kind="cut", message=message))
        spent = self.usage.completion
        changes: Json = {
            name: max(1, body[name] - spent)
            for name in ("max_tokens", "max_completion_tokens")
            if isinstance(body.get(name), int)
        }
        if self._request.endpoint == "completions":
            return self._request.with_body(prompt=body["prompt"] + text, **changes)
        said: list[Any] = [{"role": "assistant", "content": text}, {"role": "user", "content": CONTINUE}]
        return self._request.with_body(messages=[*body["messages"], *said], **changes)

    def _usage_chunk(self) -> bytes:
        said = self._parts[0].usage_body if len(self._parts) == 1 else None
        return event({**self._parts[0].head, "choices": [], "usage": said or self.usage.to_openai()})


def _forget(coming: "asyncio.Future[tuple[Opened, Attempt]]") -> None:
    """The upstream that was to go on came when nobody waited any more."""
    if not coming.cancelled() and coming.exception() is None:
        coming.result()[0].drop()


def _chunks(blocks: Iterable[bytes]) -> Iterator[Json]:
    for name, data in events(b"".join(blocks)):
        if data != DONE_DATA and not name:
            yield read_chunk(data)


def _has_calls(chunk: Json) -> bool:
    deltas = [choice.get("delta") for choice in chunk.get("choices") or () if isinstance(choice, dict)]
    return any(isinstance(delta, dict) and delta.get("tool_calls") for delta in deltas)


def _whole(chunks: Iterable[Json], request: UpstreamRequest, usage: Usage) -> Answer:
    """The answer of a stream. One in a form of its own that cannot be put together is not whole: nobody else shall have it."""
    read = list(chunks)
    native, is_whole = whole_of(read) if request.native is not None else ({}, True)
    body = {**assembled(read, request.endpoint), **native}
    body["usage"] = usage.to_openai()
    answer = Answer(body, None, usage)
    answer.is_cut = not is_whole
    return answer


def _leave(opened: Opened | None, reply: Reply | None) -> None:
    """Nobody waits for its first token any more: close it, unless it is billed to its end all the same, and is read on for that."""
    is_made_on = opened is not None and not opened.live.stops_when_closed and not opened.attempt.is_whole
    if opened is None or not is_made_on or not opened.read_on():
        _close(reply)


def _close(reply: Reply | None) -> None:
    if reply is not None:
        reply.close()


async def linger(reply: Reply) -> None:
    """Read to the end of the connection, which is a moment away, so that it can be used again; and close it, whatever has come."""
    try:
        with contextlib.suppress(TimeoutError, UpstreamError):
            async with asyncio.timeout(LINGER_S):
                # A transport that always has more, and never waits, would let nobody else have a turn.
                for _ in range(LINGER_PIECES):
                    if not await reply.read_some():
                        break
    finally:
        reply.close()
