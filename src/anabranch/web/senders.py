"""What the headers of a request tell of who sent it: a program of this machine, or a web page that its browser shows.

A page can send requests to any address, and by a name of its own that it lets mean 127.0.0.1 it would even read the answers (DNS
rebinding). Its requests say by which name they were sent (``Host``) and where they come from (``Origin``): no page can change that.
"""

from collections.abc import Collection, Mapping
from typing import Any

from anabranch.sockets import is_local, name_of


def told(headers: Mapping[str, str], name: str) -> str | None:
    """What a request says in a header; None if nothing.

    One that it has several times is as one with commas in between (RFC 9110, section 5.3): no origin, nor a host, and none of them is
    left out.

    Args:
        headers: with ``getall`` (aiohttp) or ``getlist`` (Starlette) where a name may be there several times.
        name: in small letters.
    """
    several: Any = getattr(headers, "getall", None) or getattr(headers, "getlist", None)
    if several is None:
        return headers.get(name)
    return ", ".join(several(name)) if name in headers else None


def is_meant(host: str, names: Collection[str] = ()) -> bool:
    """Whether a ``Host`` header names this machine, to this machine alone, or one of ``names`` (in small letters, without a port)."""
    name = name_of(host)
    return name is not None and (is_local(name) or name in names)


def is_same_origin(origin: str | None, host: str) -> bool:
    """Whether no page sent a request with this ``Origin`` and ``Host``, or one that came from the very server it is for."""
    return origin is None or origin.partition("://")[2].lower() == host.lower()
