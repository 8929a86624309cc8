"""Browsers: which pages of other hosts may call ``/v1`` (``cors_origins``). Nothing of the operators' is open to any."""

import re
from collections.abc import Iterable, Sequence

from aiohttp import web

ANY = "*"
METHODS = "GET, POST, OPTIONS"

# What a page may read of an answer, beside what all may: these, and whatever begins with x-.
READ = ("retry-after", "request-id")

# What a page may send where it does not ask.
SENT = "authorization, content-type, idempotency-key, x-api-key, x-cache, x-mid-stream, x-tags, x-task, traceparent, tracestate"

# Official clients send dozens of headers of their own, and more with every version: what a page asks for is what it may send, as long as
# it is a list of names.
_NAMES = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}( *, *[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}){0,99}")
DAY_S = 86_400


def for_origin(origins: Sequence[str], request: web.BaseRequest, sent: Iterable[str]) -> dict[str, str]:
    """Headers that let the page read the answer; none if it may not, or no page asks.

    Cookies and remembered passwords are never let through: a page brings the key that it was given.

    Args:
        origins: that may.
        request: of the page.
        sent: names of the answer's headers.
    """
    origin = request.headers.get("origin")
    if origin is None or not (ANY in origins or origin in origins):
        return {}
    told = {"access-control-allow-origin": origin, "vary": "Origin"}
    read = sorted({name for name in map(str.lower, sent) if name.startswith("x-") or name in READ})
    return {**told, "access-control-expose-headers": ", ".join(read)} if read else told


def preflight(origins: Sequence[str], request: web.BaseRequest) -> web.Response | None:
    """The answer to a browser that asks whether a page may; None if this is no such question, or it may not."""
    told = for_origin(origins, request, ())
    if request.method != "OPTIONS" or not told or "access-control-request-method" not in request.headers:
        return None
    asked = request.headers.get("access-control-request-headers", "").strip()
    more = {
        "access-control-allow-methods": METHODS,
        "access-control-allow-headers": asked if _NAMES.fullmatch(asked) else SENT,
        "access-control-max-age": str(DAY_S),
    }
    return web.Response(status=204, headers={**told, **more})
