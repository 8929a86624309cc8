"""`Exchange`: bodies in, replies out, for every route of models, whichever API's form it has."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from anabranch.gateway.core.incoming import KnownKey
from anabranch.gateway.core.reply import Reply
from anabranch.gateway.forms import parse_form
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.chat_form import ChatForm, translated
from anabranch.gateway.http.cors import for_origin
from anabranch.gateway.providers.provider import Native
from anabranch.web.answers import SAFE, bearer, read_body
from anabranch.web.api_error import ApiError
from anabranch.web.body import parse
from anabranch.web.json_size import MOST_PARTS, MOST_VALUES, check_json_size
from anabranch.web.large_json import LARGE, parse_large

logger = logging.getLogger(__name__)

# Large bodies are read here, one after another: the more threads want Python's lock, the longer the event loop waits for it.
_READERS = ThreadPoolExecutor(1, "large-body")

# After its deadline a stream that is not read ends.
STALL_S = 5.0


@dataclass(frozen=True, slots=True)
class Received:
    """A request whose body has been read.

    Attributes:
        body: JSON, or what was made of a form.
        num_bytes: of it as it came.
        key: that it came with, looked up once.
    """

    body: dict[str, Any]
    num_bytes: int
    key: KnownKey


class Exchange:
    """See the module."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def key(self, request: web.BaseRequest) -> KnownKey:
        """Whose request it is. Raises ApiError."""
        return KnownKey(await self._gateway.authenticate(bearer(request)))

    async def read(self, request: web.BaseRequest, *, takes_forms: bool = False) -> Received:
        """The body, of those only who have a key: nobody else may fill the memory. Raises ApiError."""
        try:
            key = await self.key(request)
        except ApiError as error:
            if not request.content.is_eof():
                error.headers["connection"] = "close"
            raise
        kind, limits = request.headers.get("content-type", ""), self._gateway.config.limits
        is_form = kind.lower().startswith("multipart/form-data")
        raw = await read_body(request, limits.body_bytes, limits.body_timeout_s)
        if is_form and not takes_forms:
            message = f"the body is a form (multipart/form-data); {request.path} takes JSON (application/json)"
            raise ApiError(400, "invalid_body", message)
        if is_form:
            body = await asyncio.to_thread(parse_form, raw, kind)
        elif len(raw) <= LARGE:
            body = _parsed(raw)
        else:
            # It would hold up all other requests.
            body = await asyncio.get_running_loop().run_in_executor(_READERS, _parsed, raw)
        return Received(body, len(raw), key)

    async def ask(
        self,
        request: web.BaseRequest,
        received: Received,
        endpoint: str,
        body: dict[str, Any],
        *,
        shown_as: str | None = None,
        native: Native | None = None,
    ) -> Reply:
        """What the gateway answers; see `Gateway.handle`. Raises ApiError."""
        return await self._gateway.handle(
            endpoint,
            body,
            key=received.key,
            headers=request.headers,
            shown_as=shown_as,
            num_bytes=received.num_bytes,
            native=native,
        )

    async def tell(
        self,
        request: web.BaseRequest,
        reply: Reply,
        form: Callable[[], ChatForm],
        whole: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> web.StreamResponse:
        """Send what a chat says in the form of another API.

        Args:
            request: that it answers.
            reply: of a chat.
            form: makes what tells its stream.
            whole: makes the whole answer, of that of the chat.
        """
        source = reply.stream
        if source is not None:
            reply.stream = translated(source, form)
        elif reply.body is not None:
            made = whole(json.loads(reply.body))
            reply.body = json.dumps(made, ensure_ascii=False).encode("utf-8", "replace")
        return await self.send(request, reply, source)

    async def send(
        self, request: web.BaseRequest, reply: Reply, source: AsyncIterator[bytes] | None
    ) -> web.StreamResponse:
        """Reply as HTTP. A stream is written as fast as it is read on the other side, and ``source``, what it is made of, is closed when
        that goes away, breaks, or does not read on until `STALL_S` after the deadline.
        """
        reply.headers |= {**SAFE, **for_origin(self._gateway.config.cors_origins, request)}
        if reply.stream is None or source is None:
            return web.Response(
                status=reply.status, body=reply.body, content_type=reply.content_type, headers=reply.headers
            )
        headers = {**reply.headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        response = web.StreamResponse(status=reply.status, headers=headers)
        response.content_type = "text/event-stream"
        try:
            async with asyncio.timeout(self._gateway.config.longest_deadline_s + STALL_S):
                await response.prepare(request)
                async for chunk in reply.stream:
                    await response.write(chunk)
                await response.write_eof()
        except ConnectionError:
            logger.debug("the client went away")
        except Exception as error:
            # The head is out: all that can be done is to break off.
            logger.error(
                "a stream broke: %s", type(error).__name__, exc_info=None if isinstance(error, TimeoutError) else error
            )
            if request.transport is not None:
                request.transport.abort()
        finally:
            for stream in (reply.stream, source):
                # It is being closed already.
                with contextlib.suppress(RuntimeError):
                    await stream.aclose()  # type: ignore[attr-defined]
        return response


def _parsed(raw: bytes) -> dict[str, Any]:
    """The JSON of a body. Raises ApiError."""
    check_json_size(raw, MOST_VALUES, MOST_PARTS)
    return parse(raw) if len(raw) <= LARGE else parse_large(raw)
