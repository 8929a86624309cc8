"""`run_workers`: several processes on one port and one store. The kernel gives each connection to one of them (SO_REUSEPORT).

    supervisor -- starts, replaces, signals --> worker 0 .. N-1 (`worker`), which talk to each other over `peers`

The supervisor answers no request: it holds the port, so that it stays theirs, and sees to it that there are N workers.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigError, InputError
from anabranch.gateway.config import GatewayConfig
from anabranch.gateway.config.needs import inside
from anabranch.gateway.config.source import told_where
from anabranch.gateway.http.run import Ready, load
from anabranch.gateway.logged_error import words
from anabranch.sockets import listening
from anabranch.web.server import Signals
from anabranch.web.turns import in_thread

logger = logging.getLogger(__name__)

# A worker that lived less has not begun well, and the next one waits, twice as long each time.
SOUND_S, WAIT_S, LONGEST_S = 10.0, 0.5, 30.0

# Of the folder of sockets.
MOST_PATH = 60

# After its requests had their time to end, for the store to be written.
CLOSE_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What all workers do.

    Attributes:
        config, host, port, store, router, drain_s: as for `run`.
        num: of workers.
        admin_port: of the operators' listener; None for none apart.
        folder: of the workers' sockets.
    """

    config: Path | None
    host: str
    port: int
    store: str | None
    router: Path | None
    drain_s: float
    num: int
    admin_port: int | None = None
    folder: Path = Path()

    def line(self, index: int) -> bytes:
        """For a worker's stdin: others may see the arguments of a process, and the store's URL may hold a password."""
        return json.dumps({**asdict(self), "index": index}, default=str).encode() + b"\n"


