"""Peers that do not agree: whom of them is told.

What peers have been through together says who runs the group's program: those with the most of it, where they agree, are believed; of
groups that have been through as much, that which has been there longest. Who does otherwise is told alone and sent away, and they never
hear of it. Where nobody has been through anything yet, or those who have do not agree themselves, all are told. Votes, collectives and
shared states have one rule for it, `anabranch.cluster.pccl.elections.odd`.
"""

from __future__ import annotations

from typing import Any

from anabranch.cluster.pccl.elections import best_known, odd
from anabranch.cluster.pccl.records import GLOBAL, MOST_TAGS, Held, Member

_COLLECTIVE = "a collective"


class Disagreements(Held):
    """Rules over what is held."""

    def _is_mixed(self) -> bool:
        """Whether peers wait for different things, none of which will come: within a group, or what all groups decide together."""
        everyone = [member for member in self.accepted if member.vote is not None and member.vote["what"] in GLOBAL]
        if self._told_apart(everyone, self.accepted):
            return True
        rings = [[self.members[peer] for peer in ring] for ring in self.order.values()]
        return any(self._told_apart(ring, ring) for ring in rings)

    def _told_apart(self, members: list[Member], all_of_them: list[Member]) -> bool:
        """Tell members who wait that others of them wait for something else; False where they do not.

        Newcomers that do otherwise than those who have run for a while are told alone.
        """
        begun = {
            member.id: str(member.vote["what"])
            for member in members
            if member.vote is not None and member.vote["what"] in (*GLOBAL, "sync")
        }
        # Of two who wait in collectives of different tags each may begin the other's too.
        said = dict(sorted((begun | {member.id: _COLLECTIVE for member in members if member.initiates}).items()))
        if not begun or len({*said.values()}) < 2:
            return False
        waiting = [(peer, self._in_words(peer, what)) for peer, what in said.items()]
        first = waiting[0]
        second = next(one for one in waiting if said[one[0]] != said[first[0]])
        told = {"error": "mismatch", "why": f"peer {first[0]} waits for {first[1]}, peer {second[0]} for {second[1]}"}
        if impatient := self._impatient(waiting):
            self._send_away(impatient)
            return True
        standing = self._standing(all_of_them)
        if (known := best_known(standing)) and not any(peer in known for peer, _ in waiting):
            # Until one of those has voted it is not known who does otherwise.
            return False
        if strangers := odd(said, standing):
            self._send_away(dict.fromkeys(strangers, told))
            return True
        self._answer([member for member in members if member.id in begun], told)
        for member in members:
            for tag in list(member.initiates):
                self._reply(member, member.initiates.pop(tag)["req"], told)
        return True

    def _in_words(self, peer: int, what: str) -> str:
        return f"{what} of tag {min(self.members[peer].initiates)}" if what == _COLLECTIVE else what

    def _impatient(self, waiting: list[tuple[int, str]]) -> dict[int, dict[str, Any]]:
        """Where the first wait until others are there: by newcomer that does not, what it is told; the first go on waiting."""
        first = self.members[waiting[0][0]]
        if not first.gathers:
            return {}
        until = f"peer {first.id} waits until {(first.vote or {}).get('awaits', 'more')} peers are there (wait_for, parallel.diloco.peers)"
        return {
            peer: {"error": "mismatch", "why": f"{until}, peer {peer} for {what}"}
            for peer, what in waiting
            if what not in ("pending", "accept") and not self.members[peer].gathers
        }

    def _none_can_begin(self) -> bool:
        """Who asks for a collective of more peers than are left, or of fewer than are there, is told at once, whatever others wait for."""
        for ring in self.order.values():
            for member in [self.members[peer] for peer in ring]:
                for tag, vote in member.initiates.items():
                    wanted = vote["descriptor"].get("world")
                    if type(wanted) is not int or wanted == len(ring):
                        continue
                    kind, state = ("lost", "left") if wanted > len(ring) else ("mismatch", "there")
                    told = {"error": kind, "why": f"{len(ring)} peers are {state}, and collective {tag} is of {wanted}"}
                    self._reply(member, member.initiates.pop(tag)["req"], told)
                    return True
        return False

    def _all_hold_others(self) -> bool:
        """Each waits in as many collectives as go at a time, none of which all have begun: what must come first waits behind them."""
        for ring in self.order.values():
            members = [self.members[peer] for peer in ring]
            if not all(len(member.initiates) >= MOST_TAGS for member in members):
                continue
            why = f"each peer waits in {MOST_TAGS} collectives, none of which all have begun; begin them in the same order everywhere"
            told = {"error": "mismatch", "why": why}
            if strangers := odd({member.id: sorted(member.initiates) for member in members}, self._standing(members)):
                self._send_away(dict.fromkeys(strangers, told))
                return True
            for member in members:
                for tag in list(member.initiates):
                    self._reply(member, member.initiates.pop(tag)["req"], told)
            return True
        return False

    def _standing(self, members: list[Member]) -> dict[int, tuple[int, int]]:
        """How well each is known: what it has been through with its group, and how long this has been there, since what all groups decide
        may be asked for by some that are alone in theirs, and have proved themselves to nobody else."""
        return {member.id: (member.proof, -member.since) for member in members if member.proof}

    def _is_less_known(self, member: Member) -> bool:
        """Whether others of its group have been through more."""
        return any(self.members[peer].proof > member.proof for peer in self.order[member.group])

    def _accuse(self, member: Member, accused: Member | None) -> None:
        """What one that is less known says of who is known better, or of nobody, is held against itself."""
        if accused is not None and accused is not member:
            (member if member.proof < accused.proof else accused).failures += 1
        elif self._is_less_known(member):
            member.quits += 1

    def _send_away(self, told: dict[int, dict[str, Any]]) -> None:
        """Members that do something else than the others: each hears why, and the others go on."""
        for peer, body in told.items():
            member = self.members[peer]
            if member.vote is not None:
                self._answer([member], body)
            for vote in member.initiates.values():
                self._reply(member, vote["req"], body)
            self._remove(peer, str(body.get("why", body["error"])))
