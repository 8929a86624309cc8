"""The transport of a provider, whoever wrote it, as the dispatcher may trust it.

What it raises is an UpstreamError, whatever it was; nothing of it ends the process, or cancels whoever waits: each
call has a task of its own, until it is closed. To close it never fails.
"""

import asyncio
import logging
from itertools import islice
from typing import Any

from anabranch.gateway.dispatch.provider_fault import STATUSES, as_failure
from anabranch.gateway.logged_error import raised
from anabranch.gateway.providers.provider import Failure, Headers, HttpCall, Reply, Transport, UpstreamError, garbage
from anabranch.web.own_task import OwnTask
from anabranch.web.turns import plainly

__all__ = ["PlainTransport", "plain_transport"]

logger = logging.getLogger(__name__)

# Of one answer; servers send some dozens.
HEADERS = 1000


def plain_transport(made: Transport, http: Transport, name: str) -> Transport:
    """What carries the calls of deployment ``name``: ``http`` itself, which is ours, or what its provider ``made`` in place of it."""
    return made if made is http else PlainTransport(made, name)


class PlainTransport:
    """See the module.

    Args:
        inner: of the provider.
        name: of the deployment.
    """

    def __init__(self, inner: Transport, name: str) -> None:
        self._inner, self._name = inner, name

    async def open(self, call: HttpCall) -> Reply:
        """Send, and wait for status and headers. Raises UpstreamError."""
        own = OwnTask()
        opening = own.begin(lambda: self._inner.open(call))
        try:
            await asyncio.wait({opening})
            return _PlainReply(opening.result(), self._name, own)
        except asyncio.CancelledError:
            # One that goes on all the same when it is cancelled brings a reply to nobody.
            await self._ended(own, opening)
            raise
        except Exception as error:
            await self._ended(own, opening)
            raise _failed(error, self._name) from None

    async def _ended(self, own: OwnTask, opening: "asyncio.Future[Reply]") -> None:
        def drop() -> None:
            if _has_come(opening):
                _close(opening.result(), self._name)

        # There may be nothing to drop before.
        own.end(drop, waits=True)
        await own.ended()


def _has_come(future: "asyncio.Future[Any]") -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


class _PlainReply:
    """An answer under way, of others."""

    __slots__ = ("_broke", "_is_closed", "_name", "_own", "_reading", "_reply", "headers", "status")

    def __init__(self, reply: Reply, name: str, own: OwnTask) -> None:
        self._reply, self._name, self._own = reply, name, own
        # Goes on where whoever waits for it is cancelled, as at each heartbeat: the next who asks has what it brings.
        self._reading: asyncio.Future[bytes] | None = None
        # What it failed with where nobody waited: whoever waits next is told, as it may say so once alone.
        self._broke: UpstreamError | None = None
        self._is_closed = False
        self.status: int = plainly(lambda: _status(reply.status))
        self.headers: Headers = plainly(lambda: _headers(reply.headers))

    def read_ready(self) -> bytes:
        """What has come, without waiting. Raises UpstreamError."""
        if self._is_closed:
            return b""
        if self._broke is not None:
            raise self._broke
        data, reading = b"", self._reading
        try:
            if reading is not None and not self._own.withdraw(reading):
                if not (_has_come(reading) and (data := _bytes(reading.result()))):
                    # It reads; and its end, and what it fails with, are told to who waits.
                    return b""
            self._reading = None
            return data + _bytes(plainly(self._reply.read_ready))
        except Exception as error:
            self._broke = _failed(error, self._name)
        if not data:
            raise self._broke
        return data

    async def read_some(self) -> bytes:
        """What comes next; empty at the end, and once it is closed. Raises UpstreamError."""
        if self._is_closed:
            return b""
        if self._broke is not None:
            raise self._broke
        reading = self._reading = self._reading or self._own.begin(self._reply.read_some)
        await asyncio.wait({reading})
        self._reading = None
        try:
            return _bytes(reading.result())
        except Exception as error:
            raise _failed(error, self._name) from None

    def close(self) -> None:
        """Drop the connection if the end has not been reached. A second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._own.end(lambda: _close(self._reply, self._name))


def _failed(error: Exception, name: str) -> UpstreamError:
    if isinstance(error, TimeoutError):
        # Its own: the time that whoever waits has is over by a cancel.
        return UpstreamError(Failure(kind="timeout", message=f"the transport of {name} took too long"))
    return as_failure(error, name)


def _close(reply: Any, name: str) -> None:
    try:
        plainly(lambda: reply.close())
    except Exception as error:
        logger.warning("a connection of deployment %s could not be closed: %s", name, raised(error))


def _status(given: Any) -> int:
    """Raises UpstreamError for a number that is none."""
    status = int(given)
    if status not in STATUSES:
        raise garbage(f"its transport gave a status that is none of {STATUSES[0]} to {STATUSES[-1]}")
    return status


def _bytes(given: Any) -> bytes:
    """Raises UpstreamError for what is none."""
    if isinstance(given, bytes):
        return given
    if isinstance(given, bytearray | memoryview):
        return bytes(given)
    raise garbage(f"its transport gave {type(given).__name__} where bytes are due")


class PlainHeaders(dict[str, str]):
    """By names in small letters, that are found however they are spelt."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name.lower() if isinstance(name, str) else name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        return super().get(name.lower(), default)


def _headers(given: Any) -> PlainHeaders:
    """Of a name that comes again the first."""
    found = PlainHeaders()
    for name, value in islice(given.items(), HEADERS):
        found.setdefault(str(name).lower(), str(value))
    return found
