"""``/v1/embeddings``: vectors of texts, made by the engine among all else that it does."""

import asyncio
import base64
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from anabranch.errors import InputError
from anabranch.serving.core.admission import Admission, Ticket
from anabranch.serving.core.client import BusyError, EngineInfo, FieldInputError
from anabranch.serving.core.mixture import Mixture
from anabranch.serving.core.request import Output, Request, Sampling
from anabranch.serving.http import fields
from anabranch.serving.http.adapter_names import chosen
from anabranch.serving.http.asked import LONG_CHARACTERS, Asked
from anabranch.serving.http.choice import refused
from anabranch.serving.http.frontend import Frontend
from anabranch.serving.http.reading import Reader
from anabranch.web.api_error import ApiError, wrong
from anabranch.web.body import is_int, said
from anabranch.web.json_text import Rows

KNOWN = {
    "model": fields.text(256),
    "input": (lambda value: isinstance(value, str | list), "text, texts or lists of token ids"),
    "encoding_format": (lambda value: value in ("float", "base64"), '"float" or "base64"'),
    "user": fields.text(512),
    "dimensions": fields.integer(1, 2**20),
    "cache_salt": fields.text(256),
    "adapters": fields.ADAPTERS,
    "task": fields.TASK,
}
MOST_INPUTS = 2048
# Sequences of one request in the engine at a time: the others wait for them, not among everybody's.
AT_ONCE = 16
# Numbers that are told at once; it takes a millisecond.
MOST_AT_ONCE = 1000
# Of all vectors of an answer: more are many megabytes for each of the senders who ask at once, here and at theirs.
MOST_NUMBERS = 1 << 23
# Of a number of a vector that waits to be told.
NUMBER_BYTES = 4
# Between two looks for room that others leave, s.
LOOK_S = 0.02
Prompts = list[tuple[int, ...]]
Vector = NDArray[np.float32]
Submit = Callable[[Request], AsyncGenerator[Output]]


