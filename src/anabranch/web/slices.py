"""Answers of any size as JSON, made and written some at a time by the event loop that does all else.

    slices = sliced(turns, key, json_slices({"data": Rows(make)}))
    response = await send_json(request, headers, slices, stall_s)

No more of its JSON is there at any time than its reader takes, and nobody waits for more than a slice of it (`anabranch.web.large_json`).
What it is made of is there until its end, so a reader has to keep up (`Writing`): the time that writing may take grows with the length.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from functools import partial

from aiohttp import web

from anabranch.web.answers import JSON
from anabranch.web.large_json import TOGETHER, together
from anabranch.web.turns import Turns

__all__ = ["SLOWEST", "SlowReaderError", "Writing", "send_json", "sliced", "told"]

# Bytes a second that a reader of a whole answer has to take; a phone on a bad line does.
SLOWEST = 32 << 10


class SlowReaderError(ConnectionError):
    """The other side does not read; whoever catches it cuts the connection."""


async def sliced(turns: Turns, whose: str, slices: Iterator[bytes]) -> AsyncGenerator[bytes]:
    """Slices, each made in a turn of the loop of its own, which those of other senders, and all else, come between.

    Args:
        turns: of the loop, the same for all answers.
        whose: the sender they are for.
        slices: makes them.
    """
    while (one := await turns.run(whose, partial(next, slices, None))) is not None:
        yield one


async def told(turns: Turns, whose: str, pieces: Iterator[bytes]) -> AsyncGenerator[bytes]:
    """`sliced` of what mostly is short: small pieces together, and the first of them at once.

    Args:
        turns, whose: as of `sliced`.
        pieces: none of which takes long to make.

    Raises what making one does, behind those that were made.
    """
    slices = together(pieces)
    first = next(slices, None)
    if first is None:
        return
    yield first
    if len(first) < TOGETHER:
        # Nothing more comes but what making it raised: no turn of the loop is waited for.
        next(slices, None)
        return
    async with contextlib.aclosing(sliced(turns, whose, slices)) as rest:
        async for one in rest:
            yield one


async def send_json(
    request: web.BaseRequest, headers: Mapping[str, str], slices: AsyncIterator[bytes], stall_s: float
) -> web.StreamResponse:
    """Write a long answer as it is made.

    Args:
        request: answered.
        headers: of the response.
        slices: of the answer's JSON; what making the first raises comes before anything is written.
        stall_s: longest a write may wait for the reader; and all together that and a second for each `SLOWEST` bytes.

    Raises SlowReaderError, ConnectionError when the reader has gone, and what making a slice raises; the connection is cut then.
    """
    first = await anext(slices)
    response = web.StreamResponse(headers=headers)
    response.content_type, response.charset = JSON, "utf-8"
    await response.prepare(request)
    try:
        writing = Writing(response, stall_s, SLOWEST)
        await writing.write(first)
        async for data in slices:
            await writing.write(data)
    except BaseException:
        # Half an answer must not look like one.
        if request.transport is not None:
            request.transport.abort()
        raise
    await response.write_eof()
    return response


class Writing:
    """Writes to a reader who has to keep up. What waits for anything else does not count.

    Args:
        response: prepared.
        stall_s: longest that a write may wait.
        slowest: bytes a second: all writes together may wait for ``stall_s`` and as long as their bytes take at this rate; None for no end.
    """

    def __init__(self, response: web.StreamResponse, stall_s: float, slowest: int | None = None) -> None:
        self._response, self._stall_s, self._slowest = response, stall_s, slowest
        self._num_bytes, self._waited_s = 0, 0.0

    async def write(self, data: bytes) -> None:
        """Raises SlowReaderError for a reader who stands still, or is too slow."""
        self._num_bytes += len(data)
        left_s = self._stall_s
        if self._slowest is not None:
            left_s = min(left_s, self._stall_s + self._num_bytes / self._slowest - self._waited_s)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(left_s):
                await self._response.write(data)
        except TimeoutError:
            raise SlowReaderError("the reader of an answer stood still, or is too slow") from None
        self._waited_s += loop.time() - began
