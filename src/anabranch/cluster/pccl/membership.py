"""Who is there: how a peer is let in, lets in others, and waits for as many as are to begin together."""

from __future__ import annotations

import time
from typing import Any

from anabranch.cluster.pccl.checks import check_world
from anabranch.cluster.pccl.faults import TopologyFailed, not_in_time
from anabranch.cluster.pccl.links import Place
from anabranch.cluster.pccl.part import Part

# Between two looks whether newcomers wait.
_LOOK_S = 0.02


class Membership(Part):
    """A peer among the others; `anabranch.cluster.pccl.Communicator` is its public face."""

    # So many as those who let this peer in wait for; 0 where they are past that, None where it was the first or has waited.
    _awaited: int | None = None

    @property
    def world_size(self) -> int:
        """Peers of all groups."""
        return int(self._topology.get("world", 0))

    @property
    def ring_order(self) -> list[int]:
        """Peers of the own group in the order of its ring."""
        return [int(row[0]) for row in self._topology.get("ring", [])]

    @property
    def places(self) -> dict[int, str]:
        """The host at which others call each peer of the own group, in the order of its ring."""
        return {place.peer: place.host for place in map(Place.of, self._topology.get("ring", []))}

    @property
    def group_size(self) -> int:
        """Peers of the own group."""
        return len(self.ring_order)

    @property
    def n_groups(self) -> int:
        """Groups that have peers."""
        return int(self._topology.get("groups", 0))

    @property
    def largest_group(self) -> int:
        """Peers of the largest group."""
        return int(self._topology.get("largest", 0))

    def are_peers_pending(self) -> bool:
        """Whether newcomers wait: one answer for all peers."""
        return bool(self._pending(awaits=0)["pending"])

    def _pending(self, *, awaits: int) -> dict[str, Any]:
        found: dict[str, Any] = self._alone_in_it(lambda: self._vote({"what": "pending", "awaits": awaits}))
        return found

    def update_topology(self) -> None:
        """Let in those who wait. Raises TopologyFailed on all peers where one cannot reach its neighbour."""
        self._accept(awaits=0)

    def _accept(self, *, awaits: int) -> None:
        self._alone_in_it(lambda: self._form(self._vote({"what": "accept", "awaits": awaits})))

    def admit(self) -> bool:
        """Let in those who wait, if there are any; whether this peer's ring has changed.

        Where this is the first call of one that comes later it does nothing: those who let it in are just making theirs.
        """
        before = self.ring_order
        while not self._is_new and (wanted := self._let_in(awaits=0)):
            # Those who were there first still wait for others, and so does this peer.
            self._gather(wanted)
        if self._is_new:
            self._is_new = False
            return True
        return self.ring_order != before

    def wait_for(self, world: int) -> None:
        """Let in until so many peers are there; all that begin together call it first.

        Where they name different numbers, that of who was there first counts. For one that comes later, and is let in by peers that are
        past it, it does nothing.

        Raises InputError for a number that is none, PeerLost where they are not there in ``wait_s``.
        """
        check_world(world)
        wanted, self._awaited = self._awaited or world, None
        if not self._is_new:
            self._gather(wanted)

    def _gather(self, wanted: int) -> None:
        deadline = None if self._wait_s is None else time.monotonic() + self._wait_s
        while self.world_size < wanted:
            is_late = deadline is not None and time.monotonic() >= deadline
            if is_late or self.is_given_up:
                why = f"after {self._wait_s:g} s" if is_late else "when it was given up"
                raise not_in_time(f"{self.world_size} of {wanted} peers were there {why}")
            before = self.ring_order
            try:
                told = self._let_in(awaits=wanted)
            except TopologyFailed:
                continue
            if not told:
                # The one that was there first goes on, and has let in with this one's vote.
                self._is_new = True
                return
            wanted = told
            if self.ring_order == before:
                time.sleep(_LOOK_S)

    def _let_in(self, *, awaits: int) -> int:
        """Let in who waits. Returns for how many peers the one that was there first waits, 0 where it waits for no more."""
        reply = self._pending(awaits=awaits)
        if reply["pending"]:
            self._accept(awaits=int(reply["awaits"]))
        return int(reply["awaits"])

    def _join(self) -> None:
        deadline = None if self._wait_s is None else time.monotonic() + self._wait_s
        while not self._topology:
            try:
                self._form(self._vote({"what": "join"}, deadline=deadline))
            except TopologyFailed:
                # Those who run may have failed to reach another newcomer; they try again when they let in again.
                continue
        # Who was let in by others waits for as many as they do, or no more.
        self._awaited = self._topology.get("awaits")
        self._is_new = self._awaited == 0
