"""Messages between the processes of one host: pickled values and file descriptors over a UNIX socket.

Both ends are processes of ours that were given their end when they were started: there is no address to connect to, so nothing
else on the machine can send a pickle.
"""

import os
import pickle
import select
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

__all__ = ["MOST_FDS", "Channel", "ChannelClosedError", "pair"]

# Bytes of the message, file descriptors that travel with it.
_HEADER = struct.Struct("<QI")

# Of one message; Linux takes up to 253.
MOST_FDS = 64


class ChannelClosedError(ConnectionError):
    """The other end is gone: its process has ended or has closed it."""


class Channel:
    """One end. Several threads may send; one at a time may receive."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()

    @classmethod
    def of_fd(cls, fd: int) -> "Channel":
        """The end that this process was started with."""
        return cls(socket.socket(fileno=fd))

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Send a value, and up to `MOST_FDS` open files beside it. Raises ChannelClosedError."""
        data = pickle.dumps(message, protocol=5)
        header = _HEADER.pack(len(data), len(fds))
        try:
            with self._sending:
                if fds:
                    socket.send_fds(self._socket, [header], fds)
                    self._socket.sendall(data)
                else:
                    self._socket.sendall(header + data)
        except OSError as error:
            raise ChannelClosedError(str(error)) from None

    def recv(self) -> tuple[Any, list[int]]:
        """The next message and the files that came with it. Raises ChannelClosedError."""
        fds: list[int] = []
        try:
            header, fds = self._header()
            size, count = _HEADER.unpack(header)
            data = self._read(size)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise ChannelClosedError(str(error)) from None
        if len(fds) != count:
            for fd in fds:
                os.close(fd)
            raise ChannelClosedError(f"{count} files were sent and {len(fds)} arrived")
        return pickle.loads(data), fds

    def ask(self, message: Any, fds: Sequence[int] = ()) -> tuple[Any, list[int]]:
        """Send, then receive."""
        self.send(message, fds)
        return self.recv()

    def poll(self, timeout_s: float | None = 0.0) -> bool:
        """Whether there is something to receive, or the end of the channel. None waits for it."""
        try:
            # Not select.select, which knows no descriptors above 1023.
            waiter = select.poll()
            waiter.register(self._socket, select.POLLIN)
            return bool(waiter.poll(None if timeout_s is None else timeout_s * 1000))
        except (OSError, ValueError):
            # Closed by another thread meanwhile.
            return True

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def detach(self) -> int:
        """Give the file away; the channel is of no use any more."""
        return self._socket.detach()

    def forget(self) -> None:
        """Close this process's copy; the channel itself goes on in the process that it was copied from."""
        self._socket.close()

    def close(self) -> None:
        """End it; whoever waits at either end learns of it."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other end was faster.
            self._socket.close()
        else:
            self._socket.close()

    def _header(self) -> tuple[bytes, list[int]]:
        data, fds, _, _ = socket.recv_fds(self._socket, _HEADER.size, MOST_FDS)
        if not data:
            raise ChannelClosedError("the other end is closed")
        return data + self._read(_HEADER.size - len(data)), fds

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ChannelClosedError("the other end closed within a message")
            view = view[count:]
        return bytes(data)


def pair() -> tuple[Channel, Channel]:
    """Two ends of one channel."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(here), Channel(there)
