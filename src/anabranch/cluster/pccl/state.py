"""What the master decides: a state machine without sockets, clocks or threads.

    state = MasterState()
    peer = state.join(group=0, host="10.0.0.1", port=48149, pool=1)
    state.vote(peer, {"what": "join", "req": 1}, now=0.0)
    state.take()            # what to send: [(peer, {"req": 1, "establish": 1, ...})]

The group moves only when every accepted peer has voted for the same thing; a peer that is lost is a vote less, which can complete one.
Votes have numbers (``req``) of their peer: what was answered is kept until the peer says that it knows, so a vote that is sent again, to
this master or to one that was restarted from its journal, gets the same answer, and nothing is decided twice.

Peers of a wrong program, which wait for different things, are told so (`Mismatch`) as soon as it is sure that the wait would not end.
"""

from __future__ import annotations

import secrets
from typing import Any

from anabranch.cluster.pccl.decisions import Decisions
from anabranch.cluster.pccl.elections import check_vote
from anabranch.cluster.pccl.records import GLOBAL, MAIN, MOST_TAGS, MOST_WORLD, Member, waits_for
from anabranch.cluster.pccl.wire import WireError, number, word

# Slowest link that a matrix tells of, Mbit/s.
_LEAST_RATE = 1e-3


# What is held of a main vote beside its name and number.
_FIELDS = {
    "pending": ("awaits",),
    "accept": ("awaits",),
    "established": ("ok", "accused", "why"),
    "sync": ("revision", "progress", "strategy", "is_default", "keys"),
    "synced": ("ok", "why"),
}


class IllegalVoteError(Exception):
    """A peer did what no peer of ours does; the master drops it."""


