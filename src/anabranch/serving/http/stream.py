"""Server-sent events to one reader: an error before the first byte is a status, after it an event; ``[DONE]`` ends every stream."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

from aiohttp import web

from anabranch.web.answers import JSON
from anabranch.web.api_error import ApiError
from anabranch.web.sse import DONE, HEARTBEAT, event

STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class SlowReaderError(ConnectionError):
    """The other side does not read; whoever catches it cuts the connection."""


async def send(
    request: web.BaseRequest,
    headers: Mapping[str, str],
    events: AsyncIterator[bytes],
    stall_s: float,
    failed: Callable[[ApiError], bytes] = lambda error: event(error.to_dict()),
    ending: bytes = DONE,
) -> tuple[web.StreamResponse, ApiError | None]:
    """Write events as they come.

    Args:
        request: answered.
        headers: of the response.
        events: bytes of whole events, the first before anything is written; an ApiError that it raises becomes the last one.
        stall_s: longest a write may wait for the reader.
        failed: that last event.
        ending: comes after all.

    Returns the response, and the error that ended it. Raises ApiError where nothing has been written, SlowReaderError, and
    ConnectionError when the reader has gone.
    """
    first = await anext(events)
    response = web.StreamResponse(headers={**headers, **STREAM_HEADERS})
    response.content_type, response.charset = "text/event-stream", "utf-8"
    failure: ApiError | None = None
    await response.prepare(request)
    await _write(response, first, stall_s)
    try:
        async for data in events:
            await _write(response, data, stall_s)
    except ApiError as error:
        failure = error
        await _write(response, failed(error), stall_s)
    if ending:
        await _write(response, ending, stall_s)
    await response.write_eof()
    return response, failure


async def send_json(
    request: web.BaseRequest, headers: Mapping[str, str], slices: AsyncIterator[bytes], stall_s: float
) -> web.StreamResponse:
    """Write a long answer as it is made, so that no more of it is there than its reader takes.

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
        await _write(response, first, stall_s)
        async for data in slices:
            await _write(response, data, stall_s)
    except BaseException:
        # Half an answer must not look like one.
        if request.transport is not None:
            request.transport.abort()
        raise
    await response.write_eof()
    return response


async def _write(response: web.StreamResponse, data: bytes, stall_s: float) -> None:
    try:
        async with asyncio.timeout(stall_s):
            await response.write(data)
    except TimeoutError:
        raise SlowReaderError("the reader of a stream stood still") from None


async def write(response: web.Response, request: web.BaseRequest, stall_s: float) -> None:
    """Write a whole answer. Raises SlowReaderError for a reader who does not take it, ConnectionError for one that has gone."""
    try:
        async with asyncio.timeout(stall_s):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        raise SlowReaderError("the reader of an answer stood still") from None


__all__ = ["DONE", "HEARTBEAT", "SlowReaderError", "event", "send", "send_json", "write"]
