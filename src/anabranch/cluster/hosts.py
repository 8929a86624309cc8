"""Hosts of one machine: network namespaces of Linux with a cable each, of a given rate, to a switch that this process sees too.

    with hosts(2, mbit=200) as made:                       # root, and Linux's ip and tc
        server = made.start(0, ["python", "serve.py", "--host", made.addresses[0]])
        made.cut(1)                                        # as if somebody pulled the cable

Where they cannot be made `NoHostsError` says why. `anabranch.testing.Ranks` puts each rank on one.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.bounds import shown
from anabranch.errors import AnabranchError, InputError

__all__ = [
    "CABLE",
    "MOST_HOSTS",
    "Hosts",
    "NoHostsError",
    "can_make_hosts",
    "check_mbit",
    "enter",
    "hosts",
    "keep_pace",
    "tcp_sockets",
]

# What the network device of each host is called.
CABLE = "cable"
MOST_HOSTS, MOST_MBIT = 200, 1e6
_TOOLS = ("ip", "tc")
_NUMBERS = itertools.count()
_NEW_NETWORK = 0x40000000
# Of Linux; Python has no name for it.
_MAX_PACING_RATE = 47
_LOOK_S = 0.01


class NoHostsError(AnabranchError):
    """The kernel, or whoever runs this, does not allow network namespaces, or a tool is missing."""


@dataclass(frozen=True)
class Hosts:
    """Some of them.

    Attributes:
        names: of the namespaces.
        addresses: IPv4, on the cable of each.
        switch: address of this process in their network.
        mbit: of a cable, each way; None where only the processor limits it.
    """

    names: tuple[str, ...]
    addresses: tuple[str, ...]
    switch: str
    mbit: float | None

    def start(self, number: int, words: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """A process on a host; ``options`` are those of `subprocess.Popen`."""
        return subprocess.Popen(["ip", "netns", "exec", self.names[number], *words], **options)

    def cut(self, number: int) -> None:
        """Pull the cable of a host: its messages are lost, and nobody is told."""
        _do("ip", "-n", self.names[number], "link", "set", CABLE, "down")

    def mend(self, number: int) -> None:
        """Plug it in again."""
        _do("ip", "-n", self.names[number], "link", "set", CABLE, "up")


@contextmanager
def hosts(count: int, *, mbit: float | None = None) -> Iterator[Hosts]:
    """So many hosts, which are taken away in the end with all processes' connections.

    Args:
        count: 1 to 200.
        mbit: rate of each cable, each way, in Mbit/s; None for no limit.

    Raises NoHostsError where they cannot be made, InputError for values that are none.
    """
    if type(count) is not int or not 1 <= count <= MOST_HOSTS:
        raise InputError(f"count is {shown(count)}; use 1 to {MOST_HOSTS} hosts")
    check_mbit(mbit)
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        raise NoHostsError(f"there is no {missing[0]} here")
    tag = f"{os.getpid() % 10**7}n{next(_NUMBERS) % 1000}"
    # Apart from those of other processes, which may have some at the same time.
    subnet = f"10.{64 + os.getpid() % 64}.{(os.getpid() // 64 + next(_NUMBERS)) % 256}"
    made = Hosts(
        tuple(f"anabranch-{tag}-{number}" for number in range(count)),
        tuple(f"{subnet}.{1 + number}" for number in range(count)),
        f"{subnet}.254",
        mbit,
    )
    with ExitStack() as stack:
        switch = f"ab{tag}"
        _do("ip", "link", "add", switch, "type", "bridge")
        stack.callback(_undo, "ip", "link", "delete", switch)
        _do("ip", "address", "add", f"{made.switch}/24", "dev", switch)
        _do("ip", "link", "set", switch, "up")
        for number, (name, address) in enumerate(zip(made.names, made.addresses, strict=True)):
            _do("ip", "netns", "add", name)
            stack.callback(_undo, "ip", "netns", "delete", name)
            _plug(name, address, switch, f"{tag}.{number}", mbit)
        yield made


def can_make_hosts() -> bool:
    """Whether this process may, which is tried."""
    try:
        with hosts(1, mbit=1000):
            return True
    except NoHostsError:
        return False


def check_mbit(mbit: float | None) -> None:
    """Raises InputError for a rate that is none."""
    if mbit is not None and not 0.1 <= mbit <= MOST_MBIT:
        raise InputError(f"mbit is {shown(mbit)}; use 0.1 to {MOST_MBIT:g} Mbit/s, or None for no limit")


def _plug(name: str, address: str, switch: str, socket_name: str, mbit: float | None) -> None:
    """A cable between a namespace and the switch."""
    _do("ip", "link", "add", socket_name, "type", "veth", "peer", "name", CABLE, "netns", name)
    _do("ip", "link", "set", socket_name, "master", switch, "up")
    _do("ip", "-n", name, "link", "set", "lo", "up")
    _do("ip", "-n", name, "address", "add", f"{address}/24", "dev", CABLE)
    _do("ip", "-n", name, "link", "set", CABLE, "up")
    if mbit is not None:
        # What a host sends is shaped at its end, what it gets at the other.
        shape = ("root", "tbf", "rate", f"{mbit * 1000:.0f}kbit", "burst", "256kb", "latency", "50ms")
        _do("tc", "-n", name, "qdisc", "add", "dev", CABLE, *shape)
        _do("tc", "qdisc", "add", "dev", socket_name, *shape)


def enter(name: str) -> None:
    """Let this thread, and those that it will start, be on a host. Raises NoHostsError where that is not allowed."""
    library = ctypes.CDLL(None, use_errno=True)
    with open(Path("/run/netns") / name) as place:
        if library.setns(place.fileno(), _NEW_NETWORK):
            raise NoHostsError(f"cannot enter {name}: {os.strerror(ctypes.get_errno())}")


def keep_pace(mbit: float) -> Callable[[], None]:
    """Let no TCP connection of this process send more than so many Mbit/s, by the kernel's own pacing.

    Each connection has the rate by itself, unlike a cable that several share. A connection that is made later is seen within about a
    hundredth of a second, on a busy machine later; what is returned looks at once, for who has just made some. Raises NoHostsError where
    the kernel has no pacing.
    """
    if not hasattr(socket, "TCP_INFO") or not Path("/proc/self/fd").is_dir():
        raise NoHostsError("connections are paced by Linux alone")
    rate = int(mbit * 1e6 / 8)
    paced: set[tuple[int, int]] = set()
    looking = threading.Lock()

    def look() -> None:
        with looking:
            found: set[tuple[int, int]] = set()
            for connection, place in tcp_sockets():
                found.add(place)
                if place not in paced:
                    # Closed since it was seen, or none that has a rate.
                    with suppress(OSError):
                        connection.setsockopt(socket.SOL_SOCKET, _MAX_PACING_RATE, rate)
            paced.clear()
            paced.update(found)

    def keep_looking() -> None:
        while True:
            look()
            threading.Event().wait(_LOOK_S)

    threading.Thread(target=keep_looking, name="pace", daemon=True).start()
    return look


def tcp_sockets() -> Iterator[tuple[socket.socket, tuple[int, int]]]:
    """Each connected TCP socket of this process, as a copy that is closed when the next one is asked for, and (descriptor, inode) of it."""
    folder = Path("/proc/self/fd")
    for entry in folder.iterdir() if folder.is_dir() else ():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            inode = entry.stat().st_ino
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.type == socket.SOCK_STREAM and isinstance(connection.getpeername(), tuple):
                    yield connection, (int(entry.name), inode)
        except (OSError, ValueError):
            # Not connected, or closed since the folder was read.
            continue


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines()
        raise NoHostsError(f"{' '.join(words)}: {told[-1] if told else f'exit code {done.returncode}'}")


def _undo(*words: str) -> None:
    # One that is gone already is as wanted.
    subprocess.run(words, capture_output=True, check=False)
