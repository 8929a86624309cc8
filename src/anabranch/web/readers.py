"""`Readers`: cuts off who does not read what a server has written to them, or reads too slowly.

What is written and not read lies in the transport of a connection, in this process. A transport that is closed waits for it to be read,
too, for ever; only `abort` lets go of it. So a connection that is behind (its transport has asked to pause, or was closed with bytes left)
has to take `rate` bytes a second, looked at every `patience_s`. Whose buffer has grown takes nothing for longer: Linux shuts the window of
a connection whose buffer is full, and opens it only once a part of that was read: a sixteenth at least, and, as it lets go of what it
keeps in pieces, up to half of a buffer that has not grown. So who has taken much before has as much longer as it takes to read half of it
at `rate`, `LONGEST` times `patience_s` at most. And where all together hold more than `most_bytes`, those of whom most is held for one
address are cut off.

    connection_made   transport = readers.enter(transport, address), which the connection writes to in place of its own
    pause_writing     transport.is_behind()
    resume_writing    transport.has_caught_up()
    connection_lost   transport.is_lost()
"""

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from anabranch.web.places import host_of

__all__ = ["Readers", "Watched"]

PATIENCE_S = 30.0
# Bytes a second; a phone on a bad line reads ten times as fast.
RATE = 1 << 10
MOST_BYTES = 256 << 20

# The part of a full buffer that is read before anything more is taken; and how many times as long anyone may take nothing because of that.
OPENS, LONGEST = 1 / 2, 4

# A connection that is behind for less than this makes no place for others.
GRACE_S = 2.0
TICK_S = 1.0

# What the system keeps of a connection before it is sent; by itself it takes megabytes of each.
UNSENT = 128 << 10
Why = Literal["slow", "room"]


@dataclass
class _Behind:
    """Since when a connection is behind, and how much it had taken when it was last looked at."""

    since: float
    looked_at: float
    taken: int


class Readers:
    """The connections of a server; for one thread (an event loop).

    Args:
        patience_s: how long a connection may be behind and take less than ``rate``, if it took little before (see the module).
        rate: bytes a second.
        most_bytes: held for all that are behind, looked at once a second.
        on_cut: told why, of each that is cut off: "slow", or "room" for others.
    """

    def __init__(
        self,
        patience_s: float = PATIENCE_S,
        rate: float = RATE,
        most_bytes: int = MOST_BYTES,
        on_cut: Callable[[Why], None] = lambda why: None,
    ) -> None:
        self.patience_s, self.rate, self.most_bytes, self.on_cut = patience_s, rate, most_bytes, on_cut
        # In the order of falling behind.
        self._behind: dict[Watched, _Behind] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Connections that are behind."""
        return len(self._behind)

    def enter(self, transport: asyncio.BaseTransport, address: str) -> "Watched":
        """What a new connection writes to."""
        return Watched(transport, host_of(address), self)

    def watch(self, watched: "Watched") -> None:
        """It is behind from now on."""
        if watched in self._behind:
            return
        loop = asyncio.get_running_loop()
        self._behind[watched] = _Behind(loop.time(), loop.time(), watched.num_taken)
        if self._timer is None:
            self._tick(loop)

    def forget(self, watched: "Watched") -> None:
        """It is behind no more, or gone."""
        self._behind.pop(watched, None)
        if not self._behind and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(min(TICK_S, self.patience_s / 4), self._look)

    def _look(self) -> None:
        loop, held = asyncio.get_running_loop(), 0
        self._timer = None
        now = loop.time()
        for watched, behind in list(self._behind.items()):
            if now - behind.looked_at >= self.patience_s:
                taken = watched.num_taken
                is_slow = taken - behind.taken < self.rate * (now - behind.looked_at)
                if is_slow and now - behind.looked_at >= self._patience(behind.taken):
                    self._cut(watched, "slow")
                    continue
                if not is_slow:
                    behind.looked_at, behind.taken = now, taken
            held += watched.get_write_buffer_size()
        if held > self.most_bytes:
            self._make_room(held, now)
        if self._behind:
            self._tick(loop)

    def _patience(self, taken: int) -> float:
        """Seconds for one that has taken so much before, all of which may lie in its buffer."""
        return min(self.patience_s + OPENS * taken / max(self.rate, 1), LONGEST * self.patience_s)

    def _make_room(self, held: int, now: float) -> None:
        """Cut off until there is room: of the address that holds most, the connection that holds most."""
        size = {watched: watched.get_write_buffer_size() for watched in self._behind}
        of_address: Counter[str] = Counter()
        for watched, num_bytes in size.items():
            of_address[watched.address] += num_bytes
        late = [watched for watched in size if now - self._behind[watched].since >= GRACE_S]
        for watched in sorted(late, key=lambda one: (-of_address[one.address], -size[one])):
            if held <= self.most_bytes:
                return
            held -= size[watched]
            self._cut(watched, "room")

    def _cut(self, watched: "Watched", why: Why) -> None:
        self.forget(watched)
        watched.abort()
        self.on_cut(why)


class Watched:
    """In place of a connection's transport: counts what is written, and does all else as the transport does.

    Attributes:
        address: whose it is, see `host_of`.
    """

    def __init__(self, transport: asyncio.BaseTransport, address: str, readers: Readers) -> None:
        self._transport, self._readers, self.address = cast(asyncio.Transport, transport), readers, address
        self._num_written = 0
        self._is_lost = False
        made = transport.get_extra_info("socket")
        if made is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # Others than TCP have none.
            with contextlib.suppress(OSError):
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)

    @property
    def num_taken(self) -> int:
        """Bytes that the other side has taken; where the system does not tell what it holds itself, with those."""
        left = self.get_write_buffer_size()
        return self._num_written - left - (0 if self._is_lost else _held_by_system(self._transport))

    def write(self, data: Any) -> None:
        """See `asyncio.WriteTransport`."""
        self._num_written += len(data)
        self._transport.write(data)

    def writelines(self, list_of_data: Any) -> None:
        """See `asyncio.WriteTransport`."""
        parts = list(list_of_data)
        self._num_written += sum(map(len, parts))
        self._transport.writelines(parts)

    def is_closing(self) -> bool:
        """See `asyncio.BaseTransport`."""
        return self._transport.is_closing()

    def get_write_buffer_size(self) -> int:
        """See `asyncio.WriteTransport`."""
        return 0 if self._is_lost else self._transport.get_write_buffer_size()

    def close(self) -> None:
        """Close it when what was written is read; see the module."""
        self._transport.close()
        if self.get_write_buffer_size():
            self._readers.watch(self)

    def abort(self) -> None:
        """Close it now."""
        self._transport.abort()

    def is_behind(self) -> None:
        """The transport asks to write no more for now."""
        self._readers.watch(self)

    def has_caught_up(self) -> None:
        """It asks for more."""
        if not self._transport.is_closing():
            self._readers.forget(self)

    def is_lost(self) -> None:
        """The connection is closed."""
        self._is_lost = True
        self._readers.forget(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _held_by_system(transport: asyncio.Transport) -> int:
    """Bytes that the other side has not acknowledged. The system asks for more only once it got rid of a third of what it holds."""
    made = transport.get_extra_info("socket")
    try:
        import fcntl
        import termios

        return int(struct.unpack("i", fcntl.ioctl(made.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
    except (ImportError, AttributeError, OSError, ValueError):
        # Not on this system, or no longer a socket.
        return 0
