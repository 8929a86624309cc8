"""Instances: the ranks of one configuration, as processes; and those that wait on standby for the configuration to be asked for."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from anabranch.errors import BackendError
from anabranch.serving.elasticmoe.fork_server import ForkServer
from anabranch.serving.elasticmoe.memory import MemoryManager
from anabranch.serving.elasticmoe.processes import Process
from anabranch.serving.elasticmoe.rank_boot import Boot
from anabranch.serving.elasticmoe.wire import ChannelClosedError, pair

__all__ = ["Instance", "InstanceError", "Standby"]

Event = tuple[Any, ...]
OnEvent = Callable[["Instance", int, Event], None]
_READY_S = 120.0


class InstanceError(BackendError):
    """A rank has died, failed or not answered in time."""


class _Handle:
    """One rank, seen from the coordinator: calls by number, and a thread that takes what comes."""

    def __init__(self, device: int, process: Process, on_event: Callable[[int, Event], None]) -> None:
        self.device, self.process = device, process
        self.ready: Future[None] = Future()
        self.is_lost = False
        self._on_event = on_event
        self._calls: dict[int, Future[Any]] = {}
        self._number = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._listen, daemon=True, name=f"anabranch-rank-{device}")
        self._thread.start()

    def call(self, name: str, **arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        with self._lock:
            self._number += 1
            number, self._calls[self._number] = self._number, future
        try:
            self.process.channel.send((number, name, arguments))
        except ChannelClosedError:
            self._lose(f"rank of device {self.device} is gone")
        return future

    def tell(self, name: str, **arguments: Any) -> None:
        try:
            self.process.channel.send((None, name, arguments))
        except ChannelClosedError:
            # The listener learns of it as well, and says so.
            return

    def _listen(self) -> None:
        while True:
            try:
                event, _ = self.process.channel.recv()
            except ChannelClosedError:
                self._lose(f"rank of device {self.device} has died")
                self._on_event(self.device, ("died",))
                return
            if event[0] == "reply":
                with self._lock:
                    future = self._calls.pop(event[1])
                if isinstance(event[2], Exception):
                    future.set_exception(InstanceError(str(event[2])))
                else:
                    future.set_result(event[2])
            elif event[0] == "ready":
                self.ready.set_result(None)
            else:
                self._on_event(self.device, event)

    def _lose(self, error: str) -> None:
        self.is_lost = True
        with self._lock:
            waiting = [*self._calls.values(), self.ready]
            self._calls.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(InstanceError(error))


class Instance:
    """The ranks of ``devices``.

    Attributes:
        devices: in the order of ranks.
        is_broken: a rank has died or failed; what it had under way is to be run elsewhere.
    """

    def __init__(self, devices: tuple[int, ...], on_event: OnEvent) -> None:
        self.devices = devices
        self.is_broken = self.is_closed = False
        self._on_event = on_event
        self._handles: dict[int, _Handle] = {}

    @classmethod
    def boot(
        cls, fork_server: ForkServer, memory: MemoryManager, boots: Sequence[Boot], on_event: OnEvent
    ) -> "Instance":
        """Start the processes; `wait_ready` says when they are on standby."""
        devices = tuple(boot.device for boot in boots)
        instance = cls(devices, on_event)
        count = len(devices)
        asks = {(a, b): pair() for a in range(count) for b in range(count) if a != b}  # a asks b
        try:
            for rank, boot in enumerate(boots):
                others = [other for other in range(count) if other != rank]
                ends = [asks[rank, other][0] for other in others] + [asks[other, rank][1] for other in others]
                process = fork_server.make(f"rank-{boot.device}")
                instance._handles[boot.device] = _Handle(boot.device, process, instance._event)
                fd = memory.connect()
                try:
                    process.channel.send(boot, [fd, *(end.fileno() for end in ends)])
                finally:
                    os.close(fd)
        except BaseException:
            instance.close()
            raise
        finally:
            # The ranks have theirs now.
            for here, there in asks.values():
                here.forget()
                there.forget()
        return instance

    @property
    def pids(self) -> dict[int, int]:
        """Process of each device."""
        return {device: handle.process.pid for device, handle in self._handles.items()}

    def wait_ready(self, timeout_s: float = _READY_S) -> None:
        """Until every rank is on standby. Raises InstanceError."""
        self._gather({device: handle.ready for device, handle in self._handles.items()}, "start", timeout_s)

    def all(
        self,
        name: str,
        each: Mapping[int, Mapping[str, Any]] | None = None,
        *,
        timeout_s: float = 60.0,
        **arguments: Any,
    ) -> dict[int, Any]:
        """Call every rank at once, or those in ``each`` with arguments of their own; their answers by device. Raises InstanceError."""
        chosen = {device: {} for device in self.devices} if each is None else each
        calls = {device: self._handles[device].call(name, **{**arguments, **own}) for device, own in chosen.items()}
        return self._gather(calls, name, timeout_s)

    def tell(self, device: int, name: str, **arguments: Any) -> None:
        """Tell one rank something that is not answered."""
        self._handles[device].tell(name, **arguments)

    def call(self, device: int, name: str) -> "Future[Any]":
        """Call one rank; its answer, or InstanceError."""
        return self._handles[device].call(name)

    def kill(self, device: int) -> None:
        """End one rank at once, as a fault would."""
        self._handles[device].process.kill()

    def close(self) -> None:
        """End the processes."""
        self.is_closed = True
        for handle in self._handles.values():
            handle.process.kill()
        for handle in self._handles.values():
            handle.process.close()

    def _gather(self, calls: Mapping[int, "Future[Any]"], name: str, timeout_s: float) -> dict[int, Any]:
        end = time.monotonic() + timeout_s
        answers = {}
        for device, future in calls.items():
            try:
                answers[device] = future.result(max(0.0, end - time.monotonic()))
            except FutureTimeoutError:
                self.is_broken = True
                raise InstanceError(f"device {device} did not {name} within {timeout_s:g} s") from None
            except InstanceError:
                self.is_broken |= self._handles[device].is_lost
                raise
        return answers

    def _event(self, device: int, event: Event) -> None:
        if event[0] in ("died", "failed"):
            if self.is_closed:
                return
            self.is_broken = True
        self._on_event(self, device, event)


class Standby:
    """Instances that wait without weights, by configuration; the least recently used goes when there are too many."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[tuple[int, ...], Instance] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, devices: tuple[int, ...]) -> Instance | None:
        """The instance for ``devices``, if one waits and lives; it is the caller's from now on."""
        with self._lock:
            found = self._kept.pop(devices, None)
        if found is not None and found.is_broken:
            found.close()
            return None
        return found

    def put(self, instance: Instance) -> None:
        """Let an instance wait; it must have let go of its memory."""
        with self._lock:
            gone = [self._kept.pop(instance.devices, None)]
            self._kept[instance.devices] = instance
            while len(self._kept) > self.size:
                gone.append(self._kept.popitem(last=False)[1])
        for each in gone:
            if each is not None:
                each.close()

    def drop(self, instance: Instance) -> None:
        """End an instance if it waits here."""
        with self._lock:
            is_here = self._kept.get(instance.devices) is instance
            if is_here:
                del self._kept[instance.devices]
        if is_here:
            instance.close()

    def configurations(self) -> list[tuple[int, ...]]:
        """What waits, least recently used first."""
        with self._lock:
            return list(self._kept)

    def instances(self) -> list[Instance]:
        """Those that wait."""
        with self._lock:
            return list(self._kept.values())

    def close(self) -> None:
        """End them all."""
        with self._lock:
            gone = list(self._kept.values())
            self._kept.clear()
        for each in gone:
            each.close()
