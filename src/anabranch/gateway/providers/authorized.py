"""A transport that gives calls their authorization when they go out: signatures with a date, tokens that expire."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="authorization")

    async def open(self, call: HttpCall) -> Reply:
        """Send, and wait for status and headers. Raises UpstreamError."""
        # Nothing is billed of a call that gets no further than this.
        call.is_sent = False
        plain, loop = call.headers, asyncio.get_running_loop()
        call.headers = {**plain, **await loop.run_in_executor(self._thread, self._make, call)}
        reply = await self._http.open(call)
        if reply.status != 401 or self._forget is None:
            return reply
        reply.close()
        self._forget()
        call.is_sent = False
        call.headers = {**plain, **await loop.run_in_executor(self._thread, self._make, call)}
        return await self._http.open(call)
