"""Reading what a client sent, and answering it: JSON, errors in OpenAI's form."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from aiohttp import HttpVersion11, web

from anabranch.web.api_error import ApiError
from anabranch.web.body_beside import BodyBeside
from anabranch.web.ids import new_id
from anabranch.web.json_text import to_json

JSON = "application/json"
SAFE = {"x-content-type-options": "nosniff", "server": "anabranch"}
# Of JSON that is told once.
NOT_STORED = {**SAFE, "cache-control": "no-store"}
Route = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def error_response(error: ApiError) -> web.Response:
    """OpenAI's form of an error."""
    headers = {"x-request-id": new_id(), **SAFE, **error.headers}
    return web.Response(status=error.status, body=to_json(error.to_dict()), content_type=JSON, headers=headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """JSON (`to_json`), never cached."""
    told = {**NOT_STORED, **(headers or {})}
    return web.Response(status=status, body=to_json(value), content_type=JSON, headers=told)


def bearer(request: web.BaseRequest) -> str | None:
    """The key of a request: ``Authorization: Bearer KEY``, or Anthropic's and Azure's headers for it."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return request.headers.get("x-api-key") or request.headers.get("api-key")


async def read_body(
    request: web.BaseRequest,
    most_bytes: int,
    timeout_s: float,
    keep: Callable[[int, asyncio.Timeout], None] | None = None,
) -> bytes:
    """The whole body; see `read_parts`."""
    return b"".join(await read_parts(request, most_bytes, timeout_s, keep))


async def read_parts(
    request: web.BaseRequest,
    most_bytes: int,
    timeout_s: float,
    keep: Callable[[int, asyncio.Timeout], None] | None = None,
    *,
    is_beside: bool = False,
) -> list[bytes]:
    """The whole body, in the parts that it came in: to put megabytes together takes an event loop milliseconds.

    Who waits with it to hear that it is wanted is told so (100), unless its head alone has it refused.

    Args:
        request: whose it is.
        most_bytes: it may have.
        timeout_s: it has to come in.
        keep: told of the bytes of each part before it is kept, and given the time that the body has, which it may cut short; what it
            raises ends the reading.
        is_beside: a large one may be read in another thread; who answers closes the connection then (`body_beside.TAKEN`).

    Raises ApiError if it is too large or too slow, or compressed.
    """
    close = {"connection": "close"}
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise ApiError(415, "unsupported_encoding", "send the body uncompressed")
    length = request.content_length
    large = ApiError(413, "request_too_large", f"the body is larger than {most_bytes:,} bytes", headers=close)
    if length is not None and length > most_bytes:
        raise large
    content = request.content
    if keep is None and content.is_eof() and length is not None:  # it came with the headers
        return [content.read_nowait()]
    _go_on(request)
    parts, size, began = [], 0, asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(timeout_s) as left, contextlib.aclosing(_parts(request, is_beside)) as coming:
            async for part in coming:
                size += len(part)
                if size > most_bytes:
                    raise large
                if keep is not None:
                    keep(len(part), left)
                parts.append(part)
    except TimeoutError:
        waited_s = asyncio.get_running_loop().time() - began
        raise ApiError(408, "slow_body", f"the body did not come within {waited_s:.1f} s", headers=close) from None
    except RuntimeError as error:
        # aiohttp's word for a body of which nothing was read before its sender went away.
        if request.transport is not None:
            raise
        raise ConnectionResetError(str(error)) from None
    except (web.RequestPayloadError, ValueError):
        raise ApiError(
            400, "invalid_body", "the body is broken: its length or its chunks are wrong", headers=close
        ) from None
    return parts


def _go_on(request: web.BaseRequest) -> None:
    """Tell who waits with the body until they hear that it will be read (`Expect: 100-continue`): curl does, for a second."""
    expected, transport, content = request.headers.get("expect", "").strip().lower(), request.transport, request.content
    if expected != "100-continue" or transport is None or content.total_bytes or content.is_eof():
        return
    if request.version >= HttpVersion11:
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _parts(request: web.BaseRequest, is_beside: bool) -> AsyncGenerator[bytes, None]:
    apart, begun = BodyBeside.of(request) if is_beside else (None, [])
    with contextlib.nullcontext() if apart is None else apart:
        for part in begun:
            yield part
        if apart is None:
            while part := await request.content.readany():
                yield part
            return
        while found := await apart.some():
            for part in found:
                yield part


def wrong_method(request: web.BaseRequest, methods: Mapping[str, Any]) -> ApiError:
    """405, with what the path does take."""
    allowed = ", ".join(methods)
    message = f"{request.path} takes {allowed}, not {request.method:.20}"
    return ApiError(405, "wrong_method", message, headers={"Allow": allowed})
