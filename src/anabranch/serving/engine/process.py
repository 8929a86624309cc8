"""`ProcessEngine`: an engine in a process of its own; whatever happens to it, the front end goes on.

The process runs `anabranch.serving.engine.worker` on one end of a socket pair. It gets the function that makes its engine, then commands;
it gives what `anabranch.serving.engine.messages` lists, the events of a step in one message. It ends when its socket does, so none is left
behind.
"""

import asyncio
import contextlib
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from anabranch.errors import BackendError, InputError
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.messages import Add, Closed, Command, Control, Refused, Reply
from anabranch.serving.engine.streams import StreamsClient, as_error, deliver_to

logger = logging.getLogger(__name__)

# How long a process that has said goodbye may take to end.
END_S = 5.0


class ProcessEngine(StreamsClient):
    """An `EngineClient` for the event loop that starts it.

    Args:
        make: makes the engine there; it must pickle (`ServingConfig.make_engine` does).
        max_restarts, watchdog_s: see `StreamsClient`.
    """

    def __init__(self, make: Callable[[], Engine], *, max_restarts: int = 3, watchdog_s: float | None = None) -> None:
        super().__init__(max_restarts, watchdog_s)
        self._make = make
        self.process: subprocess.Popen[bytes] | None = None
        self._outbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    async def start(self) -> EngineInfo:
        """Start the process, load and warm up there. Raises AnabranchError if it cannot."""
        loop = asyncio.get_running_loop()
        try:
            connection, self.process = self._spawn()
        except OSError as error:
            raise BackendError(f"the engine's process cannot be started: {error.strerror or error}") from error
        self._outbox = queue.SimpleQueue()
        try:
            first = await asyncio.to_thread(self._greet, connection)
            for thread in (
                threading.Thread(target=self._write, args=(connection, self._outbox, loop), daemon=True),
                threading.Thread(target=self._read, args=(connection, loop), daemon=True),
            ):
                thread.start()
                self._threads.append(thread)
        except BaseException as error:
            # It has said what it had to, or nobody waits for it any longer.
            self.process.kill()
            self._outbox.put(None)
            connection.close()
            await asyncio.to_thread(self.process.wait)
            if isinstance(error, Exception):
                raise as_error(error) from error
            raise
        return self._opened(first)

    def _spawn(self) -> tuple[Connection, "subprocess.Popen[bytes]"]:
        """Our end of a socket pair, and a process with the other end. Raises OSError where either cannot be had."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as unless_started:
            unless_started.enter_context(ours)
            command = [sys.executable, "-m", "anabranch.serving.engine.worker", str(theirs.fileno())]
            # A session of its own: an interrupt at the terminal is for the front end, which drains the engine.
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
            unless_started.pop_all()
        return Connection(ours.detach()), process

    def _greet(self, connection: Connection) -> EngineInfo:
        """Send the function, wait for what the engine is."""
        try:
            connection.send(self._make)
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise BackendError("the engine's process ended while it was starting") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @property
    def is_alive(self) -> bool:
        """Whether there is a process."""
        return self.process is not None and self.process.poll() is None

    def _send(self, command: Command) -> None:
        self._outbox.put(command)

    def _write(
        self, connection: Connection, outbox: "queue.SimpleQueue[Command | None]", loop: asyncio.AbstractEventLoop
    ) -> None:
        while (command := outbox.get()) is not None:
            # The reader sees that the process is gone, and tells.
            with contextlib.suppress(OSError):
                try:
                    connection.send(command)
                except OSError:
                    raise
                except Exception as error:
                    # Nothing of it was sent: what cannot be pickled concerns nobody else.
                    logger.error("%s cannot be sent to the engine: %s", type(command).__name__, error)
                    message = f"it cannot be sent to the engine: {type(error).__name__}: {error}"
                    if isinstance(command, Add):
                        deliver_to(self, loop, [Refused(command.request.id, f"the request cannot be taken: {message}")])
                    elif isinstance(command, Control):
                        deliver_to(self, loop, [Reply(command.number, error=InputError(message))])

    def _read(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        is_told = False
        try:
            while not is_told:
                events = connection.recv()
                is_told = any(isinstance(event, Closed) for event in events)
                deliver_to(self, loop, events)
        except (EOFError, OSError):
            code = self._reap()
            logger.error("the engine's process ended with code %s", code)
            deliver_to(self, loop, [Closed(f"the engine's process ended with code {code}")])
        finally:
            self._outbox.put(None)
            connection.close()

    def _reap(self) -> int | None:
        """Wait for a process that should have ended; one that has not is killed."""
        if self.process is None:
            return None
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _abandon(self) -> None:
        if self.process is not None:
            self.process.kill()

    async def _ended(self) -> None:
        threads, self._threads = self._threads, []
        for thread in threads:
            await asyncio.to_thread(thread.join)
        await asyncio.to_thread(self._reap)
