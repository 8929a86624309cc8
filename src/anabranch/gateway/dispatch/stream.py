"""`Stream`: an answer relayed event by event, and what is done when it breaks.

Until the first token, chunks are read and held back: a failure there is an ordinary one, and another deployment is asked. After it, whole
events are passed on as they came; only what ends a stream (usage, an error, ``[DONE]``) is looked into. Nothing is read ahead of the
reader beyond what the transport buffers, so a slow reader slows the upstream and costs no memory.

A stream that breaks after its first token:

    error       an error event, and the end (the default)
    continue    another model is given the partial answer and told to go on; the report says ``is_stitched``
    restart     an event named ``restart``, then a new answer from its beginning; only for senders that opted in
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from anabranch.gateway.dispatch.live import Live
from anabranch.gateway.dispatch.plan import Attempt, Report
from anabranch.gateway.dispatch.run import Run
from anabranch.gateway.providers.chunks import as_chunks, assembled, has_content, is_finished, text_of
from anabranch.gateway.providers.provider import (
    BODY_BYTES,
    Answer,
    Failure,
    Json,
    Reply,
    Translator,
    UpstreamError,
    UpstreamRequest,
    Usage,
    garbage,
    read_all,
)
from anabranch.gateway.providers.sse import DONE, DONE_DATA, EVENT_BYTES, Splitter, event, events

HEARTBEAT = b": waiting\n\n"
RESTART = b'event: restart\ndata: {"object":"stream.restart"}\n\n'
LINGER_S = 0.05  # how long the end of the connection is waited for after [DONE], so that it can be used again
CONTINUE = (
    "Continue your last message exactly where it broke off. Do not repeat anything and do not comment on the break."
)
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_ERROR = re.compile(rb'^(data:\s*\{\s*"error"|event:\s*error)', re.M)
_FIELD = re.compile(rb"(?:data|event|id|retry)?:")


class Opened:
    """One upstream's stream, from its first token on.

    Attributes:
        first: events up to the first token.
        usage: as the upstream said; None until it does.
    """

    def __init__(self, run: Run, live: Live, attempt: Attempt, request: UpstreamRequest, reply: Reply | None) -> None:
        self.run, self.live, self.attempt, self.request, self.reply = run, live, attempt, request, reply
        self.splitter = Splitter()
        self.translator: Translator | None = live.provider.translator(request)
        self.first = b""
        self.usage: Usage | None = None
        self.is_done = self.has_finished = False
        self.num_events = 0

    def counted(self) -> Usage:
        """What the upstream said, else an estimate: a token for every event."""
        return self.usage or Usage(self.request.prompt_tokens, self.num_events, 0, True)

    def drop(self) -> None:
        """Nobody wants it any more."""
        if self.reply is not None:
            self.reply.close()
        self.run.lost(self.live, self.attempt, None, self.counted())

    async def until_content(self) -> None:
        """Read to the first token. Raises UpstreamError."""
        assert self.reply is not None
        held = b""
        while True:
            data = self.reply.read_ready() or await self.reply.read_some()
            if not data:
                self._ended_early(held)
                break
            block = self.splitter.feed(data)
            if not block:
                continue
            passed, has_any = self.passed(block, looks_close=True)
            held += passed
            if has_any or self.is_done:
                break
            if len(held) > EVENT_BYTES:
                raise garbage(f"more than {EVENT_BYTES:,} bytes before a first token")
        self.first = held

    def _ended_early(self, held: bytes) -> None:
        if not self.has_finished:
            rest = self.splitter.rest
            raise (
                garbage("what is no event stream", rest)
                if rest
                else UpstreamError(
                    Failure(kind="cut", message=f"{self.live.name} ended the stream before its first token")
                )
            )
        self.is_done = True

    def passed(self, block: bytes, looks_close: bool = False) -> tuple[bytes, bool]:
        """What of a block of whole events is passed on, and whether a token is among it (known only where one ``looks_close``).

        Raises UpstreamError for an error event or what is no event stream.
        """
        if self.translator is not None:
            return self._translated(block)
        if looks_close or DONE_DATA in block or _USAGE.search(block) or _ERROR.search(block):
            return self._examined(block)
        for one in block.split(b"\n\n"):
            if one and not _FIELD.match(one):
                raise garbage("what is no event stream", one)
        self.num_events += block.count(b"\n\n")
        self.has_finished = self.has_finished or _FINISHED.search(block) is not None
        return block, True

    def _examined(self, block: bytes) -> tuple[bytes, bool]:
        kept, has_any = [], False
        for one in block.split(b"\n\n"):
            if not one:
                continue
            found = list(events(one))
            data = found[0][1] if found else None
            if data == DONE_DATA:
                self.is_done = True
                break
            if data is not None:
                chunk = _chunk(data)
                has_any = has_any or has_content(chunk)
                if self._takes_usage(chunk):
                    continue
            kept.append(one + b"\n\n")
        return b"".join(kept), has_any

    def _takes_usage(self, chunk: Json) -> bool:
        """Read a chunk; whether it is kept from the reader, who did not ask for the usage that we asked for."""
        if isinstance(chunk.get("error"), dict):
            status = chunk["error"].get("status")
            known = status if isinstance(status, int) and 400 <= status <= 599 else 500
            raise UpstreamError(self.live.provider.error(known, {}, json.dumps(chunk).encode()))
        self.num_events += 1
        self.has_finished = self.has_finished or is_finished(chunk)
        self.usage = Usage.of(chunk) or self.usage
        return not self.request.wants_usage and not chunk.get("choices") and isinstance(chunk.get("usage"), dict)

    def _translated(self, block: bytes) -> tuple[bytes, bool]:
        assert self.translator is not None
        kept, has_any = [], False
        for _, data in events(block):
            for chunk in self.translator.feed(data):
                has_any = has_any or has_content(chunk)
                if not self._takes_usage(chunk):
                    kept.append(event(chunk))
        self.is_done = self.translator.is_done
        return b"".join(kept), has_any

    def from_answer(self, answer: Answer) -> None:
        """The upstream gave a whole answer where a stream was asked for: make one of it."""
        self.translator, self.usage = None, answer.usage
        chunks = as_chunks(answer.body, self.request.endpoint, self.request.wants_usage)
        self.first = b"".join(map(event, chunks))
        self.num_events, self.is_done, self.has_finished = len(chunks), True, True


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
        self._keeps = run.plan.keep or self._mode == "continue"
        self._kept: list[bytes] = []
        self._size = 0  # bytes of what would be kept
        self._opened: Opened | None = None
        self._events = self._relay()
        self.failure: Failure | None = None

    @property
    def report(self) -> Report:
        """What has been done so far."""
        return self._run.report

    async def open(self) -> None:
        """Get to the first token. Raises UpstreamError."""
        self._opened, _ = await self._run.obtain(self._request, self._opening)

    def __aiter__(self) -> AsyncGenerator[bytes, None]:
        return self._events

    async def aclose(self) -> None:
        """Stop: the upstream's connection is dropped, and what it made so far is charged."""
        await self._events.aclose()
        self._drop()

    def answer(self) -> Answer:
        """What the stream said, as a whole answer; needs ``Plan.keep``. Raises UpstreamError (``garbage``) if that is none."""
        try:
            body = assembled(self._chunks(), self._request.endpoint)
        except (AttributeError, TypeError, ValueError):  # parts of chunks that are not what they should be
            raise garbage("chunks that make no answer") from None
        usage = self._run.report.winner.usage if self._run.report.winner else Usage()
        body["usage"] = {
            "prompt_tokens": usage.prompt, "completion_tokens": usage.completion, "total_tokens": usage.prompt + usage.completion,
        }  # fmt: skip
        answer = Answer(body, None, usage)
        answer.report = self._run.report
        return answer

    def _keep(self, block: bytes) -> None:
        self._size += len(block)
        if self._size <= BODY_BYTES:
            self._kept.append(block)
        else:
            self._kept.clear()

    def _chunks(self) -> Iterator[Json]:
        if self._size > BODY_BYTES:
            raise garbage(f"a stream of more than {BODY_BYTES:,} bytes, which is too long to be kept")
        for name, data in events(b"".join(self._kept)):
            if data != DONE_DATA and not name:
                yield _chunk(data)

    def _drop(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.drop()
        self._run.close()

    # One upstream

    async def _opening(self, live: Live, request: UpstreamRequest, attempt: Attempt) -> Opened:
        limit_s = min(live.deployment.first_token_timeout_s, live.deployment.timeout_s)
        call = live.provider.build(request)
        reply: Reply | None = None
        try:
            async with asyncio.timeout(min(limit_s, self._run.left_s)):
                reply = await live.transport.open(call)
                attempt.http_status = reply.status
                opened = Opened(self._run, live, attempt, request, reply)
                if not 200 <= reply.status < 300:
                    raise UpstreamError(live.provider.error(reply.status, reply.headers, await read_all(reply)))
                if "json" in reply.headers.get("content-type", ""):
                    opened.from_answer(live.provider.parse(request, await read_all(reply)))
                else:
                    await opened.until_content()
        except TimeoutError:
            _close(reply)
            raise self._run.timed_out(live, limit_s, "first_token") from None
        except BaseException:
            _close(reply)
            raise
        attempt.first_token_s = self._now() - self._run.began - attempt.start_s
        return opened

    async def _relay(self) -> AsyncGenerator[bytes, None]:
        try:
            while self._opened is not None:
                opened = self._opened
                try:
                    async for block in self._blocks(opened):
                        if self._keeps and block is not HEARTBEAT:
                            self._keep(block)
                        yield block
                except UpstreamError as error:
                    self._broke(opened, error.failure)
                    async for block in self._after(error):
                        yield block
                    continue
                self._opened = None
                self._run.won(opened.live, opened.attempt, opened.counted())
                await _linger(opened.reply)
                yield DONE
        finally:
            self._drop()

    async def _blocks(self, opened: Opened) -> AsyncIterator[bytes]:
        """The events of one upstream. Raises UpstreamError if it breaks."""
        if opened.first:
            yield opened.first
        quiet_since = self._now()
        while not opened.is_done:
            assert opened.reply is not None
            data: bytes | None = opened.reply.read_ready()
            if not data:
                data = await self._some(opened, quiet_since)
                if data is None:
                    yield HEARTBEAT
                    continue
                if not data:
                    if not opened.has_finished:
                        raise UpstreamError(
                            Failure(kind="cut", message=f"{opened.live.name} broke off in the middle of its answer")
                        )
                    return
            block = opened.splitter.feed(data)
            if block:
                passed, _ = opened.passed(block)
                quiet_since = self._now()
                if passed:
                    yield passed
            elif self._now() - quiet_since > opened.live.deployment.timeout_s:
                raise self._run.timed_out(opened.live, opened.live.deployment.timeout_s, "timeout")

    async def _some(self, opened: Opened, quiet_since: float) -> bytes | None:
        """What comes next; None if it is time for a sign of life. Raises UpstreamError when it takes too long."""
        assert opened.reply is not None
        limit_s = opened.live.deployment.timeout_s
        left_s = min(quiet_since + limit_s - self._now(), self._run.left_s)
        if left_s <= 0:
            raise self._run.timed_out(opened.live, limit_s, "timeout")
        try:
            async with asyncio.timeout(min(left_s, self._run.rules.heartbeat_s)):
                return await opened.reply.read_some()
        except TimeoutError:
            return None

    # After a break

    def _broke(self, opened: Opened, failure: Failure) -> None:
        _close(opened.reply)
        self._opened = None
        self._run.lost(opened.live, opened.attempt, failure, opened.counted())

    async def _after(self, error: UpstreamError) -> AsyncIterator[bytes]:
        """Go on elsewhere as the mode says; where that fails, an error event."""
        request = self._request
        try:
            if self._mode == "error" or error.failure.kind == "deadline":
                raise error
            self._run.failed(error)
            if self._mode == "continue":
                request = self._continued()
            self._opened, _ = await self._run.obtain(request, self._opening)
        except UpstreamError as last:
            self.failure = last.failure
            yield event(last.to_dict())
            return
        if self._mode == "restart":
            self._kept.clear()
            self._size = 0
            yield RESTART
        else:
            self._run.report.is_stitched = True
            yield b": x-stitched\n\n"

    def _continued(self) -> UpstreamRequest:
        """The request with what has been said so far. Raises UpstreamError where that cannot be told (tools, plain completions)."""
        text = text_of(self._chunks())
        body = self._request.body
        if not text or self._request.endpoint != "chat":
            raise UpstreamError(
                Failure(kind="cut", message="the stream broke off, and this kind of answer cannot be continued")
            )
        said: list[Any] = [{"role": "assistant", "content": text}, {"role": "user", "content": CONTINUE}]
        return self._request.with_body(messages=[*body["messages"], *said])


class WholeStream:
    """An answer that had to be whole before it was accepted, told as a stream: the same face as `Stream`.

    Attributes:
        report: as `Answer.report`.
        failure: None; it cannot break any more.
    """

    def __init__(self, answer: Answer, request: UpstreamRequest) -> None:
        self._answer = answer
        self._chunks = as_chunks(answer.body, request.endpoint, request.wants_usage)
        self._events = self._told()
        self.report: Report = answer.report
        self.failure: Failure | None = None

    def __aiter__(self) -> AsyncGenerator[bytes, None]:
        return self._events

    async def _told(self) -> AsyncGenerator[bytes, None]:
        for chunk in self._chunks:
            yield event(chunk)
        yield DONE

    async def aclose(self) -> None:
        """Stop."""
        await self._events.aclose()

    def answer(self) -> Answer:
        """The answer."""
        return self._answer


def _chunk(data: bytes) -> Json:
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        raise garbage("a chunk that is no JSON", data) from None
    if not isinstance(chunk, dict):
        raise garbage("a chunk that is no JSON object", data)
    return chunk


def _close(reply: Reply | None) -> None:
    if reply is not None:
        reply.close()


async def _linger(reply: Reply | None) -> None:
    """Read to the end of the connection, which is a moment away, so that it can be used again."""
    if reply is None:
        return
    try:
        async with asyncio.timeout(LINGER_S):
            while await reply.read_some():
                pass
    except (TimeoutError, UpstreamError):
        reply.close()
