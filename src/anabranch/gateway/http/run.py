"""`run`: a gateway from a config file to its end."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from anabranch.gateway.config import GatewayConfig, default_config, load_config
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.store.store import check_place
from anabranch.sockets import listening, url_of
from anabranch.web.server import BACKLOG, Server, Signals, reload_on, runner

logger = logging.getLogger(__name__)
SWITCH_S = 1e-3
Ready = Callable[[str, str, GatewayConfig], None]


def load(path: Path | None, store: str | None = None, router: Path | None = None) -> GatewayConfig:
    """The config of a file, or the one that needs none. Raises ConfigError with the line that is wrong.

    ``store`` takes the place of the config's; ``auto`` becomes what is recommended of the routers in ``router``.
    """
    config = default_config() if path is None else load_config(path)
    if router is not None:
        from anabranch.gateway.config.recommended import with_recommended

        config = with_recommended(config, router)
    return config if store is None else config.replace(store=store)


def try_out(config: GatewayConfig) -> None:
    """Make all that `run` makes of a config, but for what it listens at and writes to. Raises AnabranchError, as `run` would."""
    check_place(config.store)

    async def made() -> None:
        await Gateway(config).runtime.close()

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
) -> None:
    """Serve until SIGTERM or SIGINT. Call it in the main thread.

    Args:
        path: of the config; None for the built-in one.
        host: address to listen at; the default is seen from this machine only.
        port: 0 takes a free one.
        store: in place of the config's.
        router: folder of fitted routers whose recommended one ``auto`` is to be; None leaves that to the config.
        drain_s: how long requests under way have to end after a signal.
        on_ready: called with the URL for requests, the one for operators and the config when both answer.

    Raises AnabranchError: the config, the store or the address cannot be used.
    """
    config = load(path, store, router)
    logging.getLogger("anabranch").setLevel(config.log.level.upper())
    # Threads that read large bodies give way to the loop sooner than after the 5 ms that are Python's own.
    sys.setswitchinterval(SWITCH_S)
    main = _main(config, path, host, port, lambda: load(path, store, router), drain_s, on_ready)
    runner()(main)


async def _main(
    config: GatewayConfig,
    path: Path | None,
    host: str,
    port: int,
    load_again: Callable[[], GatewayConfig],
    drain_s: float,
    on_ready: Ready,
) -> None:
    admin = config.admin
    is_apart = admin.port is not None
    gateway = Gateway(config)

    async def reload() -> None:
        # Whatever the config says now: the file may have been moved away.
        gateway.observers.reopen()
        new = await asyncio.to_thread(load_again)
        await gateway.reload(new)
        logging.getLogger("anabranch").setLevel(new.log.level.upper())

    with contextlib.ExitStack() as stack, Signals() as signals:
        listener = stack.enter_context(listening(host, port))
        await gateway.start()
        apps = [App(gateway, admin=not is_apart, on_reload=None if path is None else reload)]
        sockets, urls = [listener], [url_of(host, listener)]
        if admin.port is not None:
            sockets.append(stack.enter_context(listening(admin.host, admin.port)))
            urls.append(url_of(admin.host, sockets[-1]))
            apps.append(App(gateway, public=False, on_reload=None if path is None else reload))
        servers = [app.server() for app in apps]
        loop = asyncio.get_running_loop()
        listeners = [
            await loop.create_server(server, sock=socket, backlog=BACKLOG)
            for server, socket in zip(servers, sockets, strict=True)
        ]
        reloads = loop.create_task(reload_on(signals.reload, reload))
        try:
            on_ready(urls[0], urls[-1], config)
            await signals.stop.wait()
        finally:
            for app in apps:
                app.is_stopping = True
            reloads.cancel()
            await _drain(gateway, listeners, servers, signals, drain_s)
            await gateway.stop()


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
