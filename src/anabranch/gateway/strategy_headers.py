"""What a strategy may tell a sender in headers: of its own, and short, so that nothing else of the answer is changed by it."""

import logging
import re
from collections.abc import Mapping
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

# Headers of one answer, characters of a name, and of all names and values: servers before this one take some kilobytes, with ours.
MOST, NAME_CHARACTERS, CHARACTERS = 16, 64, 3000


def strategy_headers(strategy: str, given: Mapping[Any, Any]) -> dict[str, str]:
    """What a strategy's headers go out as, in small letters and whole. Others than its own are left out, with a line in the log.

    So is one that does not fit beside those before it.
    """
    found: dict[str, str] = {}
    num_left = CHARACTERS
    for name, value in given.items():
        small = name.lower() if isinstance(name, str) else ""
        is_own = len(small) <= NAME_CHARACTERS and NAME.fullmatch(small) and small not in OURS
        if not is_own or small in found or len(found) == MOST:
            continue
        text = str(value)
        if len(small) + len(text) <= num_left:
            found[small] = text
            num_left -= len(small) + len(text)
    if len(found) < len(given):
        logger.warning(
            "strategy %s: %d headers are left out, and %s go out; names begin with x- and are none of the gateway's own, "
            "at most %d, and %d characters with all values",
            strategy,
            len(given) - len(found),
            ", ".join(found) or "none",
            MOST,
            CHARACTERS,
        )
    return found
