"""`Inside`: a server's answers without its socket, for a program that has the engine within itself, such as a gateway.

    inside = Inside(InsideConfig(engine=ServingConfig(model="runs/demo", process=False)))
    await inside.start()
    reply = await inside.ask("chat", b'{"model": "demo", "messages": [...]}', key="team-a")
    while part := await reply.read_some(): ...          # reply.status, reply.headers
    await inside.close()

What may be asked, what is answered, who is let in and in which order, errors and metrics are the server's own (`generate`, `embeddings`,
`frontend`): the same request gets the same answer from ``anabranch serve``.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

from anabranch.serving.core.client import EngineClient, EngineInfo
from anabranch.serving.http.asked import Asked, answered
from anabranch.serving.http.embeddings import Embeddings
from anabranch.serving.http.frontend import Frontend
from anabranch.serving.http.generate import Generate
from anabranch.serving.http.inside_config import InsideConfig
from anabranch.serving.http.reading import Reader
from anabranch.serving.http.serve import read_model
from anabranch.web.answers import JSON, NOT_STORED, error_response
from anabranch.web.api_error import ApiError
from anabranch.web.ids import new_id
from anabranch.web.room import PATIENCE_S

logger = logging.getLogger(__name__)
Kind = Literal["chat", "completions", "embeddings"]

# For answers that are cut short to be told of it, s.
TELL_S = 1.0
STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8"}


class Inside:
    """One model, of which this process asks. For the event loop that starts it.

    Attributes:
        config: see there.
        frontend: the engine's life: started again after a crash, given up after several.

    Args:
        config: of the engine.
        make_engine: in place of the config's.
        make_reader: in place of that of the config's model.
    """

    def __init__(
        self,
        config: InsideConfig,
        make_engine: Callable[[], EngineClient] | None = None,
        make_reader: Callable[[], Reader] | None = None,
    ) -> None:
        self.config = config
        self._engine, self._is_given = config.engine, bool(make_engine and make_reader)
        self._engines = config.engine.engines()
        self.frontend = Frontend(
            config.http.replace(name=self.name_of(config)),
            make_engine or (lambda: self._engines()),
            make_reader or (lambda: read_model(self._engine.model, config.http)),
            is_shared=True,
        )
        self._generate, self._embeddings = Generate(self.frontend), Embeddings(self.frontend)
        self._answering: set[asyncio.Task[None]] = set()

    @staticmethod
    def name_of(config: InsideConfig) -> str:
        """What requests call the model, and answers too."""
        return config.engine.name or Path(config.engine.model).name or "model"

    @property
    def has_failed(self) -> bool:
        """The engine was given up: it died more often than it may."""
        return self.frontend.state == "failed"

    async def start(self) -> EngineInfo:
        """Load the model, and take requests. Raises AnabranchError if that cannot be; nothing is left of it then."""
        try:
            if not self._is_given:
                # Once, for what reads texts, the engine, and each one that is started after it.
                self._engine = await asyncio.to_thread(self.config.engine.found)
                self._engines = self._engine.engines()
            await self.frontend.start()
        except BaseException:
            await self.frontend.close()
            raise
        assert self.frontend.info is not None, "it has started"
        return self.frontend.info

    async def ask(
        self,
        kind: Kind,
        body: bytes,
        *,
        key: str = "",
        default_tokens: int | None = None,
        on_end: Callable[[int, int, int], None] | None = None,
    ) -> "InsideReply":
        """Ask for something; returns when the status of the answer is known.

        Args:
            kind: of OpenAI's endpoints.
            body: JSON, as for that.
            key: whose request it is. Keys take turns, none fills the queue, and what one has in the prefix cache shows nobody else.
            default_tokens: see `Asked`.
            on_end: called once, when nothing more is made of it, whether or not anybody waits for the answer: with the tokens of its
                prompts, those that were made, and those of the prompts that were in the prefix cache; zeros where the engine was not asked.
        """
        reply = InsideReply()
        asked = _AskedInside(self.frontend, body, key, reply)
        asked.endpoint, asked.default_tokens = kind, default_tokens
        task = asyncio.get_running_loop().create_task(self._answer(asked, kind))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        # A task that is cancelled before it begins runs nothing of its own.
        task.add_done_callback(lambda _: reply.fail(_STOPPED))
        if on_end is not None:
            task.add_done_callback(lambda _: on_end(*asked.done_tokens))
        reply.task = task
        try:
            await reply.begun.wait()
        except BaseException:
            reply.close()
            raise
        return reply

    async def count(self, kind: Kind, body: bytes, *, key: str = "") -> int:
        """Prompt tokens of what `ask` would be asked, as the engine is given them: of a chat by its template, tools among it.

        Nothing is made, and nobody waits for the engine. Args: see `ask`. Raises ApiError where that would be the answer.
        """
        asked = _AskedInside(self.frontend, body, key, InsideReply())
        try:
            return await (self._embeddings.count(asked) if kind == "embeddings" else self._generate.count(asked, kind))
        finally:
            asked.let_go()

    async def _answer(self, asked: "_AskedInside", kind: Kind) -> None:
        try:
            response = await answered(asked, self._answered(asked, kind), f"{kind} inside")
            asked.code = response.status
            asked.reply.end(response)
        finally:
            asked.close()
            self.frontend.metrics.requests.labels(kind, str(asked.code)).inc()

    async def _answered(self, asked: Asked, kind: Kind) -> web.StreamResponse:
        if self.has_failed:
            raise ApiError(503, "failed", self.frontend.error)
        return await (self._embeddings.answer(asked) if kind == "embeddings" else self._generate.answer(asked, kind))

    def metrics_text(self) -> bytes:
        """What is counted, for Prometheus: the series of ``anabranch serve``."""
        self.frontend.picture()
        return self.frontend.metrics.text()

    async def close(self) -> None:
        """Take no more requests, cut short those under way, and end the engine."""
        self.frontend.drain()
        self.frontend.cut(_STOPPED)
        if self._answering:
            await asyncio.wait(self._answering, timeout=TELL_S)
        left = list(self._answering)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self.frontend.close()


class InsideReply:
    """An answer under way. Who makes it waits until what came before has been read: a slow reader costs what it is made of (`Asked.hold`).

    One that ends early says so in its own form: before its status is known it is the error itself, a stream between two events ends with an
    event of it, and in the middle of an event, or of anything else, whoever reads meets it as an exception.

    Attributes:
        status: of HTTP.
        headers: of the answer.
        begun: set when both are known.
        task: makes it.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.begun = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._held, self._is_over = b"", False
        # Of a stream: what says between two events, which its last bytes tell, that it failed.
        self._failed: Callable[[ApiError], bytes] | None = None
        self._last = b"\n\n"
        self._error: ApiError | None = None
        self._news, self._room = asyncio.Event(), asyncio.Event()

    # Who makes it

    def begin(self, status: int, headers: Mapping[str, str], failed: Callable[[ApiError], bytes] | None = None) -> None:
        """Status and headers are known; of a stream also what ends it where it failed."""
        self.status, self.headers, self._failed = status, headers, failed
        self.begun.set()

    async def put(self, data: bytes) -> None:
        """More of the body, once there is room for it."""
        while self._held and not self._is_over:
            self._room.clear()
            await self._room.wait()
        if self._is_over:
            # Somebody ended it meanwhile, and has said how.
            return
        self._held += data
        self._last = (self._last + data[-2:])[-2:]
        self._news.set()

    def end(self, response: web.StreamResponse) -> None:
        """No more comes: ``response`` is what was given, or all there is. A second call does nothing."""
        if self._is_over:
            return
        if not self.begun.is_set():
            body = response.body if isinstance(response, web.Response) else None
            self.begin(response.status, response.headers)
            self._held = body if isinstance(body, bytes) else b""
        self._is_over = True
        self._news.set()
        self._room.set()

    def fail(self, error: ApiError) -> None:
        """No more comes, though it is not whole. Nothing if it has ended."""
        if self._is_over or not self.begun.is_set():
            self.end(error_response(error))
            return
        if self._failed is not None and self._last == b"\n\n":
            self._held += self._failed(error)
        else:
            self._error = error
        self._is_over = True
        self._news.set()
        self._room.set()

    def cut(self, error: ApiError) -> None:
        """As `fail`, and what is not made yet is not made."""
        self.fail(error)
        if self.task is not None:
            self.task.cancel()

    # Who reads it

    def read_ready(self) -> bytes:
        """What has come, without waiting; empty if nothing has, or the end is reached."""
        data, self._held = self._held, b""
        if data:
            self._room.set()
        return data

    async def read_some(self) -> bytes:
        """What comes next, empty at the end. May be cancelled and called again without losing a byte.

        Raises ApiError behind what came of an answer that broke off.
        """
        while not self._held and not self._is_over:
            self._news.clear()
            await self._news.wait()
        if not self._held and self._error is not None:
            raise self._error
        return self.read_ready()

    def close(self) -> None:
        """Nobody reads on: what is not made yet is not made, and its place in the engine is free."""
        if self.task is not None and not self._is_over:
            self.task.cancel()


