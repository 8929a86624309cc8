"""What the headers of a request tell of who sent it: a program of this machine, or a web page that its browser shows.

A page can send requests to any address, and by a name of its own that it lets mean 127.0.0.1 it would even read the answers (DNS
rebinding). Its requests say by which name they were sent (``Host``) and where they come from (``Origin``): no page can change that.
"""

from collections.abc import Collection

from anabranch.sockets import is_local, name_of


def is_meant(host: str, names: Collection[str] = ()) -> bool:
    """Whether a ``Host`` header names this machine, to this machine alone, or one of ``names`` (in small letters, without a port)."""
    name = name_of(host)
    return name is not None and (is_local(name) or name in names)


def is_same_origin(origin: str | None, host: str) -> bool:
    """Whether no page sent a request with this ``Origin`` and ``Host``, or one that came from the very server it is for."""
    return origin is None or origin.partition("://")[2].lower() == host.lower()
