"""What a coordinator decides, without sockets, threads and clocks of its own: words of ranks go in, words to ranks come out.

`anabranch.cluster.elastic.coordinator` says how a step is committed and what an epoch is. All is called with its lock held.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from anabranch.cluster.elastic.layout import Grid, Layout, layout_to, steps_of
from anabranch.cluster.elastic.ledger import Ledger, Way
from anabranch.cluster.elastic.planner import ElasticPlan
from anabranch.cluster.elastic.replanning import Replanner
from anabranch.cluster.elastic.seats import Checkpoints, Seat, counted, refusal
from anabranch.cluster.elastic.wire import Channel, Header

__all__ = ["BEAT_S", "Decisions"]

BEAT_S = 0.5
# How often two ranks that lose their link may open it again.
_MOST_TRIES = 3


class Decisions:
    """Of one training.

    Args:
        replicas, stages: D and P.
        plans: makes layouts.
        chunk: numbers of a piece that moves while training goes on, in one step; None where training stops for moves.
        note: called with what happens, and its details.

    Attributes:
        members: by rank, who is there.
        epoch: of the layout that is announced.
        layout, version, ledger: what holds: the last layout for which all were ready, its committed steps, who keeps whose snapshots in it.
        stopped: why training has stopped before its end.
        is_ending: whether training is done, so that nobody who goes is missed.
    """

    def __init__(
        self, replicas: int, stages: int, plans: Replanner, chunk: int | None, note: Callable[..., None]
    ) -> None:
        self.replicas, self.stages, self.plans = replicas, stages, plans
        self.members: dict[int, Seat] = {}
        self.epoch = 0
        self.layout: Layout | None = None
        self.version = 0
        self.ledger = Ledger()
        self.stopped: str | None = None
        self.is_ending = False
        self._chunk, self._note = chunk, note
        self._next_rank = replicas * stages
        # What is announced, until all are ready.
        self._target: Layout | None = None
        # The layout that pieces travel to while the other holds, and the version at which they are all there.
        self._stream: tuple[Layout, int] | None = None
        # Whether layers may have to move after a loss; and who waits to come in.
        self._replans = False
        self._joiners: list[int] = []
        # Of ranks that are gone, why; and the step and the kind of error by which the last one ended.
        self._lost: dict[int, str] = {}
        self._failed: tuple[int, str] | None = None
        # Of two ranks, how often they have lost their link; and since when one of them says so.
        self._suspects: dict[tuple[int, int], int] = {}
        self._doubts: dict[tuple[int, int], float] = {}
        self._checkpoints = Checkpoints()

    def try_anew(self, now: float) -> None:
        """Where two ranks that are both there have lost their link: another epoch, in which it is opened again."""
        pairs = [pair for pair, since in self._doubts.items() if now - since >= BEAT_S]
        if not pairs:
            return
        self._doubts = {pair: since for pair, since in self._doubts.items() if pair not in pairs}
        is_on = self.layout is not None and not (self.stopped or self.is_ending)
        if is_on and any(all(rank in self.members for rank in pair) for pair in pairs):
            self._begin_epoch()

    def hello(self, channel: Channel, header: Header) -> None:
        """One who wants to be a rank."""
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
        return refusal(header, self.plans.signature or None, (self.replicas, self.stages))

    def _name_for(self, wish: Any) -> int:
        """Of a rank: as it wishes while all gather, a new one later."""
        whole = self.replicas * self.stages
        if self.layout is not None:
            self._next_rank += 1
            return self._next_rank - 1
        is_free = isinstance(wish, int) and 0 <= wish < whole and wish not in self.members
        return int(wish) if is_free else min(set(range(whole)) - self.members.keys())

    def told(self, member: Seat, header: Header) -> None:
        """What a rank tells. Raises ValueError for what nobody tells."""
        kind = str(header.get("kind"))
        told = {
            "ready": self._ready, "vote": self._vote, "held": self._held, "suspect": self._suspect, "bad": self._bad,
            "fail": self._fail, "quit": self._quit, "leave": self._leave, "saved": self._save, "wrote": self._wrote,
            "beat": lambda member, header: None,
        }.get(kind)  # fmt: skip
        if told is None:
            raise ValueError(f"kind {kind!r}")
        told(member, header)

    def _ready(self, member: Seat, header: Header) -> None:
        if header["epoch"] != self.epoch or self._target is None:
            return
        member.is_ready = True
        wanted = set(self._target.grid.ranks)
        if all(m.is_ready for m in self.members.values() if m.rank in wanted):
            self.layout, self._target = self._target, None
            self.ledger.hold(self.layout, self.version)
            for other in self.members.values():
                other.vote = None
            self._note("go", epoch=self.epoch, version=self.version)
            self._tell({"kind": "go", "epoch": self.epoch})

    def _vote(self, member: Seat, header: Header) -> None:
        if header["epoch"] != self.epoch or self._target is not None or header["step"] != self.version:
            return
        assert self.layout is not None
        member.vote = header
        self.plans.measured(header.get("costs", {}))
        # Those who take what travels vote too: when a stream ends they have it all.
        watching = () if self._stream is None else self._stream[0].grid.ranks
        ranks = dict.fromkeys((*self.layout.grid.ranks, *watching))
        if not all((m := self.members.get(rank)) is not None and m.vote is not None for rank in ranks):
            return
        told: Header = {
            "kind": "commit",
            "epoch": self.epoch,
            "step": self.version,
            "loss": counted([self.members[rank] for rank in ranks]),
        }
        self.version += 1
        if self._stream is not None:
            self._tell(told)
            if self.version == self._stream[1]:
                self._begin_epoch(self._stream[0])
            return
        joins = [rank for rank in self._joiners if rank in self.members]
        target = None
        if joins or self._replans:
            self._joiners, self._replans = [], False
            target = self.plans.grown(self.layout, joins)
            if target is not None and self._chunk is not None:
                # In the same message: all begin with the same step.
                told["live"] = self._begin_stream(target, self._chunk)
        self._tell(told)
        if target is not None and self._chunk is None:
            self._begin_epoch(target)

    def _held(self, member: Seat, header: Header) -> None:
        owner, version, epoch = (int(header[name]) for name in ("owner", "version", "layout"))
        self.ledger.heard(holder=member.rank, owner=owner, version=version, epoch=epoch)

    def _suspect(self, member: Seat, header: Header) -> None:
        accused = int(header["rank"])
        if header["epoch"] != self.epoch or accused not in self.members:
            return
        pair = (min(member.rank, accused), max(member.rank, accused))
        self._suspects[pair] = self._suspects.get(pair, 0) + 1
        self._note("suspect", by=member.rank, accused=accused)
        if self._suspects[pair] > _MOST_TRIES:
            self.lose([accused], f"rank {member.rank} does not reach it")
        else:
            # Its own connection will end in a moment if its process has. If not, all try anew.
            self._doubts[pair] = time.monotonic()

    def _bad(self, member: Seat, header: Header) -> None:
        owner = int(header["owner"])
        self._note("bad snapshot", owner=owner, holder=member.rank, why=header.get("why"))
        self.ledger.damaged(holder=member.rank, owner=owner)
        if header["epoch"] == self.epoch:
            self._begin_epoch()

    def _fail(self, member: Seat, header: Header) -> None:
        step, why = int(header["step"]), str(header["why"])
        self._note("failed", rank=member.rank, step=step, why=why)
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
        # A rank leaves when training is done: who goes now is not missed, and who waits to join waits in vain.
        self.is_ending = True
        for rank in self._joiners:
            if rank in self.members:
                self.members[rank].channel.send({"kind": "stop", "why": "training has ended"})

    def _save(self, member: Seat, header: Header) -> None:
        assert self.layout is not None
        told = self._checkpoints.saved(member.rank, header, self.layout.grid.ranks)
        if told is not None:
            self._note("saved", version=told["version"], why=told.get("why"))
            self._tell(told)

    def _wrote(self, member: Seat, header: Header) -> None:
        """The first rank has a checkpoint on disk that any number of ranks can read."""
        where, version = str(header["where"]), int(header["version"])
        self._checkpoints.wrote(where, version)
        self._note("wrote", rank=member.rank, version=version, where=where)
        if header["is_last"]:
            # Nobody is missed from here on.
            self.is_ending = True
            self._tell({"kind": "finished", "where": where})

    # What follows

    def _form(self) -> None:
        first = next(iter(self.members.values()))
        for member in self.members.values():
            if member.hello["weights"] != first.hello["weights"]:
                self._stop(
                    f"rank {member.rank} begins with other weights than rank {first.rank}; give all the same seed, or the same checkpoint"
                )
                return
        self.version = int(first.hello["version"])
        self._begin_epoch()

    def lose(self, ranks: Sequence[int], why: str) -> None:
        """Ranks that are gone, and why."""
        lost = [self.members.pop(rank) for rank in ranks if rank in self.members]
        if not lost:
            return
        for member in lost:
            self._note("lost", rank=member.rank, why=why)
            self._lost[member.rank] = why
            member.channel.peer = None
            member.channel.close("lost")
        self._joiners = [rank for rank in self._joiners if rank not in ranks]
        layouts = (self.layout, self._target, None if self._stream is None else self._stream[0])
        matters = {rank for layout in layouts if layout is not None for rank in layout.grid.ranks}
        if self.stopped or self.is_ending or not matters & set(ranks):
            return
        if self.layout is not None:
            self._begin_epoch()
            return
        # Training has not begun: the others wait for one in its place.
        self._target = None
        self._tell({"kind": "regroup"})

    def _begin_stream(self, target: Layout, chunk: int) -> Header:
        """Pieces begin to travel to a layout; what ranks are told of it."""
        assert self.layout is not None
        end = self.version + steps_of(self.layout, target, self.plans.sizes, chunk)
        self._stream = (target, end)
        self._note("stream", version=self.version, end=end, bounds=list(target.bounds))
        return {
            "kind": "live",
            "epoch": self.epoch,
            "version": self.version,
            "chunk": chunk,
            "before": layout_to(self.layout),
            "after": layout_to(target),
            "members": self._addresses(),
        }

    def _begin_epoch(self, target: Layout | None = None) -> None:
        """Announce a layout: the target, or that of the ranks that are there with the layers where they are."""
        self.epoch += 1
        self._doubts.clear()
        before = self.layout
        if before is not None and target is None:
            self._put_off(before)
        self._stream = None
        way = self.ledger.way_back(self.members.keys(), self.version)
        if way.why is not None:
            last = self._checkpoints.newest or "there is none"
            self._stop(f"{way.why}{self._told_of_lost(before)}; the last checkpoint: {last}", is_lost=True)
            return
        if before is not None:
            self._replans = bool(way.holders)
        layout = self._layout_of(before) if target is None else target
        made = self.plans.planned(layout.grid, layout.bounds, moves_layers=False)
        self._target = layout
        self.ledger.announce(self.epoch)
        for member in self.members.values():
            member.is_ready, member.vote = False, None
        self.version = way.version
        self._announce(before, made, way)

    def _put_off(self, before: Layout) -> None:
        """Who was to come in by what has failed comes after the next commit."""
        waiting = (self._target, None if self._stream is None else self._stream[0])
        coming = {rank for layout in waiting if layout is not None for rank in layout.grid.ranks}
        late = (coming - set(before.grid.ranks)) & self.members.keys()
        self._joiners += sorted(late - set(self._joiners))

    def _layout_of(self, before: Layout | None) -> Layout:
        """Of the ranks that are there, with the layers where they are."""
        if before is None:
            grid, cut = Grid.full(replicas=self.replicas, stages=self.stages), None
        else:
            dead = [rank for rank in before.grid.ranks if rank not in self.members]
            grid, cut = before.grid.without(dead).healed(), before.bounds
        return self.plans.planned(grid, cut, moves_layers=False).layout

    def _announce(self, before: Layout | None, made: ElasticPlan, way: Way) -> None:
        layout, warnings = made.layout, list(made.warnings)
        self._note(
            "epoch", epoch=self.epoch, version=self.version, floor=self.ledger.floor,
            stages=[list(stage) for stage in layout.grid.stages], bounds=list(layout.bounds), warnings=warnings,
        )  # fmt: skip
        self._tell(
            {
                "kind": "epoch",
                "epoch": self.epoch,
                "version": self.version,
                "before": None if before is None else layout_to(before),
                "after": layout_to(layout),
                "schedule": made.schedule_name,
                "costs": self.plans.layer_costs,
                "holders": {str(owner): list(holders) for owner, holders in way.holders.items()},
                "lost": {str(rank): self._lost.get(rank, "") for rank in way.holders},
                "members": self._addresses(),
                "step_s": made.step_s,
                "warnings": warnings,
            }
        )

    def _addresses(self) -> dict[str, list[Any]]:
        return {str(member.rank): [member.host, member.port] for member in self.members.values()}

    def _told_of_lost(self, before: Layout | None) -> str:
        """Why those of a layout are lost who ended by an error."""
        ranks = () if before is None else before.grid.ranks
        failed = [f"rank {rank}: {self._lost[rank]}" for rank in ranks if "failed" in self._lost.get(rank, "")]
        return f" ({'; '.join(failed)})" if failed else ""

    def _stop(self, why: str, *, is_lost: bool = False) -> None:
        if self.stopped is None:
            self.stopped = why
            self._note("stopped", why=why)
            self._tell({"kind": "stop", "why": why, "is_lost": is_lost})

    def _tell(self, header: Header) -> None:
        for member in self.members.values():
            member.channel.send(header)
