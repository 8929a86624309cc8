"""`Sandbox`: a few processes for work that may loop for ever, exhaust memory or crash, so that it ends there and nowhere else.

What strangers send (a chat template, a grammar) is worked out by a program that is given to Python as a file and calls
`anabranch.sandbox_worker.serve`, which keeps limits of time and memory.
"""

import asyncio
import atexit
import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from anabranch import sandbox_worker
from anabranch.errors import AnabranchError

__all__ = ["Refused", "Sandbox", "SandboxBusyError", "SandboxError", "Work"]

WAIT_S = 20.0  # at most for a process that is free, and then at most for its answer, where the machine is busy or has no timers
# What is longer than so many bytes may not be quick.
_SHORT = 100_000
MOST_SOURCES = 1000  # whose times are remembered
_START_S = 120.0  # at most for a new process, which does not count as waiting
_WORKERS = min(4, max(2, os.cpu_count() or 2))
NUMBERS = itertools.count(1)  # of requests; an answer repeats the one it is for


class SandboxError(AnabranchError):
    """A process of a sandbox cannot be started or asked."""


class SandboxBusyError(SandboxError):
    """No process was free in time: nobody's fault who asks, and worth asking again."""


class Refused(Exception):  # noqa: N818  # an answer, not an error
    """What the program, or a limit, said of the request."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the processes of a sandbox do.

    Attributes:
        program: a file of Python that calls `anabranch.sandbox_worker.serve`.
        does: in a sentence: the process that ``renders chat templates``.
        do: of several: processes that ``render chat templates``.
        limits: its limits of time and memory.
        crash: what it means of a request that its process ends by a signal, by the signal's number.
        greeting: a request that is answered at once.
        require: raises where a package is missing that the program needs.
        quick_s: what is done in so many seconds is quick, see `Sandbox`.
    """

    program: Path
    does: str
    do: str
    limits: sandbox_worker.Limits
    greeting: Mapping[str, Any]
    crash: Mapping[int, str] = field(default_factory=dict)
    require: Callable[[], None] = lambda: None
    quick_s: float = 0.2


@dataclass(eq=False)
class _Turn:
    """A request that wants a process; ``number`` is when it came."""

    source: str
    is_large: bool
    number: int
    worker: "Future[Worker]" = field(default_factory=Future)


