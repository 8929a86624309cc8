"""`Exchange`: bodies in, replies out, for every route of models, whichever API's form it has."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from anabranch.gateway.cache import Entry
from anabranch.gateway.core.held_body import HeldBody
from anabranch.gateway.core.incoming import KnownKey
from anabranch.gateway.core.reply import Reply
from anabranch.gateway.forms import parse_form
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.access import KEY_ID
from anabranch.gateway.http.chat_form import ChatForm, translated
from anabranch.gateway.http.cors import for_origin
from anabranch.gateway.http.rate_headers import RECORD, rate_headers
from anabranch.gateway.providers.provider import Native
from anabranch.web.answers import SAFE, bearer, read_parts
from anabranch.web.api_error import ApiError
from anabranch.web.body import parse
from anabranch.web.body_beside import TAKEN
from anabranch.web.json_size import MOST_PARTS, MOST_VALUES, check_json_size
from anabranch.web.json_text import to_json
from anabranch.web.large_json import LARGE, is_long_to_read, json_slices, load_large, parse_large
from anabranch.web.turns import Turns

T = TypeVar("T")
logger = logging.getLogger(__name__)

# The kept answer that a whole response is of: it is in memory once as long as it is written.
KEPT = web.ResponseKey("KEPT", Entry)

# After its deadline a stream that is not read ends.
STALL_S = 5.0


@dataclass(frozen=True, slots=True)
class Received:
    """A request whose body has been read.

    Attributes:
        body: JSON, or what was made of a form.
        num_bytes: of it as it came.
        key: that it came with, looked up once.
        held: what the body takes until nothing is left of it; None of one that came at once and is small.
        chat: the body as a chat, if it came in another form.
        is_long: to read it would have held up the event loop.
    """

    body: dict[str, Any]
    num_bytes: int
    key: KnownKey
    held: HeldBody | None
    chat: dict[str, Any] = field(default_factory=dict)
    is_long: bool = False


class Exchange:
    """See the module."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        # On the loop: what is told of long streams, slice by slice.
        self._telling = Turns()

    async def key(self, request: web.BaseRequest) -> KnownKey:
        """Whose request it is. Raises ApiError."""
        record = await self._gateway.authenticate(bearer(request))
        if record is not None:
            request[KEY_ID], request[RECORD] = record.id, record
        return KnownKey(record)

    @contextlib.asynccontextmanager
    async def read(
        self,
        request: web.BaseRequest,
        chat: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: {},
        *,
        takes_forms: bool = False,
    ) -> AsyncIterator[Received]:
        """The body, of those only who have a key: nobody else may fill the memory. Raises ApiError.

        What it takes of its key's requests and of the room for bodies it takes before anything is read, until the block ends, or the
        request that it is passed on to if that ends later.

        Args:
            request: whose body it is.
            chat: makes a chat of it, beside the loop where it is large.
            takes_forms: it may be a form.
        """
        key, held = await self._let_in(request)
        try:
            yield await self._read(request, key, held, chat, takes_forms)
        finally:
            if held is not None:
                held.close()

    async def _let_in(self, request: web.BaseRequest) -> tuple[KnownKey, HeldBody | None]:
        length = request.content_length
        try:
            key = await self.key(request)
            if length is not None and length <= LARGE and request.content.is_eof():
                return key, None
            # To read it costs time and memory, which its key may have no room for.
            return key, await self._gateway.hold(key.record, length)
        except ApiError as error:
            if not request.content.is_eof():
                error.headers["connection"] = "close"
            raise

    async def _read(
        self,
        request: web.BaseRequest,
        key: KnownKey,
        held: HeldBody | None,
        chat: Callable[[dict[str, Any]], dict[str, Any]],
        takes_forms: bool,
    ) -> Received:
        kind, limits = request.headers.get("content-type", ""), self._gateway.config.limits
        is_form = kind.lower().startswith("multipart/form-data")
        keep = None if held is None else held.more
        parts = await read_parts(request, limits.body_bytes, limits.body_timeout_s, keep, is_beside=True)
        size = sum(map(len, parts))
        if held is not None:
            held.is_whole()
        if is_form and not takes_forms:
            message = f"the body is a form (multipart/form-data); {request.path} takes JSON (application/json)"
            raise ApiError(400, "invalid_body", message)

        is_long = is_form or is_long_to_read(parts)

        def read() -> tuple[dict[str, Any], dict[str, Any]]:
            raw = b"".join(parts)
            parts.clear()
            body = parse_form(raw, kind) if is_form else _parsed(raw)
            return body, chat(body)

        body, made = await self.apart(key, is_long, read)
        return Received(body, size, key, held, made, is_long)

    async def apart(self, key: KnownKey, is_long: bool, work: Callable[[], T]) -> T:
        """``work()`` on a request, or on its answer; beside the loop where that is so long that it would hold up all other requests."""
        return await self._beside(key, work) if is_long else work()

    async def _beside(self, key: KnownKey, work: Callable[[], T]) -> T:
        return await self._gateway.turns.run(_sender(key), work)

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
            held=received.held,
        )

    async def tell(
        self,
        request: web.BaseRequest,
        received: Received,
        reply: Reply,
        form: Callable[[], ChatForm],
        whole: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> web.StreamResponse:
        """Send what a chat says in the form of another API.

        Args:
            request, received: that it answers.
            reply: of a chat.
            form: makes what tells its stream.
            whole: makes the whole answer, of that of the chat.
        """
        source = reply.stream
        if source is not None:
            reply.stream = translated(source, form, self._telling, _sender(received.key))
        elif reply.body is not None:
            reply.body = await self.apart(
                received.key, is_long_to_read([reply.body]), partial(_told, whole, reply.body)
            )
            reply.kept = None
        return await self.send(request, reply, source)

    async def send(
        self, request: web.BaseRequest, reply: Reply, source: AsyncIterator[bytes] | None
    ) -> web.StreamResponse:
        """Reply as HTTP. A stream is written as fast as it is read on the other side, and ``source``, what it is made of, is closed when
        that goes away, breaks, or does not read on until `STALL_S` after the deadline.
        """
        reply.headers |= rate_headers(self._gateway, request)
        reply.headers |= {**SAFE, **for_origin(self._gateway.config.cors_origins, request, (*SAFE, *reply.headers))}
        if reply.stream is None or source is None:
            whole = web.Response(
                status=reply.status, body=reply.body, content_type=reply.content_type, headers=reply.headers
            )
            if reply.kept is not None:
                whole[KEPT] = reply.kept
            return whole
        headers = {**reply.headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        response = web.StreamResponse(status=reply.status, headers=headers)
        response.content_type = "text/event-stream"
        if request.get(TAKEN):
            response.force_close()
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


def _sender(key: KnownKey) -> str:
    """Whose turn it is: each key's."""
    return "" if key.record is None else key.record.id


def _told(whole: Callable[[dict[str, Any]], dict[str, Any]], raw: bytes) -> bytes:
    """A chat's answer in another form."""
    if len(raw) <= LARGE:
        return to_json(whole(json.loads(raw)))
    # In another thread, which holds Python's lock no longer than one slice takes.
    return b"".join(json_slices(whole(load_large(raw))))


def _parsed(raw: bytes) -> dict[str, Any]:
    """The JSON of a body. Raises ApiError."""
    check_json_size(raw, MOST_VALUES, MOST_PARTS)
    return parse(raw) if len(raw) <= LARGE else parse_large(raw)
