"""`Frontend`: the life of the engine behind a server, and the requests on it: loading, ready, crashed and started again, draining."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

from anabranch.errors import AnabranchError, InputError
from anabranch.serving.core.admission import OverloadError, Ticket
from anabranch.serving.core.client import BusyError, EngineClient, EngineInfo
from anabranch.serving.core.request import Request
from anabranch.serving.http.asked import Asked
from anabranch.serving.http.buffer import Buffer
from anabranch.serving.http.choice import ENGINE_FAILED, Choice, Piece
from anabranch.serving.http.config import HttpConfig
from anabranch.serving.http.metrics import Metrics
from anabranch.serving.http.reading import Reader
from anabranch.serving.http.scores import PromptScores
from anabranch.web.api_error import ApiError

logger = logging.getLogger(__name__)
WATCH_S, PICTURE_S, CLOSE_S = 0.05, 1.0, 10.0
State = Literal["loading", "ready", "draining", "failed"]


class Frontend:
    """One engine and the requests on it.

    Attributes:
        state: ``loading`` (also while a crashed engine is started again), ``ready``, ``draining`` or ``failed``.
        info, reader: of the model; set once it was ready for the first time.
        failed: set when the engine is given up.

    Args:
        config: of the server.
        make_engine: a new engine, not started; called again after a crash.
        make_reader: the tokenizer's side of the model; called in a thread.
    """

    def __init__(
        self, config: HttpConfig, make_engine: Callable[[], EngineClient], make_reader: Callable[[], Reader]
    ) -> None:
        self.config, self._make_engine, self._make_reader = config, make_engine, make_reader
        self.metrics = Metrics()
        self.state: State = "loading"
        self.info: EngineInfo | None = None
        self.reader: Reader | None = None
        self.error = ""
        self.failed = asyncio.Event()
        self.admission = config.admission.build()
        self._engine: EngineClient | None = None
        self._live: set[Buffer[Piece]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._restarts, self._ready_at, self._serial = 0, 0.0, 0

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.config.name or (self.info.model if self.info is not None else "")

    @property
    def engine(self) -> EngineClient:
        """The engine that is ready. Raises ApiError (503) if there is none."""
        self.check_ready()
        assert self._engine is not None
        return self._engine

    def check_ready(self) -> tuple[EngineInfo, Reader]:
        """What is known of the model. Raises ApiError (503) while requests are not taken."""
        if self.state == "draining":
            raise ApiError(503, "draining", "the server is stopping", headers={"Retry-After": "5"})
        if self.state != "ready" or self.info is None or self.reader is None:
            raise ApiError(503, "loading", "the model is being loaded", headers={"Retry-After": "2"})
        return self.info, self.reader

    async def start(self) -> None:
        """Load, warm up, and take requests. Raises AnabranchError if the engine cannot start."""
        engine = self._engine = self._make_engine()
        reading = None if self.reader is not None else asyncio.ensure_future(asyncio.to_thread(self._make_reader))
        try:
            self.info = await engine.start()
        except BaseException:
            if reading is not None:
                await asyncio.gather(reading, return_exceptions=True)
            raise
        if reading is not None:
            self.reader = await reading
        self._ready_at = time.monotonic()
        if self.state == "loading":
            self._become("ready")
        if self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._watch())

    def drain(self) -> None:
        """Take no more requests."""
        if self.state != "failed":
            self._become("draining")

    def resume(self) -> None:
        """Take requests again, after a drain that an operator asked for."""
        if self.state == "draining":
            self._become("ready" if self._engine is not None and self._engine.is_ready else "loading")

    def cut(self, error: ApiError) -> None:
        """End every request under way with this error."""
        for buffer in list(self._live):
            buffer.fail(error)

    async def close(self) -> None:
        """End the engine."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._engine is not None:
            await self._end(self._engine)

    def admit(self, prompts: Sequence[int], key: str, deadline_s: float | None) -> list[Ticket]:
        """A place for each sequence, or for none of them.

        Args:
            prompts: tokens of each.
            key: whose they are.
            deadline_s: seconds from now.

        Raises ApiError (429, or 503 by config) with ``Retry-After``.
        """
        tickets: list[Ticket] = []
        try:
            tickets.extend(self.admission.admit(tokens, key, deadline_s) for tokens in prompts)
        except OverloadError as error:
            for ticket in tickets:
                ticket.close()
            self.metrics.rejections.labels(error.reason).inc()
            headers = {"Retry-After": f"{error.retry_after_s:.0f}", "x-should-retry": "true"}
            raise ApiError(error.status, "overloaded", str(error), type="rate_limit_error", headers=headers) from None
        return tickets

    @contextlib.asynccontextmanager
    async def run(
        self, asked: Asked, id: str, key: str, tickets: Sequence[Ticket]
    ) -> AsyncIterator[tuple[list[Choice], Buffer[Piece]]]:
        """Choices and the buffer their pieces come through; all is aborted at the end. Raises ApiError."""
        engine, reader = self.engine, self.check_ready()[1]
        # Senders choose their ids, and may choose one twice.
        self._serial += 1
        is_scored = asked.sampling.prompt_logprobs is not None
        scores = [PromptScores(len(prompt)) if is_scored else None for prompt in asked.prompts]
        choices = [
            Choice(at, engine, self._request(asked, f"{id}-{self._serial}", key, at), reader, asked.stop, scores[at // asked.n])
            for at in range(asked.num_choices)
        ]  # fmt: skip
        buffer: Buffer[Piece] = Buffer(
            [_checked(choice, ticket, asked.grammar_param) for choice, ticket in zip(choices, tickets, strict=True)],
            self.config.limits.stream_events,
        )
        self._live.add(buffer)
        try:
            async with buffer:
                yield choices, buffer
        finally:
            self._live.discard(buffer)

    @staticmethod
    def _request(asked: Asked, id: str, key: str, at: int) -> Request:
        prompt, choice = asked.prompts[at // asked.n], at % asked.n
        return Request(
            id=f"{id}-{at}", prompt=prompt, sampling=asked.sampling_of(choice), priority=asked.priority, key=key,
            arrival=time.monotonic(), cache_salt=asked.cache_salt, record_routing=asked.is_routing, num_streams=asked.num_streams,
        )  # fmt: skip

    def _become(self, state: State) -> None:
        self.state = state
        self.metrics.state.state(state)

    async def _watch(self) -> None:
        """Look after the engine: take its picture, and start it again when it has died."""
        pictured = 0.0
        while True:
            await asyncio.sleep(WATCH_S)
            engine = self._engine
            if engine is None or self.state == "failed":
                continue
            if time.monotonic() - pictured >= PICTURE_S:
                pictured = time.monotonic()
                self.picture()
            if not engine.is_ready and self.state == "ready":
                await self._restart(engine)

    def picture(self) -> None:
        """Bring the metrics up to date."""
        self.metrics.in_flight.set(self.admission.in_flight)
        if self._engine is not None:
            self.metrics.absorb(self._engine.stats())

    async def _restart(self, engine: EngineClient) -> None:
        if time.monotonic() - self._ready_at > self.config.restart_reset_s:
            self._restarts = 0
        self._become("loading")
        self.cut(ApiError(500, "engine_failed", ENGINE_FAILED))
        await self._end(engine)
        while self._restarts < self.config.restarts:
            self._restarts += 1
            self.metrics.restarts.inc()
            logger.error("the engine died; starting it again (%d of %d)", self._restarts, self.config.restarts)
            try:
                await self.start()
            except AnabranchError as error:
                logger.error("the engine did not start: %s", error)
                continue
            return
        self.error = f"the engine died more than {self.config.restarts} times"
        logger.error("%s; giving up", self.error)
        self._become("failed")
        self.failed.set()

    async def _end(self, engine: EngineClient) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await engine.close()
        except TimeoutError:
            logger.error("the engine did not end within %g s", CLOSE_S)
        except AnabranchError as error:
            # It is dead already: what it says of that is for the log.
            logger.error("the engine did not end well: %s", error)
        self.metrics.forget_engine()


async def _checked(choice: Choice, ticket: Ticket, param: str | None) -> AsyncIterator[Piece]:
    """Pieces of a choice; what the engine says can never run is the client's mistake."""
    pieces = choice.run()
    try:
        async for piece in pieces:
            ticket.started()
            yield piece
    except InputError as error:
        raise ApiError(400, "invalid_value", str(error), param=param) from None
    except BusyError as error:
        raise ApiError(503, "busy", str(error), param=param, headers={"Retry-After": "1"}) from None
    finally:
        ticket.close()
        await pieces.aclose()  # type: ignore[attr-defined]
