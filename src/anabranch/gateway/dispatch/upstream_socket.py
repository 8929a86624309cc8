"""`UpstreamSocket`: one that gives what has come before it says that the other side has closed.

An upstream may refuse a call (413, 429, 401) before it has read all of it, and close: the rest of the call then meets a reset. An event
loop ends a connection at the first write that fails, whatever lies there to be read, and the refusal would be lost.
"""

import socket
from collections.abc import Iterable
from typing import Any

__all__ = ["UpstreamSocket", "upstream_socket"]


class UpstreamSocket(socket.socket):
    """A socket that never blocks, of which a write that is reset takes all, to nowhere, as long as there is something to read.

    Whoever reads on comes to the end, or to the error. For loops that write by these methods: asyncio's own.
    """

    def send(self, data: Any, flags: int = 0, /) -> int:
        """See `socket.socket.send`."""
        try:
            return super().send(data, flags)
        except ConnectionError:
            if not self._has_more():
                raise
            return memoryview(data).nbytes

    def sendmsg(self, buffers: Iterable[Any], *args: Any) -> int:
        """See `socket.socket.sendmsg`."""
        parts = list(buffers)
        try:
            return super().sendmsg(parts, *args)
        except ConnectionError:
            if not self._has_more():
                raise
            return sum(memoryview(part).nbytes for part in parts)

    def _has_more(self) -> bool:
        try:
            return bool(self.recv(1, socket.MSG_PEEK))
        except OSError:
            # Nothing has come, or the system has dropped it.
            return False


def upstream_socket(address: tuple[Any, ...]) -> socket.socket:
    """One for an address of `getaddrinfo`'s."""
    family, kind, protocol, _, _ = address
    return UpstreamSocket(family, kind, protocol)
