"""Ways to change the number of devices of a running server, behind one face: ElasticMoE's, and those that the paper compares it with.

    ours          the group changes: what is there stays, the rest is copied from device to device, nothing stops
    cold          the server stops and starts again with the new number of devices; what it was doing is begun anew
    horizontal    a second server like the first is started beside it
    extravagant   a server of the new size is started on devices of its own; the old one ends when it has answered what it has
    colocated     the same on the devices that there are: both keep half of the key-value cache, so that the weights fit twice

All of them run the same server of ours. Weights come from disk for whoever loads them; the system is asked to forget the file first.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from anabranch.serving.core.request import Finish, Output, Request
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.group import Group

__all__ = ["WAYS", "PeakMemory", "Server", "forget_files"]

Emit = Callable[[Output], None]
WAYS = ("ours", "horizontal", "cold", "extravagant", "colocated")


class Server:
    """One or more groups behind one queue. A request whose group was stopped is begun again at the next.

    Args:
        config: of the first group.
        way: how `change` changes the devices.
    """

    def __init__(self, config: ElasticConfig, way: str) -> None:
        self.way = way
        self.config = config.replace(num_blocks=config.num_blocks // 2) if way == "colocated" else config
        self.groups: list[Group] = []
        # End, time to the first token, mean time per later token.
        self.served: list[tuple[float, float, float]] = []
        self.downtime_s = 0.0
        self.errors = 0
        self._all: list[Group] = []
        self._waiting: list[tuple[Request, Emit]] = []
        self._lock = threading.RLock()
        self._old: list[threading.Thread] = []
        self._is_closed = False

    def start(self) -> None:
        """Serve."""
        self.groups = [self._start(self.config)]

    def _start(self, config: ElasticConfig) -> Group:
        forget_files(Path(config.model))
        group = Group(config, self._note)
        with self._lock:
            self._all.append(group)
        group.start()
        return group

    def _note(self, ttft_s: float, tpot_s: float) -> None:
        self.served.append((time.monotonic(), ttft_s, tpot_s))

    @property
    def devices(self) -> int:
        """That serve or are about to end."""
        return sum(len(group.devices) for group in self.groups)

    @property
    def pids(self) -> list[int]:
        """All processes of all groups."""
        found: list[int] = []
        with self._lock:
            groups = list(self._all)
        for group in groups:
            found += group.pids
        return sorted(set(found))

    def arenas(self) -> int:
        """Bytes of all devices' memory."""
        with self._lock:
            memories = [group.memory for group in self._all if group.memory is not None]
        total = 0
        for memory in memories:
            # It was closed a moment ago.
            with contextlib.suppress(ConnectionError):
                total += memory.usage()["resident"]
        return total

    def submit(self, request: Request, emit: Emit) -> None:
        """Run a request on the group with fewest; once the server is closed nothing comes of it."""
        with self._lock:
            if self._is_closed:
                return
            if not self.groups:
                self._waiting.append((request, emit))
                return
            group = min(self.groups, key=lambda each: len(each.ledger.live) / max(1, len(each.devices)))

        def take(output: Output) -> None:
            # Its server was stopped.
            if output.finish is Finish.ABORT:
                self.submit(request, emit)
                return
            self.errors += output.finish is Finish.ERROR
            emit(output)

        group.ledger.submit(request, take)

    def change(self, devices: int) -> float:
        """Change the number of devices; seconds until the new number served."""
        started = time.perf_counter()
        if self.way == "ours":
            return self.groups[0].scale(devices).seconds
        if self.way == "cold":
            self._restart(devices)
        elif self.way == "horizontal":
            self._replicate(devices)
        else:
            self._replace(devices)
        return time.perf_counter() - started

    def _restart(self, devices: int) -> None:
        down = time.perf_counter()
        with self._lock:
            old, self.groups = self.groups, []
        for group in old:
            self._end(group)
        self._join([self._start(self.config.replace(devices=devices))])
        self.downtime_s += time.perf_counter() - down

    def _replicate(self, devices: int) -> None:
        """Whole replicas of the first size, as many as it takes."""
        size = len(self.groups[0].devices)
        wanted = -(-devices // size)
        while len(self.groups) < wanted:
            self._join([*self.groups, self._start(self.config.replace(devices=size))])
        while len(self.groups) > wanted:
            with self._lock:
                group = self.groups.pop()
            self._end_later(group)

    def _replace(self, devices: int) -> None:
        new = self._start(self.config.replace(devices=devices))
        old = self.groups
        self._join([new])
        for group in old:
            self._end_later(group)

    def _join(self, groups: list[Group]) -> None:
        with self._lock:
            self.groups = groups
            waiting, self._waiting = self._waiting, []
        for request, emit in waiting:
            self.submit(request, emit)

    def _end_later(self, group: Group) -> None:
        """End a group when it has answered what it has."""
        thread = threading.Thread(target=self._end, args=(group, 60.0), daemon=True)
        thread.start()
        self._old.append(thread)

    def _end(self, group: Group, drain_s: float = 0.0) -> None:
        group.close(drain_s)
        with self._lock:
            self._all.remove(group)

    def settle(self) -> None:
        """Wait until what is made ready in the background is."""
        for group in self.groups:
            group.settle()

    def close(self) -> None:
        """End everything, at once."""
        with self._lock:
            self._is_closed, self.groups = True, []
        for thread in self._old:
            thread.join()
        for group in list(self._all):
            self._end(group)


def load_closed(server: Server, clients: int, request: Callable[[int], Request], take: Emit) -> Callable[[], None]:
    """Keep ``clients`` requests under way, each followed by the next; call the result to stop."""
    stopped = threading.Event()
    count = iter(range(1 << 30))

    def begin() -> None:
        number = next(count)
        server.submit(replace(request(number), id=f"load-{number}"), again)

    def again(output: Output) -> None:
        take(output)
        if output.finish is not None and not stopped.is_set():
            # From a thread of its own: this one holds the book of the group that has just answered.
            threading.Thread(target=begin, daemon=True).start()

    for _ in range(clients):
        begin()
    return stopped.set


class PeakMemory:
    """The most memory that a server takes while the block runs, in bytes.

    Private memory and shared files of all its processes, the latter divided by how many share them (PSS), and the devices' arenas,
    counted once, as the memory manager sees them: also what no process has mapped yet. ``arenas`` is their part of the peak.
    """

    def __init__(self, server: Server, every_s: float = 0.05) -> None:
        self.server, self.every_s = server, every_s
        self.bytes = self.arenas = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            arenas = self.server.arenas()
            now = arenas + sum(map(_own_bytes, self.server.pids))
            if now > self.bytes:
                self.bytes, self.arenas = now, arenas
            if self._over.wait(self.every_s):
                return


def _own_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):  # it has ended
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if ":" in line}
        return 1024 * (kilobytes.get("Pss_Anon", 0) + kilobytes.get("Pss_File", 0))
    return 0


def forget_files(folder: Path) -> None:
    """Ask the system to read a model's files from the disk the next time."""
    if hasattr(os, "posix_fadvise"):
        for path in _files(folder):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def _files(folder: Path) -> Iterator[Path]:
    return folder.glob("*.safetensors")
