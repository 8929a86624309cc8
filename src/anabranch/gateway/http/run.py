"""`run`: a gateway from a config file to its end."""

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anabranch.gateway.config import GatewayConfig, default_config, load_config
from anabranch.gateway.config.needs import inside
from anabranch.gateway.config.source import told_where
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.http.peers import RELOAD_S, Peers, Seat, end_with_supervisor
from anabranch.gateway.store.opening import check_place
from anabranch.sockets import listening, url_of
from anabranch.web import heap
from anabranch.web.places import Places, room_for_files
from anabranch.web.server import BACKLOG, Connection, Server, Signals, reload_on, runner
from anabranch.web.turns import in_thread

logger = logging.getLogger(__name__)
SWITCH_S = 1e-3

# Connections at the port of operators, where it is one of its own.
OPERATORS = 128
Ready = Callable[[str, str, GatewayConfig], None]
Loading = Callable[[str, list[str]], None]


def load(
    path: Path | None, store: str | None = None, router: Path | None = None, *, reads_models: bool = False
) -> GatewayConfig:
    """The config of a file, or the one that needs none. Raises ConfigError with the line that is wrong.

    ``store`` takes the place of the config's; ``auto`` becomes what is recommended of the routers in ``router``; ``reads_models``: see
    `load_config`.
    """
    config = default_config() if path is None else load_config(path, reads_models=reads_models)
    if router is not None:
        from anabranch.gateway.config.recommended import with_recommended

        config = with_recommended(config, router)
    return config if store is None else config.replace(store=store)


def try_out(config: GatewayConfig, path: Path | None = None) -> None:
    """Make all that `run` makes of a config, but for models that it loads, what it listens at and writes to.

    Raises AnabranchError, as `run` would, with the line of ``path`` that is wrong.
    """
    check_place(config.store)

    async def made() -> None:
        await Gateway(config).runtime.close()

    with told_where(path):
        asyncio.run(made())


