"""The routes that generate: from a checked request to an answer, whole or streamed, with its metrics whatever its end."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from aiohttp import web

from anabranch.serving.core.client import EngineInfo
from anabranch.serving.http.asked import Asked, check_model, read_chat, read_completion
from anabranch.serving.http.buffer import Buffer
from anabranch.serving.http.call import LONG_CHARACTERS, Call
from anabranch.serving.http.choice import Choice, Piece
from anabranch.serving.http.fields import KNOWN
from anabranch.serving.http.frontend import Frontend
from anabranch.serving.http.reading import Reader
from anabranch.serving.http.responses import ResponseShape, read_response
from anabranch.serving.http.shape import ChatShape, CompletionShape, Shape
from anabranch.serving.http.stream import HEARTBEAT, SlowReaderError, send, write
from anabranch.web.answers import SAFE
from anabranch.web.api_error import ApiError

# Characters of x-route-experts.
MOST_HEADER = 900
_READ: dict[str, Callable[..., Asked]] = {"chat": read_chat, "completions": read_completion, "responses": read_response}
_SHAPES: dict[str, type[Shape]] = {"chat": ChatShape, "completions": CompletionShape, "responses": ResponseShape}


class Generate:
    """Answers requests to generate.

    Args:
        frontend: whose engine does it.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend, self._metrics = frontend, frontend.metrics

    async def answer(self, call: Call, kind: str) -> web.StreamResponse:
        """Answer a request to ``chat``, ``completions`` or ``responses``. Raises ApiError, and ConnectionError when the sender has gone."""
        frontend = self._frontend
        info, reader = frontend.check_ready()
        asked = await self._read(call, kind, info, reader)
        call.let_go()
        deadline_s = call.deadline_s()
        if asked.is_echo and asked.max_tokens == 0 and asked.logprobs is None:
            return call.json(CompletionShape(asked, [], reader, info).echoed())
        lengths = [len(prompt) for prompt in asked.prompts for _ in range(asked.n)]
        tickets = frontend.admit(lengths, call.key, call.left_s())
        choices: list[Choice] = []
        try:
            async with frontend.run(asked, call.id, call.key, tickets) as (choices, buffer):
                shape = _SHAPES[kind](asked, choices, reader, info)
                call.headers |= {
                    "x-route-model": _header(frontend.name),
                    "x-route-layers": str(len(info.routed_layers)),
                }
                if info.stream_choices != (1,):
                    call.headers["x-route-streams"] = str(asked.num_streams or info.num_streams)
                if asked.is_stream:
                    return await self._stream(call, shape, buffer, deadline_s)
                return await self._complete(call, shape, buffer, deadline_s)
        except SlowReaderError:
            self._abort(choices, "slow_reader")
            raise
        except (asyncio.CancelledError, ConnectionError):
            self._abort(choices, "client_gone")
            raise
        except ApiError as error:
            self._failed(choices, error)
            raise
        finally:
            for ticket in tickets:
                ticket.close()
            self._count(call, asked, choices)

    async def _read(self, call: Call, kind: str, info: EngineInfo, reader: Reader) -> Asked:
        # Not only the longest prompt there is, but what else a request says.
        body = await call.body(most_tokens=2 * info.max_positions)
        check_model(body, self._frontend.names)
        limit = self._frontend.config.limits.most_n
        length = call.request.content_length
        is_rendering = kind != "completions" and reader.has_template
        if is_rendering or length is None or length > LONG_CHARACTERS:
            asked = await self._frontend.apart(
                call.key, _READ[kind], body, reader, info, limit, is_rendering=is_rendering
            )
        else:
            asked = _READ[kind](body, reader, info, limit)
        call.warn(asked.unknown, KNOWN[asked.kind])
        if self._frontend.config.log_prompts:
            call.facts["prompts"] = [reader.decode(prompt) for prompt in asked.prompts]
        call.facts |= {"stream": asked.is_stream, "n": asked.n, "prompt_tokens": asked.prompt_tokens}
        if info.stream_choices != (1,):
            call.facts["num_streams"] = asked.num_streams or info.num_streams
        return asked

    async def _complete(
        self, call: Call, shape: Shape, buffer: Buffer[Piece], deadline_s: float | None
    ) -> web.StreamResponse:
        pieces: list[list[Piece]] = [[] for _ in shape.choices]
        end = None if deadline_s is None else call.began + deadline_s
        while (taken := await _take(buffer, end)) is not None:
            for piece in taken:
                pieces[piece.index].append(piece)
        if shape.asked.is_routing:
            call.headers["x-route-experts"] = _experts(shape)
        response = call.json(shape.whole(pieces))
        # Written here, not after the handler, so that a drain waits for it.
        await write(response, call.request, self._frontend.config.limits.stall_s)
        call.code = response.status
        return response

    async def _stream(
        self, call: Call, shape: Shape, buffer: Buffer[Piece], deadline_s: float | None
    ) -> web.StreamResponse:
        config = self._frontend.config
        end = None if deadline_s is None else call.began + deadline_s
        events = self._events(shape, buffer, end, config.keep_alive_s)
        try:
            response, failure = await send(
                call.request, {**SAFE, **call.headers}, events, config.limits.stall_s, shape.failed, shape.ending
            )
        finally:
            await events.aclose()
        call.code = response.status
        if failure is not None:
            call.facts["error"] = failure.code
            self._failed(shape.choices, failure)
        return response

    async def _events(
        self, shape: Shape, buffer: Buffer[Piece], end: float | None, beat_s: float
    ) -> AsyncGenerator[bytes]:
        """What is new at any time as one block of bytes: a reader who is slow gets more at once."""
        while (taken := await _take(buffer, end, beat_s)) is not None:
            block = b"".join(map(shape.events, taken))
            if block or not taken:
                yield block or HEARTBEAT
        if last := shape.last_events():
            yield last

    def _failed(self, choices: Sequence[Choice], error: ApiError) -> None:
        if error.code in _ABORTED:
            self._abort(choices, _ABORTED[error.code])
        self._frontend.num_cut += error.code in _CUT

    def _abort(self, choices: Sequence[Choice], reason: str) -> None:
        cut = sum(1 for choice in choices if choice.finish is None)
        self._metrics.aborted.labels(reason).inc(cut)

    def _count(self, call: Call, asked: Asked, choices: Sequence[Choice]) -> None:
        """Tokens and times of a request that is over, of whatever of it was done."""
        now, metrics = time.monotonic(), self._metrics
        tokens = sum(choice.completion_tokens for choice in choices)
        cached = sum(choice.cached_tokens for choice in choices[:: asked.n])
        if any(choice.times or choice.finish is not None for choice in choices):
            metrics.prompt_tokens.inc(asked.prompt_tokens)
            metrics.cached_tokens.inc(cached)
            metrics.generation_tokens.inc(tokens)
        call.facts |= {"completion_tokens": tokens, "cached_tokens": cached}
        firsts = [choice.times[0][0] for choice in choices if choice.times]
        if firsts:
            call.facts["ttft_ms"] = round((min(firsts) - call.began) * 1000, 1)
        call.facts["finish"] = sorted({str(choice.finish) for choice in choices if choice.finish is not None})
        for choice in choices:
            self._observe(choice, call.began, now)

    def _observe(self, choice: Choice, began: float, now: float) -> None:
        metrics = self._metrics
        metrics.e2e.observe(now - began)
        metrics.prompt_len.observe(choice.prompt_tokens)
        metrics.output_len.observe(choice.completion_tokens)
        if choice.queue_s is not None:
            metrics.queue_time.observe(choice.queue_s)
        if not choice.times:
            return
        metrics.ttft.observe(choice.times[0][0] - began)
        before = choice.times[0][0]
        for at, count in choice.times[1:]:
            for _ in range(count):
                metrics.inter_token.observe((at - before) / count)
            before = at


