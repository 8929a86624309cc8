"""What a coordinator decides, without sockets, threads and clocks of its own: words of ranks go in, words to ranks come out.

`anabranch.cluster.elastic.coordinator` says how a step is committed and what an epoch is; the layouts that hold and are announced are in
`anabranch.cluster.elastic.epochs`. All is called with the coordinator's lock held.
"""

import time
from collections.abc import Collection, Sequence
from typing import Any

from anabranch.cluster.elastic.epochs import Epochs
from anabranch.cluster.elastic.seats import Seat, counted, named, other_batches, other_state, refusal
from anabranch.cluster.elastic.waiting import Standing, held_up
from anabranch.cluster.elastic.wire import Channel, Header
from anabranch.errors import InputError, PeerError

__all__ = ["Decisions"]


class Decisions(Epochs):
    """Of one training; see `Epochs` for what it is given and keeps."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._next_rank = self.replicas * self.stages
        # The step and the kind of error by which the last rank ended that ended by one.
        self._failed: tuple[int, str] | None = None
        # Who has made a step with others.
        self._proved: set[int] = set()
        # Who holds up others and cannot be missed.
        self._spared: int | None = None

    def look(self, now: float) -> None:
        """What is to be done though nobody says anything: of links that are lost, and of ranks that hold up others."""
        if self.stopped:
            return
        if self.is_ending:
            self._send_home()
            return
        lost = self._watch.links(now)
        if any(all(rank in self.members for rank in pair) for pair in lost):
            # Both are there: another epoch, in which they open it again.
            self._begin_epoch()
            return
        standing = {rank: member.standing for rank, member in self.members.items()}
        found = self._watch.sure(held_up(standing, self._matter(with_stream=False), self._missing), now)
        if found is None:
            return
        if found.rank is None:
            self._untie({rank: one.waits for rank, one in standing.items() if one.waits})
        else:
            self._cast_out([found.rank], f"it is stuck: rank {found.by} has waited too long for it")

    def has_stood_still(self, seconds: float, now: float) -> None:
        """For so long this coordinator heard nobody, whatever they said."""
        for member in self.members.values():
            member.heard = min(member.heard + seconds, now)
        self._watch.has_stood_still(seconds)

    def _cast_out(self, blamed: Sequence[int], why: str) -> None:
        """One who holds up the others is lost: the first of these who can be missed, since a wait is better than an end."""
        for rank in blamed:
            if self.ledger.way_back(self.members.keys() - {rank}, self.version).why is None:
                self.lose([rank], why)
                return
        if blamed and self._spared != blamed[0]:
            self._spared = blamed[0]
            self._note("stuck", rank=blamed[0], why=f"{why}; nobody has a copy of what it has")

    def _send_home(self) -> None:
        """Who waits for those who have left does so in vain."""
        for rank, member in self.members.items():
            if member.standing.waits and member.standing.is_long:
                why = f"training has ended, and rank {rank} waits for {member.standing.waits} of those who have left"
                member.channel.send({"kind": "stop", "why": why})

    def _untie(self, waits: dict[int, Header]) -> None:
        """Ranks wait for each other: another epoch, in which they do not."""
        why = "ranks wait for each other: " + "; ".join(f"rank {rank} for {of}" for rank, of in waits.items())
        self._note("stuck", why=why)
        if self._watch.knotted():
            self._stop(f"again and again {why}")
        else:
            self._begin_epoch()

    def _missing(self, waits: Header) -> Collection[int]:
        """For whom a wait for a word of this coordinator waits."""
        if "round" in waits and self.layout is not None:
            return self._rounds.missing(waits["round"], self.layout.grid.ranks)
        if waits.get("what") == "go" and self._target is not None:
            return [
                rank for rank in self._target.grid.ranks if rank in self.members and not self.members[rank].is_ready
            ]
        if waits.get("what") == "commit" and self.layout is not None:
            return [rank for rank in self._voters() if rank in self.members and self.members[rank].vote is None]
        return ()

    def hello(self, channel: Channel, header: Header) -> None:
        """One who wants to be a rank."""
        if channel.peer is not None:
            raise ValueError("a second hello")
        if self.layout is None and not self.members:
            # Of the first of those who are there, not of one who was.
            self.plans.signature = {}
        why = self._refusal(header)
        if why is not None:
            self._note("refused", why=why)
            channel.send({"kind": "refuse", "why": why})
            channel.close(after_sends=True)
            return
        is_forming, rank = self.layout is None, self._name_for(header.get("wish"))
        if not self.plans.signature:
            self.plans.signature = header["signature"]
            self.ledger.copies = int(header["signature"]["copies"])
        channel.peer = rank
        self.members[rank] = Seat(rank, channel, str(header["host"]), int(header["port"]), header, time.monotonic())
        channel.admit()
        channel.send({"kind": "welcome", "rank": rank, "micro_batches": self.plans.micro_batches})
        self._note("joined", rank=rank)
        if is_forming and len(self.members) == self.replicas * self.stages:
            self._form()
        elif not is_forming:
            self._joiners.append(rank)

    def _refusal(self, header: Header) -> str | None:
        if self.stopped is not None:
            return f"training has stopped: {self.stopped}"
        if self.is_ending:
            return "training has ended"
        whole = self.replicas * self.stages
        if self.layout is None and len(self.members) >= whole:
            return f"{whole} ranks are there already; one can join when training has begun"
        return (
            refusal(header, self.plans.signature or None, (self.replicas, self.stages))
            or self.plans.refusal(header["signature"])
            # Who comes later is given all of it.
            or (None if self.layout is not None else other_state(header, list(self.members.values())[:1]))
        )

    def _name_for(self, wish: Any) -> int:
        """Of a rank: as it wishes while all gather, a new one later."""
        if self.layout is None:
            return named(wish, self.members.keys(), self.replicas * self.stages)
        self._next_rank += 1
        return self._next_rank - 1

    def told(self, member: Seat, header: Header) -> None:
        """What a rank tells. Raises ValueError for what nobody tells."""
        kind = str(header.get("kind"))
        told = {
            "ready": self._ready,
            "vote": self._vote,
            "held": self._held,
            "suspect": self._suspect,
            "bad": self._bad,
            "fail": self._fail,
            "quit": self._quit,
            "leave": self._leave,
            "done": self._round,
            "slices": self._round,
            "manifest": self._round,
            "wrote": self._wrote,
            "beat": self._beat,
        }.get(kind)
        if told is None:
            raise ValueError(f"kind {kind!r}")
        told(member, header)

    def _beat(self, member: Seat, header: Header) -> None:
        told = Standing.heard(header.get("waits"), header.get("is_long"))
        # Who waits in an older epoch is called away from there.
        member.standing = told if self._is_of_now(header) or told.waits is None else Standing()
        member.channel.send({"kind": "beat"})

    def _ready(self, member: Seat, header: Header) -> None:
        if header["epoch"] != self.epoch or self._target is None:
            return
        member.is_ready = True
        self._holds_if_all_are_ready()

    def _vote(self, member: Seat, header: Header) -> None:
        if header["epoch"] != self.epoch or self._target is not None or header["step"] != self.version:
            return
        assert self.layout is not None
        self.plans.measured(header.get("costs", {}))
        member.vote = header
        ranks = self._voters()
        if not all((m := self.members.get(rank)) is not None and m.vote is not None for rank in ranks):
            return
        if self._has_other_batches():
            return
        try:
            loss = counted([self.members[rank] for rank in ranks])
        except InputError as error:
            # Of no rank's making: each would be blamed in turn for having told last.
            self._stop(f"step {self.version} cannot be made: {error}")
            return
        told: Header = {"kind": "commit", "epoch": self.epoch, "step": self.version, "loss": loss}
        self._watch.has_stepped(ranks)
        self._proved |= set(self.layout.grid.ranks)
        self._committed(told)

    def _has_other_batches(self) -> bool:
        """Whether votes are of unlike batches: ranks that differ from most are lost, and where there is no most training stops."""
        assert self.layout is not None
        found = other_batches([self.members[rank] for rank in self.layout.grid.ranks], self._proved)
        if found is None:
            self._stop(
                f"step {self.version} cannot be made: ranks have unlike batches for it; give all the same data and seed"
            )
            return True
        if found:
            self.lose(list(found), f"its batch of step {self.version} is not that of rank {next(iter(found.values()))}")
        return bool(found)

    def _held(self, member: Seat, header: Header) -> None:
        owner, version, epoch = (int(header[name]) for name in ("owner", "version", "layout"))
        self.ledger.heard(holder=member.rank, owner=owner, version=version, epoch=epoch)

    def _suspect(self, member: Seat, header: Header) -> None:
        accused = int(header["rank"])
        parts = self._matter(with_stream=True) & self.members.keys()
        if not self._is_of_now(header) or not {member.rank, accused} <= parts:
            return
        self._note("suspect", by=member.rank, accused=accused)
        # Its own connection will end in a moment if its process has. If not, all try anew.
        apart = () if self.layout is None else parts - set(self.layout.grid.ranks)
        blamed = self._watch.lost_link(member.rank, accused, time.monotonic(), apart=apart)
        self._cast_out(blamed, f"ranks {member.rank} and {accused} do not reach each other")

    def _bad(self, member: Seat, header: Header) -> None:
        owner = int(header["owner"])
        self._note("bad snapshot", owner=owner, holder=member.rank, why=header.get("why"))
        self.ledger.damaged(holder=member.rank, owner=owner)
        if self._is_of_now(header):
            self._begin_epoch()

    def _fail(self, member: Seat, header: Header) -> None:
        step, why = int(header["step"]), str(header["why"])
        self._note("failed", rank=member.rank, step=step, why=why)
        if why.startswith(PeerError.__name__):
            # What others did or did not do is no fault of the step.
            self.lose([member.rank], f"it failed: {why}")
            return
        # Others have the same samples then: what ends two of them so does not lie in one machine.
        failed, self._failed = self._failed, (step, why.partition(":")[0])
        if self._failed == failed:
            self._stop(f"step {step} ends one rank after another: rank {member.rank} failed: {why}")
        else:
            self.lose([member.rank], f"it failed: {why}")

    def _quit(self, member: Seat, header: Header) -> None:
        self.lose([member.rank], "it left before the end")

    def _leave(self, member: Seat, header: Header) -> None:
        del self.members[member.rank]
        member.channel.close(after_sends=True)
        self._note("left", rank=member.rank)
        # A rank leaves when training is done: who goes now is not missed, and who is not in yet waits in vain.
        self.is_ending = True
        inside = () if self.layout is None else self.layout.grid.ranks
        for rank, other in self.members.items():
            if rank not in inside:
                other.channel.send({"kind": "stop", "why": "training has ended"})

    def _round(self, member: Seat, header: Header) -> None:
        """A rank has done its part of what all do; what is told of an older epoch counts for nothing."""
        if self._is_of_now(header) and self.layout is not None:
            for rank, said in self._rounds.heard(member.rank, header, self.layout.grid.ranks).items():
                if rank in self.members:
                    self.members[rank].channel.send(said)

    def _wrote(self, member: Seat, header: Header) -> None:
        """The first rank has a checkpoint on disk that any number of ranks can read."""
        where, version, is_last = str(header["where"]), int(header["version"]), bool(header["is_last"])
        before = self._rounds.newest
        self._rounds.wrote(where, version)
        # The last one is told of when it is there, and again as that of the end.
        if self._rounds.newest != before:
            self._note("wrote", rank=member.rank, version=version, where=where)
        # Where ranks were lost meanwhile those who are left come to it again: some may not have what was learned yet.
        if is_last and self._is_of_now(header):
            # Nobody is missed from here on.
            self.is_ending = True
            self._tell({"kind": "finished", "where": where})