def run_workers(
    path: Path | None,
    *,
    num: int,
    host: str,
    port: int,
    store: str | None,
    router: Path | None,
    drain_s: float,
    on_ready: Ready,
) -> None:
    """`run` in ``num`` processes, until SIGTERM or SIGINT; SIGHUP reaches all. Call it in the main thread.

    Raises AnabranchError: the config, the store or the address cannot be used, or this system has no SO_REUSEPORT.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise InputError("several workers need SO_REUSEPORT, which this system does not have; start one")
    config = load(path, store, router)
    with told_where(path):
        check_apart(config, num)
    logging.getLogger("anabranch").setLevel(config.log.level.upper())
    admin = config.admin
    with contextlib.ExitStack() as stack:
        port = _held(stack, host, port)
        admin_port = None if admin.port is None else _held(stack, admin.host, admin.port)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anabranch-", dir=_short())))
        task = Task(
            config=path,
            host=host,
            port=port,
            store=store,
            router=router,
            drain_s=drain_s,
            num=num,
            admin_port=admin_port,
            folder=folder,
        )
        asyncio.run(Supervisor(task).run(lambda url, admin_url: on_ready(url, admin_url, config)))


def check_apart(config: GatewayConfig, num: int) -> None:
    """Raises ConfigError if each worker would load a model of its own."""
    if found := inside(config):
        raise ConfigError(
            f"{found[0].field}: deployment {found[0].name} runs its model in the gateway's process, and each of {num} workers would load "
            'it; start one worker, or run the model with anabranch serve, and give its address with kind = "engine"'
        )


def _held(stack: contextlib.ExitStack, host: str, port: int) -> int:
    """A port that stays ours; nobody listens at it yet. Raises InputError if another program does."""
    # A listener of somebody else with SO_REUSEPORT would share it with us, unseen.
    with listening(host, port) as probe:
        port = probe.getsockname()[1]
    return int(stack.enter_context(listening(host, port, shared=True)).getsockname()[1])


def _short() -> str | None:
    """A folder for sockets, whose paths may have about a hundred characters; None for the usual one."""
    return None if len(tempfile.gettempdir()) < MOST_PATH else "/tmp"


class Supervisor:
    """Sees to the workers of one task."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._workers: dict[int, asyncio.subprocess.Process] = {}
        # Those that answer: before that, SIGHUP would end a process.
        self._ready: set[int] = set()
        self._num_reloads = 0

    async def run(self, on_ready: Callable[[str, str], None]) -> None:
        """Until a signal. ``on_ready`` is called with both URLs once all workers answer.

        Raises ConfigError if a worker cannot start.
        """
        with Signals() as signals:
            reloads = asyncio.create_task(self._pass_on(signals))
            watches: list[asyncio.Task[None]] = []
            try:
                begun = await _unless(signals.stop, self._begin())
                if begun is not None:
                    watches = [asyncio.create_task(self._keep(index)) for index in range(self._task.num)]
                    on_ready(begun["url"], begun["admin_url"])
                    await signals.stop.wait()
            finally:
                for task in (reloads, *watches):
                    task.cancel()
                await asyncio.gather(reloads, *watches, return_exceptions=True)
                await self._stop(signals)

    async def _begin(self) -> dict[str, str]:
        # The first alone: a mistake is told once, and the store is made by one.
        first = await self._start(0)
        await asyncio.gather(*(self._start(index) for index in range(1, self._task.num)))
        return first

    async def _start(self, index: int) -> dict[str, str]:
        """A worker that answers. Raises ConfigError with what it said if it ends before."""
        self._ready.discard(index)
        num_reloads = self._num_reloads
        reader, writer = os.pipe()
        try:
            command = (sys.executable, "-m", "anabranch.gateway.http.worker", str(writer))
            worker = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, pass_fds=(writer,))
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._workers[index] = worker
        assert worker.stdin is not None
        worker.stdin.write(self._task.line(index))
        said = await in_thread(_line, reader)
        told: dict[str, str] = json.loads(said) if said else {}
        if "url" not in told:
            code = await worker.wait()
            raise ConfigError(told.get("error") or f"worker {index} ended ({_ending(code)}) before it answered")
        self._ready.add(index)
        if self._num_reloads != num_reloads:
            # It may have read the config before that.
            worker.send_signal(signal.SIGHUP)
        return told

    async def _keep(self, index: int) -> None:
        """Put another worker in the place of one that ends."""
        num_bad = 0
        while True:
            began = time.monotonic()
            code = await self._workers[index].wait()
            num_bad = 0 if time.monotonic() - began > SOUND_S else num_bad + 1
            wait_s = min(WAIT_S * 2 ** (num_bad - 1), LONGEST_S) if num_bad else 0.0
            logger.error("worker %d ended (%s); another takes its place", index, _ending(code))
            await asyncio.sleep(wait_s)
            try:
                await self._start(index)
            except (ConfigError, OSError) as error:
                logger.error("worker %d cannot start: %s", index, words(error))

    async def _pass_on(self, signals: Signals) -> None:
        while True:
            await signals.reload.wait()
            signals.reload.clear()
            self._num_reloads += 1
            self._tell(signal.SIGHUP, self._ready)

    async def _stop(self, signals: Signals) -> None:
        """Let all end their requests; a second signal to this process is one to them."""
        self._tell(signal.SIGTERM, self._workers)
        ends = asyncio.gather(*(worker.wait() for worker in self._workers.values()))
        killed = asyncio.create_task(signals.kill.wait())
        await asyncio.wait((ends, killed), timeout=self._task.drain_s + CLOSE_S, return_when=asyncio.FIRST_COMPLETED)
        if not ends.done():
            self._tell(signal.SIGTERM, self._workers)
            await asyncio.wait((ends,), timeout=CLOSE_S)
        killed.cancel()
        for index, worker in self._workers.items():
            if worker.returncode is None:
                logger.error("worker %d does not end, and is killed", index)
                worker.kill()
        await ends

    def _tell(self, number: int, indices: Iterable[int]) -> None:
        for index in indices:
            worker = self._workers[index]
            if worker.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.send_signal(number)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, dict[str, str]]) -> dict[str, str] | None:
    """What ``work`` gives; None if ``stop`` comes before."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return None


def _line(reader: int) -> bytes:
    """What is said until the other end is closed."""
    with open(reader, "rb") as file:
        return file.readline()


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"code {code}"
