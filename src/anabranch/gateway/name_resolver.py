"""`NameResolver`: addresses of hosts, each name looked up in a thread of its own.

The system's resolver may take half a minute to say that nobody answers for a name, and nobody can stop it. An event loop has a few threads
for that and everything else that takes long (`asyncio.to_thread`): some such names, and no other is looked up meanwhile.
"""

import asyncio
import contextlib
import socket
import threading
from functools import partial

from aiohttp.abc import AbstractResolver, ResolveResult

__all__ = ["NameResolver"]

_Asked = tuple[str, int, socket.AddressFamily]
_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


class NameResolver(AbstractResolver):
    """For one event loop. Who asks for what is looked up already waits for the same thread, so that each name has one at most.

    Args:
        keep_s: seconds that addresses are good for once they were found; 0 where whoever asks keeps them.
    """

    def __init__(self, *, keep_s: float = 0.0) -> None:
        self._keep_s = keep_s
        self._looking: dict[_Asked, asyncio.Future[list[ResolveResult]]] = {}
        # Until when by the loop's clock, and what; those first that were found first.
        self._found: dict[_Asked, tuple[float, list[ResolveResult]]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """See `AbstractResolver`. Raises OSError. One that is cancelled leaves the others their thread."""
        asked = host, port, family
        self._drop_old()
        if asked in self._found:
            return list(self._found[asked][1])
        looking = self._looking.get(asked)
        if looking is None:
            looking = self._looking[asked] = _begun(asked)
            looking.add_done_callback(partial(self._ended, asked))
        return list(await asyncio.shield(looking))

    def _ended(self, asked: _Asked, looking: "asyncio.Future[list[ResolveResult]]") -> None:
        del self._looking[asked]
        # Perhaps nobody waits any more: who comes next has it all the same.
        if not looking.cancelled() and looking.exception() is None and self._keep_s > 0:
            self._found[asked] = looking.get_loop().time() + self._keep_s, looking.result()

    def _drop_old(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._found and self._found[first := next(iter(self._found))][0] <= now:
            del self._found[first]

    async def close(self) -> None:
        """See `AbstractResolver`."""


def _begun(asked: _Asked) -> "asyncio.Future[list[ResolveResult]]":
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[ResolveResult]] = loop.create_future()

    def tell(found: list[ResolveResult] | Exception) -> None:
        if future.done():
            return
        if isinstance(found, Exception):
            future.set_exception(found)
        else:
            future.set_result(found)

    def look() -> None:
        try:
            found: list[ResolveResult] | Exception = _addresses(*asked)
        except Exception as error:
            found = error
        with contextlib.suppress(RuntimeError):
            # Where the loop has ended nobody waits.
            loop.call_soon_threadsafe(tell, found)

    # A process that ends does not wait for it.
    threading.Thread(target=look, name=f"look up {asked[0]}", daemon=True).start()
    return future


def _addresses(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    found = []
    for kind, _, proto, _, address in socket.getaddrinfo(
        host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    ):
        number = str(address[0])
        if kind == socket.AF_INET6 and len(address) == 4 and address[3]:
            # Of this machine's links, which of them.
            number, _ = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        found.append(ResolveResult(hostname=host, host=number, port=port, family=kind, proto=proto, flags=_NUMERIC))
    return found
