"""`RequestContext`: one HTTP request as the routes see it: who asks, what for, until when, and what the log will say of it."""

import contextlib
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from aiohttp import web

from anabranch.serving.http.asked import PLAIN, Apart, Asked
from anabranch.serving.http.config import HttpConfig
from anabranch.serving.http.stream import send, write
from anabranch.web.answer_room import AnswerRoom
from anabranch.web.answers import JSON, NOT_STORED, bearer, read_body
from anabranch.web.api_error import ApiError, wrong
from anabranch.web.body_room import BodyRoom, Kept
from anabranch.web.ids import new_id
from anabranch.web.slices import send_json
from anabranch.web.turns import Turns

_ID = re.compile(r"[\x21-\x7e]{1,128}")
EXPOSED = "x-request-id, x-route-model, x-route-layers, x-route-streams, x-route-adapters, x-route-experts, x-warning, retry-after"


class RequestContext(Asked):
    """One request; see `Asked`. Its id is the sender's ``x-request-id``, if it brings one.

    Attributes:
        request: aiohttp's.
        is_giving: its answer is being written.

    Args:
        request: see above.
        config: of the server.
        apart, writing, answers: see `Asked`.
        room: of bodies.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        config: HttpConfig,
        apart: Apart,
        writing: Turns,
        answers: AnswerRoom,
        room: BodyRoom,
    ) -> None:
        given = request.headers.get("x-request-id", "")
        super().__init__(config, apart, writing, answers, given if _ID.fullmatch(given) else new_id())
        self.request, self._room = request, room
        self._kept: Kept | None = None
        self.is_giving = False
        self.headers |= self._cors()

    @property
    def bearer(self) -> str | None:
        """The secret it came with."""
        return bearer(self.request)

    @property
    def length(self) -> int | None:
        """Bytes of its body, as its head says."""
        return self.request.content_length

    async def body(self, most_tokens: int = 0) -> dict[str, Any]:
        """Its JSON, with room for ``most_tokens`` token ids; `let_go` when nothing is left of it.

        Raises ApiError: 413, 408, 415, 400, or 429 (503 by config) where too much is being read already.
        """
        # A form of a web page, or a script of it that asks nobody first, can send no such header.
        kind = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON and not kind.endswith("+json"):
            raise ApiError(415, "unsupported_media_type", "send the body as content-type: application/json")
        limits = self._config.limits
        kept = self._kept = self._room.enter(self.source, self.request.content_length)
        raw = await read_body(self.request, limits.body_bytes, limits.body_timeout_s, kept.more)
        kept.is_whole()
        return await self.parsed(raw, most_tokens)

    @property
    def source(self) -> str:
        """See `Asked`."""
        return self.key or self.request.remote or ""

    def cut(self) -> None:
        """See `Asked`; the connection goes with it."""
        if self.request.transport is not None:
            self.request.transport.abort()

    def let_go(self) -> None:
        """Nothing is left of its body. A second call does nothing."""
        if self._kept is not None:
            self._kept.close()

    def deadline_s(self) -> float | None:
        """Seconds it has, from its beginning: ``x-deadline-ms``, else ``x-request-timeout`` (s), else the config's. Raises ApiError."""
        for name, unit in (("x-deadline-ms", 0.001), ("x-request-timeout", 1.0)):
            text = self.request.headers.get(name)
            if text is not None:
                try:
                    value = float(text) * unit
                except ValueError:
                    value = math.nan
                if not 0 < value < math.inf:
                    raise wrong(name, f"{name} must be a number above 0")
                return value
        return self._config.limits.deadline_s

    async def give(self, response: web.Response) -> None:
        """Write a whole answer."""
        with self._giving():
            await write(response, self.request, self._config.limits.stall_s)

    async def give_slices(self, slices: AsyncIterator[bytes]) -> web.StreamResponse:
        """Write JSON as it is made; see `send_json`."""
        headers = {**NOT_STORED, **self.headers}
        with self._giving():
            return await send_json(self.request, headers, slices, self._config.limits.stall_s)

    async def give_events(
        self,
        headers: Mapping[str, str],
        events: AsyncIterator[bytes],
        failed: Callable[[ApiError], bytes],
        ending: bytes,
    ) -> tuple[web.StreamResponse, ApiError | None]:
        """Write events as they come; see `send`."""
        with self._giving():
            return await send(self.request, headers, events, self._config.limits.stall_s, failed, ending)

    @contextlib.contextmanager
    def _giving(self) -> Iterator[None]:
        self.is_giving = True
        try:
            yield
        finally:
            self.is_giving = False

    def refuse(self, error: ApiError) -> web.Response:
        """An answer that is an error."""
        response = super().refuse(error)
        if error.headers.get("connection") == "close":
            response.force_close()
        return response

    def preflight(self) -> web.Response | None:
        """The answer to a browser's question whether a page may call; None if it is no such question."""
        request = self.request
        if request.method != "OPTIONS" or "access-control-request-method" not in request.headers or not self._cors():
            return None
        allowed = request.headers.get("access-control-request-headers", "authorization, content-type")
        self.headers |= {
            "access-control-allow-methods": "GET, POST, OPTIONS",
            "access-control-max-age": "600",
            "access-control-allow-headers": PLAIN.sub("", allowed)[:1000],
        }
        return web.Response(status=204, headers=self.headers)

    def _cors(self) -> dict[str, str]:
        origin, allowed = self.request.headers.get("origin"), self._config.cors_origins
        if origin is None or not ("*" in allowed or origin in allowed):
            return {}
        shown = "*" if "*" in allowed else PLAIN.sub("", origin)
        return {"access-control-allow-origin": shown, "access-control-expose-headers": EXPOSED, "vary": "origin"}
