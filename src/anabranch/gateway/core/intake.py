"""`Intake`: each request is counted in, run, and counted out, whichever way it ends, and whether or not somebody waits for it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from anabranch.gateway.core.admission import Admission
from anabranch.gateway.core.incoming import Incoming, Key
from anabranch.gateway.core.reply import Reply
from anabranch.gateway.core.request import CLIENT_GONE, RequestRun
from anabranch.gateway.core.request_state import RequestState
from anabranch.gateway.core.services import Services
from anabranch.gateway.metrics import Metrics
from anabranch.web.api_error import ApiError

if TYPE_CHECKING:
    from anabranch.gateway.runtime import Runtime


class Intake:
    """That of one gateway, on its event loop.

    Attributes:
        in_flight: requests under way.

    Args:
        runtime: gives the one of the config that is in use now.
        services: gives what a request is lent.
        metrics: of the process.
        admission: of requests and tokens, by key.
        spawn: begins something that nobody waits for.
        keep: has a task end before the gateway does.
        on_refused: told of a request that has no row in the ledger: its state, HTTP status, and code.
    """

    def __init__(
        self,
        *,
        runtime: Callable[[], "Runtime"],
        services: Callable[[], Services],
        metrics: Metrics,
        admission: Admission,
        spawn: Callable[[Coroutine[Any, Any, Any]], None],
        keep: Callable[[asyncio.Task[Any]], None],
        on_refused: Callable[[RequestState, int, str], None],
    ) -> None:
        self._runtime, self._services, self._metrics, self._admission = runtime, services, metrics, admission
        self._spawn, self._keep, self._on_refused = spawn, keep, on_refused
        self.in_flight = 0

    async def take(self, incoming: Incoming, key: Key) -> Reply:
        """Answer a request. Raises ApiError."""
        runtime = self._runtime()
        if self.in_flight >= runtime.config.limits.in_flight:
            self._metrics.refuse("too_many")
            message = f"{self.in_flight:,} requests are under way, which is the limit; try again"
            raise ApiError(429, "rate_limit_exceeded", message, type="requests", headers={"Retry-After": "1"})
        run = RequestRun(self._services(), runtime, incoming)
        self.in_flight += 1
        runtime.users += 1
        if incoming.held is not None:
            incoming.held.share()
        if not incoming.headers.get("idempotency-key"):
            return await self._run(run, key)
        # One with a name goes on without its client, who comes back for the answer.
        task = asyncio.ensure_future(self._run(run, key))
        self._keep(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._unread)
            raise

    def _unread(self, done: "asyncio.Task[Reply]") -> None:
        """The client has gone before there was a reply."""
        if done.cancelled() or done.exception() is not None:
            return
        stream = done.result().stream
        if stream is not None:
            self._spawn(stream.aclose())  # type: ignore[attr-defined]

    async def _run(self, run: RequestRun, key: Key) -> Reply:
        state = run.state
        try:
            reply = await run.run(key)
        except BaseException as error:
            self._leave(state)
            if not state.is_over:
                self._refused(state, error)
            if isinstance(error, ApiError):
                error.headers.setdefault("x-request-id", state.id)
                # Codes of upstreams are theirs to choose.
                if state.report is None:
                    self._metrics.refuse(error.code if error.status < 500 else "failed")
            raise
        if reply.stream is None:
            self._leave(state)
        else:
            reply.stream.on_close = lambda: self._leave(state)  # type: ignore[attr-defined]
        return reply

    def _refused(self, state: RequestState, error: BaseException) -> None:
        """It has no row in the ledger: nobody knows whose it is, or what it asks."""
        if isinstance(error, ApiError):
            self._on_refused(state, error.status, error.code or "")
        else:
            self._on_refused(state, 500 if isinstance(error, Exception) else CLIENT_GONE, "")

    def _leave(self, state: RequestState) -> None:
        self.in_flight -= 1
        state.runtime.release()
        if state.is_counted:
            self._admission.leave(state.tenant, state.id)
        elif state.has_place:
            self._admission.give_back(state.tenant)
        if state.held is not None:
            state.held.close()
