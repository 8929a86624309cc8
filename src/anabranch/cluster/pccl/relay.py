"""A long way for connections: a relay passes on what it gets a while later, a window of it at a time, and no faster than a rate.

    with Relay(("127.0.0.1", peer_port), delay_s=0.05, window=1 << 18) as relay:
        ...                                           # whoever calls relay.port is connected to the peer, 50 ms away each way

For what a machine without netem cannot try: what distance does to collectives. It loses nothing and reorders nothing.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from typing import Any

from anabranch.bounds import shown
from anabranch.errors import InputError

_PIECE = 1 << 14


class Relay:
    """See the module.

    Args:
        target: host and port to which it passes on.
        delay_s: of every byte, one way.
        window: bytes of one connection that may be under way in one direction; so its rate is at most ``window / delay_s``.
        rate: bytes a second of all connections together in one direction; None for no limit.

    Attributes:
        port: where it listens, on 127.0.0.1.

    Raises InputError for values that are none.
    """

    def __init__(
        self, target: tuple[str, int], *, delay_s: float = 0.0, window: int = 1 << 20, rate: float | None = None
    ) -> None:
        if not 0 <= delay_s <= 60 or not 1 <= window <= 2**30 or (rate is not None and not rate > 0):
            raise InputError(
                f"delay_s is {shown(delay_s)}, window {shown(window)}, rate {shown(rate)}; use 0 to 60 s, 1 to 2^30 bytes, a rate above 0"
            )
        self._target, self._delay_s, self._window, self._rate = target, delay_s, window, rate
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(0.25)
        self.port = int(self._socket.getsockname()[1])
        self._is_closed = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        # When the wire is free again, by direction.
        self._free = [0.0, 0.0]
        threading.Thread(target=self._serve, name="relay", daemon=True).start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Cut all connections."""
        self._is_closed.set()
        self._socket.close()
        with self._lock:
            for sock in self._open:
                _cut(sock)

    def _serve(self) -> None:
        while not self._is_closed.is_set():
            try:
                near, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            threading.Thread(target=self._connect, args=(near,), name="relay", daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._target, timeout=10)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open |= {near, far}
        for source, sink, way in ((near, far, 0), (far, near, 1)):
            queue = _Delayed(self._window)
            threading.Thread(target=self._read, args=(source, queue, way), name="relay", daemon=True).start()
            threading.Thread(target=self._write, args=(sink, source, queue), name="relay", daemon=True).start()

    def _read(self, source: socket.socket, queue: _Delayed, way: int) -> None:
        try:
            while data := source.recv(min(_PIECE, self._window)):
                queue.put(data, self._sent(len(data), way) + self._delay_s)
        except OSError:
            # Cut off: what had come before still goes on.
            pass
        queue.put(b"", time.monotonic() + self._delay_s)

    def _sent(self, count: int, way: int) -> float:
        """When the last of so many bytes is on the wire."""
        now = time.monotonic()
        if self._rate is None:
            return now
        with self._lock:
            self._free[way] = max(self._free[way], now) + count / self._rate
            return self._free[way]

    def _write(self, sink: socket.socket, source: socket.socket, queue: _Delayed) -> None:
        try:
            while data := queue.get():
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            # Nobody takes it any more: who sends it is told so.
            _cut(source)
            queue.drop()


class _Delayed:
    """Bytes that come out a while after they went in; who puts in waits for room."""

    def __init__(self, window: int) -> None:
        self._window, self._held, self._is_dropped = window, 0, False
        self._items: deque[tuple[float, bytes]] = deque()
        self._changed = threading.Condition()

    def put(self, data: bytes, due: float) -> None:
        with self._changed:
            while self._held and self._held + len(data) > self._window and not self._is_dropped:
                self._changed.wait()
            self._items.append((due, data))
            self._held += len(data)
            self._changed.notify_all()

    def get(self) -> bytes:
        """The next bytes, when they are due; none at the end."""
        with self._changed:
            while not self._items:
                self._changed.wait()
            due, data = self._items[0]
        left = due - time.monotonic()
        if left > 0:
            time.sleep(left)
        with self._changed:
            self._items.popleft()
            self._held -= len(data)
            self._changed.notify_all()
        return data

    def drop(self) -> None:
        with self._changed:
            self._is_dropped = True
            self._changed.notify_all()


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