# By the code of the error: what was refused before it ran was not cut short.
_ABORTED = {
    "engine_failed": "engine_failed", "request_failed": "request_failed", "aborted": "shutdown", "shutting_down": "shutdown",
    "deadline_exceeded": "deadline",
}  # fmt: skip
# Of these, what neither the request nor its sender is the reason of.
_CUT = ("engine_failed", "aborted", "shutting_down")


async def _take(buffer: Buffer[Piece], end: float | None, beat_s: float | None = None) -> list[Piece] | None:
    """See `Buffer.take`. Raises ApiError (504) once ``end`` (s of `time.monotonic`) has passed."""
    left_s = None if end is None else max(0.0, end - time.monotonic())
    waits = [wait_s for wait_s in (left_s, beat_s) if wait_s is not None]
    taken = await buffer.take(min(waits) if waits else None)
    if taken is not None and end is not None and time.monotonic() >= end:
        raise ApiError(504, "deadline_exceeded", "the request's deadline has passed")
    return taken


def _header(name: str) -> str:
    return "".join(letter if 32 <= ord(letter) < 127 else "?" for letter in name)


def _experts(shape: Shape) -> str:
    """The experts of each layer by use, ``layer=expert*tokens,...;...``, as much as a header may hold."""
    rows = []
    for layer, experts in shape.routing()["experts"].items():
        best = sorted(experts.items(), key=lambda row: -row[1])[:4]
        rows.append(f"{layer}=" + ",".join(f"{expert}*{count}" for expert, count in best))
    text = ";".join(rows)
    return text if len(text) <= MOST_HEADER else text[:MOST_HEADER].rpartition(";")[0]