class _AskedInside(Asked):
    """A request from this process."""

    def __init__(self, frontend: Frontend, body: bytes, key: str, reply: InsideReply) -> None:
        super().__init__(frontend.config, frontend.apart, frontend.writing, frontend.answers, new_id(), key)
        self._body: bytes | None = body
        self._length = len(body)
        self.reply = reply

    @property
    def length(self) -> int | None:
        """Bytes of its body."""
        return self._length

    def cut(self) -> None:
        """See `Asked`."""
        message = (
            f"others need the room that this answer takes, which was not read in {PATIENCE_S:g} s; try again in 1 s"
        )
        error = ApiError(
            self._config.admission.status, "overloaded", message, type="rate_limit_error", headers={"Retry-After": "1"}
        )
        self.code = error.status
        self.reply.cut(error)

    def refuse(self, error: ApiError) -> web.Response:
        """See `Asked`. What has begun says it in its own form."""
        if self.reply.begun.is_set():
            self.reply.fail(error)
        return super().refuse(error)

    @property
    def done_tokens(self) -> tuple[int, int, int]:
        """Of its prompts, made, and of the prompts in the prefix cache; zeros until the engine has been asked."""
        facts = self.facts
        if "completion_tokens" not in facts:
            return 0, 0, 0
        return facts["prompt_tokens"], facts["completion_tokens"], facts["cached_tokens"]

    async def body(self, most_tokens: int = 0) -> dict[str, Any]:
        """Its JSON."""
        raw, self._body = self._body, None
        assert raw is not None, "a body is read once"
        return await self.parsed(raw, most_tokens)

    async def give(self, response: web.Response) -> None:
        """It goes back as what the route returns."""

    async def give_slices(self, slices: AsyncIterator[bytes]) -> web.StreamResponse:
        """Hand on JSON as there is room for it."""
        first = await anext(slices)
        self.reply.begin(200, {**NOT_STORED, **self.headers, "content-type": f"{JSON}; charset=utf-8"})
        await self.reply.put(first)
        async for data in slices:
            await self.reply.put(data)
        return web.StreamResponse(status=200)

    async def give_events(
        self,
        headers: Mapping[str, str],
        events: AsyncIterator[bytes],
        failed: Callable[[ApiError], bytes],
        ending: bytes,
    ) -> tuple[web.StreamResponse, ApiError | None]:
        """Hand on events as there is room for them."""
        first = await anext(events)
        failure: ApiError | None = None
        self.reply.begin(200, {**headers, **STREAM_HEADERS}, lambda error: failed(error) + ending)
        await self.reply.put(first)
        try:
            async for data in events:
                await self.reply.put(data)
        except ApiError as error:
            failure = error
            self.reply.fail(error)
        else:
            await self.reply.put(ending)
        # Only its status is looked at: what it says has been handed on.
        return web.StreamResponse(status=200), failure


# The end of what nobody waits for any longer, or of what the end of the engine cut short.
_STOPPED = ApiError(503, "shutting_down", "the engine was stopped before the answer was complete")
