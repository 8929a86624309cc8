"""Browsers: which pages of other hosts may call ``/v1`` (``cors_origins``). Nothing of the operators' is open to any."""

from collections.abc import Sequence

from aiohttp import web

ANY = "*"
METHODS = "GET, POST, OPTIONS"

# What a page may read of an answer, beside what all may.
EXPOSED = (
    "x-request-id, x-route-model, x-route-deployment, x-route-attempts, x-route-strategy, x-route-reason, x-route-confidence, "
    "x-route-bypassed, x-route-arm, x-cache, x-cost-usd, x-overhead-ms, retry-after"
)
SENT = "authorization, content-type, idempotency-key, x-api-key, x-cache, x-mid-stream, x-tags, x-task, traceparent, tracestate"
DAY_S = 86_400


def for_origin(origins: Sequence[str], request: web.BaseRequest) -> dict[str, str]:
    """Headers that let the page read the answer; none if it may not, or no page asks.

    Cookies and remembered passwords are never let through: a page brings the key that it was given.
    """
    origin = request.headers.get("origin")
    if origin is None or not (ANY in origins or origin in origins):
        return {}
    return {"access-control-allow-origin": origin, "vary": "Origin", "access-control-expose-headers": EXPOSED}


def preflight(origins: Sequence[str], request: web.BaseRequest) -> web.Response | None:
    """The answer to a browser that asks whether a page may; None if this is no such question, or it may not."""
    told = for_origin(origins, request)
    if request.method != "OPTIONS" or not told or "access-control-request-method" not in request.headers:
        return None
    more = {
        "access-control-allow-methods": METHODS,
        "access-control-allow-headers": SENT,
        "access-control-max-age": str(DAY_S),
    }
    return web.Response(status=204, headers={**told, **more})
