"""Whole answers as tasks of their own, which go on where nobody waits for them any more.

Providers make and bill an answer to its end, whoever has gone meanwhile: it is read on for what it costs.
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from anabranch.gateway.dispatch.large_answers import LargeAnswers
from anabranch.gateway.dispatch.own_time import OwnTime
from anabranch.gateway.dispatch.plan import Attempt
from anabranch.gateway.dispatch.provider_fault import refusal
from anabranch.gateway.providers.answer_shape import read_answer
from anabranch.gateway.providers.provider import (
    BODY_BYTES,
    Answer,
    Headers,
    HttpCall,
    Provider,
    Reply,
    Transport,
    UpstreamRequest,
    read_all,
    read_beginning,
    read_error,
)
from anabranch.web.large_json import LARGE
from anabranch.web.turns import Turns

# Status, headers and body of an answer, and that as it was read, if it was large.
Exchange = asyncio.Task[tuple[int, Headers, bytes, Answer | None]]

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
        # With whose it is, and the bytes of its request.
        self._open: dict[Reading, tuple[str, int]] = {}
        # That were given up, and have not ended yet.
        self._ending: set[Reading] = set()

    def __len__(self) -> int:
        return len(self._open)

    def take(
        self, exchange: Reading, size: int, then: Callable[[], None], seconds: float = math.inf, sender: str = ""
    ) -> bool:
        """Read an answer on. ``then`` is called once: when it has come, has failed, or is given up and cancelled.

        Args:
            exchange: that reads it.
            size: bytes of its request.
            then: see above.
            seconds: at most, if that is less than others get.
            sender: whose it is. Where there is no room, whoever has more of it than this one would, gives up what came last.

        Returns:
            Whether it is; not if there are too many already.
        """
        given_up = self._in_the_way(size, sender) if self._seconds else None
        if given_up is None:
            return False
        for other in given_up:
            del self._open[other]
            self._ending.add(other)
            other.cancel()
        timer = asyncio.get_running_loop().call_later(min(seconds, self._seconds), exchange.cancel)
        exchange.add_done_callback(lambda _: timer.cancel())
        self._watch(exchange, size, then, sender)
        return True

    def _in_the_way(self, size: int, sender: str) -> list[Reading] | None:
        """What is to be given up for one more, so that nobody fills all of the room; None if there is none for it."""
        left, found = dict(self._open), list[Reading]()
        while True:
            is_full = len(left) >= self._most
            if not is_full and sum(each for _, each in left.values()) + size <= MOST_BYTES:
                return found
            shares: dict[str, int] = {}
            for whose, each in left.values():
                shares[whose] = shares.get(whose, 0) + (1 if is_full else each)
            fullest = max(shares, key=shares.__getitem__, default=sender)
            if fullest == sender or shares[fullest] <= shares.get(sender, 0) + (1 if is_full else size):
                return None
            found.append(next(each for each in reversed(left) if left[each][0] == fullest))
            del left[found[-1]]

    def stop(self, exchange: Reading, then: Callable[[], None]) -> bool:
        """Give one up that was not sent. ``then`` is called once it has ended: until that it may still go out."""
        self._watch(exchange, 0, then)
        exchange.cancel()
        return True

    def _watch(self, exchange: Reading, size: int, then: Callable[[], None], sender: str = "") -> None:
        self._open[exchange] = sender, size

        def ended(_: Reading) -> None:
            self._open.pop(exchange, None)
            self._ending.discard(exchange)
            then()

        exchange.add_done_callback(ended)

    async def settled(self) -> None:
        """Wait until nothing is read on any more."""
        while self._open or self._ending:
            await asyncio.wait([*self._open, *self._ending])

    async def close(self) -> None:
        """Give all up now, and take no more."""
        self._seconds = 0.0
        for exchange in self._open:
            exchange.cancel()
        await self.settled()


async def exchanged(
    transport: Transport, call: HttpCall, attempt: Attempt, reading: "Reader", most: int = BODY_BYTES
) -> tuple[int, Headers, bytes, Answer | None]:
    """Send, and read to the end: of an answer ``most`` bytes. Raises UpstreamError."""
    call.is_sent = True
    reply = await transport.open(call)
    attempt.http_status = reply.status
    try:
        if not 200 <= reply.status < 300:
            return reply.status, reply.headers, await read_error(reply), None
        body, answer = await reading.whole(reply, most)
        return reply.status, reply.headers, body, answer
    finally:
        reply.close()


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads answers to one request; large ones in another thread, in which senders take turns.

    Attributes:
        provider, request: whose answer it is, and to what.
        turns: of that thread.
        sender: whose request it is.
        room: of large ones, until they have been read.
        time: of the upstream.
        has_come: told of a large one when its upstream has no more to do with it: it may wait long until it is read.
    """

    provider: Provider
    request: UpstreamRequest
    turns: Turns
    sender: str
    room: LargeAnswers
    time: OwnTime
    has_come: Callable[[], None]

    async def read(self, reply: Reply) -> Answer:
        """A 2xx answer. Raises UpstreamError."""
        body, answer = await self.whole(reply)
        return read_answer(self.provider, self.request, body) if answer is None else answer

    async def whole(self, reply: Reply, most: int = BODY_BYTES) -> tuple[bytes, Answer | None]:
        """The body of a 2xx answer, and what it says if it was large, written too if it will be. Raises UpstreamError."""
        parts, is_large = await read_beginning(reply, LARGE)
        if not is_large:
            return await read_all(reply, most, parts), None
        with self.room.enter(self.sender) as held:

            async def keep(num_bytes: int) -> None:
                with self.time.held():
                    await held.more(num_bytes)

            body = await read_all(reply, most, parts, keep)
            parts.clear()
            # Its connection is free for the next, and so is its place.
            reply.close()
            self.has_come()
            work = partial(_read_large, self.provider, self.request, body)
            with self.time.held():
                return body, await self.turns.run(self.sender, work)


def _read_large(provider: Provider, request: UpstreamRequest, body: bytes) -> Answer:
    answer = read_answer(provider, request, body)
    answer.is_large = True
    # From now on it is kept.
    _ = answer.data
    return answer


def answer_of(provider: Provider, request: UpstreamRequest, exchange: Exchange) -> Answer:
    """The answer that has come. Raises UpstreamError, and CancelledError if it was given up."""
    status, headers, body, answer = exchange.result()
    if not 200 <= status < 300:
        raise refusal(provider, status, headers, body)
    return read_answer(provider, request, body) if answer is None else answer