class Sandbox:
    """A few workers, and who is next where none is free: sources take turns, each in the order of coming.

    One worker is kept for short requests of sources that were quick when they were last served, and for one of a new source while there
    is none: however many slow ones there are, and whoever sends them, they hold up each other alone. Safe for threads. See `of`.

    Args:
        work: what is done there.
    """

    def __init__(self, work: Work) -> None:
        self._lock = threading.Lock()
        self.work = work
        self.workers = [Worker(work) for _ in range(_WORKERS)]
        # The last to be free is the next to work: it has started, and may have kept what the request needs.
        self._free = list(self.workers)
        self._waiting: list[_Turn] = []
        self._numbers = itertools.count()
        self._served: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._slow: set[Worker] = set()
        # That wait for the answers to `ask_in_turn`: one for each worker.
        self._threads = ThreadPoolExecutor(_WORKERS, thread_name_prefix="sandbox")

    @staticmethod
    def of(work: Work) -> "Sandbox":
        """The one sandbox of this process for ``work``."""
        # By process: a fork of this one has the other ends of the same pipes, and the answers must not be mixed.
        key = os.getpid(), work.program
        return _SANDBOXES.get(key) or _SANDBOXES.setdefault(key, Sandbox(work))

    def ask(self, source: str, request: Mapping[str, Any]) -> Any:
        """The answer to a request, which is written as JSON.

        Args:
            source: whose it is; sources take turns.
            request: for the program.

        Raises Refused; SandboxError if there is no worker for it.
        """
        written = _written(request)
        return self._work(self._take(source, len(written), time.monotonic() + WAIT_S), source, written)

    async def ask_in_turn(self, source: str, request: Mapping[str, Any]) -> Any:
        """As `ask`, for an event loop: whoever waits for his turn holds no thread that another's turn would need."""
        written, loop, is_given = _written(request), asyncio.get_running_loop(), asyncio.Event()
        turn = self._enter(source, len(written))
        turn.worker.add_done_callback(lambda _: loop.call_soon_threadsafe(is_given.set))
        try:
            await asyncio.wait_for(is_given.wait(), WAIT_S)
        except BaseException as error:
            self._leave(turn)
            if isinstance(error, TimeoutError):
                raise self._busy() from None
            raise
        # Whoever stops waiting here leaves a thread behind that gives the worker back.
        return await asyncio.shield(
            loop.run_in_executor(self._threads, self._work, turn.worker.result(), source, written)
        )

    def close(self) -> None:
        """End the workers. Idempotent."""
        for worker in self.workers:
            worker.close()

    def _take(self, source: str, size: int, deadline: float) -> "Worker":
        turn = self._enter(source, size)
        try:
            return turn.worker.result(max(0.0, deadline - time.monotonic()))
        except BaseException as error:
            self._leave(turn)
            if isinstance(error, TimeoutError):
                raise self._busy() from None
            raise

    def _enter(self, source: str, size: int) -> _Turn:
        """Wait for a turn: its ``worker`` is set when it has come."""
        with self._lock:
            turn = _Turn(source, size > _SHORT, next(self._numbers))
            self._waiting.append(turn)
            self._assign()
        return turn

    def _leave(self, turn: _Turn) -> None:
        """Wait no more; a worker that came as the wait ended goes back."""
        with self._lock:
            is_waiting = turn in self._waiting
            if is_waiting:
                self._waiting.remove(turn)
        if not is_waiting:
            self._give(turn.worker.result())

    def _busy(self) -> SandboxBusyError:
        return SandboxBusyError(
            f"busy: none of the {len(self.workers)} processes that {self.work.do} was free in {WAIT_S:g} s"
        )

    def _work(self, worker: "Worker", source: str, written: bytes) -> Any:
        try:
            return worker.ask(written, WAIT_S)
        finally:
            self._note(source, worker.seconds)
            self._give(worker)

    def _note(self, source: str, seconds: float) -> None:
        """How long the last request of a source took."""
        with self._lock:
            self._seconds.pop(source, None)
            self._seconds[source] = seconds
            if len(self._seconds) > MOST_SOURCES:
                del self._seconds[next(iter(self._seconds))]

    def _give(self, worker: "Worker") -> None:
        with self._lock:
            self._slow.discard(worker)
            self._free.append(worker)
            self._assign()

    def _assign(self) -> None:
        """Give the free workers to those whose turn it is."""
        while self._free:
            able = self._waiting
            # The last one free is the one that is kept.
            if len(self._slow) >= len(self.workers) - 1:
                able = [turn for turn in self._waiting if self._is_quick(turn)]
                able = able or [turn for turn in self._waiting if self._is_quick(turn, unknown_s=0.0)]
            if not able:
                return
            turn = min(able, key=lambda turn: (max(turn.number, self._served.get(turn.source, -1)), turn.number))
            self._waiting.remove(turn)
            waiting = {turn.source for turn in self._waiting}
            self._served = {source: number for source, number in self._served.items() if source in waiting}
            self._served[turn.source] = next(self._numbers)
            worker = self._free.pop()
            if not self._is_quick(turn):
                self._slow.add(worker)
            turn.worker.set_result(worker)

    def _is_quick(self, turn: _Turn, unknown_s: float = math.inf) -> bool:
        return not turn.is_large and self._seconds.get(turn.source, unknown_s) <= self.work.quick_s


def _written(request: Mapping[str, Any]) -> bytes:
    """Raises Refused."""
    try:
        return json.dumps(request).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"they are no JSON: {error}") from None


