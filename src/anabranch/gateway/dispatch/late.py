"""Whole answers as tasks of their own, which go on where nobody waits for them any more.

Providers make and bill an answer to its end, whoever has gone meanwhile: it is read on for what it costs.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Any

from anabranch.gateway.dispatch.plan import Attempt
from anabranch.gateway.providers.answer_shape import read_answer
from anabranch.gateway.providers.provider import (
    BODY_BYTES,
    Answer,
    Headers,
    HttpCall,
    Provider,
    Transport,
    UpstreamError,
    UpstreamRequest,
    read_all,
)

# Status, headers and body of an answer.
Exchange = asyncio.Task[tuple[int, Headers, bytes]]

# A stream may be read on too: its usage comes behind its end.
Reading = asyncio.Task[Any]

# Of all requests whose answers are waited for: they are held until these have come.
MOST_BYTES = 64 << 20


class Late:
    """Answers that are read on, for a while.

    Args:
        seconds: each at most.
        most: at once.
    """

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds, self._most = seconds, most
        # With the bytes of its request.
        self._open: dict[Reading, int] = {}

    def __len__(self) -> int:
        return len(self._open)

    def take(self, exchange: Reading, size: int, then: Callable[[], None], seconds: float = math.inf) -> bool:
        """Read an answer on. ``then`` is called once: when it has come, has failed, or is given up and cancelled.

        Args:
            exchange: that reads it.
            size: bytes of its request.
            then: see above.
            seconds: at most, if that is less than others get.

        Returns:
            Whether it is; not if there are too many already.
        """
        if not self._seconds or len(self._open) >= self._most or sum(self._open.values()) + size > MOST_BYTES:
            return False
        timer = asyncio.get_running_loop().call_later(min(seconds, self._seconds), exchange.cancel)
        exchange.add_done_callback(lambda _: timer.cancel())
        self._watch(exchange, size, then)
        return True

    def stop(self, exchange: Reading, then: Callable[[], None]) -> bool:
        """Give one up that was not sent. ``then`` is called once it has ended: until that it may still go out."""
        self._watch(exchange, 0, then)
        exchange.cancel()
        return True

    def _watch(self, exchange: Reading, size: int, then: Callable[[], None]) -> None:
        self._open[exchange] = size

        def ended(_: Reading) -> None:
            del self._open[exchange]
            then()

        exchange.add_done_callback(ended)

    async def settled(self) -> None:
        """Wait until nothing is read on any more."""
        while self._open:
            await asyncio.wait(list(self._open))

    async def close(self) -> None:
        """Give all up now, and take no more."""
        self._seconds = 0.0
        for exchange in self._open:
            exchange.cancel()
        await self.settled()


async def exchanged(
    transport: Transport, call: HttpCall, attempt: Attempt, most: int = BODY_BYTES
) -> tuple[int, Headers, bytes]:
    """Send, and read to the end: of an answer ``most`` bytes. Raises UpstreamError."""
    call.is_sent = True
    reply = await transport.open(call)
    attempt.http_status = reply.status
    try:
        is_answer = 200 <= reply.status < 300
        return reply.status, reply.headers, await read_all(reply, most if is_answer else BODY_BYTES)
    finally:
        reply.close()


def answer_of(provider: Provider, request: UpstreamRequest, exchange: Exchange) -> Answer:
    """The answer that has come. Raises UpstreamError, and CancelledError if it was given up."""
    status, headers, body = exchange.result()
    if not 200 <= status < 300:
        raise UpstreamError(provider.error(status, headers, body))
    return read_answer(provider, request, body)
