"""`Gate`: who may reach a server that listens on this machine only: programs of this machine, and no web page that it shows.

A page can send requests to any address, and by a name of its own that it lets mean 127.0.0.1 it would even read the answers (DNS
rebinding). Its requests say where they come from (``Origin``) and by which name they were sent (``Host``).
"""

from aiohttp import web

from anabranch.serving.http.config import HttpConfig
from anabranch.sockets import is_local, name_of
from anabranch.web.api_error import ApiError


class Gate:
    """See the module; a server that others can reach lets everybody through, and keys say who they are.

    Args:
        config: of the server.
    """

    def __init__(self, config: HttpConfig) -> None:
        self._is_closed = is_local(config.host) and "*" not in config.hosts
        self._hosts = frozenset(host.lower() for host in config.hosts)
        self._origins = frozenset(config.cors_origins)

    def check(self, request: web.BaseRequest) -> None:
        """Raises ApiError (403) for a request that is for another name, or of another page."""
        if not self._is_closed:
            return
        host = request.headers.get("host", "")
        name = name_of(host)
        if name is None or not (is_local(name) or name in self._hosts):
            message = f"this server is for this machine, not for the host {name or '?':.80}; http.hosts allows names"
            raise ApiError(403, "forbidden_host", message)
        origin = request.headers.get("origin")
        if origin is None or self._origins & {origin, "*"}:
            return
        if origin.partition("://")[2].lower() != host.lower():
            raise ApiError(
                403, "forbidden_origin", "pages of other origins may not call; http.cors_origins allows them"
            )
