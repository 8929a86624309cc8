"""A plan carried out: pieces of a buffer over several TCP connections, each from an address or port of its own, and so over its own path.

Which path a connection takes is the network's matter: a source address that a routing rule sends over one uplink, or a source port that
hashes to it. The sender sends each connection's pieces in their order, all connections at once; the receiver writes by offset.

    with SplitReceiver(("10.0.1.2", 0)) as receiver:                                  # on one machine
        receiver.receive(array)
    with SplitSender(address, paths=[("10.1.0.1", 0), ("10.2.0.1", 0)]) as sender:    # on the other
        sender.send(array, [(0, 0, 1000), (1, 1000, 500)])                            # path, offset, bytes

A sender that is gone before it was done has sent nothing: when its last connection has ended, another may send the buffer from the start.

The wire is plain TCP: whoever reaches the port and knows ``secret`` can write into the buffer. A frame says of which transfer it is, of
how many bytes, and where its own go; what does not fit the buffer that waits ends the connection, and nothing of it is written.
"""

import contextlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from anabranch.bounds import finite, shown, whole
from anabranch.errors import BackendError, InputError

Address = tuple[str, int]
MAGIC = b"anabranch-split-1"
SECRET_BYTES = 32
# Transfer, bytes of the whole buffer, offset, bytes that follow.
FRAME = struct.Struct("!QQQQ")
MOST_PATHS, BLOCK = 256, 1 << 20
WAIT_S = 60.0
# Connections that a receiver has at a time.
MOST_LINKS = 4 * MOST_PATHS


class TransferError(BackendError):
    """A transfer over several connections did not end: nobody answered, somebody left, or time was up."""


def as_bytes(buffer: Any, *, writable: bool = False) -> memoryview:
    """The memory of a numpy array, a tensor of the CPU or anything with a buffer, byte by byte; nothing is copied.

    Raises InputError where it cannot be had so.
    """
    array = (
        np.asarray(buffer)
        if not isinstance(buffer, bytes | bytearray | memoryview)
        else np.frombuffer(buffer, np.uint8)
    )
    if array.dtype == object or not array.flags.c_contiguous:
        raise InputError(
            f"a buffer of {array.dtype} of shape {list(array.shape)} is not one row of bytes; make it contiguous"
        )
    if writable and not array.flags.writeable:
        raise InputError("the buffer to receive into is read-only")
    row: Any = array.reshape(-1).view(np.uint8)
    return memoryview(row)


def check_pieces(pieces: Iterable[Sequence[int]], size: int, paths: int) -> list[tuple[int, int, int]]:
    """Pieces (path, offset, bytes) in order of offset. Raises InputError unless they are the ``size`` bytes, each once."""
    found = [
        (whole("path", path, 0, paths - 1), whole("offset", begin, 0), whole("bytes", count, 1))
        for path, begin, count in pieces
    ]
    place = 0
    for _, begin, count in sorted(found, key=lambda piece: piece[1]):
        if begin != place:
            raise InputError(
                f"pieces end at byte {place:,} and go on at {begin:,}; they must be the {size:,} bytes, each once"
            )
        place += count
    if place != size:
        raise InputError(f"pieces have {place:,} bytes, and the buffer has {size:,}")
    return found


