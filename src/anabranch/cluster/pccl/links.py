"""Connections between peers: where a peer listens, and the links that it keeps with its neighbours in the ring.

Every peer listens at one port; what a caller wants (a link, a shared state, a flood that measures) it says when it proves that it is of
this run. Links belong to an epoch: when the ring changes, or a collective broke off with bytes still on their way, all are made anew.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.cluster.pccl.addresses import connected, listen_at, tuned
from anabranch.cluster.pccl.faults import Refused
from anabranch.cluster.pccl.handshake import call, take
from anabranch.cluster.pccl.times import HANDSHAKE_S, LOOK_S
from anabranch.cluster.pccl.wire import Kind, WireError, number, packed, send_all
from anabranch.errors import InputError

log = logging.getLogger(__name__)

FIRST_PORT, _PORTS_TRIED = 48149, 64
_MOST_GUESTS = 64
MOST_POOL = 64
# Links that others have made ahead of this peer: those of two rings, and as many of who has no part in them.
_MOST_OFFERS = 4 * MOST_POOL
# Calls for links at a time: over a long way each takes three round trips.
_CALLS = 16


class LinkError(Exception):
    """A link could not be made, or broke.

    Attributes:
        accused: the peer at its other end; None where that is nobody's fault.
    """

    def __init__(self, why: str, accused: int | None = None) -> None:
        super().__init__(why)
        self.accused = accused


class AbortedError(LinkError):
    """The master has ended the operation."""


@dataclass(frozen=True)
class Place:
    """A peer, as others reach it."""

    peer: int
    host: str
    port: int
    pool: int

    @staticmethod
    def of(row: list[Any]) -> Place:
        """Of what the master says."""
        return Place(int(row[0]), str(row[1]), int(row[2]), min(max(int(row[3]), 1), MOST_POOL))


class Listener:
    """Where other peers call.

    Args:
        host: to listen at; empty for every address.
        port: None for the first free one from 48149.
        secret: of the run.
        handlers: by purpose: called with the connection and the hello, in a thread of its own; the handler closes the connection.

    Attributes:
        port: where it listens.
        run: name of the run; until it is known nobody is let in.
    """

    def __init__(
        self,
        host: str,
        port: int | None,
        secret: bytes,
        handlers: Mapping[str, Callable[[socket.socket, dict[str, Any]], None]],
    ) -> None:
        self._secret, self._handlers = secret, handlers
        self.run = ""
        self._stack = contextlib.ExitStack()
        self._socket = self._listening(host, port)
        self._socket.settimeout(0.25)
        self.port = int(self._socket.getsockname()[1])
        self._guests = threading.Semaphore(_MOST_GUESTS)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="pccl listener", daemon=True)
        self._thread.start()

    def _listening(self, host: str, port: int | None) -> socket.socket:
        if port is not None:
            return self._stack.enter_context(listen_at(host, port))
        for tried in range(FIRST_PORT, FIRST_PORT + _PORTS_TRIED):
            with contextlib.suppress(InputError):
                return self._stack.enter_context(listen_at(host, tried))
        return self._stack.enter_context(listen_at(host, 0))

    def close(self) -> None:
        """Let nobody in any more."""
        self._is_closed.set()
        self._stack.close()

    def _serve(self) -> None:
        while not self._is_closed.is_set():
            try:
                sock, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if not self._is_closed.is_set():
                    log.warning("a connection could not be taken: %s", error)
                    time.sleep(0.05)
                continue
            if not self._guests.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._welcome, args=(sock,), name="pccl guest", daemon=True).start()

    def _welcome(self, sock: socket.socket) -> None:
        try:
            hello = take(sock, link_key(self._secret, self.run))
            handler = self._handlers.get(hello["purpose"])
            if handler is None or not self.run:
                raise WireError(f"the purpose {hello['purpose']!r}")
            handler(tuned(sock), hello)
        except (WireError, OSError) as error:
            log.warning("a caller is sent away: %s", error)
            sock.close()
        except Exception:
            log.exception("a fault inside of this peer, by what a caller said")
            sock.close()
        finally:
            self._guests.release()


def link_key(secret: bytes, run: str) -> bytes:
    """What peers of a run know and nobody else: without a secret, whoever the master has let in."""
    return secret + b"|" + run.encode()


def call_peer(
    place: Place, secret: bytes, run: str, hello: dict[str, Any], deadline: float, congestion: str | None = None
) -> tuple[socket.socket, dict[str, Any]]:
    """A connection to another peer, and its welcome. Raises LinkError, which accuses it."""
    try:
        sock = tuned(connected(place.host, place.port, deadline), congestion)
    except (OSError, ValueError, OverflowError) as error:
        # Of what is no host at all, socket raises others than OSError.
        told = getattr(error, "strerror", None) or error
        why = f"peer {place.peer} at {place.host!r:.80}:{place.port} cannot be reached: {told}"
        raise LinkError(why, place.peer) from None
    try:
        return sock, call(sock, link_key(secret, run), hello, deadline)
    except (OSError, WireError, Refused) as error:
        sock.close()
        raise LinkError(f"peer {place.peer} at {place.host}:{place.port}: {error}", place.peer) from None


@dataclass(frozen=True)
class _Offer:
    """A link that another peer has made, from which host."""

    sock: socket.socket
    host: str


class Links:
    """The links of this peer with its neighbours in the ring.

    Args:
        secret: of the run.
        connect_s: in which they must stand; the master's time for it where that is shorter.
        congestion: control of their connections.

    Attributes:
        connect_s: as given, until the master has told of its own.
        epoch: of the ring that they are of; -1 where there are none.
        to_next, from_previous: connections, as many as the smallest pool in the ring.
    """

    def __init__(self, secret: bytes, connect_s: float, congestion: str | None) -> None:
        self._secret, self.connect_s, self._congestion = secret, connect_s, congestion
        self.epoch = -1
        self.to_next: list[socket.socket] = []
        self.from_previous: list[socket.socket] = []
        self._offers: dict[tuple[int, int, int], _Offer] = {}
        # Ring that is being made, and whose links of it are awaited.
        self._wanted = (-1, -1)
        self._came = threading.Condition()
        self._is_closed = False

    def offer(self, sock: socket.socket, hello: dict[str, Any]) -> None:
        """Another peer has called for a link."""
        key = (number(hello, "epoch"), number(hello, "from"), number(hello, "index", MOST_POOL - 1))
        send_all(sock, packed(Kind.WELCOME), time.monotonic() + HANDSHAKE_S)
        gone: list[_Offer] = []
        offered = _Offer(sock, _host_of(sock))
        with self._came:
            if self._is_closed or key[0] <= self.epoch or key[0] < self._wanted[0]:
                gone.append(offered)
            else:
                if key in self._offers:
                    gone.append(self._offers.pop(key))
                elif len(self._offers) >= _MOST_OFFERS and key[:2] != self._wanted:
                    gone.append(self._offers.pop(self._too_many()))
                self._offers[key] = offered
            self._came.notify_all()
        for one in gone:
            one.sock.close()

    def _too_many(self) -> tuple[int, int, int]:
        """Of what nobody awaits the oldest of the host that has offered most: who fills it takes no place of others."""
        unwanted = {key: one.host for key, one in self._offers.items() if key[:2] != self._wanted}
        most = Counter(unwanted.values()).most_common(1)[0][0]
        return next(key for key, host in unwanted.items() if host == most)

    def _give_up(self, is_stale: Callable[[int], bool]) -> None:
        """Offers of rings that are no more."""
        with self._came:
            stale = [self._offers.pop(key) for key in list(self._offers) if is_stale(key[0])]
        for one in stale:
            one.sock.close()

    def build(self, epoch: int, ring: list[Place], me: int, run: str, check: Callable[[], None] = lambda: None) -> None:
        """Make the links of a ring; those of others are closed.

        Args:
            epoch: of the ring.
            ring: its peers in order.
            me: this one.
            run: name of the run.
            check: called now and then; raises where the links are no longer wanted.

        Raises LinkError, which accuses the neighbour that cannot be reached.
        """
        self.drop()
        place = next(number for number, peer in enumerate(ring) if peer.peer == me)
        following, previous = ring[(place + 1) % len(ring)], ring[place - 1]
        with self._came:
            self._wanted = (epoch, previous.peer)
        # Those of rings that were given up would fill the place of what comes.
        self._give_up(lambda of: of < epoch)
        if len(ring) > 1:
            pool = min(peer.pool for peer in ring)
            deadline = time.monotonic() + self.connect_s

            def called(index: int) -> socket.socket:
                hello = {"purpose": "link", "run": run, "epoch": epoch, "from": me, "index": index}
                return call_peer(following, self._secret, run, hello, deadline, self._congestion)[0]

            self.to_next = _Calls(called, pool).wait(check)
            for index in range(pool):
                self.from_previous.append(self._await((epoch, previous.peer, index), deadline, check))
        with self._came:
            self.epoch = epoch
        self._give_up(lambda of: of <= epoch)

    def _await(self, key: tuple[int, int, int], deadline: float, check: Callable[[], None]) -> socket.socket:
        with self._came:
            while key not in self._offers:
                check()
                if time.monotonic() >= deadline:
                    raise LinkError(f"peer {key[1]} made no link within {self.connect_s:g} s", key[1])
                self._came.wait(LOOK_S)
            return self._offers.pop(key).sock

    def drop(self) -> None:
        """Close the links there are."""
        for sock in (*self.to_next, *self.from_previous):
            sock.close()
        self.to_next, self.from_previous = [], []

    def close(self) -> None:
        """Close all."""
        self.drop()
        with self._came:
            self._is_closed = True
            offers, self._offers = list(self._offers.values()), {}
        for one in offers:
            one.sock.close()


class _Calls:
    """Calls to a neighbour for its links, some at a time: whoever waits for them looks meanwhile whether they are still wanted.

    Args:
        call: makes the link of a number; raises what is raised by `wait`.
        count: of links.
    """

    def __init__(self, call: Callable[[int], socket.socket], count: int) -> None:
        self._call, self._count = call, count
        self._left = deque(range(count))
        self._made: dict[int, socket.socket] = {}
        self._failure: BaseException | None = None
        self._is_over = False
        self._came = threading.Condition()

    def wait(self, check: Callable[[], None]) -> list[socket.socket]:
        """All of them, in order; none where ``check`` or one of them raises."""
        try:
            for _ in range(min(self._count, _CALLS)):
                # One that hangs ends by its own deadline, and nobody waits for it.
                threading.Thread(target=self._work, name="pccl call", daemon=True).start()
            with self._came:
                while len(self._made) < self._count:
                    check()
                    if self._failure is not None:
                        raise self._failure
                    self._came.wait(LOOK_S)
                return [self._made[index] for index in range(self._count)]
        except BaseException:
            with self._came:
                self._is_over = True
                made = list(self._made.values())
            for sock in made:
                sock.close()
            raise

    def _work(self) -> None:
        while True:
            with self._came:
                if self._is_over or self._failure is not None or not self._left:
                    return
                index = self._left.popleft()
            try:
                sock = self._call(index)
            except BaseException as error:
                with self._came:
                    self._failure = self._failure or error
                    self._came.notify_all()
                return
            with self._came:
                if not self._is_over:
                    self._made[index] = sock
                    self._came.notify_all()
                    continue
            sock.close()


def _host_of(sock: socket.socket) -> str:
    try:
        name = sock.getpeername()
    except OSError:
        # It has closed it already.
        return ""
    # One of this machine alone has no host.
    return str(name[0]) if isinstance(name, tuple) else ""
