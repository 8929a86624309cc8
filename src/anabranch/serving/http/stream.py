"""Server-sent events to one reader: an error before the first byte is a status, after it an event; ``[DONE]`` ends every stream."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

from aiohttp import web

from anabranch.web.api_error import ApiError
from anabranch.web.slices import SlowReaderError, Writing
from anabranch.web.sse import DONE, HEARTBEAT, event

STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


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
    # How slowly a stream is read is its reader's to choose: what is made waits, and nothing more is made.
    writing = Writing(response, stall_s)
    await writing.write(first)
    try:
        async for data in events:
            await writing.write(data)
    except ApiError as error:
        failure = error
        await writing.write(failed(error))
    if ending:
        await writing.write(ending)
    await response.write_eof()
    return response, failure


async def write(response: web.Response, request: web.BaseRequest, stall_s: float) -> None:
    """Write a whole answer. Raises SlowReaderError for a reader who does not take it, ConnectionError for one that has gone."""
    try:
        async with asyncio.timeout(stall_s):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        raise SlowReaderError("the reader of an answer stood still") from None


__all__ = ["DONE", "HEARTBEAT", "SlowReaderError", "event", "send", "write"]
