"""`RequestContext`: one HTTP request as the routes see it: who asks, what for, until when, and what the log will say of it."""

import difflib
import math
import re
import threading
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from aiohttp import web

from anabranch.serving.http.config import HttpConfig
from anabranch.web.answers import JSON, bearer, error_response, json_response, read_body
from anabranch.web.api_error import ApiError, wrong
from anabranch.web.body import parse
from anabranch.web.body_room import BodyRoom, Kept
from anabranch.web.ids import new_id
from anabranch.web.json_size import check_json_size

_ID = re.compile(r"[\x21-\x7e]{1,128}")
_PLAIN = re.compile(r"[^\x20-\x7e]")
# Reading more than this would hold up the others, so it is done in a thread.
LONG_CHARACTERS = 20_000
# Of the fields that nobody knows.
MOST_TOLD = 10
_PARSING = threading.Lock()
Apart = Callable[..., Awaitable[Any]]
EXPOSED = "x-request-id, x-route-model, x-route-layers, x-route-streams, x-route-experts, x-warning, retry-after"


class RequestContext:
    """One request.

    Attributes:
        request: aiohttp's.
        id: the sender's ``x-request-id``, else a new one.
        began: seconds of `time.monotonic`.
        key: name of the API key; "" without keys.
        headers: of the answer, whatever it is.
        facts: for the access log.
        endpoint: label in the metrics.
        code: status of the answer once that is written; 499 until then, in case the sender goes away.

    Args:
        request: see above.
        config: of the server.
        apart: calls a function in a thread, see `Frontend.apart`.
        room: of bodies.
    """

    def __init__(self, request: web.BaseRequest, config: HttpConfig, apart: Apart, room: BodyRoom) -> None:
        self.request, self._config, self._apart, self._room = request, config, apart, room
        self._kept: Kept | None = None
        given = request.headers.get("x-request-id", "")
        self.id = given if _ID.fullmatch(given) else new_id()
        self.began = time.monotonic()
        self.key = ""
        self.endpoint, self.code = "other", 499
        self.headers = {"x-request-id": self.id, **self._cors()}
        self.facts: dict[str, Any] = {}

    @property
    def bearer(self) -> str | None:
        """The secret it came with."""
        return bearer(self.request)

    async def body(self, most_tokens: int = 0) -> dict[str, Any]:
        """Its JSON, with room for ``most_tokens`` token ids; `let_go` when nothing is left of it.

        Raises ApiError: 413, 408, 415, 400, or 429 (503 by config) where too much is being read already.
        """
        # A form of a web page, or a script of it that asks nobody first, can send no such header.
        kind = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON and not kind.endswith("+json"):
            raise ApiError(415, "unsupported_media_type", "send the body as content-type: application/json")
        limits = self._config.limits
        kept = self._kept = self._room.enter(self.key or self.request.remote or "", self.request.content_length)
        raw = await read_body(self.request, limits.body_bytes, limits.body_timeout_s, kept.more)
        kept.is_whole()
        if len(raw) <= LONG_CHARACTERS:
            return parse(raw)
        most_values = max(limits.body_values, most_tokens)
        return await self._apart(self.key, _parse_long, raw, most_values, limits.body_parts)

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

    def left_s(self) -> float | None:
        """What is left of `deadline_s` now, less than 0 once it has passed. Raises ApiError."""
        deadline_s = self.deadline_s()
        return None if deadline_s is None else deadline_s - (time.monotonic() - self.began)

    def warn(self, unknown: tuple[str, ...], known: Collection[str]) -> None:
        """Tell of the first fields that nobody knows, each with the one of ``known`` it may be; refuse them in strict mode (ApiError)."""
        if not unknown:
            return
        # A look for what a name may be takes time, and a body may have very many names.
        names = ", ".join(sorted(_told(name, known) for name in unknown[:MOST_TOLD]))
        if len(unknown) > MOST_TOLD:
            names += f" and {len(unknown) - MOST_TOLD:,} more"
        if self._config.strict:
            raise wrong(unknown[0][:80], f"nobody knows these fields: {names}", "unknown_parameter")
        self.headers["x-warning"] = f"ignored unknown fields: {names}"

    def json(self, value: Any, status: int = 200) -> web.Response:
        """An answer."""
        return json_response(value, status, self.headers)

    def refuse(self, error: ApiError) -> web.Response:
        """An answer that is an error."""
        response = error_response(error)
        response.headers.update(self.headers)
        if error.headers.get("connection") == "close":
            response.force_close()
        self.facts["error"] = error.code
        return response

    def preflight(self) -> web.Response | None:
        """The answer to a browser's question whether a page may call; None if it is no such question."""
        request = self.request
        if request.method != "OPTIONS" or "access-control-request-method" not in request.headers or not self._cors():
            return None
        allowed = request.headers.get("access-control-request-headers", "authorization, content-type")
        self.headers |= {
            "access-control-allow-methods": "GET, POST, OPTIONS", "access-control-max-age": "600",
            "access-control-allow-headers": _PLAIN.sub("", allowed)[:1000],
        }  # fmt: skip
        return web.Response(status=204, headers=self.headers)

    def _cors(self) -> dict[str, str]:
        origin, allowed = self.request.headers.get("origin"), self._config.cors_origins
        if origin is None or not ("*" in allowed or origin in allowed):
            return {}
        shown = "*" if "*" in allowed else _PLAIN.sub("", origin)
        return {"access-control-allow-origin": shown, "access-control-expose-headers": EXPOSED, "vary": "origin"}


def _parse_long(raw: bytes, most_values: int, most_parts: int) -> dict[str, Any]:
    check_json_size(raw, most_values, most_parts)
    # One at a time: each holds Python's lock while it lasts, and all other threads together may have it as often.
    with _PARSING:
        return parse(raw)


def _told(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name[:40], known, n=1, cutoff=0.8)
    return _PLAIN.sub("?", name[:40]) + (f" (did you mean {near[0]}?)" if near else "")
