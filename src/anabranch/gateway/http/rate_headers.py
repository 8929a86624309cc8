"""What is left of a key's own limits, in the headers that OpenAI has for it, so that its clients can pace themselves.

x-ratelimit-limit-requests: 60          a minute
x-ratelimit-remaining-requests: 59      now
x-ratelimit-reset-requests: 1s          until all of the limit is there again
x-ratelimit-...-tokens                  likewise
"""

import math
from collections.abc import Mapping

from aiohttp import web

from anabranch.gateway.core.admission import Left
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.store import KeyRecord

# Of a request: the key of the store that it came with.
RECORD = web.RequestKey("record", KeyRecord)


def rate_headers(gateway: Gateway, request: web.BaseRequest) -> dict[str, str]:
    """Of the key that a request came with; none where that has no such limits, or is not known yet."""
    return headers_of(gateway.rates_left(request.get(RECORD)))


def headers_of(left: Mapping[str, Left]) -> dict[str, str]:
    """For each limit what it is, what remains, and when it is whole again."""
    found = {}
    for name, one in left.items():
        found[f"x-ratelimit-limit-{name}"] = str(one.limit)
        found[f"x-ratelimit-remaining-{name}"] = str(one.remaining)
        found[f"x-ratelimit-reset-{name}"] = duration(one.reset_s)
    return found


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``0s``, ``20ms``, ``8.64s``, ``1m26.4s``, ``1h0m3s``; thousandths are rounded up."""
    millis = max(0, math.ceil(seconds * 1000 - 1e-6))
    if 0 < millis < 1000:
        return f"{millis}ms"
    minutes, rest = divmod(millis, 60_000)
    told = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{told}"
    return f"{minutes}m{told}" if minutes else told
