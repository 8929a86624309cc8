"""Answers of any size as JSON, made and written some at a time by the event loop that does all else.

    slices = sliced(turns, key, json_slices({"data": Rows(make)}))
    response = await send_json(request, headers, slices, stall_s)

No more of an answer is there at any time than its reader takes, and nobody waits for more than a slice of it (`anabranch.web.large_json`).
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from functools import partial

from aiohttp import web

from anabranch.web.answers import JSON
from anabranch.web.turns import Turns

__all__ = ["SlowReaderError", "send_json", "sliced", "write_within"]


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


async def send_json(
    request: web.BaseRequest, headers: Mapping[str, str], slices: AsyncIterator[bytes], stall_s: float
) -> web.StreamResponse:
    """Write a long answer as it is made.

    Args:
        request: answered.
        headers: of the response.
        slices: of the answer's JSON; what making the first raises comes before anything is written.
        stall_s: longest a write may wait for the reader.

    Raises SlowReaderError, ConnectionError when the reader has gone, and what making a slice raises; the connection is cut then.
    """
    first = await anext(slices)
    response = web.StreamResponse(headers=headers)
    response.content_type, response.charset = JSON, "utf-8"
    await response.prepare(request)
    try:
        await write_within(response, first, stall_s)
        async for data in slices:
            await write_within(response, data, stall_s)
    except BaseException:
        # Half an answer must not look like one.
        if request.transport is not None:
            request.transport.abort()
        raise
    await response.write_eof()
    return response


async def write_within(response: web.StreamResponse, data: bytes, stall_s: float) -> None:
    """Write to a reader. Raises SlowReaderError for one that stands still for so long."""
    try:
        async with asyncio.timeout(stall_s):
            await response.write(data)
    except TimeoutError:
        raise SlowReaderError("the reader of an answer stood still") from None
