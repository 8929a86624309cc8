"""A transport that gives calls their authorization when they go out: signatures with a date, tokens that expire."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, Thread

from anabranch.gateway.providers.provider import Headers, HttpCall, Reply, Transport


class Authorized:
    """Calls, with headers made at the last moment.

    Args:
        http: what carries the calls.
        headers: makes those of one call, in a thread of its own, one call after another: it may ask a server for a token, or read files.
            Raises UpstreamError where there is nothing to authorize with.
        forget: what was made before is not accepted any more; the call is then tried once again. None for signatures, which are new each
            time.
    """

    def __init__(
        self, http: Transport, headers: Callable[[HttpCall], Headers], forget: Callable[[], None] | None = None
    ) -> None:
        self._http, self._make, self._forget = http, headers, forget
        self._waiting: deque[tuple[HttpCall, Future[Headers]]] = deque()
        self._lock, self._is_running = Lock(), False

    async def open(self, call: HttpCall) -> Reply:
        """Send, and wait for status and headers. Raises UpstreamError."""
        # Nothing is billed of a call that gets no further than this.
        call.is_sent = False
        plain = call.headers
        call.headers = {**plain, **await self._made(call)}
        reply = await self._http.open(call)
        if reply.status != 401 or self._forget is None:
            return reply
        reply.close()
        self._forget()
        call.is_sent = False
        call.headers = {**plain, **await self._made(call)}
        return await self._http.open(call)

    def _made(self, call: HttpCall) -> "asyncio.Future[Headers]":
        """The headers of a call, once those before it have theirs."""
        future: Future[Headers] = Future()
        with self._lock:
            self._waiting.append((call, future))
            starts, self._is_running = not self._is_running, True
        if starts:
            # The process does not wait for its end, as it would for that of an executor's: a server of tokens may never answer.
            Thread(target=self._run, name="authorization", daemon=True).start()
        return asyncio.wrap_future(future)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
                call, future = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._make(call))
            except BaseException as error:
                future.set_exception(error)
