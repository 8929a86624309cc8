"""`Gate`: who may reach a server that listens on this machine only: programs of this machine, and no web page that it shows."""

from collections.abc import Mapping, Sequence

from anabranch.sockets import is_local, name_of
from anabranch.web.api_error import ApiError
from anabranch.web.senders import is_meant, is_same_origin, told

ANY = "*"


class Gate:
    """See the module and `senders`; a server that others can reach lets everybody through, and keys say who they are.

    Args:
        host: that the server listens at.
        hosts: names beside those of this machine that a request may be for; ``*`` for all.
        origins: of pages that may call; ``*`` for all.
        part: of the config that these two are in, with a dot behind; "" for none.
    """

    def __init__(self, host: str, hosts: Sequence[str], origins: Sequence[str], part: str = "") -> None:
        self._is_closed = is_local(host) and ANY not in hosts
        self._hosts, self._origins = frozenset(name.lower() for name in hosts), frozenset(origins)
        self._part = part

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises ApiError (403) for the headers of a request that is for another name, or of another page."""
        if not self._is_closed:
            return
        host, origin = told(headers, "host") or "", told(headers, "origin")
        if not is_meant(host, self._hosts):
            name = name_of(host) or "?"
            message = f"this server is for this machine, not for the host {name:.80}; {self._part}hosts allows names"
            raise ApiError(403, "forbidden_host", message)
        if not self._origins & {origin, ANY} and not is_same_origin(origin, host):
            raise ApiError(
                403,
                "forbidden_origin",
                f"pages of other origins may not call; {self._part}cors_origins allows them",
            )
