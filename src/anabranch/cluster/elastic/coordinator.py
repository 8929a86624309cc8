"""The coordinator: who is there, which layout holds, which step is committed. It is no rank, holds no weights and does no work of a step.

    with Coordinator(replicas=2, stages=2, secret="s3cret") as coordinator:
        ...                      # ranks: ElasticTrainer(..., coordinator=coordinator.address, secret="s3cret")

A step is committed in two phases: each rank votes when its update stands beside the weights; when all have, the step is decided and every
rank swaps it in. A rank that goes (its connection ends, or it is silent for ``patience_s``) before the decision takes the step back for
all; after it, all who are left have the step. Every change of ranks is an *epoch*: the new layout is announced, ranks move what must move
while the old layout still holds everything, and only when all are ready is it the layout. A loss in between begins another epoch from the
old one. How far a loss takes the training back, and where it cannot go on, `anabranch.cluster.elastic.ledger` says.

A rank that ends by an error is a rank that is lost: its error is told, and the others do its samples. Where the same step then ends another
rank by such an error it is the step that cannot be made, and training stops with it.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from anabranch.cluster.elastic.decisions import Decisions
from anabranch.cluster.elastic.layout import Layout
from anabranch.cluster.elastic.planner import Policy
from anabranch.cluster.elastic.replanning import Replanner
from anabranch.cluster.elastic.stages import Memory
from anabranch.cluster.elastic.waiting import BEAT_S, Pulse
from anabranch.cluster.elastic.wire import Body, Channel, Header, Listener
from anabranch.errors import InputError

__all__ = ["Coordinator"]


class Coordinator:
    """A thread per connection, one state under a lock. A context manager.

    Args:
        replicas, stages: D and P; training begins when D P ranks are there.
        secret: that ranks must know.
        host, port: where it listens; port 0 finds a free one.
        patience_s: after so long without a word a rank counts as lost.
        policy: of the planner; None for that of the ranks, or the usual one.
        memory: what layers take and ranks have, for the planner.
        layer_costs: seconds of each layer; None for those that ranks measure.
        chunk_bytes: of each piece that moves while training goes on, in one step. None: whoever comes, and layers that move, stop training
            until all is there.
        restarts: so many times a training that has stopped is followed by another, which begins when D P ranks are there again: of
            processes that are started anew, and go on from their last checkpoint.
        log: called with whatever happens, and its details.

    Attributes:
        history: (seconds since the beginning, what happened, details), for tests and for people.
        restarts: how many are left.
    """

    def __init__(
        self,
        *,
        replicas: int,
        stages: int,
        secret: str = "",
        host: str = "127.0.0.1",
        port: int = 0,
        patience_s: float = 10.0,
        policy: Policy | None = None,
        memory: Memory | None = None,
        layer_costs: Sequence[float] | None = None,
        chunk_bytes: int | None = 4 * 2**20,
        restarts: int = 0,
        log: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        for name, number in (("replicas", replicas), ("stages", stages), ("restarts", restarts + 1)):
            if number < 1:
                raise InputError(f"{name} is {number - (name == 'restarts')}; use at least {int(name != 'restarts')}")
        if not patience_s > 2 * BEAT_S:
            raise InputError(f"patience_s is {patience_s}; ranks are heard every {BEAT_S} s, use more than twice that")
        if chunk_bytes is not None and chunk_bytes < 4:
            raise InputError(f"chunk_bytes is {chunk_bytes}; a number has 4, use more")
        self.history: list[tuple[float, str, dict[str, Any]]] = []
        self.restarts = restarts
        self._patience_s, self._log = patience_s, log
        self._began = time.monotonic()
        self._lock = threading.RLock()
        chunk = None if chunk_bytes is None else chunk_bytes // 4

        def decisions() -> Decisions:
            plans = Replanner(stages, policy, memory, layer_costs)
            return Decisions(replicas, stages, plans, chunk, self._note, patience_s=patience_s)

        self._new_decisions = decisions
        self._decisions = decisions()
        # Connections of trainings that have stopped, which are told so.
        self._parted: list[Channel] = []
        # Ranks tell it words alone.
        self._listener = Listener(
            host, port, secret.encode(), self._on_frame, self._on_close, most_body=0, tell=self._tell_trouble
        )
        self.address = f"[{host}]:{self._listener.port}" if ":" in host else f"{host}:{self._listener.port}"
        self._watching = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> "Coordinator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections; ranks that still train are told."""
        self._watching.set()
        self._listener.close()
        with self._lock:
            members = [member.channel for member in self._decisions.members.values()]
            self._decisions.members.clear()
            parted = [*self._parted, *self._decisions.cast_out]
            # Of whom something may still be heard before they are told.
            self._parted += members
        for channel in members:
            channel.send({"kind": "stop", "why": "the coordinator was closed"})
        for channel in (*parted, *members):
            channel.close(after_sends=True)

    @property
    def version(self) -> int:
        """Steps that are committed."""
        with self._lock:
            return self._decisions.version

    @property
    def floor(self) -> int | None:
        """The version below which no loss takes the training back; None where nobody keeps snapshots of all ranks."""
        with self._lock:
            return self._decisions.ledger.floor

    @property
    def layout(self) -> Layout | None:
        """The layout that holds; None before training begins."""
        with self._lock:
            return self._decisions.layout

    @property
    def stopped(self) -> str | None:
        """Why training has stopped before its end; None where it has not."""
        with self._lock:
            return self._decisions.stopped

    @property
    def has_ended(self) -> bool:
        """Whether training was done, or has stopped, and nobody is there any more."""
        with self._lock:
            made = self._decisions
            return (made.is_ending or made.stopped is not None) and not made.members

    @property
    def ranks(self) -> tuple[int, ...]:
        """Who is there."""
        with self._lock:
            return tuple(sorted(self._decisions.members))

    def wait_for(self, holds: Callable[["Coordinator"], bool], timeout_s: float = 60.0) -> bool:
        """Until ``holds`` of this coordinator; whether it did in time."""
        deadline = time.monotonic() + timeout_s
        while not holds(self):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    # What ranks tell

    def _on_frame(self, channel: Channel, header: Header, body: Body) -> None:
        with self._lock:
            if header.get("kind") == "hello":
                self._decisions.hello(channel, header)
                return
            member = self._decisions.members.get(channel.peer)
            if member is None or member.channel is not channel:
                # What it is told of its end may not be sent yet; it ends the connection when it has read that.
                if channel not in (*self._parted, *self._decisions.cast_out):
                    channel.close("not a member")
                return
            member.heard = time.monotonic()
            try:
                self._decisions.told(member, header)
            finally:
                self._begin_anew()

    def _on_close(self, channel: Channel, why: str) -> None:
        with self._lock:
            member = self._decisions.members.get(channel.peer)
            if member is not None and member.channel is channel:
                self._decisions.lose([member.rank], why)
                self._begin_anew()

    def _begin_anew(self) -> None:
        """Where training has stopped, and may begin again: nobody of it has a part any more."""
        made = self._decisions
        if made.stopped is None or not self.restarts:
            return
        self.restarts -= 1
        for member in made.members.values():
            # What it is told has been sent.
            member.channel.peer = None
            member.channel.close(after_sends=True)
        gone = [*self._parted, *made.cast_out, *(member.channel for member in made.members.values())]
        self._parted = [channel for channel in gone if not channel.is_closed]
        self._decisions = self._new_decisions()
        self._note("anew", why=made.stopped, left=self.restarts)

    def _watch(self) -> None:
        pulse = Pulse(time.monotonic())
        while not self._watching.wait(BEAT_S):
            with self._lock:
                now = time.monotonic()
                # While this process stands still nobody is silent.
                if late_s := pulse.late_s(now):
                    self._decisions.has_stood_still(late_s, now)
                silent = [m.rank for m in self._decisions.members.values() if now - m.heard > self._patience_s]
                if silent:
                    self._decisions.lose(silent, f"silent for {self._patience_s:g} s")
                self._decisions.look(now)
                self._begin_anew()

    def _tell_trouble(self, why: str) -> None:
        with self._lock:
            self._note("door", why=why)

    def _note(self, what: str, **details: Any) -> None:
        self.history.append((time.monotonic() - self._began, what, details))
        if self._log is not None:
            self._log(what, details)
