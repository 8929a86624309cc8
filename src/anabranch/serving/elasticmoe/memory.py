"""The memory manager: a process that owns every weight and every key-value cache of a host, loaded once.

    memory = MemoryManager.start(layout, kv_bytes=64 << 20)
    memory.load(place(8, 2, (0, 1)))
    memory.prepare(plan)          # peer copies, beside what serves
    memory.commit()               # or drop()

Instances that execute the model own no memory: they `attach` to that of their device, by file descriptors. So an instance may die, be
exchanged or run beside another without a byte being read again. The process needs neither torch nor numpy and is there in an instant.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from anabranch.errors import AnabranchError
from anabranch.serving.elasticmoe.backend import Backend, Kind, Mappable, backend_of
from anabranch.serving.elasticmoe.devices import Host
from anabranch.serving.elasticmoe.layout import Layout
from anabranch.serving.elasticmoe.plan import Placement, ScalePlan
from anabranch.serving.elasticmoe.processes import Process, start_process
from anabranch.serving.elasticmoe.wire import Channel, ChannelClosedError, pair

__all__ = ["Attached", "MemoryManager", "attach"]

Which = Literal["current", "prepared"]
Part = Literal["dense", "experts", "kv"]
PARTS: tuple[Part, ...] = ("dense", "experts", "kv")


@dataclass(frozen=True)
class Attached:
    """What an instance gets of one device: memory to map, and which experts of each layer stand in which slot.

    Attributes:
        layout: of the model.
        placement: of all devices.
        kv_bytes: size of the key-value cache.
        backend: whose memory it is.
        device: what this process computes on.
        parts: memory to map, by name.
    """

    layout: Layout
    placement: Placement
    kv_bytes: int
    backend: Backend
    device: int
    parts: Mapping[Part, Mappable]

    @property
    def dense(self) -> Mappable:
        """The dense weights."""
        return self.parts["dense"]

    @property
    def experts(self) -> Mappable:
        """The experts."""
        return self.parts["experts"]

    @property
    def kv(self) -> Mappable:
        """The key-value cache."""
        return self.parts["kv"]

    def close(self) -> None:
        """Let go of it; what is mapped stays mapped."""
        for part in self.parts.values():
            part.close()


def attach(
    channel: Channel,
    device: int,
    which: Which = "current",
    *,
    only: Sequence[Part] = PARTS,
    backend: Backend | None = None,
    device_here: int | None = None,
) -> Attached:
    """Attach to a device of the memory manager at the other end of ``channel``. Raises what it raised.

    Args:
        channel: from `MemoryManager.connect`.
        device: whose memory.
        which: the placement that says which experts.
        only: what of it.
        backend: None for this process's own of the manager's kind.
        device_here: what this process computes on, if that is not ``device``.
    """
    layout, placement, kv_bytes, kind = _answer(*channel.ask(("attach", {"device": device, "which": which})))[0]
    backend = backend or backend_of(kind)
    here = device if device_here is None else device_here
    experts = [
        matrix.offset + expert * matrix.block
        for layer, matrices in enumerate(layout.layers)
        for expert in placement.of(layer, device)
        for matrix in matrices
    ]
    parts: dict[Part, Mappable] = {}
    attached = Attached(layout, placement, kv_bytes, backend, here, parts)
    try:
        for part in only:

            def ask(offsets: Sequence[int], part: Part = part) -> tuple[Any, list[int]]:
                return _answer(*channel.ask(("export", {"device": device, "part": part, "offsets": list(offsets)})))

            parts[part] = backend.opened(here, experts if part == "experts" else [0], ask)
    except BaseException:
        attached.close()
        raise
    return attached


class MemoryManager:
    """The manager seen from the process that started it. Every call waits for its answer; calls of several threads run side by side."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._idle: list[Channel] = []
        self._lock = threading.Lock()

    @classmethod
    def start(cls, layout: Layout, kv_bytes: int, *, shares: bool = False, kind: Kind = "cpu") -> "MemoryManager":
        """Start the process; nothing is loaded yet. Arguments are those of `Host`, and the kind of its backend.

        Raises BackendError where there are no such devices.
        """
        manager = cls(start_process("anabranch.serving.elasticmoe.memory", "memory"))
        try:
            manager.process.channel.send((layout, kv_bytes, shares, kind))
            error, _ = manager.process.channel.recv()
            if error is not None:
                raise error
            manager.usage()
        except BaseException:
            manager.close()
            raise
        return manager

    def load(self, placement: Placement) -> None:
        """Fill the devices of a first placement from disk. Raises CheckpointError, CapacityError."""
        self._ask("load", placement=placement)

    def prepare(self, plan: ScalePlan, *, from_disk: bool = False) -> dict[str, float]:
        """Bring what a plan copies, beside what serves; see `Host.prepare`."""
        return self._ask("prepare", plan=plan, from_disk=from_disk)

    def commit(self) -> int:
        """Make the prepared placement the current one; gives the bytes that became free."""
        return self._ask("commit")

    def drop(self) -> None:
        """Let go of what was prepared; nothing happens if nothing was."""
        self._ask("drop")

    def usage(self) -> dict[str, Any]:
        """See `Host.usage`."""
        return self._ask("usage")

    def ping(self) -> None:
        """Wait for a sign of life. Raises ChannelClosedError if the process has died."""
        self._ask("ping")

    def connect(self) -> int:
        """A file descriptor through which another process may `attach`; it is given to that process and closed here."""
        ours, theirs = pair()
        fd = ours.detach()
        try:
            self.process.channel.send("connect", [fd])
        except ChannelClosedError:
            theirs.close()
            raise
        finally:
            os.close(fd)
        return theirs.detach()

    def close(self) -> None:
        """End the process, and with it the memory that nobody has mapped."""
        with self._lock:
            for channel in self._idle:
                channel.close()
            self._idle.clear()
        self.process.close()

    def _ask(self, name: str, **arguments: Any) -> Any:
        with self._lock:
            channel = self._idle.pop() if self._idle else None
        channel = channel or Channel.of_fd(self.connect())
        try:
            answer = _answer(*channel.ask((name, arguments)))[0]
        except ChannelClosedError:
            channel.close()
            raise
        except BaseException:
            self._put_back(channel)
            raise
        self._put_back(channel)
        return answer

    def _put_back(self, channel: Channel) -> None:
        with self._lock:
            self._idle.append(channel)