class Embeddings:
    """This route.

    Args:
        frontend: whose engine makes the vectors.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend, self._metrics = frontend, frontend.metrics

    async def answer(self, context: Asked) -> web.StreamResponse:
        """Vectors of texts. Raises ApiError: 501 for an engine that makes none."""
        frontend = self._frontend
        info, reader = frontend.check_ready()
        body = await self._body(context)
        if info.pooling is None:
            raise ApiError(501, "not_supported", "this engine makes no embeddings")
        size = body.get("dimensions") or info.width
        if size > info.width:
            raise wrong("dimensions", f"dimensions is {size:,}; this model's vectors have {info.width:,}")
        prompts = await self._read(context, body.get("input"), reader, info)
        if size * len(prompts) > MOST_NUMBERS:
            what = f"{len(prompts):,} vectors of {size:,} numbers are asked for, and {MOST_NUMBERS // size:,} may be at a time"
            raise wrong("input", f"{what}; send fewer texts, or give dimensions", "too_many_numbers")
        salt, is_packed = str(body.get("cache_salt") or ""), body.get("encoding_format") == "base64"
        model, asked = body["model"], (chosen(body, frontend.names, frontend.adapters), body.get("task"))
        # Texts that wait for the engine take no room from bodies that others send.
        del body
        context.let_go()
        context.hold(NUMBER_BYTES * info.width * len(prompts))
        vectors, cached = await self._made(context, prompts, info, salt, asked)
        tokens = sum(map(len, prompts))

        def rows() -> Iterator[dict[str, Any]]:
            for at, vector in enumerate(vectors):
                yield {"object": "embedding", "index": at, "embedding": _shown(vector[:size], is_packed)}

        data = list(rows()) if size * len(vectors) <= MOST_AT_ONCE else Rows(rows)
        context.facts |= {"prompt_tokens": tokens, "cached_tokens": cached, "n": len(prompts)}
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return await context.give_json({"object": "list", "data": data, "model": model, "usage": usage})

    async def count(self, context: Asked) -> int:
        """Tokens of a request's texts, of which no vectors are made. Raises ApiError."""
        info, reader = self._frontend.check_ready()
        body = await self._body(context)
        return sum(map(len, await self._read(context, body.get("input"), reader, info)))

    async def _body(self, context: Asked) -> dict[str, Any]:
        """A request whose fields have been checked. Raises ApiError."""
        body = await context.body()
        chosen(body, self._frontend.names, self._frontend.adapters)
        for name, value in body.items():
            if name in KNOWN and value is not None:
                fields.expect(name, value, KNOWN[name])
        context.warn(tuple(name for name in body if name not in KNOWN), KNOWN)
        return body

    async def _read(self, context: Asked, given: Any, reader: Reader, info: EngineInfo) -> Prompts:
        length = (
            sum(len(part) for part in given if isinstance(part, str | list))
            if isinstance(given, list)
            else len(given or "")
        )
        if length > LONG_CHARACTERS:
            return await self._frontend.apart(context.key, read_inputs, given, reader, info)
        return read_inputs(given, reader, info)

    async def _made(
        self, context: Asked, prompts: Prompts, info: EngineInfo, salt: str, asked: tuple[Mixture, str | None]
    ) -> tuple[list[Vector], int]:
        """Vectors of prompts, and how many of their tokens were there; ``asked`` are the adapters and the task. Raises ApiError."""
        frontend, left_s, (adapters, task) = self._frontend, context.left_s(), asked
        [first] = frontend.admit([len(prompts[0])], context.key, left_s)
        base = frontend.new_id(context.id)
        salt = frontend.salt_of(context.key, salt)
        requests = [
            Request(
                id=f"{base}-{at}",
                prompt=prompt,
                sampling=Sampling(max_tokens=0),
                key=context.key,
                arrival=time.monotonic(),
                cache_salt=salt,
                pooling=info.pooling,
                stall_s=math.inf,
                adapters=adapters,
                task=task,
            )
            for at, prompt in enumerate(prompts)
        ]
        made = Vectors(requests, frontend.admission, first)
        try:
            with frontend.under_way(made) as submit:
                async with asyncio.timeout(left_s):
                    vectors = await made.run(submit)
        except TimeoutError:
            raise ApiError(504, "deadline_exceeded", "the request's deadline has passed") from None
        except InputError as error:
            param = error.field if isinstance(error, FieldInputError) else "input"
            raise ApiError(400, "invalid_value", str(error), param=param) from None
        except BusyError as error:
            raise ApiError(503, "busy", str(error), headers={"Retry-After": "1"}) from None
        except ApiError as error:
            frontend.count_cut(error)
            raise
        finally:
            first.close()
        self._metrics.prompt_tokens.inc(sum(map(len, prompts)))
        self._metrics.cached_tokens.inc(made.cached_tokens)
        return vectors, made.cached_tokens


