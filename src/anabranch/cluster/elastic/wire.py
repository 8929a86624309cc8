"""Connections that carry frames: a header of JSON and bytes behind it. Both ends prove that they know the secret; nothing is unpickled.

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
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from anabranch.errors import InputError, PeerError

__all__ = ["Channel", "Listener", "connect"]

Header = dict[str, Any]
OnFrame = Callable[["Channel", Header, bytes], None]
OnClose = Callable[["Channel", str], None]
_SIZES = struct.Struct("<IQ")
_NONCE, _DIGEST = 16, 32
# What a frame may have at most, so that a stranger or a bug cannot ask for all memory.
MOST_HEADER, MOST_BODY = 2**22, 2**33
HANDSHAKE_S = 10.0
# Unanswered data for so long closes a connection whose other end is gone without a word.
_SILENCE_MS = 30_000


class Channel:
    """One connection, after both ends have proved themselves.

    Attributes:
        peer: for whoever uses it: who is at the other end.
        sent_bytes: so far, with headers.
    """

    def __init__(self, connection: socket.socket, on_frame: OnFrame, on_close: OnClose) -> None:
        self.peer: Any = None
        self.sent_bytes = 0
        self._connection = connection
        self._on_frame, self._on_close = on_frame, on_close
        self._queue: queue.SimpleQueue[tuple[bytes, Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        self._has_ended = threading.Event()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_MS)

    def start(self) -> None:
        """Begin to read and to write."""
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    @property
    def is_closed(self) -> bool:
        """Whether it has ended."""
        return self._is_closed

    def send(self, header: Header, body: bytes | memoryview = b"") -> None:
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
                header_size, body_size = _SIZES.unpack(_exactly(self._connection, _SIZES.size))
                if header_size > MOST_HEADER or body_size > MOST_BODY:
                    raise PeerError(f"a frame of {header_size} and {body_size} bytes is too large")
                header = json.loads(_exactly(self._connection, header_size))
                if not isinstance(header, dict):
                    raise PeerError("a frame's header is no table")
                self._on_frame(self, header, _exactly(self._connection, body_size))
        except (OSError, EOFError, ValueError, PeerError) as error:
            self.close(f"{type(error).__name__}: {error}")
        except Exception as error:
            # A frame that nobody could have sent by mistake of the network: the peer is at fault, and only it is left.
            self.close(f"a frame that makes no sense ({type(error).__name__}: {error})")


class Listener:
    """Takes connections of those who know the secret; of others it closes them and goes on.

    Attributes:
        port: where.
        refused: how many were refused.

    Raises InputError for an address that cannot be had.
    """

    def __init__(
        self,
        host: str,
        port: int,
        secret: bytes,
        on_frame: OnFrame,
        on_close: OnClose,
        on_open: Callable[[Channel], None] | None = None,
    ) -> None:
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
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            # Each by itself: one that says nothing holds up nobody.
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(HANDSHAKE_S)
            nonce = os.urandom(_NONCE)
            connection.sendall(nonce)
            theirs = _exactly(connection, _NONCE)
            proof = _exactly(connection, _DIGEST)
            if not hmac.compare_digest(proof, _proof(self._secret, b"c", nonce, theirs)):
                raise PeerError("the other end does not know the secret")
            connection.sendall(_proof(self._secret, b"a", nonce, theirs))
        except (OSError, EOFError, PeerError):
            self.refused += 1
            connection.close()
            return
        channel = Channel(connection, self._on_frame, self._on_close)
        if self._on_open is not None:
            self._on_open(channel)
        channel.start()


def connect(
    host: str,
    port: int,
    secret: bytes,
    *,
    on_frame: OnFrame,
    on_close: OnClose,
    timeout_s: float = HANDSHAKE_S,
    peer: Any = None,
) -> Channel:
    """A channel to a listener. Raises PeerError where there is none in time, or it does not know the secret."""
    at = f"{host}:{port}"
    try:
        connection = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise PeerError(f"nothing answers at {at} ({error})") from None
    try:
        connection.settimeout(timeout_s)
        nonce, mine = _exactly(connection, _NONCE), os.urandom(_NONCE)
        connection.sendall(mine + _proof(secret, b"c", nonce, mine))
        if not hmac.compare_digest(_exactly(connection, _DIGEST), _proof(secret, b"a", nonce, mine)):
            raise PeerError(f"{at} does not know the secret")
    except (OSError, EOFError) as error:
        connection.close()
        raise PeerError(f"{at} does not take this process: another secret, or no listener of ours ({error})") from None
    except PeerError:
        connection.close()
        raise
    channel = Channel(connection, on_frame, on_close)
    channel.peer = peer
    channel.start()
    return channel


def _proof(secret: bytes, role: bytes, nonce: bytes, other: bytes) -> bytes:
    return hmac.digest(secret, role + nonce + other, "sha256")


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = bytearray(size)
    view, have = memoryview(found), 0
    while have < size:
        got = connection.recv_into(view[have:])
        if not got:
            raise EOFError("the other end closed the connection")
        have += got
    return bytes(found)