class Worker:
    """A process that works: started when it is first needed, kept for the next request, begun anew after it has ended."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.process: subprocess.Popen[bytes] | None = None
        self._pipes: tuple[IO[bytes], IO[bytes]] | None = None
        self.seconds = math.inf  # that the last request took, apart from starting the process

    def ask(self, request: bytes, wait_s: float) -> Any:
        """The answer, in at most so many seconds. Raises Refused; SandboxError where the process cannot do its work."""
        self.seconds = math.inf
        for is_again in (False, True):
            if self.process is None or self.process.poll() is not None:
                self._start()
            began = time.monotonic()
            found = self._exchange(request, began + wait_s)
            if found is not None:
                self.seconds = time.monotonic() - began
                break
            why = self._limit_passed(began, wait_s)
            code = self.close()
            if why is not None:
                raise Refused(why)
            if is_again:
                raise Refused(f"its process was ended twice by another (code {code})")
        assert found is not None
        if "error" in found:
            raise Refused(found["error"])
        return found["answer"]

    def close(self) -> int | None:
        """End the process, which has nothing to lose; its code. Idempotent."""
        process, self.process = self.process, None
        pipes, self._pipes = self._pipes, None
        code = None
        if process is not None:
            process.kill()
            code = process.wait()
        for pipe in pipes or ():
            with contextlib.suppress(OSError):  # half a request that it did not read
                pipe.close()
        return code

    def _start(self) -> None:
        self.work.require()
        self.close()
        try:
            self.process, self._pipes = _started(self.work.program)
        except (OSError, ValueError) as error:
            raise SandboxError(f"the process that {self.work.does} cannot be started: {error}") from None
        greeting = json.dumps(self.work.greeting).encode()
        if self._exchange(greeting, time.monotonic() + _START_S) is None:
            code = self.close()
            raise SandboxError(f"the process that {self.work.does} ended as it started ({sys.executable}, code {code})")

    def _exchange(self, request: bytes, deadline: float) -> dict[str, Any] | None:
        """What is answered; None if the process has ended, as it has at the deadline.

        Raises SandboxError for what is no answer to this request. Whatever is raised ends the process, and with it an answer that nobody
        has read, which would be taken for that to the next request.
        """
        assert self.process is not None
        assert self._pipes is not None
        requests, answers = self._pipes
        number = b"%d" % next(NUMBERS)
        try:
            with _killed_at(self.process, deadline, self.work.does), contextlib.suppress(BrokenPipeError):
                requests.write(b"%s %s\n" % (number, request))
                requests.flush()
                line = answers.readline()
                if line.endswith(b"\n"):
                    return _answer_to(number, line, self.work.does)
        except BaseException:
            self.close()
            raise
        return None

    def _limit_passed(self, began: float, wait_s: float) -> str | None:
        """The limit for which the process has ended, if one is; it was asked at the time ``began``."""
        assert self.process is not None
        seconds = time.monotonic() - began
        if seconds >= wait_s:
            return f"its process had no answer after {wait_s:g} s"
        self.process.kill()  # which leaves the code of one that has ended as it is
        code = self.process.wait()
        limits = self.work.limits
        if code == sandbox_worker.OUT_OF_MEMORY:
            return f"it asked for more than {limits.memory_text} of memory"
        if code == -getattr(signal, "SIGPROF", 0):
            return f"it took more than {limits.seconds:g} s of computing"
        if code < 0 and -code in self.work.crash:
            return self.work.crash[-code]
        # Where a program ignores SIGCHLD the system forgets how its processes end, and they all seem to have ended well.
        if code == 0 and seconds >= limits.seconds:
            text = f"{limits.seconds:g} s of computing or {limits.memory_text} of memory"
            return f"it took more than {text} (which of them is not known where SIGCHLD is ignored)"
        return None


def _started(program: Path) -> tuple["subprocess.Popen[bytes]", tuple[IO[bytes], IO[bytes]]]:
    """A new process, with a pipe for requests and one for answers. Raises OSError and ValueError.

    The pipes are for nothing else: what is printed as Python starts there, by a ``sitecustomize`` or a ``.pth`` file, is no answer. Windows
    has only the standard ones, where such a line is found out by its lack of a number.
    """
    if not sys.executable:
        raise ValueError(f"sys.executable is {sys.executable!r}; it must be the path of Python")
    # Python itself passes over entries that are no text.
    folders = [folder for folder in sys.path if isinstance(folder, str) and folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    # -P: the program's folder has our modules, not those of Python's own.
    command = [sys.executable, "-P", str(program)]
    if sys.platform == "win32":
        process = subprocess.Popen(
            [*command, "0", "1"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        return process, (process.stdin, process.stdout)
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        ends = []
        for our_mode in ("wb", "rb"):
            read, write = os.pipe()
            our, their = (write, read) if our_mode == "wb" else (read, write)
            theirs.callback(os.close, their)
            ends.append((ours.enter_context(open(our, our_mode)), _beyond_standard(their, theirs)))
        (requests, their_requests), (answers, their_answers) = ends
        # A session of its own: an interrupt at the terminal is not for it.
        process = subprocess.Popen(
            [*command, str(their_requests), str(their_answers)],
            env=environment,
            start_new_session=True,
            pass_fds=(their_requests, their_answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ours.pop_all()
    return process, (requests, answers)


def _beyond_standard(end: int, closing: contextlib.ExitStack) -> int:
    """The end of a pipe under a number of its own, where the program has closed its standard input or output and they are given again."""
    import fcntl

    if end > 2:
        return end
    copy: int = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3)
    closing.callback(os.close, copy)
    return copy


def _answer_to(number: bytes, line: bytes, does: str) -> dict[str, Any]:
    repeated, _, text = line.partition(b" ")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    is_answer = isinstance(found, dict) and (
        isinstance(found.get("error"), str) or isinstance(found.get("answer"), str | list)
    )
    if repeated != number or not is_answer:
        raise SandboxError(f"the process that {does} gave what is no answer to the request")
    return dict(found)


@contextlib.contextmanager
def _killed_at(process: "subprocess.Popen[bytes]", deadline: float, does: str) -> Iterator[None]:
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError as error:  # no more threads for this user
        raise SandboxError(f"the process that {does} cannot be watched: {error}") from None
    try:
        yield
    finally:
        timer.cancel()


_SANDBOXES: dict[tuple[int, Path], Sandbox] = {}


@atexit.register
def close_all() -> None:
    """End the workers of every sandbox of this process; one that is asked again starts anew."""
    for key in [key for key in _SANDBOXES if key[0] == os.getpid()]:
        _SANDBOXES.pop(key).close()
