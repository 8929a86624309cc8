"""Connections that carry frames: a header of JSON and bytes behind it. Both ends prove that they know the secret; nothing is unpickled.

Without a secret whoever reaches the port is as good as a rank, so a listener that other machines reach has one. Until its user knows who is
at the other end (`Channel.admit`) a connection has a time, small frames, and no more than its share of the places of those who wait.

    channel = connect("127.0.0.1", 4711, secret, on_frame=print, on_close=print)
    channel.send({"kind": "hello"}, tensor_bytes)

Sends never wait: a thread writes what is queued, another reads. Who waits for a frame waits in a mailbox, from where it can be called away,
which a receive of gloo cannot without breaking its pair.
"""

import hmac
import json
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from anabranch.errors import InputError, PeerError
from anabranch.sockets import is_local

__all__ = ["Channel", "Listener", "connect"]

Header = dict[str, Any]
Body = bytes | bytearray | memoryview
OnFrame = Callable[["Channel", Header, Body], None]
OnClose = Callable[["Channel", str], None]
_SIZES = struct.Struct("<IQ")
_NONCE, _DIGEST = 16, 32
# What a frame may have at most, so that a bug cannot ask for all memory; and the header of one who is not admitted, who sends no body.
MOST_HEADER, MOST_BODY = 2**22, 2**33
MOST_HELLO = 2**18
# All that both ends say until one is admitted takes at most so long.
HANDSHAKE_S = 10.0
# Of those who are not admitted yet; whoever has waited longest makes room.
MOST_WAITING = 256
# Where no connection can be taken (no files, no memory, no threads), it is tried again after so long.
_PAUSE_S = 0.2
# Unanswered data for so long closes a connection whose other end is gone without a word.
_SILENCE_MS = 30_000


