"""What a master knows: its members, what they wait for and what is under way, and what is to be sent.

Plain records, and the changes of them that every decision needs: answering votes, ending collectives, losing a member.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from anabranch.cluster.pccl.times import Times

# Votes of which a peer has one at a time.
MAIN = ("join", "pending", "accept", "optimize", "measured", "established", "sync", "synced")
# Those that all groups take together.
GLOBAL = ("pending", "accept", "optimize")
# In which a newcomer that its neighbours cannot reach may fail, before it is sent away.
MOST_FAILURES = 2
# In which one that is less known than others may end collectives without a reason.
MOST_QUITS = 8
# Collectives of a peer at a time, under way and waited for.
MOST_TAGS = 64
# Answers that are kept of a peer: more than it can wait for at a time, so that older ones have been heard, whatever it says it knows.
MOST_ANSWERS = 4 * MOST_TAGS
# Peers that anybody can wait for.
MOST_WORLD = 2**16


@dataclass
class Member:
    """One peer.

    Attributes:
        id, group: numbers.
        host, port: where other peers reach it.
        pool: connections that it keeps with each neighbour.
        token: by which it is known when it comes back after the master was restarted.
        is_accepted: whether it takes part.
        is_absent: whether it has not come back since.
        vote: its main vote, a message; None where it waits for nothing.
        initiates: by tag, its votes to begin a collective.
        answered: by number of the vote, what it was told and may not know yet.
        unfetched: sources from which it could not fetch what is being shared.
        doubted: members that could not fetch from it, and could from others.
        has_reduced, has_shared: whether it has been through a collective, and through the sharing of a state.
        proof: of what it had been through at the last vote of all: 2 a collective, 1 a shared state alone, 0 neither. Where peers do not
            agree, those with the most are believed: they run what the others run.
        since: number of the first peer of its group, from whom on there was always somebody in it.
        gathers: whether it waits for others to be there, by `Communicator.wait_for`.
        failures: times in a row in which others could not reach it.
        quits: times in a row in which it has ended a collective and named nobody.
    """

    id: int
    group: int
    host: str
    port: int
    pool: int
    token: str
    is_accepted: bool = False
    is_absent: bool = False
    vote: dict[str, Any] | None = None
    initiates: dict[int, dict[str, Any]] = field(default_factory=dict)
    answered: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: int = 0
    unfetched: list[int] = field(default_factory=list)
    doubted: list[int] = field(default_factory=list)
    has_reduced: bool = False
    has_shared: bool = False
    proof: int = 0
    since: int = 0
    gathers: bool = False
    quits: int = 0

    @property
    def place(self) -> list[Any]:
        """As other peers are told of it."""
        return [self.id, self.host, self.port, self.pool]

    @property
    def is_proven(self) -> bool:
        """Whether it has been through anything with others, and through a vote of all after it."""
        return self.proof > 0

    def prove(self) -> None:
        """It has voted as all others."""
        self.proof = max(self.proof, 2 if self.has_reduced else int(self.has_shared))


@dataclass
class Running:
    """A collective under way.

    Attributes:
        tag, seq: its name, and its number in its group.
        epoch: of the ring that it runs on.
        participants: members that began it and are still there.
        is_aborted: whether it has failed.
        votes: by member, the number of its vote to complete.
    """

    tag: int
    seq: int
    epoch: int
    participants: list[int]
    is_aborted: bool = False
    votes: dict[int, int] = field(default_factory=dict)


@dataclass
class Forming:
    """A ring that is being made.

    Attributes:
        epoch: of it.
        rings: by group, its members in order.
        newcomers: members that would be accepted.
        participants: whose links must stand.
        awaits: so many peers those who let them in wait for, by `Communicator.wait_for`; 0 for no more, None where nobody lets in anybody.
        is_lost: whether one of them went away.
    """

    epoch: int
    rings: dict[int, list[int]]
    newcomers: list[int]
    participants: list[int]
    awaits: int | None = None
    is_lost: bool = False


@dataclass
class Syncing:
    """A shared state under way.

    Attributes:
        revision: of what was elected.
        participants: who has been told what to fetch and has not told that it has.
        sources: by member that fetches, from whom.
        is_lost: whether a source went away in the midst of it.
    """

    revision: int
    participants: list[int]
    sources: dict[int, int]
    is_lost: bool = False


class Held:
    """All of it; `anabranch.cluster.pccl.state.MasterState` decides.

    Args:
        times: in which peers answer.
        most_peers: members at a time.

    Attributes:
        run: name of this run, and the secret of those who are in it.
        members: by number.
        order: by group, accepted members in the order of its ring.
        epoch: grows with every change of members or ring.
        revision: by group, of the last shared state.
        matrix: Mbit/s from one member to another.
        is_changed: whether anything was decided since `saved`.
    """

    def __init__(self, times: Times | None = None, *, most_peers: int = 256) -> None:
        self.times, self.most_peers = times or Times(), most_peers
        self.run = secrets.token_hex(16)
        self.members: dict[int, Member] = {}
        self.order: dict[int, list[int]] = {}
        self.epoch = 0
        self.revision: dict[int, int] = {}
        self.matrix: dict[tuple[int, int], float] = {}
        self.running: dict[tuple[int, int], Running] = {}
        self.syncing: dict[int, Syncing] = {}
        self.forming: Forming | None = None
        self.is_solving = False
        self.is_changed = False
        # By group: the best tour found in the background, for the members that it was found for.
        self.found: dict[int, list[int]] = {}
        # Who was asked to measure, until a ring is found.
        self._asked_to_measure: set[int] = set()
        self._next_id = 0
        self._next_seq: dict[int, int] = {}
        self._deadlines: dict[int, float] = {}
        self._now = 0.0
        self._outbox: list[tuple[int, str, dict[str, Any]]] = []
        self._dropped: list[tuple[int, str]] = []
        self._jobs: list[dict[int, list[int]]] = []

    @property
    def accepted(self) -> list[Member]:
        """Who takes part, in order of arrival."""
        return [member for _, member in sorted(self.members.items()) if member.is_accepted]

    def _remove(self, peer: int, why: str) -> None:
        member = self.members.pop(peer)
        self._outbox.append((peer, "kick", {"why": why}))
        self._dropped.append((peer, why))
        self._deadlines.pop(peer, None)
        self._asked_to_measure.discard(peer)
        for left in self.members.values():
            # Of one that is gone nobody could fetch; and what it said of others counts no more.
            left.unfetched = [source for source in left.unfetched if source != peer]
            left.doubted = [by for by in left.doubted if by != peer]
        self.is_changed = True
        if self.forming is not None and peer in self.forming.participants:
            self.forming.participants.remove(peer)
            self.forming.is_lost = True
            # Nobody waits longer for links to it.
            for other in self.forming.participants:
                self._outbox.append((other, "abort", {"epoch": self.forming.epoch}))
        if not member.is_accepted:
            return
        self.order[member.group].remove(peer)
        if not self.order[member.group]:
            del self.order[member.group]
            self.revision.pop(member.group, None)
        self.epoch = max(self.epoch, self.forming.epoch if self.forming is not None else 0) + 1
        self.matrix = {edge: rate for edge, rate in self.matrix.items() if peer not in edge}
        self.found.pop(member.group, None)
        self._abort(member.group)
        for running in self._of_member(peer):
            running.participants.remove(peer)
            running.votes.pop(peer, None)
        syncing = self.syncing.get(member.group)
        if syncing is not None:
            if peer in syncing.participants:
                syncing.participants.remove(peer)
            if peer in syncing.sources.values():
                syncing.is_lost = True

    def _fitting(self, rings: dict[int, list[int]]) -> dict[int, list[int]]:
        """Of these rings those that have the members that their groups have now."""
        return {group: ring for group, ring in rings.items() if sorted(ring) == sorted(self.order.get(group, []))}

    def _of_member(self, peer: int) -> list[Running]:
        return [running for running in self.running.values() if peer in running.participants]

    def _abort(self, group: int) -> None:
        """All collectives of a group: links are made anew after it, for all."""
        hit = [running for (of, _), running in self.running.items() if of == group and not running.is_aborted]
        if not hit:
            return
        self.epoch += 1
        for running in hit:
            running.is_aborted = True
            for peer in running.participants:
                if peer in self.members:
                    self._outbox.append((peer, "abort", {"tags": [[running.tag, running.seq]]}))
                    if peer not in running.votes:
                        self._deadlines[peer] = self._now + self.times.answer_s
        self.is_changed = True

    def _reply(self, member: Member, req: int, body: dict[str, Any]) -> None:
        told = {"req": req, **body}
        member.answered[req] = told
        while len(member.answered) > MOST_ANSWERS:
            del member.answered[next(iter(member.answered))]
        self._outbox.append((member.id, "reply", told))
        self.is_changed = True

    def _answer(self, members: Iterable[Member], body: Callable[[Member], dict[str, Any]] | dict[str, Any]) -> None:
        """Their main votes."""
        for member in members:
            assert member.vote is not None
            req, member.vote = member.vote["req"], None
            self._reply(member, req, body(member) if callable(body) else body)


def waits_for(member: Member, what: str) -> bool:
    """Whether a member's main vote is this one."""
    return member.vote is not None and member.vote["what"] == what
