"""`run`: a server from its socket to its exit code.

The port is bound at once and answers 503 while the model is loaded. SIGTERM or SIGINT: no new requests, those under way end within
``drain_s``, the rest get an error; a second signal ends them now. An engine that has died too often ends the process.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable

from anabranch.errors import AnabranchError
from anabranch.serving.core.client import EngineClient, EngineInfo
from anabranch.serving.http.app import App, access
from anabranch.serving.http.config import HttpConfig
from anabranch.serving.http.frontend import Frontend
from anabranch.serving.http.reading import Reader
from anabranch.sockets import listening, url_of
from anabranch.web import heap
from anabranch.web.api_error import ApiError
from anabranch.web.places import room_for_files
from anabranch.web.server import BACKLOG, Server, Signals, runner

logger = logging.getLogger(__name__)

# Exit codes: all requests were answered, some were cut short, the engine is dead.
CLEAN, CUT, FAILED = 0, 1, 3

# For those who connected before the port was closed to be told.
GRACE_S = 0.05

# For error events to reach those who were cut short.
TELL_S = 1.0


def run(
    config: HttpConfig,
    make_engine: Callable[[], EngineClient],
    make_reader: Callable[[], Reader],
    *,
    on_bound: Callable[[str], None] = lambda url: None,
    on_ready: Callable[[str], None] = lambda url: None,
    on_info: Callable[[EngineInfo], None] = lambda info: None,
) -> int:
    """Serve until a signal or until the engine is given up; returns the exit code. Call it in the main thread.

    Args:
        config: of the server.
        make_engine, make_reader: see `Frontend`.
        on_bound: called with the URL when the port answers, if only with 503.
        on_ready: called with the URL when requests are taken.
        on_info: called before that with what the engine serves.

    Raises AnabranchError: the address cannot be used, or the engine cannot start.
    """
    _log_access(config)
    return runner()(_main(config, make_engine, make_reader, on_bound, on_ready, on_info))


def _log_access(config: HttpConfig) -> None:
    if config.access_log:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        access.handlers, access.propagate = [handler], False
        access.setLevel(logging.INFO)


async def _main(
    config: HttpConfig,
    make_engine: Callable[[], EngineClient],
    make_reader: Callable[[], Reader],
    on_bound: Callable[[str], None],
    on_ready: Callable[[str], None],
    on_info: Callable[[EngineInfo], None],
) -> int:
    frontend = Frontend(config, make_engine, make_reader)
    connections = room_for_files(config.limits.connections)
    if connections < config.limits.connections:
        logger.warning(
            "http.limits.connections is %d, but this process may open so few files that there is room for %d (ulimit -n)",
            config.limits.connections,
            connections,
        )
    app = App(frontend, connections)
    server = app.server()
    with listening(config.host, config.port) as socket, Signals() as signals:
        url = url_of(config.host, socket)
        listener = await asyncio.get_running_loop().create_server(server, sock=socket, backlog=BACKLOG)
        on_bound(url)
        starting = asyncio.create_task(frontend.start())
        try:
            await _first(starting, signals.stop)
            if starting.done():
                starting.result()
                assert frontend.info is not None, "it has started"
                on_info(frontend.info)
                heap.set_aside()
                on_ready(url)
                await _first(signals.stop, frontend.failed)
            else:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
            is_cut = await _drain(frontend, app, signals, config.drain_s)
        finally:
            listener.close()
            await asyncio.sleep(GRACE_S)
            await _shut(server)
            # It is being left; why it failed has been told.
            with contextlib.suppress(AnabranchError):
                await frontend.close()
    if frontend.failed.is_set():
        return FAILED
    return CUT if is_cut else CLEAN


async def _first(*things: asyncio.Event | asyncio.Task[None]) -> None:
    """Wait for the first of these events and tasks."""
    waits = {asyncio.create_task(thing.wait()) if isinstance(thing, asyncio.Event) else thing for thing in things}
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits - set(things):
        wait.cancel()


async def _drain(frontend: Frontend, app: App, signals: Signals, drain_s: float) -> bool:
    """Let requests under way end; returns whether some were cut short, here or by an engine that failed. The port still answers: 503."""
    cut_before = frontend.num_cut
    frontend.drain()
    clock = asyncio.get_running_loop().time
    end = clock() + drain_s
    while app.under_way and not signals.kill.is_set() and clock() < end and not frontend.failed.is_set():
        await asyncio.sleep(0.01)
    if not frontend.admission.in_flight:
        # All that was asked of the engine is made; who has not taken it yet gets no more of it.
        return app.is_giving or frontend.num_cut > cut_before
    frontend.cut(ApiError(503, "shutting_down", "the server was stopped before the answer was complete"))
    end = clock() + TELL_S
    while app.under_way and clock() < end:
        await asyncio.sleep(0.01)
    return True


async def _shut(server: Server) -> None:
    """Close connections; what is written to them gets out."""
    server.pre_shutdown()
    await server.shutdown(0.2)
    end = asyncio.get_running_loop().time() + TELL_S
    while server.connections and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.01)