def run(
    path: Path | None,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    store: str | None = None,
    router: Path | None = None,
    drain_s: float = 30.0,
    on_ready: Ready = lambda url, admin_url, config: None,
    on_loading: Loading = lambda url, names: None,
    seat: Seat | None = None,
    admin_port: int | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. Call it in the main thread.

    Args:
        path: of the config; None for the built-in one.
        host: address to listen at; the default is seen from this machine only.
        port: 0 takes a free one.
        store: in place of the config's.
        router: folder of fitted routers whose recommended one ``auto`` is to be; None leaves that to the config.
        drain_s: how long requests under way have to end after a signal.
        on_ready: called with the URL for requests, the one for operators and the config when both answer, and models are loaded.
        on_loading: called before that with the URL, and the deployments whose models run in this process, if there are such.
        seat: which worker of several this process is; None for the only one.
        admin_port: in place of the config's.

    Raises AnabranchError: the config, the store or the address cannot be used.
    """
    config = load(path, store, router)
    logging.getLogger("anabranch").setLevel(config.log.level.upper())
    # Threads that read large bodies give way to the loop sooner than after the 5 ms that are Python's own.
    sys.setswitchinterval(SWITCH_S)
    place = Place(host, port, config.admin.port if admin_port is None else admin_port, seat)
    again = partial(load, path, store, router)
    runner()(_main(config, place, again, path, drain_s, on_ready, on_loading))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process serves.

    Attributes:
        host, port: of requests.
        admin_port: of operators; None where they share the port of requests.
        seat: which worker it is; None for the only one.
    """

    host: str
    port: int
    admin_port: int | None
    seat: Seat | None

    def listening(self, stack: contextlib.AsyncExitStack, host: str, port: int) -> socket.socket:
        """A bound socket, until the end of ``stack``."""
        return stack.enter_context(listening(host, port, shared=self.seat is not None))


class _Reload:
    """Reads the config again, in this process and, as an operator wants it, in the other workers."""

    def __init__(self, gateway: Gateway, load_again: Callable[[], GatewayConfig], path: Path | None) -> None:
        self._gateway, self._load, self._path = gateway, load_again, path
        self.peers: Peers | None = None

    async def here(self) -> None:
        """Raises AnabranchError, and the old config stays."""
        # Whatever the config says now: the log's file may have been moved away.
        self._gateway.observers.reopen()
        new = await in_thread(self._load)
        with told_where(self._path):
            await self._gateway.reload(new)
        heap.set_aside()
        logging.getLogger("anabranch").setLevel(new.log.level.upper())

    async def everywhere(self) -> None:
        """Here first: where it cannot be used, no worker is asked."""
        await self.here()
        if self.peers is not None:
            await self.peers.ask("reload", most_s=RELOAD_S)


def _peers(gateway: Gateway, seat: Seat, reload: _Reload) -> Peers:
    async def metrics(of: str) -> bytes:
        return gateway.metrics_text()

    async def read_again(of: str) -> bytes:
        await reload.here()
        return b""

    async def clear(of: str) -> bytes:
        return str(gateway.caches.delete(of) if of else gateway.caches.clear()).encode()

    return Peers(seat, {"metrics": metrics, "reload": read_again, "clear": clear})


async def _main(
    config: GatewayConfig,
    place: Place,
    load_again: Callable[[], GatewayConfig],
    path: Path | None,
    drain_s: float,
    on_ready: Ready,
    on_loading: Loading,
) -> None:
    admin = config.admin
    with told_where(path):
        gateway = Gateway(config)
    reload = _Reload(gateway, load_again, path)
    on_reload = None if path is None else reload.everywhere
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        signals = stack.enter_context(Signals())
        listener = place.listening(stack, place.host, place.port)
        with told_where(path):
            await gateway.start(loads=False)
        tasks = [loop.create_task(reload_on(signals.reload, reload.here))]
        if place.seat is not None:
            reload.peers = await stack.enter_async_context(_peers(gateway, place.seat, reload).serving())
            tasks.append(loop.create_task(end_with_supervisor(signals.stop)))
        apps = [
            App(
                gateway,
                admin=place.admin_port is None,
                host=place.host,
                places=_places(config),
                on_reload=on_reload,
                peers=reload.peers,
            )
        ]
        sockets, urls = [listener], [url_of(place.host, listener)]
        if place.admin_port is not None:
            sockets.append(place.listening(stack, admin.host, place.admin_port))
            urls.append(url_of(admin.host, sockets[-1]))
            theirs: Places[Connection] = Places(OPERATORS)
            apps.append(App(gateway, public=False, places=theirs, on_reload=on_reload, peers=reload.peers))
        servers = [app.server() for app in apps]
        listeners = [
            await loop.create_server(server, sock=bound, backlog=BACKLOG)
            for server, bound in zip(servers, sockets, strict=True)
        ]
        # The other models answer meanwhile, and so does who asks whether this process lives.
        loading = loop.create_task(gateway.load())
        tasks.append(loading)
        if found := inside(config):
            on_loading(urls[0], [one.name for one in found])
        try:
            await _first(loading, signals.stop)
            if loading.done():
                with told_where(path):
                    loading.result()
                heap.set_aside()
                on_ready(urls[0], urls[-1], config)
                await signals.stop.wait()
        finally:
            for app in apps:
                app.is_stopping = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await _drain(gateway, listeners, servers, signals, drain_s)
            await gateway.stop()


def _places(config: GatewayConfig) -> Places[Connection]:
    """For the connections of those who send requests: as many as the config says, or as this process may open files for.

    A request that is under way has a connection to a provider beside its own.
    """
    limits = config.limits
    room = room_for_files(limits.connections + limits.in_flight + OPERATORS) - OPERATORS
    connections = max(1, min(limits.connections, max(room - limits.in_flight, room // 2)))
    if connections < limits.connections:
        logger.warning(
            "limits.connections is %d, but this process may open so few files that there is room for %d (ulimit -n)",
            limits.connections,
            connections,
        )
    return Places(connections, limits.address_share)


async def _first(task: asyncio.Task[None], event: asyncio.Event) -> None:
    """Wait until the task is done or the event is set."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def _drain(
    gateway: Gateway, listeners: list[asyncio.Server], servers: list[Server], signals: Signals, drain_s: float
) -> None:
    """Take no new connections, drop idle ones, and wait for requests under way; a second signal ends the wait."""
    for listener in listeners:
        listener.close()
    for server in servers:
        server.pre_shutdown()
    end = asyncio.get_running_loop().time() + drain_s
    while gateway.in_flight and not signals.kill.is_set() and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.02)
    for server in servers:
        await server.shutdown(0.2)
