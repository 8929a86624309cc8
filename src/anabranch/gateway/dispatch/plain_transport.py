"""The transport of a provider, whoever wrote it, as the dispatcher may trust it.

What it raises is an UpstreamError, whatever it was; nothing of it ends the process, or cancels whoever waits:
each call of it has a task of its own. To close it never fails.
"""

import logging
from itertools import islice
from typing import Any

from anabranch.gateway.dispatch.provider_fault import STATUSES, as_failure
from anabranch.gateway.logged_error import raised
from anabranch.gateway.providers.provider import Failure, Headers, HttpCall, Reply, Transport, UpstreamError, garbage
from anabranch.web.turns import in_task, plainly

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
        try:
            # One that goes on all the same when it is cancelled brings it to nobody.
            reply = await in_task(lambda: self._inner.open(call), unwanted=lambda reply: _close(reply, self._name))
        except Exception as error:
            raise _failed(error, self._name) from None
        try:
            return _PlainReply(reply, self._name)
        except Exception as error:
            _close(reply, self._name)
            raise _failed(error, self._name) from None


class _PlainReply:
    """An answer under way, of others."""

    __slots__ = ("_name", "_reply", "headers", "status")

    def __init__(self, reply: Reply, name: str) -> None:
        self._reply, self._name = reply, name
        self.status: int = plainly(lambda: _status(reply.status))
        self.headers: Headers = plainly(lambda: _headers(reply.headers))

    def read_ready(self) -> bytes:
        """What has come, without waiting. Raises UpstreamError."""
        try:
            return _bytes(plainly(self._reply.read_ready))
        except Exception as error:
            raise _failed(error, self._name) from None

    async def read_some(self) -> bytes:
        """What comes next; empty at the end. Raises UpstreamError."""
        try:
            return _bytes(await in_task(self._reply.read_some))
        except Exception as error:
            raise _failed(error, self._name) from None

    def close(self) -> None:
        """Drop the connection if the end has not been reached."""
        _close(self._reply, self._name)


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
