"""The process: it listens, obeys signals, and stops only when the requests under way are answered."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from anabranch.errors import AnabranchError
from anabranch.graph.serve.app import create_app
from anabranch.graph.serve.connections import Bounds, Config
from anabranch.graph.serve.limits import Limits
from anabranch.graph.serve.sources import Loaded, Sources
from anabranch.sockets import listening

logger = logging.getLogger(__name__)
BACKLOG = 2048


def run(
    sources: Sources,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    limits: Limits | None = None,
    token: str | None = None,
    watch_s: float | None = None,
    drain_s: float = 0.0,
    on_ready: Callable[[str, Loaded], None] = lambda url, loaded: None,
) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads the files. Call it in the main thread.

    On SIGTERM or SIGINT ``/readyz`` turns 503; after ``drain_s`` seconds the server stops to listen, answers the requests under way, and
    returns. The second signal ends it at once.

    Args:
        sources: what to serve.
        host: address to listen at; the default is seen from this machine only.
        port: 0 takes a free one.
        limits: as of `create_app`, as are ``token`` and ``watch_s``.
        token: see there.
        watch_s: see there.
        drain_s: how long to go on after a signal, for balancers that look at ``/readyz``.
        on_ready: called with the server's URL, and with what it has loaded, when it answers requests.

    Raises:
        AnabranchError: the files cannot be served, the address cannot be taken, or uvicorn is not installed.
    """
    limits = limits or Limits()
    with listening(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"
        failures: list[AnabranchError] = []

        def failed(error: AnabranchError) -> None:
            failures.append(error)
            server.should_exit = True

        app = create_app(
            sources,
            limits,
            token=token,
            host=host,
            watch_s=watch_s,
            on_ready=lambda loaded: on_ready(url, loaded),
            on_failure=failed,
        )
        app.state.bounds = bounds = Bounds(limits)
        config = Config(
            app,
            bounds,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            backlog=BACKLOG,
            timeout_graceful_shutdown=max(1, round(limits.stop_s)),
        )
        server = _Server(config, app, drain_s)
        server.run(sockets=[listener])
        if failures:
            raise failures[0]


class _Server(uvicorn.Server):
    """Uvicorn with our signals: it does not raise them again when it is done, so a stop that was asked for is no failure."""

    def __init__(self, config: uvicorn.Config, app: Any, drain_s: float) -> None:
        super().__init__(config)
        self._app, self._drain_s = app, drain_s
        self._reloads: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        wanted: dict[int, Callable[[], None]] = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop}
        if hasattr(signal, "SIGHUP"):
            wanted[signal.SIGHUP] = self._reload

        def handle(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(wanted[number])

        before = {number: signal.signal(number, handle) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        serving = getattr(self._app.state, "serving", None)
        if serving is None or serving.is_stopping:
            self.should_exit = self.force_exit = True
            return
        serving.is_stopping = True
        asyncio.get_running_loop().call_later(self._drain_s, setattr, self, "should_exit", True)

    def _reload(self) -> None:
        task = asyncio.get_running_loop().create_task(self._reload_now())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload_now(self) -> None:
        serving = getattr(self._app.state, "serving", None)
        if serving is None or serving.holder.current is None:
            # The first files are still being read.
            return
        try:
            new = await serving.holder.reload()
            logger.info("generation %d is served", new.generation)
        except AnabranchError as error:
            logger.warning("the files cannot be used, the old ones are still served: %s", error)
