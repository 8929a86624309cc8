"""The master: connections of peers, and time, around `MasterState`. It sees no tensor.

    Master("0.0.0.0:48148", journal="run.journal").run()        # or: anabranch cluster master --listen 0.0.0.0:48148

One thread, which waits for nobody: a peer that sends no frame, half of one, a wrong one, or too many, or that does not take what it is
sent, loses its connection, and the others do not notice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anabranch.bounds import shown
from anabranch.cluster.pccl.addresses import is_host, listen_at, parse_address
from anabranch.cluster.pccl.handshake import Called, run_secret
from anabranch.cluster.pccl.journal import Journal
from anabranch.cluster.pccl.state import MasterState
from anabranch.cluster.pccl.times import CUT_OFF_S, HANDSHAKE_S, Times
from anabranch.cluster.pccl.tours import rings_of
from anabranch.cluster.pccl.wire import MOST_HELLO, Frame, Kind, Reader, WireError, number, packed, word
from anabranch.errors import DataError, InputError
from anabranch.locks import locked
from anabranch.sockets import kept_alive

log = logging.getLogger(__name__)

PORT = 48148
# Unproven connections at a time.
_MOST_STRANGERS = 64
# Bytes that a peer may leave untaken.
_MOST_UNSENT = 8 << 20
# At a time from one connection: a peer that floods with small messages leaves the others their turn.
_READ = 1 << 14
_MOONSHOT_S = 30.0


@dataclass
class _Line:
    """A connection.

    Attributes:
        sock: its socket.
        name: of the other end, for the log.
        called: the handshake; None once it is done.
        peer: whose it is, once known.
        heard: when it last said something.
        unsent: what it has not taken yet.
        is_closing: whether it ends once that is sent.
    """

    sock: socket.socket
    name: str
    heard: float
    called: Called | None
    reader: Reader = field(default_factory=lambda: Reader(MOST_HELLO))
    peer: int | None = None
    unsent: bytearray = field(default_factory=bytearray)
    is_closing: bool = False


class Master:
    """See the module.

    Args:
        listen: ``host:port``; port 0 takes any free one. ``[::]:48148`` for IPv6.
        secret: that peers must know; None is what the environment's ANABRANCH_CLUSTER_SECRET says. Without one
            everybody is let in who reaches the port.
        journal: file by which a master that is started again goes on with the run; None for none.
        heartbeat_s: between signs of life.
        dead_s: after which a peer without one is dropped.
        connect_s: in which peers make links.
        most_peers: at a time.

    Attributes:
        address: ``host:port`` where it listens.
        times: of it.
        state: what it knows.

    Raises InputError for an address that cannot be had, numbers that are none and times that do not fit together, DataError for a journal
    that is none or that another master holds.
    """

    def __init__(
        self,
        listen: str = f"127.0.0.1:{PORT}",
        *,
        secret: str | None = None,
        journal: str | os.PathLike[str] | None = None,
        heartbeat_s: float = 1.0,
        dead_s: float = 5.0,
        connect_s: float = 10.0,
        most_peers: int = 256,
    ) -> None:
        for name, seconds in (("heartbeat_s", heartbeat_s), ("dead_s", dead_s), ("connect_s", connect_s)):
            if not isinstance(seconds, (int, float)) or not 0 < seconds < 1e6:
                raise InputError(f"{name} is {shown(seconds)}; use a number of seconds above 0")
        if type(most_peers) is not int or not 1 <= most_peers <= 65_536:
            raise InputError(f"most_peers is {shown(most_peers)}; use 1 to 65536")
        self.times = Times(heartbeat_s=heartbeat_s, dead_s=dead_s, connect_s=connect_s)
        self.times.check()
        self._secret = run_secret(secret)
        self._stack = contextlib.ExitStack()
        self._journal: Journal | None = None
        self.state = MasterState(self.times, most_peers=most_peers)
        self._selector = selectors.DefaultSelector()
        self._lines: dict[int, _Line] = {}
        self._by_peer: dict[int, _Line] = {}
        self._done: deque[tuple[dict[int, list[int]], bool]] = deque()
        self._is_stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._moonshot: threading.Event | None = None
        try:
            self._open(listen, journal)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, listen: str, journal: str | os.PathLike[str] | None) -> None:
        if journal is not None:
            path = Path(journal)
            if not self._stack.enter_context(locked(path.with_name(f".{path.name}.lock"))):
                raise DataError(f"another master keeps its journal in {path}; stop it, or name another file")
            self._journal = Journal(path)
            if self._journal.load(self.state):
                self.state.absent(time.monotonic())
        self._socket = self._stack.enter_context(listen_at(*parse_address(listen, PORT)))
        self._socket.setblocking(False)
        host, port = self._socket.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            self._stack.enter_context(end)
            end.setblocking(False)
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until `stop`."""
        try:
            while not self._is_stopping.is_set():
                self._turn()
        finally:
            self._close()

    def start(self) -> Master:
        """Serve in a thread; one that does so already goes on."""
        # Two threads would answer peers at once: `with Master(...).start()` begins it twice.
        if self._thread is None:
            self._thread = threading.Thread(target=self.run, name="pccl master", daemon=True)
            self._thread.start()
        return self

    @property
    def has_secret(self) -> bool:
        """Whether peers must know one."""
        return bool(self._secret)

    def end(self) -> None:
        """Have `run` return; for signal handlers and other threads."""
        self._is_stopping.set()
        self._poke()

    def stop(self) -> None:
        """End it, as if its process ended: peers lose their connections."""
        self.end()
        if self._thread is not None:
            self._thread.join()
        else:
            self._close()

    def __enter__(self) -> Master:
        return self.start()

    def __exit__(self, *error: Any) -> None:
        self.stop()

    # The loop

    def _turn(self) -> None:
        # What came before this is read below. So nobody is missed because the master itself stood still in the midst of a turn.
        asked = time.monotonic()
        for key, events in self._selector.select(self.times.heartbeat_s / 4):
            self._goes_on(self._serve, key, events)
        now = time.monotonic()
        while self._done:
            rings, is_late = self._done.popleft()
            self._goes_on(self.state.solved, rings, is_late=is_late, now=now)
        for line in list(self._lines.values()):
            self._goes_on(self._miss, line, asked)
        self._goes_on(self.state.tick, now)
        self._goes_on(self._tell)

    def _goes_on(self, work: Callable[..., None], *given: Any, **named: Any) -> None:
        """A fault of ours, by whatever a peer said or that came late, ends nobody's run."""
        try:
            work(*given, **named)
        except Exception:
            log.exception("a fault inside of the master, in %s", work.__name__)

    def _serve(self, key: selectors.SelectorKey, events: int) -> None:
        if key.fileobj is self._socket:
            self._accept()
        elif key.fileobj is self._woken:
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
        elif (line := self._lines.get(key.fd)) is not None:
            if events & selectors.EVENT_READ:
                self._read(line)
            if events & selectors.EVENT_WRITE and key.fd in self._lines:
                self._flush(line)

    def _miss(self, line: _Line, now: float) -> None:
        limit = self.times.dead_s if line.called is None else HANDSHAKE_S
        if now - line.heard > limit and line.peer is not None:
            # Told, in case that it wakes.
            self.state.lost(line.peer, f"nothing was heard of it for {limit:g} s", now)
        elif now - line.heard > limit:
            self._end(line, "")

    def _tell(self) -> None:
        """Write down what was decided, then tell it."""
        messages = self.state.take()
        if self.state.is_changed:
            self.state.is_changed = False
            if self._journal is not None:
                self._journal.save(self.state)
        kinds = {"reply": Kind.REPLY, "abort": Kind.ABORT, "kick": Kind.KICK}
        for peer, kind, body in messages:
            if (line := self._by_peer.get(peer)) is None:
                continue
            try:
                self._send(line, packed(kinds[kind], body, self.state.epoch))
            except WireError as error:
                self._end(line, f"what it has voted for makes {error}")
            except Exception:
                log.exception("a fault inside of the master, of an answer to peer %d", peer)
                self._end(line, "its answer led to a fault inside of the master")
        for peer, why in self.state.dropped():
            log.info("peer %d is dropped: %s", peer, why)
            if (line := self._by_peer.pop(peer, None)) is not None:
                line.peer, line.is_closing = None, True
                self._flush(line)
        for rings in self.state.jobs():
            self._solve(rings)

    def _solve(self, rings: dict[int, list[int]]) -> None:
        matrix = dict(self.state.matrix)
        if self._moonshot is not None:
            self._moonshot.set()
        cancelled = self._moonshot = threading.Event()

        def work() -> None:
            self._done.append((rings_of(rings, matrix, budget_s=1.0, is_cancelled=cancelled.is_set), False))
            self._poke()
            if max(map(len, rings.values()), default=0) > 8:
                better = rings_of(rings, matrix, budget_s=_MOONSHOT_S, exact_to=16, is_cancelled=cancelled.is_set)
                if not cancelled.is_set():
                    self._done.append((better, True))
                    self._poke()

        threading.Thread(target=work, name="pccl tours", daemon=True).start()

    def _poke(self) -> None:
        # Full, it wakes as well; closed, there is nobody to wake.
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    # Connections

    def _accept(self) -> None:
        try:
            sock, address = self._socket.accept()
        except OSError as error:
            log.warning("a connection could not be taken: %s", error)
            return
        if sum(line.called is not None for line in self._lines.values()) >= _MOST_STRANGERS:
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kept_alive(sock, CUT_OFF_S)
        self._lines[sock.fileno()] = _Line(sock, _plain(str(address[0])), time.monotonic(), Called(self._secret))
        self._selector.register(sock, selectors.EVENT_READ)

    def _read(self, line: _Line) -> None:
        try:
            data = line.sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(line, f"its connection broke ({error.strerror or error})")
            return
        if not data:
            self._end(line, "its connection ended")
            return
        if line.called is None:
            # A stranger's time runs on, however slowly it talks.
            line.heard = time.monotonic()
        try:
            for frame in line.reader.feed(data):
                if line.is_closing or line.sock.fileno() < 0:
                    return
                self._take(line, frame)
        except WireError as error:
            log.warning("connection from %s is dropped: %s", line.name, error)
            self._send(line, packed(Kind.REFUSED if line.peer is None else Kind.KICK, {"why": str(error)}))
            self._end(line, f"it broke the protocol: {error}")
        except Exception:
            # A fault of ours costs the one whose message led to it its connection, and not the others their run.
            log.exception("a fault inside of the master, by a message from %s", line.name)
            self._end(line, "its message led to a fault inside of the master")

    def _take(self, line: _Line, frame: Frame) -> None:
        if line.called is not None:
            if answer := line.called.answer(frame):
                self._send(line, answer)
            if line.called.hello is not None:
                hello, line.called = line.called.hello, None
                line.heard = time.monotonic()
                line.reader.most = Reader().most
                self._welcome(line, hello)
        elif line.peer is None:
            raise WireError("a message of nobody")
        elif frame.kind == Kind.BEAT:
            self._send(line, packed(Kind.BEAT, {}, self.state.epoch))
        elif frame.kind == Kind.VOTE:
            self.state.vote(line.peer, frame.body, time.monotonic())
        elif frame.kind == Kind.WITHDRAW:
            self.state.withdraw(line.peer, frame.body, time.monotonic())
        elif frame.kind == Kind.LEAVE:
            self._end(line, "it left")
        else:
            raise WireError(f"a {frame.kind.name} from a peer")

    def _welcome(self, line: _Line, hello: dict[str, Any]) -> None:
        if hello["purpose"] == "resume":
            peer = number(hello, "peer")
            # One that another run had, or that is dropped: it must hear that it is out.
            if hello.get("run") != self.state.run or not self.state.resume(peer, word(hello, "token")):
                raise WireError(f"peer {peer} is not in this run, or no more")
            if (old := self._by_peer.pop(peer, None)) is not None:
                old.peer = None
                self._end(old, "it came back")
        elif hello["purpose"] == "join":
            if len(self.state.members) >= self.state.most_peers:
                raise WireError(f"there are {self.state.most_peers} peers, and no more go")
            host = word(hello, "host") or line.name
            if not is_host(host):
                raise WireError(f"{host!r:.80} is no host that others could call")
            peer = self.state.join(
                group=number(hello, "group", 2**16),
                host=host,
                port=number(hello, "port", 65_535),
                pool=max(number(hello, "pool", 64), 1),
            )
            log.info("peer %d is %s:%d", peer, host, hello["port"])
        else:
            raise WireError(f"the purpose {hello['purpose']!r}")
        line.peer = peer
        self._by_peer[peer] = line
        told = {"peer": peer, "token": self.state.members[peer].token, "run": self.state.run}
        times = self.times
        told |= {"heartbeat_s": times.heartbeat_s, "dead_s": times.dead_s, "connect_s": times.connect_s}
        self._send(line, packed(Kind.WELCOME, told))

    def _send(self, line: _Line, data: bytes) -> None:
        if line.sock.fileno() < 0:
            return
        line.unsent += data
        if len(line.unsent) > _MOST_UNSENT:
            self._end(line, "it does not take what it is sent")
            return
        self._flush(line)

    def _flush(self, line: _Line) -> None:
        if line.sock.fileno() < 0:
            return
        try:
            while line.unsent:
                del line.unsent[: line.sock.send(line.unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._end(line, f"its connection broke ({error.strerror or error})")
            return
        if line.is_closing and not line.unsent:
            self._end(line, "")
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.unsent else 0)
        self._selector.modify(line.sock, wanted)

    def _end(self, line: _Line, why: str) -> None:
        """Close a connection; its peer is lost."""
        if line.sock.fileno() < 0:
            return
        self._lines.pop(line.sock.fileno(), None)
        self._selector.unregister(line.sock)
        line.sock.close()
        if line.peer is not None and self._by_peer.get(line.peer) is line:
            del self._by_peer[line.peer]
            self.state.lost(line.peer, why, time.monotonic())

    def _close(self) -> None:
        if self._moonshot is not None:
            self._moonshot.set()
        for line in list(self._lines.values()):
            line.sock.close()
        self._lines.clear()
        self._selector.close()
        self._stack.close()


def _plain(address: str) -> str:
    """An IPv4 address as such, where a socket of both kinds has it as one of IPv6."""
    return address.removeprefix("::ffff:") if "." in address else address
