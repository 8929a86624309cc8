"""The process: sockets, signals, bounds of connections, and a stop that lets requests under way end.

SIGTERM, SIGINT   set `Signals.stop`: no new requests, those under way are answered; a second one sets `Signals.kill`: end now
SIGHUP            sets `Signals.reload`
"""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from anabranch.errors import AnabranchError
from anabranch.web.api_error import ApiError
from anabranch.web.places import Places
from anabranch.web.readers import PATIENCE_S, Readers, Watched
from anabranch.web.turns import words

T = TypeVar("T")
logger = logging.getLogger(__name__)
BACKLOG = 2048
KEEP_ALIVE_S = 75.0
# For a request of a connection beyond the limit, and for one to say something where others wait for its place.
BEYOND_S = 1.0
HEADER_BYTES, NUM_HEADERS = 16 << 10, 100

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Refuse = Callable[[int, str], web.Response]


class Connection(RequestHandler):
    """aiohttp's, but the first request's headers have to come soon, what is no HTTP is refused in OpenAI's form, and answers are read."""

    __slots__ = ("_began", "_header_timeout_s", "_late", "_places", "_readers", "_refuse", "_watched", "is_beyond")

    def __init__(
        self,
        manager: Any,
        refuse: Refuse,
        header_timeout_s: float,
        places: Places["Connection"],
        readers: Readers,
        **settings: Any,
    ) -> None:
        super().__init__(manager, **settings)
        self._refuse, self._header_timeout_s, self._places = refuse, header_timeout_s, places
        self._readers = readers
        self._watched: Watched | None = None
        self._late: asyncio.TimerHandle | None = None
        self._began = self._loop.time()
        # There was no place for it: it may ask whether the server lives, and is closed.
        self.is_beyond = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Someone has connected."""
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._watched = self._readers.enter(transport, address)
        super().connection_made(cast(asyncio.BaseTransport, self._watched))
        self.is_beyond = not self._places.enter(self, address)
        patience_s = min(self._header_timeout_s, BEYOND_S) if self.is_beyond else self._header_timeout_s
        self._late = self._loop.call_later(patience_s, self._close_silent)

    def connection_lost(self, exc: BaseException | None) -> None:
        """They have gone."""
        self._places.leave(self)
        if self._watched is not None:
            self._watched.is_lost()
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

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
        is_waiting = self._current_request is None and not self._messages
        return is_waiting and (self._request_count > 0 or self._loop.time() - self._began > BEYOND_S)

    def _close_silent(self) -> None:
        if self._request_count == 0:
            self.force_close()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What aiohttp answers itself: headers that are too large or no HTTP, and bugs."""
        if isinstance(exc, ConnectionError):
            # They have gone, and what is answered is read by nobody.
            gone = web.Response(status=499)
            gone.force_close()
            return gone
        if status >= 500:
            logger.error("a bug: %s %.80s", request.method, request.path, exc_info=exc)
        response = self._refuse(status, message or "")
        response.force_close()
        return response


def is_beyond(request: web.BaseRequest) -> bool:
    """Whether it came on a connection that there was no place for."""
    return isinstance(request.protocol, Connection) and request.protocol.is_beyond


def check_place(request: web.BaseRequest) -> None:
    """Raises ApiError (503) for a request on a connection that there was no place for."""
    if is_beyond(request):
        message = "too many connections are open, in all or from your address; try again in 1 s"
        headers = {"Retry-After": "1", "x-should-retry": "true", "connection": "close"}
        raise ApiError(503, "too_many_connections", message, headers=headers)


class Server(web.Server):
    """A listener's connections.

    Args:
        handler: answers requests.
        refuse: answers what is no HTTP.
        header_timeout_s: the first request's head has to come within it.
        places: for how many there are; None for as many as come.
        stall_s: who is behind with reading and takes less than a kibibyte a second for so long is cut off, see `Readers`.
    """

    def __init__(
        self,
        handler: Handler,
        refuse: Refuse,
        header_timeout_s: float,
        places: Places[Connection] | None = None,
        stall_s: float = PATIENCE_S,
    ) -> None:
        super().__init__(handler, handler_cancellation=True)
        self._readers = Readers(stall_s)
        self._refuse, self._header_timeout_s = refuse, header_timeout_s
        self._places: Places[Connection] = Places(None) if places is None else places

    def __call__(self) -> RequestHandler:
        """A new connection."""
        connection = Connection(
            self,
            self._refuse,
            self._header_timeout_s,
            self._places,
            self._readers,
            loop=self._loop,
            access_log=None,
            keepalive_timeout=KEEP_ALIVE_S,
            max_line_size=HEADER_BYTES,
            max_field_size=HEADER_BYTES,
            max_headers=NUM_HEADERS,
            auto_decompress=False,
            lingering_time=0.5,
        )
        return connection


class Signals:
    """Set by the signals of the process, as events of the running loop."""

    def __init__(self) -> None:
        self.stop, self.kill, self.reload = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def __enter__(self) -> "Signals":
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, self.reload.set)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            if hasattr(signal, name):
                loop.remove_signal_handler(getattr(signal, name))

    def _stop(self) -> None:
        (self.kill if self.stop.is_set() else self.stop).set()


async def until(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether the event came within this time."""
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return False
    return True


async def reload_on(event: asyncio.Event, reload: Callable[[], Awaitable[None]]) -> None:
    """Each time the event is set, reload; a mistake in the new config is logged, and nothing changes."""
    while True:
        await event.wait()
        event.clear()
        try:
            await reload()
            logger.warning("the config was read again and is in use")
        except AnabranchError as error:
            logger.error("the config cannot be used, the old one stays: %s", words(error))
        except Exception:  # a bug of ours, which must not end what works
            logger.exception("the config could not be read again, the old one stays")


def runner() -> Callable[[Coroutine[Any, Any, T]], T]:
    """uvloop's where it is installed: a request takes less of the processor there."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run