class MasterState(Decisions):
    """The state machine; see the module. Its arguments and attributes are those of `Held`."""

    def take(self) -> list[tuple[int, str, dict[str, Any]]]:
        """What to send: member, ``reply``, ``abort`` or ``kick``, and the body. In this order; what is taken is gone."""
        found, self._outbox = self._outbox, []
        return found

    def dropped(self) -> list[tuple[int, str]]:
        """Members that were dropped, and why; their connections are to be closed once all is sent."""
        found, self._dropped = self._dropped, []
        return found

    def jobs(self) -> list[dict[int, list[int]]]:
        """Rings to be improved, by group: the caller gives back what it found to `solved`."""
        found, self._jobs = self._jobs, []
        return found

    def join(self, *, group: int, host: str, port: int, pool: int) -> int:
        """A peer has come. Returns its number."""
        number_of = self._next_id
        self._next_id += 1
        self.members[number_of] = Member(number_of, group, host, port, pool, secrets.token_hex(16))
        self.is_changed = True
        return number_of

    def resume(self, peer: int, token: str) -> bool:
        """A peer has come back after its connection, or the master, was gone. False for one that is not known."""
        member = self.members.get(peer)
        if member is None or not secrets.compare_digest(member.token.encode(), token.encode()):
            return False
        member.is_absent = False
        self._deadlines.pop(peer, None)
        if self.forming is not None and peer in self.forming.participants:
            self._must_report(peer)
        # All it waits for, it says again.
        member.vote, member.initiates = None, {}
        tags, under_way = [], self._of_member(peer)
        for told in member.answered.values():
            # It may not have heard that they began; of an end that comes before, now or later, it would know nothing.
            if any((told.get("tag"), told.get("seq")) == (running.tag, running.seq) for running in under_way):
                self._outbox.append((peer, "reply", told))
        for running in under_way:
            running.votes.pop(peer, None)
            if running.is_aborted:
                tags.append([running.tag, running.seq])
                self._deadlines[peer] = self._now + self.times.answer_s
        if tags:
            self._outbox.append((peer, "abort", {"tags": tags}))
        if self.forming is not None and self.forming.is_lost and peer in self.forming.participants:
            self._outbox.append((peer, "abort", {"epoch": self.forming.epoch}))
        return True

    def lost(self, peer: int, why: str, now: float) -> None:
        """A peer's connection is gone, or it has left."""
        self._now = now
        if peer in self.members:
            self._remove(peer, why)
            self._evaluate()

    def tick(self, now: float) -> None:
        """Time has passed: drop who has not answered in it."""
        self._now = now
        for peer in [peer for peer, when in self._deadlines.items() if when <= now]:
            member = self.members.get(peer)
            if member is None or self._deadlines.get(peer, now) > now:
                continue
            if newcomers := self._newcomers_that_hold_up(member):
                # Those go first whom nobody knows; without them it has nothing more to wait for.
                self._deadlines[peer] = now + self.times.answer_s
                for other in newcomers:
                    self._remove(other, "those who run could not make their links with it in time")
            else:
                late = "did not come back" if member.is_absent else "did not answer an abort or make its links"
                self._remove(peer, f"{late} in time")
            self._evaluate()

    def _newcomers_that_hold_up(self, member: Member) -> list[int]:
        """Of a ring that is being made, and for which a member that takes part has no links yet."""
        forming = self.forming
        if forming is None or not member.is_accepted or member.is_absent or member.id not in forming.participants:
            return []
        return [peer for peer in forming.newcomers if peer in self.members]

    def absent(self, now: float) -> None:
        """After a restart: members are to come back in time."""
        self._now = now
        for peer in list(self.members):
            self.members[peer].is_absent = True
            self._deadlines[peer] = now + self.times.absence_s

    def vote(self, peer: int, body: dict[str, Any], now: float) -> None:
        """A peer has voted. One whose vote no peer of ours would give is dropped, with why."""
        self._now = now
        member = self.members.get(peer)
        if member is None:
            return
        try:
            self._vote(member, body)
        except (IllegalVoteError, WireError) as error:
            self._remove(peer, f"an illegal vote: {error}")
        self._evaluate()

    def withdraw(self, peer: int, body: dict[str, Any], now: float) -> None:
        """A peer waits no more for what it voted. What was decided stays so."""
        self._now = now
        member = self.members.get(peer)
        if member is None:
            return
        req = number(body, "req")
        what = member.vote["what"] if member.vote is not None and member.vote["req"] == req else ""
        if what in ("join", *GLOBAL, "sync"):
            member.vote = None
            self._reply(member, req, {"error": "late", "why": _late(what)})
        for tag, vote in list(member.initiates.items()):
            if vote["req"] == req:
                del member.initiates[tag]
                self._reply(member, req, {"error": "late", "why": _late("initiate")})

    def solved(self, rings: dict[int, list[int]], *, is_late: bool, now: float) -> None:
        """Rings that were found: for those who wait, or, ``is_late``, to be taken up when peers are next admitted."""
        self._now = now
        fitting = self._fitting(rings)
        if is_late:
            self.found |= fitting
            return
        self.is_solving = False
        waiting = [self.members[peer] for peer in sorted(self._asked_to_measure)]
        # Those whom it was sought for may all be gone, and others be about something else.
        if waiting and all(waits_for(member, "measured") for member in waiting):
            self._asked_to_measure.clear()
            self._form({**{group: list(ring) for group, ring in self.order.items()}, **fitting}, [], waiting)
        self._evaluate()

    def _vote(self, member: Member, body: dict[str, Any]) -> None:
        req = number(body, "req")
        low = number(body, "low", default=0)
        member.answered = {key: value for key, value in member.answered.items() if key >= low}
        if req in member.answered:
            self._outbox.append((member.id, "reply", member.answered[req]))
            return
        what = word(body, "what", 32)
        number(body, "accused", default=0)
        if what == "initiate":
            self._initiate(member, body)
        elif what == "complete":
            self._complete(member, body, req)
        elif what in MAIN:
            self._main(member, what, body, req)
        else:
            raise IllegalVoteError(f"there is nothing called {what!r}")

    def _main(self, member: Member, what: str, body: dict[str, Any], req: int) -> None:
        if member.vote is not None:
            if member.vote["req"] == req:
                return
            raise IllegalVoteError(f"{what} while it waits for {member.vote['what']}")
        if member.initiates or self._of_member(member.id):
            raise IllegalVoteError(f"{what} in the midst of a collective")
        forming = self.forming
        if what == "established":
            if forming is None or member.id not in forming.participants:
                raise IllegalVoteError("established, and there is no ring to make")
        elif what == "measured":
            if member.id not in self._asked_to_measure:
                raise IllegalVoteError("measured, and there is nothing to measure")
            self._take_rates(member, body)
        elif what == "synced":
            syncing = self.syncing.get(member.group)
            if syncing is None or member.id not in syncing.participants:
                raise IllegalVoteError("synced, and nothing is shared")
        elif (what == "join") == member.is_accepted:
            raise IllegalVoteError(f"{what} of a peer that {'takes' if member.is_accepted else 'does not take'} part")
        if what == "sync":
            check_vote(body)
        elif what in ("pending", "accept"):
            number(body, "awaits", MOST_WORLD, default=0)
        member.vote = _held(what, body)
        if what == "established":
            self._deadlines.pop(member.id, None)

    def _initiate(self, member: Member, body: dict[str, Any]) -> None:
        tag = number(body, "tag")
        descriptor = body.get("descriptor")
        if not isinstance(descriptor, dict) or len(descriptor) > 16:
            raise IllegalVoteError("a collective without a description")
        if not all(
            len(key) <= 64 and isinstance(value, (str, int)) and len(str(value)) <= 64
            for key, value in descriptor.items()
        ):
            raise IllegalVoteError("a collective whose description is none")
        if not member.is_accepted or member.vote is not None:
            raise IllegalVoteError("a collective of a peer that takes no part or waits for something else")
        if (member.group, tag) in self.running and member.id in self.running[member.group, tag].participants:
            raise IllegalVoteError(f"tag {tag} is under way")
        held = member.initiates.get(tag)
        if held is not None and held["req"] != body["req"]:
            raise IllegalVoteError(f"tag {tag} is waited for")
        if len(member.initiates) >= MOST_TAGS:
            raise IllegalVoteError(f"more than {MOST_TAGS} tags at a time")
        member.initiates[tag] = {"req": body["req"], "descriptor": descriptor}

    def _complete(self, member: Member, body: dict[str, Any], req: int) -> None:
        tag, seq = number(body, "tag"), number(body, "seq")
        running = self.running.get((member.group, tag))
        if running is None or running.seq != seq or member.id not in running.participants:
            raise IllegalVoteError(f"complete of tag {tag}, which is not under way")
        if member.id in running.votes:
            return
        running.votes[member.id] = req
        # What comes after an abort says nothing about who is at fault, nor about collectives that began since.
        if body.get("aborted") and not running.is_aborted:
            accused = self.members.get(number(body, "accused", default=member.id))
            # Of another group it can know nothing.
            self._accuse(member, accused if accused is not None and accused.id in running.participants else None)
            # Others may be right in the midst of it, and it would come to nothing.
            self._abort(member.group)
        if not any(other.is_aborted and member.id not in other.votes for other in self._of_member(member.id)):
            self._deadlines.pop(member.id, None)

    def _take_rates(self, member: Member, body: dict[str, Any]) -> None:
        rates = body.get("rates")
        if not isinstance(rates, dict) or len(rates) > self.most_peers:
            raise IllegalVoteError("rates that are none")
        for name, rate in rates.items():
            if (
                not (name.isascii() and name.isdigit() and len(name) < 19)
                or not isinstance(rate, (int, float))
                or not 0 <= rate < 1e9
            ):
                raise IllegalVoteError("rates that are none")
            if int(name) in self.members and int(name) != member.id:
                self.matrix[member.id, int(name)] = max(float(rate), _LEAST_RATE)


def _late(what: str) -> str:
    return "those who run did not let it in in time" if what == "join" else "the others did not come in time"


def _held(what: str, body: dict[str, Any]) -> dict[str, Any]:
    """Of a vote what the group decides by, as what it should be; nothing else that a peer may have put there."""
    told = {"what": what, "req": body["req"]}
    for name in _FIELDS.get(what, ()):
        value = body.get(name)
        if name in ("ok", "is_default"):
            told[name] = value is True
        elif name in ("awaits", "progress"):
            told[name] = value if type(value) is int else 0
        elif name == "why":
            told[name] = value[:200] if isinstance(value, str) else ""
        else:
            told[name] = value
    return told
