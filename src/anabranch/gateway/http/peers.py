"""`Peers`: the workers of one gateway, which are processes on one port, talk to each other over Unix sockets in a folder of their own.

A scrape of ``/metrics`` or a change by an operator comes to one of them, whichever took the connection, and is for all.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web

from anabranch.errors import AnabranchError
from anabranch.gateway.logged_error import words

logger = logging.getLogger(__name__)
ANSWER_S = 2.0

# A config is read, and a router may be loaded.
RELOAD_S = 60.0

# Name and argument -> answer.
Told = Callable[[str], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Seat:
    """Which of the workers a process is.

    Attributes:
        index: from 0.
        num: of all.
        folder: of their sockets, which nobody else may enter.
    """

    index: int
    num: int
    folder: Path

    def socket(self, index: int) -> Path:
        """Of a worker."""
        return self.folder / f"{index}.sock"


class PeerError(AnabranchError):
    """Another worker did not do what it was asked."""


class Peers:
    """The other workers.

    Args:
        seat: of this one.
        routes: what others may ask of this one: by name, called with an argument, which may be "".
    """

    def __init__(self, seat: Seat, routes: Mapping[str, Told]) -> None:
        self.seat, self._routes = seat, routes

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Peers"]:
        """Answer the others until the end of the block."""
        path = self.seat.socket(self.seat.index)
        # Of one that has died.
        path.unlink(missing_ok=True)
        server = web.Server(self._answer)
        listener = await asyncio.get_running_loop().create_unix_server(server, path)
        try:
            yield self
        finally:
            listener.close()
            await server.shutdown(0.2)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        told = self._routes.get(request.path.removeprefix("/"))
        if told is None:
            return web.Response(status=404)
        try:
            return web.Response(body=await told(request.query.get("of", "")))
        except AnabranchError as error:
            return web.Response(status=409, text=words(error))

    async def ask(self, name: str, of: str = "", *, most_s: float = ANSWER_S) -> dict[int, bytes]:
        """What the others answer, by their index. One that is not there now, or does not answer in time, is left out.

        Raises PeerError if one refuses.
        """
        others = [index for index in range(self.seat.num) if index != self.seat.index]
        answers = await asyncio.gather(*(self._asked(index, name, of, most_s) for index in others))
        return {index: answer for index, answer in zip(others, answers, strict=True) if answer is not None}

    async def _asked(self, index: int, name: str, of: str, most_s: float) -> bytes | None:
        connector = aiohttp.UnixConnector(str(self.seat.socket(index)))
        timeout = aiohttp.ClientTimeout(total=most_s)
        try:
            async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
                async with session.post(f"http://worker/{name}", params={"of": of}) as response:
                    body = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            logger.warning("worker %d does not answer: %s", index, type(error).__name__)
            return None
        if response.status != 200:
            raise PeerError(f"worker {index}: {body.decode('utf-8', 'replace')[:500] or response.status}")
        return body


async def end_with_supervisor(stop: asyncio.Event) -> None:
    """Set ``stop`` when stdin ends: whoever started this process is gone."""
    reader, loop = asyncio.StreamReader(), asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    while await reader.read(4096):
        pass
    logger.error("the supervisor is gone; this worker ends")
    stop.set()
