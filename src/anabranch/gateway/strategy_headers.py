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
_ROUTE = ("arm", "attempts", "bypassed", "calls", "confidence", "deployment", "model", "reason", "strategy")
OURS = frozenset(
    {
        *("x-cache", "x-cost-usd", "x-overhead-ms", "x-request-id", "x-stitched"),
        *(f"x-route-{name}" for name in _ROUTE),
        *("x-should-retry", "x-accel-buffering", "x-content-type-options", "x-frame-options"),
    }
)

# Beginnings of what servers before this one obey or say themselves, and of what clients, browsers and crawlers act upon: a strategy, or a
# text that it puts there, would have them send an inner file, keep an answer, or take this server for dead. Of nginx
# (nginx.org/en/docs/http/ngx_http_proxy_module.html, proxy_ignore_headers), lighttpd, Apache's mod_xsendfile, LiteSpeed, Envoy's router
# filter (envoyproxy.io/docs), other proxies, and clouds. To some of them `_` is as `-`.
OTHERS = (
    *("x-accel-", "x-sendfile", "x-lighttpd-", "x-litespeed-", "x-envoy-", "x-varnish", "x-kong-", "x-nginx-"),
    *("x-forwarded-", "x-real-ip", "x-original-", "x-rewrite-", "x-http-method", "x-proxy-"),
    *(
        "x-amz-",
        "x-amzn-",
        "x-appengine-",
        "x-goog-",
        "x-google-",
        "x-cloud-",
        "x-azure-",
        "x-ms-",
        "x-vercel-",
        "x-middleware-",
    ),
    *("x-ratelimit", "x-rate-limit", "x-retry-", "x-should-", "x-cache"),
    *(
        "x-content-",
        "x-frame-",
        "x-xss-",
        "x-dns-",
        "x-permitted-",
        "x-download-",
        "x-ua-",
        "x-webkit-",
        "x-robots-",
        "x-sourcemap",
    ),
)

# Headers of one answer, characters of a name, and of all names and values: servers before this one take some kilobytes, with ours.
MOST, NAME_CHARACTERS, CHARACTERS = 16, 64, 3000

# That are looked at: a mapping of others may have no end.
LOOKED_AT = 4 * MOST


def strategy_headers(strategy: str, given: Mapping[Any, Any]) -> dict[str, str]:
    """What a strategy's headers go out as, in small letters and whole. Others than its own are left out, with a line in the log.

    So is one that does not fit beside those before it.
    """
    found: dict[str, str] = {}
    num_left, num_given = CHARACTERS, 0
    for name, value in islice(given.items(), LOOKED_AT):
        num_given += 1
        small = name.lower() if isinstance(name, str) else ""
        is_own = len(small) <= NAME_CHARACTERS and NAME.fullmatch(small) and small not in OURS
        is_own = is_own and not small.replace("_", "-").startswith(OTHERS)
        if not is_own or small in found or len(found) == MOST:
            continue
        text = str(value)
        if len(small) + len(text) <= num_left:
            found[small] = text
            num_left -= len(small) + len(text)
    if len(found) < num_given:
        logger.warning(
            "strategy %s: %d headers are left out, and %s go out; names begin with x- and are none of the gateway's own or "
            "of servers, at most %d, and %d characters with all values",
            strategy,
            num_given - len(found),
            ", ".join(found) or "none",
            MOST,
            CHARACTERS,
        )
    return found
