"""Uvicorn's connections with bounds: how many there are, how long one may say nothing whole, and how slowly it may read.

Uvicorn itself closes a connection between two requests after some seconds, but not one that has said nothing yet, or half of something; and
what nobody reads stays in its transports for ever.
"""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from anabranch.graph.serve.limits import Limits
from anabranch.graph.serve.text import CONNECTION
from anabranch.web.places import Places, room_for_files
from anabranch.web.readers import Readers, Watched

if TYPE_CHECKING:
    # One of two, which are alike.
    from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol
else:
    Protocol = AutoHTTPProtocol

# Of the connections that others leave, so many are for one address.
SHARE = 0.75

# For a connection beyond the limit to ask something, and for any to count as idle that has said nothing whole.
BEYOND_S = 1.0

# Bytes a second that who is behind takes at least.
RATE = 4 << 10


@dataclass
class Bounds:
    """What the connections of one server share."""

    limits: Limits
    readers: Readers = field(init=False)
    places: "Places[Connection]" = field(init=False)

    def __post_init__(self) -> None:
        self.readers = Readers(self.limits.stall_s, RATE, self.limits.answers_bytes)
        self.places = Places(room_for_files(self.limits.connections), SHARE)


class Config(uvicorn.Config):
    """Uvicorn's, which each connection is given, with our bounds."""

    def __init__(self, app: Any, bounds: Bounds, **settings: Any) -> None:
        super().__init__(app, http=Connection, **settings)
        self.bounds = bounds


class Connection(Protocol):
    """See the module.

    Attributes:
        is_beyond: there was no place for it: it may ask whether the server lives, and is closed.
    """

    def __init__(self, config: uvicorn.Config, *arguments: Any, **settings: Any) -> None:
        super().__init__(config, *arguments, **settings)
        self._bounds: Bounds = config.bounds  # type: ignore[attr-defined]
        self._asked, self.app = self.app, self._ask
        self._watched: Watched | None = None
        self._silent: asyncio.TimerHandle | None = None
        self._began, self._num_asked = self.loop.time(), 0
        self.is_beyond = False

    async def _ask(self, scope: Any, receive: Any, send: Any) -> None:
        """A request has come whole but for its body."""
        self._wait(None)
        self._num_asked += 1
        extensions = {**(scope.get("extensions") or {}), CONNECTION: self}
        await self._asked({**scope, "extensions": extensions}, receive, send)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Someone has connected."""
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._watched = self._bounds.readers.enter(transport, address)
        super().connection_made(cast(asyncio.Transport, self._watched))
        self.is_beyond = not self._bounds.places.enter(self, address)
        stall_s = self._bounds.limits.stall_s
        self._wait(min(stall_s, BEYOND_S) if self.is_beyond else stall_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """They have gone."""
        self._bounds.places.leave(self)
        self._wait(None)
        if self._watched is not None:
            self._watched.is_lost()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """The next request may come."""
        super().on_response_complete()
        self._wait(self._bounds.limits.stall_s)

    def pause_writing(self) -> None:
        """What is written is not read as fast."""
        super().pause_writing()
        if self._watched is not None:
            self._watched.is_behind()

    def resume_writing(self) -> None:
        """It was read."""
        super().resume_writing()
        if self._watched is not None:
            self._watched.has_caught_up()

    @property
    def is_idle(self) -> bool:
        """Whether nothing would be lost with it: it is between two requests, or has been open for a while and said nothing whole."""
        is_waiting = self.cycle is None or self.cycle.response_complete
        return is_waiting and (self._num_asked > 0 or self.loop.time() - self._began > BEYOND_S)

    def force_close(self) -> None:
        """Close it now, whatever was not read."""
        self.transport.abort()

    def _wait(self, seconds: float | None) -> None:
        """For a request, no longer than this; None for not any more."""
        if self._silent is not None:
            self._silent.cancel()
        self._silent = None if seconds is None else self.loop.call_later(seconds, self._close_silent)

    def _close_silent(self) -> None:
        self._silent = None
        # What was answered may still be read: `Readers` sees to that.
        self.transport.close()
