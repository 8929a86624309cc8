"""Which layout holds, which is announced, and how the one becomes the other: what a coordinator keeps of its training.

A layout is announced (an epoch), ranks make ready for it, and when all have it is the one that holds. A loss in between announces another
one, which begins from what holds. A layout to which pieces travel while training goes on (a *stream*) is announced when they are there.
What ranks tell, and what follows of it, is in `anabranch.cluster.elastic.decisions`.
"""

import time
from collections.abc import Callable, Sequence

from anabranch.cluster.elastic.layout import Grid, Layout, steps_of
from anabranch.cluster.elastic.ledger import Ledger, Way
from anabranch.cluster.elastic.planner import ElasticPlan
from anabranch.cluster.elastic.replanning import Replanner
from anabranch.cluster.elastic.rounds import Rounds
from anabranch.cluster.elastic.seats import Seat
from anabranch.cluster.elastic.waiting import Standing, Watch
from anabranch.cluster.elastic.wire import Channel, Header
from anabranch.cluster.elastic.words import another_layout, stream_to

__all__ = ["Epochs"]


class Epochs:
    """Of one training.

    Args:
        replicas, stages: D and P.
        plans: makes layouts.
        chunk: numbers of a piece that moves while training goes on, in one step; None where training stops for moves.
        note: called with what happens, and its details.
        patience_s: for so long two ranks try to open a link that is lost, before one of them is.

    Attributes:
        members: by rank, who is there.
        epoch: of the layout that is announced.
        layout, version, ledger: what holds: the last layout for which all were ready, its committed steps, who keeps whose snapshots in it.
        stopped: why training has stopped before its end.
        is_ending: whether training is done, so that nobody who goes is missed.
        cast_out: connections of ranks that were lost, which are told why.
    """

    def __init__(
        self,
        replicas: int,
        stages: int,
        plans: Replanner,
        chunk: int | None,
        note: Callable[..., None],
        *,
        patience_s: float = 0.0,
    ) -> None:
        self.replicas, self.stages, self.plans = replicas, stages, plans
        self.members: dict[int, Seat] = {}
        self.epoch = 0
        self.layout: Layout | None = None
        self.version = 0
        self.ledger = Ledger()
        self.stopped: str | None = None
        self.is_ending = False
        self.cast_out: list[Channel] = []
        self._chunk, self._note = chunk, note
        # What is announced, until all are ready; whether nobody is lost by it, so that what holds is as it was; and the epoch of that.
        self._target: Layout | None = None
        self._is_growth = False
        self._held_epoch = 0
        # The layout that pieces travel to while the other holds, and the version at which they are all there.
        self._stream: tuple[Layout, int] | None = None
        # Whether layers may have to move after a loss; and who waits to come in.
        self._replans = False
        self._joiners: list[int] = []
        # Of ranks that are gone, why.
        self._lost: dict[int, str] = {}
        self._watch, self._rounds = Watch(patience_s), Rounds(note)
        # Since the last announcement, how long a rank that was lost had not been heard.
        self._detect_s = 0.0

    # Who has a part in what

    def _is_of_now(self, header: Header) -> bool:
        """Whether what a rank tells is of the epoch that is announced; or of the one that holds, which growth leaves as it is."""
        return header.get("epoch") == self.epoch or (self._is_growth and header.get("epoch") == self._held_epoch)

    def _matter(self, *, with_stream: bool) -> set[int]:
        """Ranks of the layouts that hold, or are to."""
        layouts = (self.layout, self._target, self._stream[0] if self._stream is not None and with_stream else None)
        return {rank for layout in layouts if layout is not None for rank in layout.grid.ranks}

    def _voters(self) -> list[int]:
        """Who votes: those who take what travels too, so that they have it all when a stream ends."""
        assert self.layout is not None
        watching = () if self._stream is None else self._stream[0].grid.ranks
        return list(dict.fromkeys((*self.layout.grid.ranks, *watching)))

    # From one layout to the next

    def _form(self) -> None:
        self.version = int(next(iter(self.members.values())).hello["version"])
        self._begin_epoch()

    def _holds_if_all_are_ready(self) -> None:
        """What was announced is the layout that holds, once all of it have made ready."""
        assert self._target is not None
        wanted = set(self._target.grid.ranks)
        if not all(m.is_ready for m in self.members.values() if m.rank in wanted):
            return
        self.layout, self._target = self._target, None
        self._held_epoch, self._is_growth = self.epoch, False
        self.ledger.hold(self.layout, self.version)
        for other in self.members.values():
            other.vote = None
        self._note("go", epoch=self.epoch, version=self.version)
        self._tell({"kind": "go", "epoch": self.epoch})

    def _committed(self, told: Header) -> None:
        """A step is: ranks are told, and what begins or ends with it: pieces that travel, who waits to come in, layers that are to move."""
        assert self.layout is not None
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

    def lose(self, ranks: Sequence[int], why: str) -> None:
        """Ranks that are gone, and why."""
        lost = [self.members.pop(rank) for rank in ranks if rank in self.members]
        if not lost:
            return
        for member in lost:
            self._note("lost", rank=member.rank, why=why)
            self._lost[member.rank] = why
            self._detect_s = max(self._detect_s, time.monotonic() - member.heard)
            member.channel.peer = None
            # One that lives hears of it when it looks.
            member.channel.send({"kind": "stop", "why": f"the coordinator has cast this rank out: {why}"})
            member.channel.close("lost", after_sends=True)
            self.cast_out.append(member.channel)
            self._watch.forget(member.rank)
        self._joiners = [rank for rank in self._joiners if rank not in ranks]
        if self.stopped or self.is_ending or not self._matter(with_stream=True) & set(ranks):
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
        return stream_to(self.epoch, self.members, self.layout, target, version=self.version, chunk=chunk)

    def _begin_epoch(self, target: Layout | None = None) -> None:
        """Announce a layout: the target, or that of the ranks that are there with the layers where they are."""
        self.epoch += 1
        self._watch.has_epoch()
        before = self.layout
        if before is not None and target is None:
            self._put_off(before)
        self._stream = None
        way = self.ledger.way_back(self.members.keys(), self.version)
        if way.why is not None:
            last = self._rounds.newest or "there is none"
            self._stop(f"{way.why}{self._told_of_lost(before)}; the last checkpoint: {last}", is_lost=True)
            return
        if before is not None:
            self._replans = bool(way.holders)
        layout = self._layout_of(before) if target is None else target
        made = self.plans.planned(layout.grid, layout.bounds, moves_layers=False)
        self._target, self._is_growth = layout, before is not None and target is not None
        self.ledger.announce(self.epoch)
        for member in self.members.values():
            member.is_ready, member.vote, member.standing = False, None, Standing()
        # What was told in an epoch is dropped with it: whoever was called away from something tells it again.
        self._rounds.has_epoch()
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
        layout = made.layout
        detect_s, self._detect_s = self._detect_s, 0.0
        self._note(
            "epoch",
            epoch=self.epoch,
            version=self.version,
            floor=self.ledger.floor,
            stages=[list(stage) for stage in layout.grid.stages],
            bounds=list(layout.bounds),
            warnings=list(made.warnings),
        )
        self._tell(
            another_layout(
                self.epoch,
                self.members,
                before,
                made,
                way,
                costs=self.plans.layer_costs,
                lost=self._lost,
                detect_s=detect_s,
                is_growth=self._is_growth,
            )
        )

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
