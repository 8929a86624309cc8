"""A peer's connection to the master: votes and their answers, signs of life, and coming back after the connection was lost.

A vote stays open until it is answered. Where the connection breaks, the line calls again for as long as it was told to, and says again what
was not answered; the master knows votes by their numbers, so nothing counts twice.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from anabranch.cluster.pccl.addresses import connected
from anabranch.cluster.pccl.faults import CollectiveError, Kicked, MasterLost, Refused
from anabranch.cluster.pccl.handshake import call
from anabranch.cluster.pccl.times import AGAIN_S, ASK_S, CUT_OFF_S, HANDSHAKE_S, REACH_S, Times
from anabranch.cluster.pccl.wire import Frame, Kind, Reader, WireError, number, packed, word
from anabranch.errors import InputError
from anabranch.sockets import kept_alive

log = logging.getLogger(__name__)


@dataclass
class _Open:
    """A vote without an answer."""

    body: dict[str, Any]
    done: threading.Event = field(default_factory=threading.Event)
    reply: dict[str, Any] | None = None
    is_withdrawn: bool = False


class Line:
    """See the module.

    Args:
        address: host and port of the master.
        secret: of the run.
        times: this peer's own; the master tells the others.
        master_returns: whether one that is gone may come back at all, once this peer was connected.
        on_reply, on_abort: called with bodies of frames as they come, in their order, by the line's thread.
        before: called with the name of what is about to be sent; of tests, which let a peer die there.

    Attributes:
        peer, run: what the master calls this peer and its run.
        times: of the run, as the master told; what is this peer's own as it was given.
    """

    def __init__(
        self,
        address: tuple[str, int],
        secret: bytes,
        *,
        times: Times,
        master_returns: bool = True,
        on_reply: Callable[[dict[str, Any]], None],
        on_abort: Callable[[dict[str, Any]], None],
        before: Callable[[str], None],
    ) -> None:
        self._address, self._secret = address, secret
        self.times, self._master_returns = times, master_returns
        self._on_reply, self._on_abort, self._before = on_reply, on_abort, before
        self.peer, self.run, self._token = -1, "", ""
        self._open: dict[int, _Open] = {}
        self._next_req = 1
        # Of all that follows, and of writing.
        self._lock = threading.RLock()
        self._sock: socket.socket | None = None
        self._error: CollectiveError | None = None
        self._thread: threading.Thread | None = None

    def open(self, hello: dict[str, Any]) -> None:
        """Connect as a new peer. Raises MasterLost where nobody answers, Refused where the master does not want it."""
        deadline = time.monotonic() + self.times.master_wait_s
        while True:
            try:
                self._adopt(*self._called({"purpose": "join", **hello}, deadline))
                break
            except (OSError, WireError) as error:
                if time.monotonic() + AGAIN_S > deadline:
                    raise MasterLost(f"no master at {self._shown()}: {error}") from None
                time.sleep(AGAIN_S)
        self._thread = threading.Thread(target=self._run, name=f"pccl line {self.peer}", daemon=True)
        self._thread.start()

    def request(
        self, body: dict[str, Any], *, timeout_s: float | None = None, gives_up: Callable[[], bool] | None = None
    ) -> dict[str, Any]:
        """Vote, and wait for the answer.

        After ``timeout_s``, or when ``gives_up`` says so, the vote is withdrawn; where it was decided just before, the decision is the
        answer. Raises MasterLost, Kicked.
        """
        self._before(str(body["what"]))
        with self._lock:
            self._check()
            if not self.has_begun:
                raise InputError("this communicator is not connected; call connect(), or use it in a with statement")
            req, self._next_req = self._next_req, self._next_req + 1
            low = min(self._open, default=req)
            vote = self._open[req] = _Open({**body, "req": req, "low": low})
            self._write(Kind.VOTE, vote.body)
        try:
            if not _waited(vote.done, timeout_s, gives_up):
                with self._lock:
                    # Where the master is away just now, the next connection says it.
                    vote.is_withdrawn = True
                    self._write(Kind.WITHDRAW, {"req": req})
                if not vote.done.wait(self.times.withdrawn_s):
                    self.fail(MasterLost(f"the master at {self._shown()} does not answer"))
        except BaseException:
            # Interrupted: what the others decide with this vote has nobody to carry it out.
            self.fail(Kicked("it was interrupted in the midst of a vote"))
            raise
        with self._lock:
            self._open.pop(req, None)
            if vote.reply is None:
                self._check()
                raise MasterLost("the connection to the master is closed")
            return vote.reply

    @property
    def has_begun(self) -> bool:
        """Whether it was opened."""
        return self._thread is not None

    def close(self) -> None:
        """Leave."""
        with self._lock:
            if self._sock is not None and self._error is None:
                self._write(Kind.LEAVE, {})
            self.fail(CollectiveError("this peer has left"))

    def fail(self, error: CollectiveError) -> None:
        """End the line; all that waits, and all that is asked from now on, gets the error."""
        with self._lock:
            if self._error is None:
                self._error = error
            sock, self._sock = self._sock, None
            waiting = list(self._open.values())
        if sock is not None:
            _closed(sock)
        for vote in waiting:
            vote.done.set()

    def join_thread(self) -> None:
        """Until its thread has ended."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5)

    @property
    def error(self) -> CollectiveError | None:
        """Why nothing goes any more; None while all is well."""
        return self._error

    def _check(self) -> None:
        if self._error is not None:
            # Each caller gets its own, with its own traceback.
            raise type(self._error)(*self._error.args)

    def _shown(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    # The connection

    def _called(self, hello: dict[str, Any], deadline: float) -> tuple[socket.socket, dict[str, Any]]:
        # One that is begun just before the deadline may take as long as a handshake, and no longer.
        end = max(deadline, time.monotonic() + HANDSHAKE_S)
        sock = connected(*self._address, min(time.monotonic() + REACH_S, end))
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return kept_alive(sock, CUT_OFF_S), call(
                sock, self._secret, hello, min(time.monotonic() + HANDSHAKE_S, end)
            )
        except BaseException:
            sock.close()
            raise

    def _adopt(self, sock: socket.socket, welcome: dict[str, Any]) -> None:
        with self._lock:
            if self._error is not None:
                sock.close()
                return
            try:
                self.peer, self.run, self._token = number(welcome, "peer"), word(welcome, "run"), word(welcome, "token")
                self.times = replace(
                    self.times,
                    heartbeat_s=min(max(_seconds(welcome, "heartbeat_s"), 0.01), 60),
                    dead_s=min(max(_seconds(welcome, "dead_s"), 0.05), 600),
                    connect_s=min(max(_seconds(welcome, "connect_s"), 0.01), 3600),
                )
            except WireError:
                sock.close()
                raise
            sock.settimeout(self.times.dead_s)
            self._sock = sock
            for vote in self._open.values():
                if not vote.done.is_set():
                    self._write(Kind.VOTE, vote.body)
                    if vote.is_withdrawn:
                        self._write(Kind.WITHDRAW, {"req": vote.body["req"]})

    def _write(self, kind: Kind, body: dict[str, Any]) -> None:
        """Send, with the lock held. Where the connection is gone the thread notices, and says it again."""
        if self._sock is None:
            return
        try:
            self._sock.sendall(packed(kind, body))
        except OSError:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            while self._error is None:
                sock = self._sock
                why = self._listen(sock) if sock is not None else "there is no connection"
                if self._error is not None:
                    return
                log.info("peer %d lost the master (%s), and calls again", self.peer, why)
                self._come_back(why)
        finally:
            # Whatever ended this thread, nobody waits for it.
            self.fail(MasterLost(f"the line to the master at {self._shown()} has ended"))

    def _listen(self, sock: socket.socket) -> str:
        """Until the connection is of no use. Returns why."""
        reader, poll = Reader(), select.poll()
        heard = beaten = time.monotonic()
        try:
            poll.register(sock, select.POLLIN)
        except ValueError:
            return "it is closed"
        while self._error is None:
            now = time.monotonic()
            # What waits there to be read counts, however late this thread comes to it.
            if now - heard > self.times.dead_s and not poll.poll(0):
                return f"nothing was heard for {self.times.dead_s:g} s"
            if now - beaten >= self.times.heartbeat_s:
                beaten = now
                with self._lock:
                    self._write(Kind.BEAT, {})
            try:
                # Not select, which knows no file descriptor above 1023.
                if not poll.poll(self.times.heartbeat_s * 500):
                    continue
                data = sock.recv(1 << 16)
                if not data:
                    return "it closed the connection"
                heard = time.monotonic()
                for frame in reader.feed(data):
                    self._take(frame)
            except (OSError, ValueError, WireError) as error:
                return str(error) or type(error).__name__
        return ""

    def _take(self, frame: Frame) -> None:
        if frame.kind == Kind.REPLY:
            with self._lock:
                vote = self._open.get(number(frame.body, "req"))
                if vote is None or vote.done.is_set():
                    return
            # Before whoever waits for it goes on.
            if self._heard(self._on_reply, frame.body):
                vote.reply = frame.body
                vote.done.set()
        elif frame.kind == Kind.ABORT:
            self._heard(self._on_abort, frame.body)
        elif frame.kind == Kind.KICK:
            self.fail(Kicked(f"peer {self.peer} was dropped: {frame.body.get('why', '')!s:.500}"))
        elif frame.kind != Kind.BEAT:
            raise WireError(f"a {frame.kind.name} from the master")

    def _heard(self, hear: Callable[[dict[str, Any]], None], body: dict[str, Any]) -> bool:
        try:
            hear(body)
        except (KeyError, IndexError, TypeError, ValueError):
            self.fail(MasterLost(f"what calls itself the master at {self._shown()} says what no master does"))
            return False
        return True

    def _come_back(self, why: str) -> None:
        with self._lock:
            if self._sock is not None:
                _closed(self._sock)
                self._sock = None
        if not self._master_returns:
            self.fail(MasterLost(f"the master at {self._shown()} is gone: {why}"))
            return
        deadline = time.monotonic() + self.times.master_wait_s
        hello = {"purpose": "resume", "peer": self.peer, "token": self._token, "run": self.run}
        while self._error is None:
            try:
                self._adopt(*self._called(hello, deadline))
                return
            except Refused as error:
                self.fail(Kicked(str(error)))
            except (OSError, WireError) as error:
                if time.monotonic() + AGAIN_S > deadline:
                    self.fail(MasterLost(f"the master at {self._shown()} is gone: {why}; {error}"))
                time.sleep(AGAIN_S)


def _seconds(welcome: dict[str, Any], name: str) -> float:
    value = welcome.get(name)
    if not isinstance(value, (int, float)):
        raise WireError(f"{name} is no number")
    return float(value)


def _waited(done: threading.Event, timeout_s: float | None, gives_up: Callable[[], bool] | None) -> bool:
    """Whether it was done before time was up or the caller gave up."""
    if gives_up is None:
        return done.wait(timeout_s)
    end = None if timeout_s is None else time.monotonic() + timeout_s
    while not done.wait(ASK_S if end is None else min(ASK_S, max(end - time.monotonic(), 0))):
        if gives_up() or (end is not None and time.monotonic() >= end):
            return False
    return True


def _closed(sock: socket.socket) -> None:
    # Who waits for the socket in another thread wakes by this; closing alone would not tell it.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
