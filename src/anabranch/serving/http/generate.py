"""The routes that generate: from a checked request to an answer, whole or streamed, with its metrics whatever its end."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial

from aiohttp import web

from anabranch.serving.core.client import EngineInfo
from anabranch.serving.http.adapter_names import chosen
from anabranch.serving.http.asked import LONG_CHARACTERS, Asked
from anabranch.serving.http.choice import Choice, ChoiceDelta, bytes_of
from anabranch.serving.http.completion import Completion
from anabranch.serving.http.fields import KNOWN
from anabranch.serving.http.frontend import Frontend
from anabranch.serving.http.generation_request import GenerationRequest, read_chat, read_completion
from anabranch.serving.http.reading import Reader
from anabranch.serving.http.responses import ResponseShape, read_response
from anabranch.serving.http.shape import ChatShape, CompletionShape, Shape
from anabranch.serving.http.stream import HEARTBEAT, SlowReaderError
from anabranch.web.answers import SAFE
from anabranch.web.api_error import ApiError

# Characters of x-route-experts.
MOST_HEADER = 900
_READ: dict[str, Callable[..., GenerationRequest]] = {
    "chat": read_chat,
    "completions": read_completion,
    "responses": read_response,
}
_SHAPES: dict[str, type[Shape]] = {"chat": ChatShape, "completions": CompletionShape, "responses": ResponseShape}


class Generate:
    """Answers requests to generate.

    Args:
        frontend: whose engine does it.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend, self._metrics = frontend, frontend.metrics

    async def answer(self, context: Asked, kind: str) -> web.StreamResponse:
        """Answer a request to ``chat``, ``completions`` or ``responses``. Raises ApiError, and ConnectionError when the sender has gone."""
        frontend = self._frontend
        info, reader = frontend.check_ready()
        request = await self._read(context, kind, info, reader)
        context.let_go()
        deadline_s = context.deadline_s()
        context.hold(request.score_bytes)
        if request.is_echo and request.max_tokens == 0 and request.logprobs is None:
            return await context.give_json(CompletionShape(request, [], reader, info).echoed())
        lengths = [len(prompt) for prompt in request.prompts for _ in range(request.n)]
        tickets = frontend.admit(lengths, context.key, context.left_s())
        choices: Sequence[Choice] = ()
        try:
            async with frontend.run(request, context.id, context.key, tickets) as completion:
                choices = completion.choices
                shape = _SHAPES[kind](request, choices, reader, info)
                context.headers |= {
                    "x-route-model": _header(frontend.name),
                    "x-route-layers": str(len(info.routed_layers)),
                }
                if request.adapters:
                    told = [f"{name}*{weight:.6g}" for name, weight in request.adapters]
                    context.headers["x-route-adapters"] = ",".join(told)
                if info.stream_choices != (1,):
                    context.headers["x-route-streams"] = str(request.num_streams or info.num_streams)
                if request.is_stream:
                    return await self._stream(context, shape, completion, deadline_s)
                return await self._complete(context, shape, completion, deadline_s)
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
            self._count(context, request, choices)

    async def count(self, context: Asked, kind: str) -> int:
        """Prompt tokens of a request that is read, and not answered. Raises ApiError."""
        info, reader = self._frontend.check_ready()
        return (await self._read(context, kind, info, reader)).prompt_tokens

    async def _read(self, context: Asked, kind: str, info: EngineInfo, reader: Reader) -> GenerationRequest:
        # Not only the longest prompt there is, but what else a request says.
        body = await context.body(most_tokens=2 * info.max_positions)
        adapters = chosen(body, self._frontend.names, self._frontend.adapters)
        limit = self._frontend.config.limits.most_n
        length = context.length
        read = partial(_READ[kind], default_tokens=context.default_tokens)
        is_rendering = kind != "completions" and reader.has_template
        if is_rendering or length is None or length > LONG_CHARACTERS:
            request = await self._frontend.apart(
                context.key, read, body, reader, info, limit, is_rendering=is_rendering
            )
        else:
            request = read(body, reader, info, limit)
        if adapters:
            versions = self._frontend.adapters.told(adapters)
            request = replace(request, adapters=adapters, adapter_versions=versions)
            context.facts["adapters"] = dict(adapters)
        if request.task is not None:
            context.facts["task"] = request.task
        context.warn(request.unknown, KNOWN[request.kind])
        if self._frontend.config.log_prompts:
            context.facts["prompts"] = [reader.decode(prompt) for prompt in request.prompts]
        context.facts |= {"stream": request.is_stream, "n": request.n, "prompt_tokens": request.prompt_tokens}
        if info.stream_choices != (1,):
            context.facts["num_streams"] = request.num_streams or info.num_streams
        return request

    async def _complete(
        self, context: Asked, shape: Shape, completion: Completion, deadline_s: float | None
    ) -> web.StreamResponse:
        end = None if deadline_s is None else context.began + deadline_s
        while (taken := await _take(completion, end)) is not None:
            for change in taken:
                context.hold(bytes_of(change))
                shape.take(change)
        if shape.request.is_routing:
            context.headers["x-route-experts"] = _experts(shape)
        # Written here, not after the handler, so that a drain waits for it.
        response = await context.give_json(shape.whole())
        context.code = response.status
        return response

    async def _stream(
        self, context: Asked, shape: Shape, completion: Completion, deadline_s: float | None
    ) -> web.StreamResponse:
        end = None if deadline_s is None else context.began + deadline_s
        events = self._events(context, shape, completion, end)
        try:
            headers = {**SAFE, **context.headers}
            response, failure = await context.give_events(headers, events, shape.failed, shape.ending)
        finally:
            await events.aclose()
        context.code = response.status
        if failure is not None:
            context.facts["error"] = failure.code
            self._failed(shape.choices, failure)
        return response

    async def _events(
        self, context: Asked, shape: Shape, completion: Completion, end: float | None
    ) -> AsyncGenerator[bytes]:
        """What is new at any time as one block of bytes: who reads slowly gets more at once. What takes long to tell comes in slices."""
        beat_s, has_told = self._frontend.config.keep_alive_s, False
        while (taken := await _take(completion, end, beat_s)) is not None:
            # Each is of another choice: many short ones are as long as a long one.
            if shape.is_long(taken):
                context.begin_reading()
                async for piece in context.sliced(shape.long_events(taken)):
                    yield piece
            elif (block := b"".join(map(shape.events, taken))) or not taken:
                yield block or HEARTBEAT
            if not has_told and shape.has_told_prompts:
                has_told = True
                # Nothing of prompts is told from here on.
                for choice in shape.choices:
                    choice.scores = None
                context.close()
        if shape.has_long_end:
            async for piece in context.sliced(shape.long_last_events()):
                yield piece
        elif last := shape.last_events():
            yield last

    def _failed(self, choices: Sequence[Choice], error: ApiError) -> None:
        if error.code in _ABORTED:
            self._abort(choices, _ABORTED[error.code])
        self._frontend.count_cut(error)

    def _abort(self, choices: Sequence[Choice], reason: str) -> None:
        cut = sum(1 for choice in choices if choice.finish is None)
        self._metrics.aborted.labels(reason).inc(cut)

    def _count(self, context: Asked, request: GenerationRequest, choices: Sequence[Choice]) -> None:
        """Tokens and times of a request that is over, of whatever of it was done."""
        now, metrics = time.monotonic(), self._metrics
        tokens = sum(choice.completion_tokens for choice in choices)
        cached = sum(choice.cached_tokens for choice in choices[:: request.n])
        if any(choice.first_at is not None or choice.finish is not None for choice in choices):
            metrics.prompt_tokens.inc(request.prompt_tokens)
            metrics.cached_tokens.inc(cached)
            metrics.generation_tokens.inc(tokens)
        context.facts |= {"completion_tokens": tokens, "cached_tokens": cached}
        firsts = [choice.first_at for choice in choices if choice.first_at is not None]
        if firsts:
            context.facts["ttft_ms"] = round((min(firsts) - context.began) * 1000, 1)
        context.facts["finish"] = sorted({str(choice.finish) for choice in choices if choice.finish is not None})
        for choice in choices:
            self._observe(choice, context.began, now)

    def _observe(self, choice: Choice, began: float, now: float) -> None:
        metrics = self._metrics
        metrics.e2e.observe(now - began)
        metrics.prompt_len.observe(choice.prompt_tokens)
        metrics.output_len.observe(choice.completion_tokens)
        if choice.queue_s is not None:
            metrics.queue_time.observe(choice.queue_s)
        if choice.first_at is not None:
            metrics.ttft.observe(choice.first_at - began)


# By the code of the error: what was refused before it ran was not cut short.
_ABORTED = {
    "engine_failed": "engine_failed",
    "request_failed": "request_failed",
    "aborted": "shutdown",
    "shutting_down": "shutdown",
    "deadline_exceeded": "deadline",
    "overloaded": "room",
    "over_limit": "room",
}


async def _take(completion: Completion, end: float | None, beat_s: float | None = None) -> list[ChoiceDelta] | None:
    """See `Completion.take`. Raises ApiError (504) once ``end`` (s of `time.monotonic`) has passed."""
    left_s = None if end is None else max(0.0, end - time.monotonic())
    waits = [wait_s for wait_s in (left_s, beat_s) if wait_s is not None]
    taken = await completion.take(min(waits) if waits else None)
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
