"""What a strategy may tell a sender in headers: of its own, and short, so that nothing else of the answer is changed by it."""

import logging
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

logger = logging.getLogger(__name__)

# A token of RFC 9110 that begins as no header of the protocol does.
NAME = re.compile(r"x-[!#$%&'*+.^_`|~a-z0-9-]+", re.ASCII)

# What the gateway says itself, or clients, browsers and servers before it act upon.
_ROUTE = ("arm", "attempts", "bypassed", "calls", "confidence", "deployment", "model", "reason", "spare", "strategy")
OURS = frozenset(
    {
        *("x-cache", "x-cost-usd", "x-overhead-ms", "x-request-id", "x-stitched"),
        *(f"x-route-{name}" for name in _ROUTE),
        *("x-should-retry", "x-accel-buffering", "x-content-type-options", "x-frame-options"),
    }
)

# What servers before this one obey or say themselves, and what clients, browsers and crawlers act upon, by name. Beside these a strategy
# may tell what it likes of an original, a cache or a download.
OTHERS = frozenset(
    {
        *(f"x-cache-{name}" for name in ("control", "hits", "key", "lookup", "status", "tag", "tags")),
        *(f"x-original-{name}" for name in ("args", "host", "method", "path", "uri", "url")),
        *("x-cascade", "x-content-digest", "x-content-duration", "x-dns-prefetch-control", "x-download-options"),
        *("x-ratelimit", "x-real-ip", "x-rewrite-uri", "x-rewrite-url", "x-ua-compatible", "x-xss-protection"),
    }
)

# Beginnings of such: a strategy, or a text that it puts there, would have them send an inner file, keep an answer, or take this server for
# dead. Of nginx (nginx.org/en/docs/http/ngx_http_proxy_module.html, proxy_ignore_headers) and its mod_zip, lighttpd, Apache's
# mod_xsendfile, LiteSpeed, Perlbal, Envoy's router filter (envoyproxy.io/docs), other proxies, and clouds.
BEGINNINGS = (
    *("x-accel-", "x-archive-", "x-sendfile", "x-lighttpd-", "x-litespeed-", "x-reproxy-", "x-envoy-", "x-varnish"),
    *("x-kong-", "x-nginx-", "x-forwarded-", "x-original-forwarded-", "x-http-method", "x-proxy-"),
    *("x-amz-", "x-amzn-", "x-appengine-", "x-goog-", "x-google-", "x-cloud-trace-", "x-azure-", "x-vercel-"),
    *("x-middleware-", "x-ms-blob-", "x-ms-client-", "x-ms-correlation-", "x-ms-deployment-", "x-ms-edge-"),
    *("x-ms-error-", "x-ms-meta-", "x-ms-middleware-", "x-ms-proxy", "x-ms-rai-", "x-ms-ratelimit-", "x-ms-region"),
    *("x-ms-request-", "x-ms-retry-", "x-ms-routing-", "x-ms-token-", "x-ms-version"),
    *("x-ratelimit-", "x-rate-limit", "x-retry-after", "x-should-", "x-content-security-", "x-content-type-"),
    *("x-permitted-", "x-webkit-", "x-robots-", "x-sourcemap"),
)

# Headers of one answer, characters of a name, and of all names and values: servers before this one take some kilobytes, with ours.
MOST, NAME_CHARACTERS, CHARACTERS = 16, 64, 3000

# That are looked at: a mapping of others may have no end.
LOOKED_AT = 4 * MOST


def strategy_headers(strategy: str, given: Mapping[Any, Any]) -> dict[str, str]:
    """What a strategy's headers go out as, in small letters and whole. Others than its own are left out, and the log names them.

    So is one that does not fit beside those before it.
    """
    found: dict[str, str] = {}
    num_left, left_out = CHARACTERS, list[str]()
    for name, value in islice(given.items(), LOOKED_AT):
        small = name.lower() if isinstance(name, str) else ""
        is_free = len(small) <= NAME_CHARACTERS and NAME.fullmatch(small) is not None and not _is_taken(small)
        is_free = is_free and small not in found and len(found) < MOST
        text = str(value) if is_free else ""
        if not is_free or len(small) + len(text) > num_left:
            left_out.append(ascii(name[:NAME_CHARACTERS]) if isinstance(name, str) else f"a {type(name).__name__}")
            continue
        found[small] = text
        num_left -= len(small) + len(text)
    if left_out:
        logger.warning(
            "strategy %s: %d headers are left out (%s), and %s go out; names begin with x- and are none of the gateway's own or "
            "of servers, at most %d, and %d characters with all values",
            strategy,
            len(left_out),
            ", ".join(left_out[:MOST]) + (", ..." if len(left_out) > MOST else ""),
            ", ".join(found) or "none",
            MOST,
            CHARACTERS,
        )
    return found


def _is_taken(name: str) -> bool:
    """Whether it means something to others than whoever asked."""
    # To some servers `_` is as `-`.
    alike = name.replace("_", "-")
    return alike in OURS or alike in OTHERS or alike.startswith(BEGINNINGS)
