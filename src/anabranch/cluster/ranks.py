"""A few processes with a rank each, on gloo: the way to test what happens between ranks, without a launcher and without a hang.

    from anabranch.testing import run_ranks

    def sums(rank, world):                       # in a module that other processes can import
        value = torch.tensor([float(rank)])
        dist.all_reduce(value)
        return value.item()

    run_ranks(sums, 4)                           # [6.0, 6.0, 6.0, 6.0]

A rank that raises ends them all: `RankError` says which and why, with its traceback. What takes longer than ``timeout_s`` is killed, and
the error shows where each rank stood. `Ranks` is the same with the processes in hand: kill one, let another join, see what went over wires.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from anabranch.cluster.hosts import (
    CABLE,
    MOST_HOSTS,
    Hosts,
    NoHostsError,
    check_mbit,
    enter,
    hosts,
    keep_pace,
    tcp_sockets,
)

__all__ = ["RankError", "Ranks", "run_ranks"]

# What the server from which ranks are forked has loaded; a rank then starts in milliseconds.
# torch's compiler is what every optimizer loads when it is made: more than a second, in each rank.
_PRELOADED = [
    "torch.distributed",
    "torch._dynamo",
    "anabranch.cluster.ranks",
    "anabranch.cluster.gpipe",
    "anabranch.cluster.elastic.trainer",
    "anabranch.train",
]
# Seconds in which ranks that lost another may end by themselves, with an error that says more.
_GRACE_S = 3.0
# Seconds in which ranks must have begun: loading, and finding each other.
_START_S = 120.0
_BEGUN = b"begun"
_TAIL = 4000
# Offsets in struct tcp_info of Linux: bytes that arrived at the other end, and that were received.
_ACKED_AT, _TCP_INFO_SIZE = 120, 232


class RankError(RuntimeError):
    """A rank failed, ended without a result, or did not end in time.

    Attributes:
        rank: which.
        why: ``TypeName: message`` of what it raised; or how it ended.
    """

    def __init__(self, rank: int, why: str, told: str = "") -> None:
        self.rank, self.why, self.told = rank, why, told
        super().__init__(f"rank {rank}: {why}" + (f"\n{told}" if told else ""))

    def __reduce__(self) -> Any:
        return RankError, (self.rank, self.why, self.told)


@dataclass(frozen=True)
class _Result:
    """What a rank tells in the end: a value, or an error; and what it sent by connection, (local port, remote port, bytes).

    ``is_gone``: it told nothing, and its process has ended.
    """

    value: Any = None
    why: str | None = None
    trace: str = ""
    sent: tuple[tuple[int, int, int], ...] = ()
    is_gone: bool = False


@dataclass
class _Rank:
    """One process.

    Attributes:
        rank: its number.
        process, connection: of it.
        output: where its standard output and error go.
        has_begun: whether the function runs.
        result: once it has told.
        is_killed: whether `Ranks.kill` ended it.
    """

    rank: int
    process: Any
    connection: Connection
    output: Path
    has_begun: bool = False
    result: _Result | None = None
    is_killed: bool = False


class Ranks:
    """Processes with a rank each. A context manager: at its end no process is left.

        with Ranks(4, train, config) as ranks:
            ranks.kill(2)                         # as if its machine went away
            ranks.join(train, config, rank=2)     # another takes its place; how it finds the others is up to the function
            values = ranks.wait()

    Args:
        world: how many.
        function: called as ``function(rank, world, *arguments)`` in each process, in a gloo group of all; importable by name.
        arguments: given to it.
        backend: of the group; None for none, where the function makes its own, with ``MASTER_ADDR`` and ``MASTER_PORT`` of a store that
            outlives every rank.
        timeout_s: from when the last rank has begun the function until the last has ended; starting has a bound of its own (2 minutes).
        threads: of torch in each process.
        mbit: each rank is a host of its own with a link of so many Mbit/s each way; None for none of this. A rank that joins with a new
            number shares the link of one that is there.
        links: what those are: ``namespaces`` of the network (root, Linux's ip and tc), in which all connections of a rank share its link;
            or connections that the kernel has ``paced`` (Linux), each by itself. ``auto`` takes namespaces where they can be made.

    Attributes:
        links: which of the two it is; None without a rate.

    Raises ValueError for what cannot be, `anabranch.testing.NoHostsError` where links of the kind that was asked for cannot be made.
    """

    def __init__(
        self,
        world: int,
        function: Callable[..., Any],
        *arguments: Any,
        backend: str | None = "gloo",
        timeout_s: float = 60.0,
        threads: int = 1,
        mbit: float | None = None,
        links: Literal["auto", "namespaces", "paced"] = "auto",
    ) -> None:
        if world < 1:
            raise ValueError(f"world is {world}; use at least 1")
        if links not in ("auto", "namespaces", "paced"):
            raise ValueError(f"links is {links!r}; use auto, namespaces or paced")
        check_mbit(mbit)
        self.world, self.timeout_s = world, timeout_s
        # By when the last that was started must have begun.
        self._start_by = 0.0
        self._end_by: float | None = None
        self._settings: dict[str, Any] = {"backend": backend, "timeout_s": timeout_s, "threads": threads}
        self._stack = ExitStack()
        self._hosts, self.links = self._made_links(mbit, links)
        self._settings["paced_mbit"] = mbit if self.links == "paced" else None
        self._folder = tempfile.TemporaryDirectory(prefix="anabranch-ranks-")
        # In this process, so that no rank's end takes it along.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._ranks: dict[int, _Rank] = {}
        self._ended: list[_Rank] = []
        self._sent: dict[int, tuple[tuple[int, int, int], ...]] = {}
        try:
            for rank in range(world):
                self._start(rank, function, arguments)
        except BaseException:
            self.close()
            raise

    def _made_links(self, mbit: float | None, links: str) -> tuple[Hosts | None, Literal["namespaces", "paced"] | None]:
        if mbit is None:
            return None, None
        if links == "paced":
            return None, "paced"
        try:
            return self._stack.enter_context(hosts(min(self.world, MOST_HOSTS), mbit=mbit)), "namespaces"
        except NoHostsError:
            if links == "namespaces":
                raise
            return None, "paced"

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        return int(self._ranks[rank].process.pid)

    def kill(self, rank: int, sign: int = signal.SIGKILL) -> None:
        """End a rank's process at once; with another signal, such as SIGSTOP, do that to it instead."""
        found = self._ranks[rank]
        os.kill(found.process.pid, sign)
        if sign in (signal.SIGKILL, signal.SIGTERM):
            found.is_killed = True
            found.process.join(5)

    def expect_end(self, rank: int) -> None:
        """A rank will end by itself, wherever it wants to: that is no error, as if `kill` had ended it."""
        self._ranks[rank].is_killed = True

    def join(self, function: Callable[..., Any], *arguments: Any, rank: int | None = None) -> int:
        """Start one more process, with the number of one that was killed or the next one. Returns its rank."""
        number = max(self._ranks) + 1 if rank is None else rank
        old = self._ranks.get(number)
        if old is not None and not old.is_killed:
            raise ValueError(f"rank {number} is still there; kill it first, or let the next number join")
        if old is not None:
            self._ended.append(old)
        self._start(number, function, arguments)
        return number

    def wait(self) -> list[Any]:
        """What the function returned in each rank that was not killed, in order of ranks.

        Raises RankError for the rank that failed first, or that did not end in time; then no process is left.
        """
        try:
            while open_ranks := [rank for rank in self._ranks.values() if rank.result is None and not rank.is_killed]:
                if self._end_by is None and all(rank.has_begun for rank in open_ranks):
                    self._end_by = time.monotonic() + self.timeout_s
                self._gather(open_ranks, self._start_by if self._end_by is None else self._end_by)
        except BaseException:
            self.close()
            raise
        # They stay until all have a result, so that no connection ends under another's hands.
        for rank in self._ranks.values():
            rank.connection.close()
        for rank in self._ranks.values():
            rank.process.join(5)
        return [
            rank.result.value
            for _, rank in sorted(self._ranks.items())
            if rank.result is not None and not rank.is_killed
        ]

    def output(self, rank: int) -> str:
        """What a rank has printed so far, on both streams."""
        return self._ranks[rank].output.read_text(encoding="utf-8", errors="replace")

    def sent_bytes(self) -> np.ndarray | None:
        """int64 ``[world, world]``: bytes that each rank (row) sent to each (column) through TCP, as the kernel counted them.

        Of all connections between ranks that were open when they ended, so of gloo whatever operations were used. After `wait`. None where
        the kernel does not say (it is Linux that does).
        """
        if not any(self._sent.values()):
            return None
        owner = {(local, remote): rank for rank, rows in self._sent.items() for local, remote, _ in rows}
        found = np.zeros((self.world, self.world), np.int64)
        for rank, rows in self._sent.items():
            for local, remote, sent in rows:
                peer = owner.get((remote, local))
                if peer is not None and rank < self.world and peer < self.world:
                    found[rank, peer] += sent
        return found

    def close(self) -> None:
        """Kill what still runs."""
        for rank in [*self._ranks.values(), *self._ended]:
            if rank.process.is_alive():
                rank.process.kill()
                rank.process.join(5)
            rank.connection.close()
        self._folder.cleanup()
        self._stack.close()

    def _start(self, rank: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        context = _context()
        ours, theirs = context.Pipe()
        place = Path(self._folder.name) / f"{rank}-{len(self._ended)}"
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        host = None
        if self._hosts is not None:
            host = self._hosts.names[rank % len(self._hosts.names)]
            # gloo takes the address of the machine's name otherwise, which is not on this link.
            environment |= {"MASTER_ADDR": self._hosts.switch, "GLOO_SOCKET_IFNAME": CABLE}
        process = context.Process(
            target=_run,
            args=(
                rank,
                self.world,
                pickle.dumps((function, arguments)),
                theirs,
                str(place),
                environment,
                {**self._settings, "host": host},
            ),
            daemon=True,
        )
        process.start()
        self._start_by = time.monotonic() + _START_S
        theirs.close()
        self._ranks[rank] = _Rank(rank, process, ours, place)

    def _gather(self, open_ranks: Sequence[_Rank], deadline: float) -> None:
        """Wait for one of the ranks to tell or to end. Raises RankError where it failed."""
        left = deadline - time.monotonic()
        # What has been told already counts, however late it is asked for.
        ready = wait([rank.connection for rank in open_ranks], max(left, 0))
        if not ready:
            raise self._late(open_ranks)
        for rank in open_ranks:
            if rank.connection in ready:
                self._read(rank)
        if failed := [rank for rank in open_ranks if rank.result is not None and rank.result.why is not None]:
            raise self._failed(failed[0])

    def _read(self, rank: _Rank) -> None:
        try:
            told = rank.connection.recv_bytes()
            if told == _BEGUN:
                rank.has_begun = True
                return
        except (EOFError, OSError):
            rank.process.join(5)
            code = rank.process.exitcode
            how = (
                f"ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
            )
            rank.result = _Result(why=f"{how} before it had a result", is_gone=True)
            return
        rank.result = pickle.loads(told)
        self._sent[rank.rank] = rank.result.sent

    def _failed(self, first: _Rank) -> RankError:
        """The error of the rank where it began: others often fail since that one went away."""
        deadline = time.monotonic() + _GRACE_S
        others = [rank for rank in self._ranks.values() if rank.result is None and not rank.is_killed]
        while others and (left := deadline - time.monotonic()) > 0:
            ready = wait([rank.connection for rank in others], left)
            for rank in others:
                if rank.connection in ready:
                    self._read(rank)
            others = [rank for rank in others if rank.result is None]
        # One that is gone is why others lost their connections to it, whoever told first.
        gone = [rank for rank in self._ranks.values() if rank.result is not None and rank.result.is_gone]
        first = gone[0] if gone else first
        result = first.result
        assert result is not None
        assert result.why is not None
        told = result.trace or self._tail(first)
        also = [
            f"rank {rank.rank} then: {rank.result.why}"
            for rank in self._ranks.values()
            if rank is not first and rank.result is not None and rank.result.why is not None
        ]
        return RankError(first.rank, result.why, "\n".join([told.rstrip(), *also]).strip())

    def _late(self, open_ranks: Sequence[_Rank]) -> RankError:
        for rank in open_ranks:
            if rank.process.is_alive() and hasattr(signal, "SIGUSR1"):
                # Its handler writes the stacks of all threads where its output goes.
                os.kill(rank.process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        told = [f"rank {rank.rank} stood at\n{self._tail(rank)}" for rank in open_ranks]
        first = next((rank for rank in open_ranks if not rank.has_begun), open_ranks[0])
        why = f"no result after {self.timeout_s:g} s" if first.has_begun else f"not begun after {_START_S:g} s"
        return RankError(first.rank, why, "\n".join(told))

    def _tail(self, rank: _Rank) -> str:
        text = rank.output.read_text(encoding="utf-8", errors="replace") if rank.output.exists() else ""
        return text[-_TAIL:]


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    backend: str | None = "gloo",
    timeout_s: float = 60.0,
    threads: int = 1,
    mbit: float | None = None,
    links: Literal["auto", "namespaces", "paced"] = "auto",
) -> list[Any]:
    """``function(rank, world, *arguments)`` in ``world`` processes; what each returned, in order of ranks. See `Ranks`.

    Raises RankError: with the rank, what it raised and its traceback, or where each rank stood after ``timeout_s``.
    """
    options: dict[str, Any] = {
        "backend": backend,
        "timeout_s": timeout_s,
        "threads": threads,
        "mbit": mbit,
        "links": links,
    }
    with Ranks(world, function, *arguments, **options) as ranks:
        return ranks.wait()


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _run(
    rank: int,
    world: int,
    call: bytes,
    connection: Connection,
    output: str,
    environment: dict[str, str],
    settings: dict[str, Any],
) -> None:
    """In a rank's process."""
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    torch.set_num_threads(settings["threads"])
    if settings["host"] is not None:
        # Before there is another thread.
        enter(settings["host"])
    has_told = threading.Event()
    watch = threading.Thread(target=_watch, args=(connection, has_told, Path(output).parent), daemon=True)
    watch.start()
    try:
        pace = None if settings["paced_mbit"] is None else keep_pace(settings["paced_mbit"])
        if settings["backend"] is not None:
            store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
            bound = timedelta(seconds=_START_S + settings["timeout_s"])
            dist.init_process_group(settings["backend"], store=store, rank=rank, world_size=world, timeout=bound)
        if pace is not None:
            # The group's connections, before anything goes through them.
            pace()
        function, arguments = pickle.loads(call)
        connection.send_bytes(_BEGUN)
        result = _Result(function(rank, world, *arguments), sent=_sent_by_connection())
        told = pickle.dumps(result)
    except BaseException as error:
        result = _Result(why=f"{type(error).__name__}: {error}", trace=traceback.format_exc()[-_TAIL:])
        told = pickle.dumps(result)
    sys.stdout.flush()
    # Bytes by plain pickle: what multiprocessing makes of tensors would need this process to be there when they are read.
    has_told.set()
    with suppress(OSError):
        connection.send_bytes(told)
    if result.why is None:
        # Until the other end is closed. One that failed goes at once, so that others find its connections closed.
        watch.join()
    # A group that a failed rank took part in may wait for the others when it is destroyed; nothing here is worth that.
    os._exit(0 if result.why is None else 1)


def _watch(connection: Connection, has_told: threading.Event, folder: Path) -> None:
    """Until the other end is closed. If that is before this rank has told its result, who started it is gone, and so goes this process."""
    with suppress(EOFError, OSError):
        # Nothing is ever sent there.
        connection.recv_bytes()
    if not has_told.is_set():
        # Nobody else is left who would.
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def _sent_by_connection() -> tuple[tuple[int, int, int], ...]:
    """(local port, remote port, bytes sent) of each open TCP connection of this process."""
    if not hasattr(socket, "TCP_INFO"):
        return ()
    found = []
    for connection, _ in tcp_sockets():
        # Closed since it was seen, or no TCP.
        with suppress(OSError):
            local, remote = connection.getsockname(), connection.getpeername()
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
            if len(info) >= _ACKED_AT + 8:
                (acked,) = struct.unpack_from("=Q", info, _ACKED_AT)
                found.append((local[1], remote[1], int(acked)))
    return tuple(found)
