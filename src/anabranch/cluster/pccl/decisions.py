"""What the group decides, and when: each rule looks whether all votes that it needs are there, and answers them.

Rules are tried until none applies, after everything that happens. Which of them comes first makes no difference to what is decided for a
peer, since a peer has one main vote at a time.
"""

from __future__ import annotations

from typing import Any

from anabranch.cluster.pccl.disagreements import Disagreements
from anabranch.cluster.pccl.elections import elect, odd
from anabranch.cluster.pccl.records import (
    GLOBAL,
    MOST_FAILURES,
    MOST_QUITS,
    Forming,
    Member,
    Running,
    Syncing,
    waits_for,
)


class Decisions(Disagreements):
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
                self._none_can_begin,
                self._all_begin,
                self._all_hold_others,
                self._all_ended,
            )
        ):
            pass

    def _form(
        self,
        rings: dict[int, list[int]],
        newcomers: list[int],
        participants: list[Member],
        *,
        awaits: int | None = None,
    ) -> None:
        """Have links made for a ring."""
        self.forming = Forming(self.epoch + 1, rings, newcomers, [member.id for member in participants], awaits)
        for member in participants:
            self._must_report(member.id)
        self._answer(
            participants,
            lambda member: {
                "establish": True,
                "epoch": self.epoch + 1,
                "ring": [self.members[peer].place for peer in rings[member.group]],
            },
        )

    def _must_report(self, peer: int) -> None:
        """How its links fared, in time."""
        self._deadlines[peer] = self._now + self.times.report_s

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
            member = self.members[peer]
            older = [self.members[other].since for other in self.order.get(member.group, [])]
            member.is_accepted, member.since = True, min([*older, *forming.rings[member.group]])
        world = sum(map(len, forming.rings.values()))
        for member in there:
            member.failures = 0
            member.gathers &= world < (forming.awaits or 0)
        self.order, self.epoch = {group: ring for group, ring in forming.rings.items() if ring}, forming.epoch
        # A newcomer's next call is what those make next who have let it in.
        self._answer(there, lambda member: {**self._topology(member), "awaits": forming.awaits})
        return True

    def _form_failed(self, forming: Forming, there: list[Member], failed: list[Member]) -> None:
        # Some have links of that ring, and some of the one before: neither goes on.
        self.epoch = max(self.epoch, forming.epoch + 1)
        accused = {member.id: (member.vote or {}).get("accused") for member in failed}
        why = "a peer went away meanwhile" if forming.is_lost else ""
        for member in failed[:1]:
            why = f"peer {member.id}: {str((member.vote or {}).get('why', 'no links'))[:200]}"
        self._answer(there, {"error": "topology", "why": f"the ring could not be made: {why}"})
        newcomers = [peer for peer in forming.newcomers if peer in self.members]
        guilty = [peer for peer in newcomers if peer in accused or peer in accused.values()]
        if not forming.is_lost:
            # One that takes part and is not known, and fails for no newcomer's sake: nobody else might ever be let in.
            guilty += [
                peer
                for peer, other in accused.items()
                if peer not in newcomers and other not in newcomers and self._is_less_known(self.members[peer])
            ]
        for peer in guilty:
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
        awaits = self._awaited()
        for member in accepted:
            member.prove()
        if what == "pending":
            for member in accepted:
                member.gathers = awaits > 0 and (member.gathers or (member.vote or {}).get("awaits", 0) > 0)
            self._answer(accepted, {"pending": bool(waiting), "awaits": awaits})
        elif what == "accept":
            # What was found for other members is of no use: those who are gone, or have come, meanwhile.
            rings, self.found = _with(self.order | self._fitting(self.found), waiting), {}
            if rings == self.order:
                self._answer(accepted, self._topology)
            else:
                newcomers = [member.id for member in waiting]
                self._form(rings, newcomers, [*accepted, *waiting], awaits=awaits)
        else:
            self._asked_to_measure = {member.id for member in accepted}
            self._answer(accepted, self._to_measure)
        return True

    def _awaited(self) -> int:
        """For how many peers those wait who decide together: by the vote of the best known, and of these the one that came first."""
        first = max(self.accepted, key=lambda member: (member.proof, -member.id))
        return int((first.vote or {}).get("awaits", 0))

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
                {member.id: member.proof for member in members if member.has_shared},
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
                    member.prove()
                    member.has_shared, member.gathers = True, False
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
                    if strangers := odd({peer: held[peer]["descriptor"] for peer in ring}, self._standing(members)):
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
                    elif self.members[peer].quits >= MOST_QUITS:
                        self._remove(peer, "it ends each collective, and names nobody")
            else:
                for peer in running.participants:
                    member = self.members[peer]
                    member.failures, member.quits = 0, 0
                    member.has_reduced, member.gathers = True, False
            return True
        return False


def _with(order: dict[int, list[int]], newcomers: list[Member]) -> dict[int, list[int]]:
    rings = {group: list(ring) for group, ring in order.items()}
    for member in newcomers:
        rings.setdefault(member.group, []).append(member.id)
    return rings


def _in_words(peer: int, vote: dict[str, Any]) -> str:
    return f"peer {peer} has " + " ".join(f"{key}={value}" for key, value in sorted(vote["descriptor"].items()))