class SplitSender:
    """Connections to one receiver, one for each path.

    Args:
        to: address of a `SplitReceiver`.
        paths: (local address, local port) of each connection; port 0 for any, ``("", 0)`` for any address too.
        secret: what the receiver was given.
        timeout_s: to connect, and without any progress of a transfer.

    Raises InputError for paths that are none, TransferError where nobody answers. Threads may not share one.
    """

    def __init__(
        self, to: Address, paths: Sequence[Address], *, secret: bytes = b"", timeout_s: float = WAIT_S
    ) -> None:
        whole("paths", len(paths), 1, MOST_PATHS)
        self.timeout_s = finite("timeout_s", timeout_s, 1e-3, 1e6)
        self._links: list[socket.socket] = []
        self._transfer = secrets.randbits(32) << 20
        try:
            for local in paths:
                link = socket.create_connection(to, self.timeout_s, source_address=local if local != ("", 0) else None)
                self._links.append(link)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                link.sendall(MAGIC + _key(secret))
        except OSError as error:
            self.close()
            raise TransferError(f"no connection to {to[0]}:{to[1]} from {shown(local)}: {_why(error)}") from None

    def send(self, buffer: Any, pieces: Iterable[Sequence[int]]) -> None:
        """Send the pieces (path, offset, bytes) of a buffer; returns when the receiver has all of it.

        Raises InputError for pieces that are not the buffer's bytes, each once, TransferError when a connection ends or stands still.
        """
        held = as_bytes(buffer)
        found = check_pieces(pieces, len(held), len(self._links))
        self._transfer += 1
        by_path: dict[int, list[tuple[int, int]]] = {}
        for path, begin, count in found:
            by_path.setdefault(path, []).append((begin, count))
        with ThreadPoolExecutor(len(by_path) or 1) as pool:
            jobs = [pool.submit(self._send_over, self._links[path], held, parts) for path, parts in by_path.items()]
        for job in jobs:
            job.result()

    def _send_over(self, link: socket.socket, held: memoryview, parts: list[tuple[int, int]]) -> None:
        try:
            for begin, count in parts:
                link.sendall(FRAME.pack(self._transfer, len(held), begin, count))
                link.sendall(held[begin : begin + count])
            for _ in parts:
                if link.recv(1) != b"\x01":
                    raise TransferError(
                        "the receiver refused a piece: is its buffer of another size, or its secret another?"
                    )
        except OSError as error:
            raise TransferError(f"a transfer to {_peer(link)} ended: {_why(error)}") from None

    def close(self) -> None:
        """End the connections."""
        for link in self._links:
            link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SplitReceiver:
    """Takes connections of one sender or several, and one transfer at a time into the buffer that waits.

    Args:
        listen: address; port 0 for any free one, which ``address`` then says.
        secret: senders must have it.

    Raises TransferError where the address cannot be had.
    """

    def __init__(self, listen: Address = ("127.0.0.1", 0), *, secret: bytes = b"") -> None:
        self._secret = _key(secret)
        self._state = threading.Condition()
        self._waiting: _Transfer | None = None
        self._links: set[socket.socket] = set()
        # Those that have not shown the secret yet, the oldest first.
        self._strangers: dict[socket.socket, None] = {}
        self._is_closed = False
        try:
            self._server = socket.create_server(listen, backlog=MOST_PATHS)
        except OSError as error:
            raise TransferError(f"cannot listen at {listen[0]}:{listen[1]}: {_why(error)}") from None
        self.address: Address = self._server.getsockname()[:2]
        self._thread = threading.Thread(target=self._accept, name="split-receiver", daemon=True)
        self._thread.start()

    def receive(self, buffer: Any, timeout_s: float = WAIT_S) -> None:
        """Fill a buffer; returns when every byte was written once.

        Raises InputError for a buffer that cannot be written, TransferError when time is up or the receiver is closed.
        """
        held = as_bytes(buffer, writable=True)
        end = time.monotonic() + finite("timeout_s", timeout_s, 0.0, 1e6)
        with self._state:
            if self._waiting is not None:
                raise InputError("another buffer is being received into; one at a time")
            self._waiting = transfer = _Transfer(held)
            self._state.notify_all()
            try:
                while (transfer.left or transfer.writers) and not self._is_closed:
                    rest = end - time.monotonic()
                    if rest <= 0:
                        break
                    self._state.wait(rest)
            finally:
                self._waiting = None
                # Nobody writes any more once this has returned, also who stands still in the middle of a piece.
                for link in transfer.writers:
                    _end(link)
                while transfer.writers:
                    self._state.wait(1.0)
        if transfer.left:
            why = "the receiver was closed" if self._is_closed else f"after {timeout_s:g} s"
            raise TransferError(f"{transfer.left:,} of {len(held):,} bytes did not come: {why}")

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._server.accept()
            except OSError:
                return
            with self._state:
                if self._is_closed or not self._has_room():
                    link.close()
                    continue
                self._links.add(link)
                self._strangers[link] = None
            threading.Thread(target=self._serve, args=(link,), name="split-link", daemon=True).start()

    def _has_room(self) -> bool:
        """Whether one more connection is taken: whoever has no secret makes room for the next."""
        if len(self._links) < MOST_LINKS:
            return True
        if not self._strangers:
            return False
        oldest = next(iter(self._strangers))
        del self._strangers[oldest]
        # Its thread closes it.
        self._links.discard(oldest)
        _end(oldest)
        return True

    def _serve(self, link: socket.socket) -> None:
        """One connection, until it ends or says something that does not fit."""
        try:
            link.settimeout(WAIT_S)
            if not hmac.compare_digest(_read(link, len(MAGIC) + SECRET_BYTES), MAGIC + self._secret):
                return
            link.settimeout(None)
            with self._state:
                if link not in self._strangers:
                    # It was ended in this moment.
                    return
                del self._strangers[link]
            while True:
                header = FRAME.unpack(_read(link, FRAME.size))
                transfer = self._claim(link, *header)
                if transfer is None:
                    return
                try:
                    self._take(link, transfer, header[2], header[3])
                    # Before `receive` returns: who closes the receiver then would end the connection without it.
                    link.sendall(b"\x01")
                finally:
                    with self._state:
                        transfer.writers.discard(link)
                        self._state.notify_all()
        except OSError:
            # The sender is told by the end of its connection, who waits here by the clock.
            return
        finally:
            with self._state:
                self._links.discard(link)
                self._strangers.pop(link, None)
                if self._waiting is not None:
                    self._waiting.leave(link)
            link.close()

    def _claim(self, link: socket.socket, number: int, total: int, begin: int, count: int) -> "_Transfer | None":
        """The transfer that a frame is of, once somebody waits for one; None if it does not fit what waits."""
        end = time.monotonic() + WAIT_S
        with self._state:
            # Who has been told that all has come may send the next buffer before `receive` has taken this one away.
            while (
                (self._waiting is None or self._waiting.is_followed_by(link, number))
                and not self._is_closed
                and time.monotonic() < end
            ):
                self._state.wait(1.0)
            transfer = self._waiting
            if transfer is None or not transfer.claim(link, number, total, begin, count):
                return None
            transfer.writers.add(link)
            return transfer

    def _take(self, link: socket.socket, transfer: "_Transfer", begin: int, count: int) -> None:
        place, end = begin, begin + count
        while place < end:
            got = link.recv_into(transfer.held[place : min(end, place + BLOCK)])
            if not got:
                raise ConnectionError("the sender left")
            place += got
        with self._state:
            transfer.left -= count

    def close(self) -> None:
        """End everything; who waits is told."""
        with self._state:
            self._is_closed = True
            links = list(self._links)
            self._state.notify_all()
        # An accept that waits is not ended by closing alone.
        _end(self._server)
        self._server.close()
        for link in links:
            _end(link)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Transfer:
    """A buffer that is being filled; all fields are the receiver's, under its lock."""

    def __init__(self, held: memoryview) -> None:
        self.held, self.left = held, len(held)
        self.writers: set[socket.socket] = set()
        self._number: int | None = None
        self._claimed: list[tuple[int, int]] = []
        # Connections of the sender whose transfer it is.
        self._links: set[socket.socket] = set()

    def is_followed_by(self, link: socket.socket, number: int) -> bool:
        """Whether it is whole, and what comes is of another transfer: of another number, or of a sender that begins to count."""
        return not self.left and self._number is not None and (number != self._number or link not in self._links)

    def leave(self, link: socket.socket) -> None:
        """A connection has ended. Where it was the last of a sender that was not done, another one may begin anew."""
        if link not in self._links:
            return
        self._links.discard(link)
        if not self._links and self.left:
            self.left, self._number, self._claimed = len(self.held), None, []

    def claim(self, link: socket.socket, number: int, total: int, begin: int, count: int) -> bool:
        """Whether a piece is of this transfer and of no bytes that another piece has; it has them then."""
        fits = total == len(self.held) and 0 < count <= total and begin <= total - count
        if (
            not fits
            or self._number not in (None, number)
            or any(a < begin + count and begin < b for a, b in self._claimed)
        ):
            return False
        self._number = number
        self._claimed.append((begin, begin + count))
        self._links.add(link)
        return True


def _read(link: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = link.recv(count - len(parts))
        if not part:
            raise ConnectionError("the sender left")
        parts += part
    return bytes(parts)


def _key(secret: bytes) -> bytes:
    return hmac.digest(secret, MAGIC, "sha256")


def _end(link: socket.socket) -> None:
    """Whoever waits at this socket goes on."""
    with contextlib.suppress(OSError):  # it has ended by itself, or never was connected
        link.shutdown(socket.SHUT_RDWR)


def _peer(link: socket.socket) -> str:
    try:
        return "{}:{}".format(*link.getpeername()[:2])
    except OSError:
        return "the receiver"


def _why(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()