class Vectors:
    """The texts of one request while their vectors are made: each with a place of its own in the queue.

    The first has one. The others are in no hurry: they come in while there is room to spare, and one by one where there is none.

    Attributes:
        cached_tokens: of prompts, that were there.

    Args:
        requests: of the engine, one for each text.
        admission: which gives places.
        first: the place of the first.
    """

    def __init__(self, requests: Sequence[Request], admission: Admission, first: Ticket) -> None:
        self._requests, self._admission, self._first = requests, admission, first
        self.cached_tokens = 0
        self._vectors: list[Vector] = [np.empty(0, np.float32)] * len(requests)
        self._open: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._news = asyncio.Event()

    @property
    def ids(self) -> tuple[str, ...]:
        """Of its sequences."""
        return tuple(request.id for request in self._requests)

    def fail(self, error: BaseException) -> None:
        """End with this error, unless it has failed already."""
        self._error = self._error or error
        self._news.set()

    async def run(self, submit: Submit) -> list[Vector]:
        """The vectors, in order; ``submit`` runs one sequence. Raises what the first that fails raises; what still runs is aborted."""
        try:
            for at, request in enumerate(self._requests):
                ticket = self._first if at == 0 else await self._place(request)
                task = asyncio.get_running_loop().create_task(self._one(submit, at, ticket))
                self._open.add(task)
                # One that is cancelled before it begins has a place too.
                task.add_done_callback(partial(self._ended, ticket))
            while self._open and self._error is None:
                await self._wait(None)
        finally:
            open_now = list(self._open)
            for task in open_now:
                task.cancel()
            await asyncio.gather(*open_now, return_exceptions=True)
        if self._error is not None:
            raise self._error
        return self._vectors

    async def _place(self, request: Request) -> Ticket:
        """A place for one more text, when there is one."""
        size, key = len(request.prompt), request.key
        while self._error is None:
            is_room = self._admission.has_spare(size, key) if self._open else self._admission.has_room(size, key)
            if len(self._open) < AT_ONCE and is_room:
                break
            await self._wait(LOOK_S)
        if self._error is not None:
            raise self._error
        return self._admission.admit(size, key)

    async def _wait(self, timeout_s: float | None) -> None:
        """Until one has ended or failed, or the time is up."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()

    async def _one(self, submit: Submit, at: int, ticket: Ticket) -> None:
        try:
            self._vectors[at] = await self._vector(submit, self._requests[at], ticket)
        except Exception as error:
            # Told to whoever waits for all.
            self.fail(error)

    def _ended(self, ticket: Ticket, task: "asyncio.Task[None]") -> None:
        ticket.close()
        self._open.discard(task)
        self._news.set()

    async def _vector(self, submit: Submit, request: Request, ticket: Ticket) -> Vector:
        async with contextlib.aclosing(submit(request)) as outputs:
            async for output in outputs:
                if (error := refused(output, request)) is not None:
                    raise error
                ticket.prepared(output.is_prepared)
                if output.is_bare:
                    continue
                ticket.started()
                self.cached_tokens += output.cached_tokens or 0
                if output.finish is not None:
                    # An eighth of what the numbers take one by one.
                    return np.asarray(output.embedding, np.float32)
        raise ApiError(500, "engine_failed", "the engine ended a request without a reason")


def read_inputs(given: Any, reader: Reader, info: EngineInfo) -> Prompts:
    """Token ids of each input. Raises ApiError (400) that names it."""
    parts = [given] if isinstance(given, str) or (isinstance(given, list) and given and is_int(given[0])) else given
    if not isinstance(parts, list) or not 0 < len(parts) <= MOST_INPUTS:
        raise wrong("input", f"input is {said(given)}; it must be text, or a list of 1 to {MOST_INPUTS:,} texts")
    prompts = []
    for at, part in enumerate(parts):
        is_ids = isinstance(part, list) and part and all(is_int(x) and 0 <= x < info.vocab_size for x in part)
        if not is_ids and not isinstance(part, str):
            raise wrong(f"input[{at}]", f"input[{at}] is {said(part)}; it must be text or a list of token ids")
        prompts.append(tuple(part) if is_ids else reader.encode(part))
        if not prompts[-1]:
            raise wrong(f"input[{at}]", f"input[{at}] is empty, and the model has no token for a beginning")
        if len(prompts[-1]) > info.max_positions:
            message = f"input[{at}] has {len(prompts[-1]):,} tokens; the model reads {info.max_positions:,}"
            raise wrong(f"input[{at}]", message, "context_length_exceeded")
    return prompts


def _shown(vector: Vector, is_packed: bool) -> list[float] | str:
    """A vector of length 1, as numbers or as the bytes of float32 numbers in base64; of nothing but zeros as it is."""
    values = vector.astype(np.float64)
    length = np.linalg.norm(values)
    values = (values / length if length else values).astype(np.float32)
    return base64.b64encode(values.astype("<f4").tobytes()).decode() if is_packed else values.tolist()