class Channel:
    """One connection, after both ends have proved themselves.

    Attributes:
        peer: for whoever uses it: who is at the other end.
        sent_bytes: so far, with headers.
    """

    def __init__(
        self, connection: socket.socket, on_frame: OnFrame, on_close: OnClose, *, most_body: int = MOST_BODY
    ) -> None:
        self.peer: Any = None
        self.sent_bytes = 0
        self._connection = connection
        self._on_frame, self._on_close = on_frame, on_close
        self._queue: queue.SimpleQueue[tuple[bytes, Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        self._has_ended = threading.Event()
        self._most_body = most_body
        # Until when it must be admitted, and who is told; None once it is.
        self._deadline: float | None = None
        self._on_admit: Callable[[], None] = lambda: None
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_MS)

    def start(self) -> None:
        """Begin to read and to write."""
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def hold(self, deadline: float, on_admit: Callable[[], None]) -> None:
        """Before `start`: small frames alone until it is admitted, and an end at a time where it is not."""
        self._deadline, self._on_admit = deadline, on_admit

    def admit(self) -> None:
        """Its user knows who is at the other end; called where a frame said so."""
        self._deadline = None
        self._connection.settimeout(None)
        self._on_admit()

    @property
    def is_closed(self) -> bool:
        """Whether it has ended."""
        return self._is_closed

    def send(self, header: Header, body: Body = b"") -> None:
        """Queue a frame. What is sent to a connection that has ended is lost: whoever is told of the end deals with it."""
        told = json.dumps(header, separators=(",", ":")).encode()
        self._queue.put((_SIZES.pack(len(told), len(body)) + told, body))

    def close(self, why: str = "closed here", *, after_sends: bool = False) -> None:
        """End it; `on_close` is called once. ``after_sends``: what is queued goes first, and the other end is waited for, elsewhere."""
        if after_sends:
            self._queue.put(None)
            return
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._queue.put(None)
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._on_admit()
        self._on_close(self, why)
        self._has_ended.set()

    def wait_closed(self, timeout_s: float) -> bool:
        """Until it has ended, so that a process that ends next takes back nothing of what was queued; whether it did in time."""
        return self._has_ended.wait(timeout_s)

    def _write(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                head, body = item
                self._connection.sendall(head)
                if len(body):
                    self._connection.sendall(body)
                self.sent_bytes += len(head) + len(body)
            if not self._is_closed:
                # No more from here. To close while something lies unread would take back what was sent last: the other end closes too
                # when it has read that, and then the thread that reads ends it.
                self._connection.shutdown(socket.SHUT_WR)
        except (OSError, ValueError) as error:
            self.close(f"{type(error).__name__}: {error}")

    def _read(self) -> None:
        try:
            while True:
                header_size, body_size = _SIZES.unpack(self._exactly(_SIZES.size))
                is_held = self._deadline is not None
                most_header, most_body = (MOST_HELLO, 0) if is_held else (MOST_HEADER, self._most_body)
                if header_size > most_header or body_size > most_body:
                    raise PeerError(
                        f"a frame of {header_size} and {body_size} bytes is too large; at most {most_header} and {most_body}"
                    )
                header = json.loads(self._exactly(header_size))
                if not isinstance(header, dict):
                    raise PeerError("a frame's header is no table")
                self._on_frame(self, header, self._exactly(body_size))
        except (OSError, EOFError, ValueError, PeerError) as error:
            self.close(f"{type(error).__name__}: {error}")
        except Exception as error:
            # A frame that nobody could have sent by mistake of the network: the peer is at fault, and only it is left.
            self.close(f"a frame that makes no sense ({type(error).__name__}: {error})")

    def _exactly(self, size: int) -> bytearray:
        return _exactly(self._connection, size, self._deadline)


class Listener:
    """Takes connections of those who know the secret; of others it closes them and goes on.

    Args:
        host, port: where; port 0 finds a free one.
        secret: that both ends know. It may be empty where nobody but this machine reaches it.
        on_frame, on_close, on_open: called with a channel; see `Channel`.
        most_body: bytes of a frame behind its header, of those who are admitted.
        tell: called with what keeps it from taking connections, once until one is taken again.

    Attributes:
        port: where.
        refused: how many were refused.

    Raises InputError for an address that cannot be had, and for one that others reach without a secret.
    """

    def __init__(
        self,
        host: str,
        port: int,
        secret: bytes,
        on_frame: OnFrame,
        on_close: OnClose,
        on_open: Callable[[Channel], None] | None = None,
        *,
        most_body: int = MOST_BODY,
        tell: Callable[[str], None] = lambda why: None,
    ) -> None:
        if not secret and not is_local(host):
            raise InputError(
                f"secret is empty, and other machines reach {host}, where whoever comes would be a rank; give one"
            )
        self._most_body, self._tell = most_body, tell
        self._is_closed = threading.Event()
        # Connections of those who are not admitted yet, the oldest first.
        self._waiting: dict[socket.socket, None] = {}
        self._lock = threading.Lock()
        self._secret, self._on_frame, self._on_close, self._on_open = secret, on_frame, on_close, on_open
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=256)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot listen at {host}, port {port}: {reason}") from None
        self.port = int(self._socket.getsockname()[1])
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more."""
        self._is_closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        is_told = False
        while not self._is_closed.is_set():
            connection = None
            try:
                connection, _ = self._socket.accept()
                self._keep(connection)
                # Each by itself: one that says nothing holds up nobody.
                threading.Thread(target=self._greet, args=(connection,), daemon=True).start()
                is_told = False
            except (OSError, RuntimeError) as error:
                # No file, no memory, no thread, or one that came has gone again: it passes, and the next one is taken.
                if connection is not None:
                    self._let_go(connection)
                    connection.close()
                if self._is_closed.is_set():
                    return
                if not is_told:
                    self._tell(f"no connection can be taken, which is tried again: {type(error).__name__}: {error}")
                is_told = True
                self._is_closed.wait(_PAUSE_S)

    def _keep(self, connection: socket.socket) -> None:
        """One more who waits; of too many the one that has said nothing for longest goes."""
        with self._lock:
            self._waiting[connection] = None
            oldest = next(iter(self._waiting)) if len(self._waiting) > MOST_WAITING else None
            if oldest is not None:
                del self._waiting[oldest]
        if oldest is not None:
            # Its own thread sees that, and closes it.
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)

    def _let_go(self, connection: socket.socket) -> None:
        with self._lock:
            self._waiting.pop(connection, None)

    def _greet(self, connection: socket.socket) -> None:
        deadline = time.monotonic() + HANDSHAKE_S
        try:
            connection.settimeout(HANDSHAKE_S)
            nonce = os.urandom(_NONCE)
            connection.sendall(nonce)
            theirs = bytes(_exactly(connection, _NONCE, deadline))
            proof = _exactly(connection, _DIGEST, deadline)
            if not hmac.compare_digest(proof, _proof(self._secret, b"c", nonce, theirs)):
                raise PeerError("the other end does not know the secret")
            connection.sendall(_proof(self._secret, b"a", nonce, theirs))
            channel = Channel(connection, self._on_frame, self._on_close, most_body=self._most_body)
        except (OSError, EOFError, PeerError):
            self.refused += 1
            self._let_go(connection)
            connection.close()
            return
        channel.hold(deadline, lambda: self._let_go(connection))
        if self._on_open is not None:
            self._on_open(channel)
        try:
            channel.start()
        except RuntimeError as error:
            channel.close(f"there is no thread for it: {error}")


def connect(
    host: str,
    port: int,
    secret: bytes,
    *,
    on_frame: OnFrame,
    on_close: OnClose,
    timeout_s: float = HANDSHAKE_S,
    peer: Any = None,
    most_body: int = MOST_BODY,
) -> Channel:
    """A channel to a listener. Raises PeerError where there is none in time, or it does not know the secret."""
    at, deadline = f"{host}:{port}", time.monotonic() + timeout_s
    try:
        connection = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise PeerError(f"nothing answers at {at} ({error})") from None
    try:
        connection.settimeout(timeout_s)
        nonce, mine = bytes(_exactly(connection, _NONCE, deadline)), os.urandom(_NONCE)
        connection.sendall(mine + _proof(secret, b"c", nonce, mine))
        if not hmac.compare_digest(_exactly(connection, _DIGEST, deadline), _proof(secret, b"a", nonce, mine)):
            raise PeerError(f"{at} does not know the secret")
    except (OSError, EOFError) as error:
        connection.close()
        raise PeerError(f"{at} does not take this process: another secret, or no listener of ours ({error})") from None
    except PeerError:
        connection.close()
        raise
    channel = Channel(connection, on_frame, on_close, most_body=most_body)
    channel.peer = peer
    channel.start()
    return channel


def _proof(secret: bytes, role: bytes, nonce: bytes, other: bytes) -> bytes:
    return hmac.digest(secret, role + nonce + other, "sha256")


def _exactly(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    """So many bytes, read into one buffer. Raises TimeoutError where they are not all there at the deadline, whoever sends how slowly."""
    found = bytearray(size)
    view, have = memoryview(found), 0
    while have < size:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("it took too long")
            connection.settimeout(left)
        got = connection.recv_into(view[have:])
        if not got:
            raise EOFError("the other end closed the connection")
        have += got
    return found
