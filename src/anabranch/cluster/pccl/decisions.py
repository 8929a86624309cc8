"""What the group decides, and when: each rule looks whether all votes that it needs are there, and answers them.

Rules are tried until none applies, after everything that happens. Which of them comes first makes no difference to what is decided for a
peer, since a peer has one main vote at a time.
"""

from __future__ import annotations

from typing import Any

from anabranch.cluster.pccl.elections import elect
from anabranch.cluster.pccl.records import GLOBAL, MOST_FAILURES, Forming, Held, Member, Running, Syncing, waits_for


class Decisions(Held):
    """Rules over what is held."""

    def _evaluate(self) -> None:
        """Decide all that can be decided."""
        while any(
            decide()
            for decide in (
                self._form_is_done,
                self._is_mixed,
                self._all_agree,
                self._all_measured,
                self._all_share,
                self._all_shared,
                self._all_begin,
                self._all_ended,
            )
        ):
            pass

    def _form(
        self, rings: dict[int, list[int]], newcomers: list[int], participants: list[Member], *, gathers: bool = True
    ) -> None:
        """Have links made for a ring."""
        self.forming = Forming(self.epoch + 1, rings, newcomers, [member.id for member in participants], gathers)
        for member in participants:
            self._deadlines[member.id] = self._now + 2 * self.connect_s + self.dead_s
        self._answer(
            participants,
            lambda member: {
                "establish": True,
                "epoch": self.epoch + 1,
                "ring": [self.members[peer].place for peer in rings[member.group]],
            },
        )

    def _form_is_done(self) -> bool:
        forming = self.forming
        if forming is None:
            return False
        there = [self.members[peer] for peer in forming.participants]
        if not all(waits_for(member, "established") for member in there):
            return False
        self.forming = None
        self.is_changed = True
        failed = [member for member in there if not (member.vote or {}).get("ok")]
        if failed or forming.is_lost:
            self._form_failed(forming, there, failed)
            return True
        for peer in forming.newcomers:
            self.members[peer].is_accepted = True
        for member in there:
            member.failures = 0
        self.order, self.epoch = {group: ring for group, ring in forming.rings.items() if ring}, forming.epoch
        # A newcomer's next call is what those make next who have let it in.
        self._answer(there, lambda member: {**self._topology(member), "gathers": forming.gathers})
        return True

    def _form_failed(self, forming: Forming, there: list[Member], failed: list[Member]) -> None:
        # Some have links of that ring, and some of the one before: neither goes on.
        self.epoch = max(self.epoch, forming.epoch + 1)
        blamed = {(member.vote or {}).get("accused") for member in failed} | {member.id for member in failed}
        why = "a peer went away meanwhile" if forming.is_lost else ""
        for member in failed[:1]:
            why = f"peer {member.id}: {str((member.vote or {}).get('why', 'no links'))[:200]}"
        self._answer(there, {"error": "topology", "why": f"the ring could not be made: {why}"})
        for peer in forming.newcomers:
            if peer in blamed and peer in self.members:
                self.members[peer].failures += 1
                if self.members[peer].failures >= MOST_FAILURES:
                    self._remove(peer, f"its neighbours could not reach it, or it them ({why})")

    def _topology(self, member: Member) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "ring": [self.members[peer].place for peer in self.order[member.group]],
            "world": len(self.accepted),
            "groups": len(self.order),
            "largest": max(map(len, self.order.values())),
        }

    def _is_mixed(self) -> bool:
        """Whether peers wait for different things, none of which will come: within a group, or what all groups decide together."""
        everyone = [member for member in self.accepted if member.vote is not None and member.vote["what"] in GLOBAL]
        if self._told_apart(everyone, self.accepted):
            return True
        rings = [[self.members[peer] for peer in ring] for ring in self.order.values()]
        return any(self._told_apart(ring, ring) for ring in rings)

    def _told_apart(self, members: list[Member], all_of_them: list[Member]) -> bool:
        """Tell members who wait that others of them wait for something else; False where they do not.

        Newcomers that do otherwise than those who have run for a while are told alone; until one of those has voted, it is not known who.
        """
        begun = {
            member.id: str(member.vote["what"])
            for member in members
            if member.vote is not None and member.vote["what"] in (*GLOBAL, "sync")
        }
        began = {member.id: f"a collective of tag {min(member.initiates)}" for member in members if member.initiates}
        if not begun or len({*begun.values(), *began.values()}) < 2:
            return False
        waiting = sorted((begun | began).items())
        first, second = waiting[0], next(one for one in waiting if one[1] != waiting[0][1])
        told = {"error": "mismatch", "why": f"peer {first[0]} waits for {first[1]}, peer {second[0]} for {second[1]}"}
        if strangers := self._strangers(dict(waiting)):
            self._send_away(dict.fromkeys(strangers, told))
            return True
        if any(member.is_proven for member in all_of_them) and not any(
            self.members[peer].is_proven for peer, _ in waiting
        ):
            return False
        self._answer([member for member in members if member.id in begun], told)
        for member in members:
            for tag in list(member.initiates):
                self._reply(member, member.initiates.pop(tag)["req"], told)
        return True

    def _all_agree(self) -> bool:
        """What all groups decide together."""
        if self.forming is not None:
            return False
        accepted = self.accepted
        waiting = [member for _, member in sorted(self.members.items()) if waits_for(member, "join")]
        if not accepted:
            if waiting:
                self._form(_with({}, waiting), [member.id for member in waiting], waiting)
            return bool(waiting)
        what = accepted[0].vote["what"] if accepted[0].vote is not None else ""
        if what not in GLOBAL or not all(waits_for(member, what) for member in accepted):
            return False
        if what == "pending":
            for member in accepted:
                member.is_proven |= member.has_reduced
            self._answer(accepted, {"pending": bool(waiting)})
        elif what == "accept":
            rings = _with(self.order | self.found, waiting)
            self.found = {}
            if rings == self.order:
                self._answer(accepted, self._topology)
            else:
                gathers = any((member.vote or {}).get("gathers") is True for member in accepted)
                self._form(rings, [member.id for member in waiting], [*accepted, *waiting], gathers=gathers)
        else:
            self._asked_to_measure = {member.id for member in accepted}
            self._answer(accepted, self._to_measure)
        return True

    def _to_measure(self, member: Member) -> dict[str, Any]:
        others = [peer for peer in self.order[member.group] if peer != member.id]
        return {"measure": [self.members[peer].place for peer in others if (member.id, peer) not in self.matrix]}

    def _all_measured(self) -> bool:
        asked = [self.members[peer] for peer in sorted(self._asked_to_measure)]
        if self.is_solving or not asked or not all(waits_for(member, "measured") for member in asked):
            return False
        self.is_solving = True
        self._jobs.append({group: list(ring) for group, ring in self.order.items()})
        return True

    def _all_share(self) -> bool:
        for group, ring in self.order.items():
            members = [self.members[peer] for peer in ring]
            if group in self.syncing or not all(waits_for(member, "sync") for member in members):
                continue
            found = elect(
                {member.id: member.vote for member in members if member.vote},
                self.revision.get(group),
                {member.id: member.unfetched for member in members},
            )
            if found.error is not None:
                self._answer(members, found.error)
            elif found.kicked:
                for peer, why in found.kicked.items():
                    self._remove(peer, why)
            elif found.apart:
                self._send_away(found.apart)
            else:
                self._share(group, members, found.revision, found.fetches)
            return True
        return False

    def _share(
        self, group: int, members: list[Member], revision: int, fetches: dict[int, tuple[int, list[list[Any]]]]
    ) -> None:
        sources = {peer: source for peer, (source, _) in fetches.items()}
        self.syncing[group] = Syncing(revision, [member.id for member in members], sources)

        def plan(member: Member) -> dict[str, Any]:
            told: dict[str, Any] = {"revision": revision, "is_first": group not in self.revision}
            if member.id in fetches:
                source, entries = fetches[member.id]
                told |= {"from": self.members[source].place, "fetch": entries}
            return told

        self._answer(members, plan)

    def _all_shared(self) -> bool:
        for group, syncing in self.syncing.items():
            members = [self.members[peer] for peer in syncing.participants]
            if not all(waits_for(member, "synced") for member in members):
                continue
            failed = [member for member in members if not (member.vote or {}).get("ok")]
            del self.syncing[group]
            self.is_changed = True
            if failed or syncing.is_lost:
                whom = f"peer {failed[0].id} could not fetch it" if failed else "its source went away"
                self._answer(members, {"error": "lost", "why": f"the shared state is as it was: {whom}"})
                self._judge(syncing, members, failed)
            elif members:
                self.revision[group] = syncing.revision
                self._answer(members, {"revision": syncing.revision})
                self._judge(syncing, members, [])
                for member in members:
                    member.unfetched = []
                    member.is_proven |= member.has_reduced
            return True
        return False

    def _judge(self, syncing: Syncing, members: list[Member], failed: list[Member]) -> None:
        """Who could not fetch takes another source next time. One that fails with two is at fault, and so is a source that failed two."""
        for member in members:
            source = syncing.sources.get(member.id)
            if member in failed:
                # One that is gone is nobody's fault; who had nothing to fetch and says that it failed has itself to blame.
                if source is None or source in self.members:
                    member.unfetched.append(member.id if source is None else source)
            elif source is not None:
                for doubted in [self.members[other] for other in member.unfetched if other in self.members]:
                    doubted.doubted = sorted({*doubted.doubted, member.id})
        for member in members:
            if len(member.unfetched) >= MOST_FAILURES:
                self._remove(member.id, f"it could not fetch the shared state in {MOST_FAILURES} tries")
            elif len(member.doubted) >= MOST_FAILURES:
                self._remove(member.id, "peers could not fetch the shared state from it, and could from others")

    def _send_away(self, told: dict[int, dict[str, Any]]) -> None:
        """Members that do something else than the others: each hears why, and the others go on."""
        for peer, body in told.items():
            member = self.members[peer]
            if member.vote is not None:
                self._answer([member], body)
            for vote in member.initiates.values():
                self._reply(member, vote["req"], body)
            self._remove(peer, str(body["why"]))

    def _strangers(self, said: dict[int, Any]) -> list[int]:
        """Who does otherwise than all those who have done a round with each other; nobody where there are none, or they do not agree."""
        known = [said[peer] for peer in said if self.members[peer].is_proven]
        if not known or any(one != known[0] for one in known):
            return []
        return [peer for peer in said if said[peer] != known[0]]

    def _all_begin(self) -> bool:
        for group, ring in self.order.items():
            members = [self.members[peer] for peer in ring]
            for tag, vote in members[0].initiates.items():
                if not all(tag in member.initiates for member in members):
                    continue
                held = {member.id: member.initiates[tag] for member in members}
                other = next((peer for peer in ring if held[peer]["descriptor"] != vote["descriptor"]), None)
                if other is not None:
                    told = {
                        "error": "mismatch",
                        "why": f"tag {tag}: {_in_words(ring[0], vote)}, {_in_words(other, held[other])}",
                    }
                    if strangers := self._strangers({peer: held[peer]["descriptor"] for peer in ring}):
                        self._send_away(dict.fromkeys(strangers, told))
                        return True
                    for member in members:
                        self._reply(member, member.initiates.pop(tag)["req"], told)
                    return True
                for member in members:
                    del member.initiates[tag]
                self._begin(group, tag, members, held)
                return True
        return False

    def _begin(self, group: int, tag: int, members: list[Member], held: dict[int, dict[str, Any]]) -> None:
        seq = self._next_seq.get(group, 0)
        self._next_seq[group] = seq + 1
        self.running[group, tag] = Running(tag, seq, self.epoch, [member.id for member in members])
        for member in members:
            self._reply(member, held[member.id]["req"], {"tag": tag, "seq": seq, **self._topology(member)})

    def _all_ended(self) -> bool:
        for key, running in self.running.items():
            if not all(peer in running.votes for peer in running.participants):
                continue
            del self.running[key]
            self.is_changed = True
            for peer in running.participants:
                member = self.members[peer]
                self._reply(member, running.votes[peer], {"aborted": running.is_aborted, **self._topology(member)})
            if running.is_aborted:
                for peer in running.participants:
                    if self.members[peer].failures >= MOST_FAILURES:
                        self._remove(peer, "its neighbours do not reach it")
            else:
                for peer in running.participants:
                    self.members[peer].failures = 0
                    self.members[peer].has_reduced = True
            return True
        return False


def _with(order: dict[int, list[int]], newcomers: list[Member]) -> dict[int, list[int]]:
    rings = {group: list(ring) for group, ring in order.items()}
    for member in newcomers:
        rings.setdefault(member.group, []).append(member.id)
    return rings


def _in_words(peer: int, vote: dict[str, Any]) -> str:
    return f"peer {peer} has " + " ".join(f"{key}={value}" for key, value in sorted(vote["descriptor"].items()))