def _answer(message: Any, fds: list[int]) -> tuple[Any, list[int]]:
    if isinstance(message, Exception):
        raise message
    return message, fds


class _Served:
    """One connection to the manager, served by a thread of its own."""

    def __init__(self, host: Host, channel: Channel) -> None:
        self.host, self.channel = host, channel

    def run(self) -> None:
        # The client has gone.
        with contextlib.suppress(ChannelClosedError):
            while True:
                (name, arguments), _ = self.channel.recv()
                try:
                    message, fds = getattr(self, f"do_{name}")(**arguments)
                except (AnabranchError, OSError, RuntimeError, KeyError) as error:
                    message, fds = error, ()
                try:
                    self.channel.send(message, fds)
                finally:
                    for fd in fds:
                        os.close(fd)

    def do_load(self, placement: Placement) -> tuple[Any, tuple]:
        self.host.load(placement)
        return None, ()

    def do_prepare(self, plan: ScalePlan, from_disk: bool) -> tuple[Any, tuple]:
        return self.host.prepare(plan, from_disk=from_disk), ()

    def do_commit(self) -> tuple[Any, tuple]:
        return self.host.commit(), ()

    def do_drop(self) -> tuple[Any, tuple]:
        if self.host.plan is not None:
            self.host.drop()
        return None, ()

    def do_ping(self) -> tuple[Any, tuple]:
        return None, ()

    def do_usage(self) -> tuple[Any, tuple]:
        return self.host.usage(), ()

    def do_attach(self, device: int, which: Which) -> tuple[Any, tuple]:
        plan, placement = self.host.plan, self.host.placement
        if which == "prepared" and plan is not None:
            placement = plan.new
        if placement is None or device not in placement.devices:
            raise RuntimeError(f"device {device} has no memory in the {which} placement")
        return (self.host.layout, placement, self.host.kv_bytes, self.host.backend.kind), ()

    def do_export(self, device: int, part: Part, offsets: Sequence[int]) -> tuple[Any, Sequence[int]]:
        return getattr(self.host.devices[device], part).export(offsets)


def main() -> None:
    """The process: takes connections from the one that started it until that ends."""
    control = Channel.of_fd(int(sys.argv[1]))
    with contextlib.suppress(ChannelClosedError):
        (layout, kv_bytes, shares, kind), _ = control.recv()
        try:
            host = Host(layout, kv_bytes, shares=shares, backend=backend_of(kind))
        except AnabranchError as error:
            control.send(error)
            os._exit(1)
        control.send(None)
        while True:
            _, (fd,) = control.recv()
            threading.Thread(target=_Served(host, Channel.of_fd(fd)).run, daemon=True).start()
    # Threads may wait for clients that still live; the memory ends with the last of them.
    os._exit(0)


if __name__ == "__main__":
    main()
