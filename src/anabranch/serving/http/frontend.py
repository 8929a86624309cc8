"""`Frontend`: the life of the engine behind a server, and the requests on it: loading, ready, crashed and started again, draining."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from anabranch.errors import AnabranchError, CheckpointError, InputError
from anabranch.seen_files import SeenFiles
from anabranch.serving.core.admission import Ticket
from anabranch.serving.core.client import BusyError, EngineClient, EngineInfo, NotBegunError
from anabranch.serving.core.overload import OverloadError
from anabranch.serving.core.request import Output, Request
from anabranch.serving.core.turns import Turns
from anabranch.serving.http.adapter_names import AdapterNames
from anabranch.serving.http.choice import ENGINE_FAILED, Choice
from anabranch.serving.http.completion import Completion
from anabranch.serving.http.config import HttpConfig
from anabranch.serving.http.generation_request import GenerationRequest
from anabranch.serving.http.metrics import Metrics
from anabranch.serving.http.reading import Reader
from anabranch.serving.http.scores import PromptScores
from anabranch.web.answer_room import AnswerRoom
from anabranch.web.api_error import ApiError
from anabranch.web.turns import Turns as LoopTurns

logger = logging.getLogger(__name__)
WATCH_S, PICTURE_S, CLOSE_S = 0.05, 1.0, 10.0
# Before a start that follows one that has failed; twice as long before each further one. What was short may be there again.
AGAIN_S = 1.0
# Seconds after which who asks while the model is loaded is told to ask again.
LEAST_RETRY_S, MOST_RETRY_S = 2, 60
T = TypeVar("T")
State = Literal["loading", "ready", "draining", "failed"]
# Codes of errors that neither a request nor its sender is the reason of, and that end it before its answer is complete.
_CUT = ("engine_failed", "aborted", "shutting_down")


class OtherModelError(CheckpointError):
    """An engine has read other files than those that the server was started with."""


class UnderWay(Protocol):
    """A request as `Frontend` sees it.

    Attributes:
        ids: of its sequences.
    """

    @property
    def ids(self) -> Sequence[str]: ...  # noqa: D102

    def fail(self, error: BaseException) -> None:
        """End with this error."""


class Frontend:
    """One engine and the requests on it.

    Attributes:
        state: ``loading`` (also while a crashed engine is started again), ``ready``, ``draining`` or ``failed``.
        info, reader: of the model; set once it was ready for the first time.
        adapters: names that requests may use beside those of the model.
        failed: set when the engine is given up.
        writing: turns of the loop in which long answers are written, see `Asked.sliced`.
        answers: room for what answers are made of, see `Asked.hold`.
        num_cut: requests whose answers ended early for no fault of theirs or of their senders': the engine failed, or the server stopped.

    Args:
        config: of the server.
        make_engine: a new engine, not started; called again after a crash.
        make_reader: the tokenizer's side of the model; called in a thread.
        is_shared: several keys may ask, none of which may keep the others out; None if the config has several.
    """

    def __init__(
        self,
        config: HttpConfig,
        make_engine: Callable[[], EngineClient],
        make_reader: Callable[[], Reader],
        *,
        is_shared: bool | None = None,
    ) -> None:
        self.config, self._make_engine, self._make_reader = config, make_engine, make_reader
        self.metrics = Metrics()
        self.state: State = "loading"
        self.info: EngineInfo | None = None
        self.reader: Reader | None = None
        self.adapters = AdapterNames(config.adapter_root)
        self.error = ""
        self.failed = asyncio.Event()
        self.num_cut = 0
        self._is_shared = len(config.api_keys) > 1 if is_shared is None else is_shared
        self.admission = config.admission.build(is_shared=self._is_shared)
        self.writing = LoopTurns()
        room, refused = config.limits.answers_bytes, self.metrics.rejections.labels("answers").inc
        self.answers = AnswerRoom(room, config.admission.key_share, config.admission.status, refused)
        self._reading = Turns(
            "anabranch-reading", "long requests wait to be read", threads=4, at_once=3, most_waiting=256
        )
        self._rendering = Turns(
            "anabranch-template", "chats wait to be rendered", threads=32, at_once=16, most_waiting=256
        )
        self._engine: EngineClient | None = None
        self._live: set[UnderWay] = set()
        # Ids of sequences that wait for the next engine.
        self._waiting: set[str] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._restarts, self._ready_at, self._serial = 0, 0.0, 0
        # Since when it loads, and how long that took last.
        self._loading_at, self._load_s = time.monotonic(), 0.0

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.config.name or (self.info.model if self.info is not None else "")

    @property
    def names(self) -> tuple[str, ...]:
        """All that the model is called, each once; `name` is the first."""
        return tuple(dict.fromkeys([self.name, *self.config.names]))

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
        if self.state == "failed":
            raise ApiError(503, "failed", self.error)
        if self.state != "ready" or self.info is None or self.reader is None:
            raise ApiError(
                503, "loading", "the model is being loaded", headers={"Retry-After": str(self._load_left_s())}
            )
        return self.info, self.reader

    def _load_left_s(self) -> int:
        """Whole seconds until the model is likely there, if it takes as long as last time; clients do not heed more than a minute."""
        left_s = self._load_s - (time.monotonic() - self._loading_at)
        return min(max(LEAST_RETRY_S, math.ceil(left_s)), MOST_RETRY_S)

    async def start(self) -> None:
        """Load, warm up, and take requests.

        Raises AnabranchError if the engine cannot start, and `OtherModelError` where it has read other files than the engine before it, or
        than what reads texts for it.
        """
        engine = self._engine = self._make_engine()
        reading = None if self.reader is not None else asyncio.ensure_future(asyncio.to_thread(self._make_reader))
        try:
            info = await engine.start()
            reader = self.reader if reading is None else await reading
            assert reader is not None, "it is read"
            self._check_files(info, reader)
            await self.adapters.begin(engine, info)
        except BaseException:
            if reading is not None:
                await asyncio.gather(reading, return_exceptions=True)
            raise
        self.info, self.reader = info, reader
        self._ready_at = time.monotonic()
        self._load_s = self._ready_at - self._loading_at
        if self.state == "loading":
            self._become("ready")
        if self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._watch())

    def _check_files(self, info: EngineInfo, reader: Reader) -> None:
        """Raise OtherModelError where an engine serves another model than requests are read for: its answers would be nonsense.

        So it is where it goes by other routers or another skipper than the one before it: its answers would be others. Adapters are
        looked at one by one where they are read, see `AdaptersConfig.versions`.
        """
        known = reader.files if self.info is None else self.info.files
        changed = known.difference(info.files) if known.files and info.files.files else ""
        if self.info is not None:
            changed = changed or self.info.beside.difference(info.beside)
        if changed:
            raise OtherModelError(
                f"{changed} is another file than when the server was started: the engine has another model than texts are read for, or "
                "what it goes by is another; start the server again"
            )

    def _check_there(self) -> None:
        """Raise OtherModelError where files of the model are no longer those that the engines before had read; nothing before any has."""
        if self.info is None:
            return
        for known in (self.info.files, self.info.beside):
            if changed := known.difference(SeenFiles.of(Path(one.path) for one in known.files)):
                raise OtherModelError(
                    f"{changed} is another file than when the server was started, and cannot be read; start the server again"
                )

    def drain(self) -> None:
        """Take no more requests."""
        if self.state != "failed":
            self._become("draining")

    def resume(self) -> None:
        """Take requests again, after a drain that an operator asked for."""
        if self.state == "draining":
            self._become("ready" if self._engine is not None and self._engine.is_ready else "loading")

    def cut(self, error: ApiError, *, keeps_waiting: bool = False) -> None:
        """End every request under way with this error; ``keeps_waiting``: but for those that wait for the next engine."""
        for one in list(self._live):
            if not (keeps_waiting and any(id in self._waiting for id in one.ids)):
                one.fail(error)

    def count_cut(self, error: ApiError) -> None:
        """Note the end of a request by this error, for `num_cut`."""
        self.num_cut += error.code in _CUT

    async def engine_after(self, gone: EngineClient) -> EngineClient:
        """The engine that is started in place of one that has failed. Raises ApiError (500) if there is to be none."""
        while self._engine is gone or self.state != "ready":
            if self.state in ("draining", "failed"):
                raise ApiError(500, "engine_failed", ENGINE_FAILED)
            await asyncio.sleep(WATCH_S)
        assert self._engine is not None
        return self._engine

    async def close(self) -> None:
        """End the engine."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._end_there()
        self._reading.close()
        self._rendering.close()

    async def apart(
        self, key: str, function: Callable[..., T], *args: Any, is_rendering: bool = False, **kwargs: Any
    ) -> T:
        """What a function returns that reads what a client sent, and may take long: from a thread, in turn with those of other keys.

        Args:
            key: whose it is.
            function, args, kwargs: what to call.
            is_rendering: it asks for a chat template, and mostly waits: what renders nothing never waits behind templates.

        Raises what it raises, and ApiError (429, or 503 by config) where there is no room for the request, or for so much of one key.
        """
        with self._refusing():
            self.admission.check(0, key)
        try:
            future = (self._rendering if is_rendering else self._reading).submit(key, function, *args, **kwargs)
        except BusyError as error:
            self.metrics.rejections.labels("queued").inc()
            raise _overloaded(self.admission.config.status, str(error), 1.0) from None
        return await asyncio.wrap_future(future)

    def admit(self, prompts: Sequence[int], key: str, deadline_s: float | None) -> list[Ticket]:
        """A place for each sequence, or for none of them.

        Args:
            prompts: tokens of each.
            key: whose they are.
            deadline_s: seconds from now.

        Raises ApiError (429, or 503 by config) with ``Retry-After``, 504 where the deadline has passed before anything was done, and 400
        for more sequences than are ever let in together.
        """
        if deadline_s is not None and deadline_s <= 0:
            raise ApiError(504, "deadline_exceeded", "the request's deadline has passed")
        try:
            with self._refusing():
                return self.admission.admit_all(prompts, key, deadline_s)
        except InputError as error:
            raise ApiError(400, "too_many_sequences", str(error)) from None

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OverloadError as error:
            self.metrics.rejections.labels(error.reason).inc()
            raise _overloaded(error.status, str(error), error.retry_after_s or 1.0) from None

    @contextlib.asynccontextmanager
    async def run(
        self, request: GenerationRequest, id: str, key: str, tickets: Sequence[Ticket]
    ) -> AsyncIterator[Completion]:
        """The answer to a request while it is made; what is left of it is aborted at the end. Raises ApiError."""
        engine, reader = self.engine, self.check_ready()[1]
        base = self.new_id(id)
        is_scored = request.sampling.prompt_logprobs is not None
        scores = [PromptScores(len(prompt)) if is_scored else None for prompt in request.prompts]
        choices = [
            Choice(
                at,
                self._engine_request(request, base, key, at),
                request.text(reader),
                scores[at // request.n],
                self.metrics.inter_token.observe,
            )
            for at in range(request.num_choices)
        ]
        completion = Completion(partial(self._submit, engine), choices, tickets, request.grammar_param)
        with self.under_way(completion):
            async with completion:
                yield completion

    def new_id(self, id: str) -> str:
        """What the ids of a request's sequences begin with, before their numbers: senders choose ``id``, and may choose one twice."""
        self._serial += 1
        return f"{id}-{self._serial}"

    @contextlib.contextmanager
    def under_way(self, one: UnderWay) -> Iterator[Callable[[Request], AsyncGenerator[Output]]]:
        """While a request is under way, `cut` may end it, and a drain keeps no part of it out.

        Yields what runs one sequence: its outputs, of the engine there is, and where that fails before it has begun, of the next one.
        Raises ApiError if no engine is ready.
        """
        engine = self.engine
        self._live.add(one)
        try:
            yield partial(self._submit, engine)
        finally:
            self._live.remove(one)

    async def _submit(self, engine: EngineClient, request: Request) -> AsyncGenerator[Output]:
        while True:
            try:
                async with contextlib.aclosing(engine.submit(request)) as outputs:  # type: ignore[type-var]
                    async for output in outputs:
                        yield output
                return
            except NotBegunError:
                self._waiting.add(request.id)
                try:
                    engine = await self.engine_after(engine)
                finally:
                    self._waiting.discard(request.id)

    def _engine_request(self, request: GenerationRequest, id: str, key: str, at: int) -> Request:
        prompt, choice = request.prompts[at // request.n], at % request.n
        config = self.config
        salt = self.salt_of(key, request.cache_salt)
        is_above = key in config.priority_keys or "*" in config.priority_keys
        return Request(
            id=f"{id}-{at}",
            prompt=prompt,
            sampling=request.sampling_of(choice),
            key=key,
            arrival=time.monotonic(),
            cache_salt=salt,
            priority=request.priority if is_above else 0,
            own_priority=0 if is_above else request.priority,
            record_routing=request.is_routing,
            num_streams=request.num_streams,
            path=None if isinstance(request.depth, str) else request.depth,
            routes_depth=request.depth == "routed",
            depth_control=request.depth_control,
            skips_tokens=request.depth == "pruned",
            rewires=request.rewires,
            adapters=request.adapters,
            task=request.task,
            **(request.asked_of(at // request.n) if request.adapters else {}),
            # How long one may wait for a reader is the connection's to say.
            buffer=config.limits.stream_events,
            stall_s=math.inf,
        )

    def salt_of(self, key: str, salt: str) -> str:
        """What the prefixes of a request are shared by: times, and usage, would tell one key what another has asked."""
        if self.config.shared_prefixes or not (key or (salt and self._is_shared)):
            return salt
        # Without a key too, where others have one: a salt of theirs could spell what a key's is made to.
        return f"{len(key)} {key} {salt}"

    def _become(self, state: State) -> None:
        if state == "loading":
            self._loading_at = time.monotonic()
        self.state = state
        self.metrics.state.state(state)

    async def _watch(self) -> None:
        """Look after the engine as long as that can be done; a server that nobody looks after gives up."""
        try:
            await self._look()
        except Exception as error:
            # A bug of ours: who runs the server starts it anew.
            logger.error("a bug: the engine cannot be looked after", exc_info=error)
            self._give_up(f"the engine cannot be looked after: {type(error).__name__}: {error}")

    async def _look(self) -> None:
        """Take the engine's picture, and start it again when it has died."""
        pictured = 0.0
        while True:
            await asyncio.sleep(WATCH_S)
            engine = self._engine
            if engine is None or self.state == "failed":
                continue
            if time.monotonic() - pictured >= PICTURE_S:
                pictured = time.monotonic()
                self.picture()
            if engine.is_ready:
                continue
            if self.state == "draining":
                # It is started again when requests are to be taken again.
                self.cut(ApiError(500, "engine_failed", ENGINE_FAILED))
            else:
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
        # Those with which it had not begun find out, and wait for the next.
        await asyncio.sleep(WATCH_S)
        self.cut(ApiError(500, "engine_failed", ENGINE_FAILED), keeps_waiting=True)
        await self._end(engine)
        pause_s = AGAIN_S
        while self._restarts < self.config.restarts:
            self._restarts += 1
            self.metrics.restarts.inc()
            logger.error("the engine died; starting it again (%d of %d)", self._restarts, self.config.restarts)
            try:
                await self._start_again()
            except OtherModelError as error:
                await self._end_there()
                logger.error("%s", error)
                self._give_up("the model's files are no longer those that the server was started with")
                return
            except Exception as error:
                await self._end_there()
                # Whatever was short, such as descriptors or processes, may be there the next time.
                trace = None if isinstance(error, AnabranchError) else error
                logger.error("the engine did not start: %s", error, exc_info=trace)
            else:
                return
            if self._restarts < self.config.restarts:
                await asyncio.sleep(pause_s)
                pause_s *= 2
        self._give_up(f"the engine died more than {self.config.restarts} times")

    async def _start_again(self) -> None:
        """`start`, and `OtherModelError` where that cannot be because files of the model are not what they were."""
        try:
            await self.start()
        except OtherModelError:
            raise
        except Exception:
            # Half of a model, or none, is no better the next time.
            await asyncio.to_thread(self._check_there)
            raise

    def _give_up(self, why: str) -> None:
        self.error = why
        logger.error("%s; giving up", why)
        self._become("failed")
        self.failed.set()

    async def _end_there(self) -> None:
        """End the engine there is, also one that has started and is not to be used."""
        if self._engine is not None:
            await self._end(self._engine)

    async def _end(self, engine: EngineClient) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await engine.close()
        except TimeoutError:
            logger.error("the engine did not end within %g s", CLOSE_S)
        except Exception as error:
            # It is dead already: what it says of that is for the log.
            logger.error("the engine did not end well: %s: %s", type(error).__name__, error)
        self.metrics.forget_engine()


def _overloaded(status: int, message: str, retry_after_s: float) -> ApiError:
    headers = {"Retry-After": f"{retry_after_s:.0f}", "x-should-retry": "true"}
    return ApiError(status, "overloaded", message, type="rate_limit_error", headers=headers)
