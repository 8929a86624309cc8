"""A rank among the others: which layout it acts on, what it has in it, and how it follows the coordinator from one to the next."""
# Shapes: N numbers of a layer

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from anabranch.cluster.elastic.clocks import StageClock
from anabranch.cluster.elastic.control import CALLS, Control
from anabranch.cluster.elastic.execution import StepSettings, Work
from anabranch.cluster.elastic.layout import Layout, layout_from
from anabranch.cluster.elastic.links import CalledAwayError, LinkPool
from anabranch.cluster.elastic.moving import Moved, moved_state
from anabranch.cluster.elastic.snapshots import Snapshots
from anabranch.cluster.elastic.state import PARAM, Slice, State, flat_of, install
from anabranch.cluster.elastic.streaming import Stream
from anabranch.cluster.elastic.updating import Updater
from anabranch.cluster.elastic.wire import Header
from anabranch.errors import PeerError

__all__ = ["Member"]


class Member:
    """One rank.

    Args:
        layers: of the whole model.
        sizes: numbers of each layer.
        updater: as all have it.
        links, control, snapshots: of this rank.
        loaded: each layer whole, where training goes on from a checkpoint.
        version: committed steps then.
        clock: of this rank's processor.
        probe: called with states of the protocol.
        on_change: called with what is told of every change.

    Attributes:
        settings: of steps; set before the first change.
        version: committed steps.
        states: by version, what this rank has: the committed one, and the one before until the newer is safe.
        work: what it does in the layout; None before the first.
        layout_epoch: of the layout that holds.
        stream: what travels while training goes on.
        recovery: of the last change, how long its parts took.
        plan: of the layout that holds.
    """

    settings: StepSettings

    def __init__(
        self,
        layers: Sequence[nn.Module],
        sizes: Sequence[int],
        updater: Updater,
        *,
        links: LinkPool,
        control: Control,
        snapshots: Snapshots,
        loaded: Mapping[int, Slice],
        version: int,
        clock: StageClock,
        probe: Callable[[str], None],
        on_change: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.layers, self.sizes, self.updater = list(layers), list(sizes), updater
        self.links, self.control, self.snapshots = links, control, snapshots
        self.version = version
        self.states: dict[int, State] = {}
        self.work: Work | None = None
        self.layout_epoch = 0
        self.stream: Stream | None = None
        self.recovery: dict[str, Any] = {}
        self.plan: dict[str, Any] | None = None
        self.clock = clock
        self._loaded = loaded
        self._probe, self._on_change = probe, on_change
        # Links opened and closed since the last layout.
        self._edited = (0, 0)

    @property
    def rank(self) -> int:
        """Its name."""
        return self.links.rank

    @property
    def layout(self) -> Layout:
        """That holds."""
        assert self.work is not None
        return self.work.layout

    @property
    def state(self) -> State:
        """Of the committed version."""
        return self.states[self.version]

    def commit(self, step: int, shadow: State) -> None:
        """The next version is what this rank has."""
        if step != self.version:
            raise PeerError(f"the coordinator committed step {step}, and this rank is at {self.version}")
        # The version before stays until snapshots of this one are with all neighbours, which the next vote says.
        self.states = {step: self.states[step], step + 1: shadow}
        self.version = step + 1
        for layer, flat in shadow.flat.items():
            install(self.layers[layer], flat)
        self.snapshots.send(self.links, self.layout_epoch, self.layout, shadow.slices, step + 1)
        if self.control.noticed_s is not None and self.recovery:
            now = time.monotonic()
            self.recovery["first_commit_s"] = now - self.recovery.pop("_going", now)
            self.recovery["total_s"] = now - self.control.noticed_s
            self.control.noticed_s = None

    def follow(self) -> None:
        """Do what the coordinator announced, until a layout holds. Raises UnrecoverableError and PeerError where it stopped."""
        control = self.control
        if control.noticed_s is None:
            control.noticed_s = time.monotonic()
        while True:
            control.raise_if_stopped()
            news = self._last_news()
            if news is None:
                # What this rank has is of no use, or what was said was not for it: the coordinator will say.
                control.wait_for_news((lambda: {"what": "epoch"}) if control.is_in else None)
            elif news["kind"] == "regroup":
                # Until all are there again, however long.
                control.wait_for_news(None)
            elif news["kind"] == "live":
                self._observe(news)
            else:
                try:
                    self._change(news)
                except CalledAwayError:
                    continue
                return

    def _last_news(self) -> Header | None:
        """What counts of what was said: the newest."""
        found = None
        with self.links.changed:
            while self.control.news:
                news = self.control.news.popleft()
                if news["kind"] in CALLS or (news["kind"] == "live" and self.work is None):
                    found = news
        return found

    def take_live_news(self) -> None:
        """Begin a stream that the coordinator announced at the last commit."""
        with self.links.changed:
            news = next((one for one in self.control.news if one["kind"] == "live"), None)
            if news is not None:
                self.control.news.remove(news)
        if news is not None:
            self.stream = self._stream_of(news)

    def _stream_of(self, news: Header) -> Stream:
        self.control.epoch = int(news["epoch"])
        self._edit(news)
        before, after = layout_from(news["before"]), layout_from(news["after"])
        return Stream(before, after, self.sizes, int(news["chunk"]), int(news["version"]), self.rank, self.updater)

    def _edit(self, news: Header) -> set[int]:
        """Links to those who are there; who that is."""
        members = {int(rank): (str(host), int(port)) for rank, (host, port) in news["members"].items()}
        opened, closed = self.links.edit(self.control.epoch, members)
        self._edited = (self._edited[0] + opened, self._edited[1] + closed)
        return set(members)

    def _observe(self, news: Header) -> None:
        """As one who comes: take what is sent, step by step, until all is there; then the coordinator announces the layout."""
        control = self.control
        try:
            stream = self._stream_of(news)
            for version in range(stream.start, stream.end):
                self._probe("observe")
                stream.take(self.links, version)
                control.tell("vote", epoch=control.epoch, step=version, loss=[])
                # Not whatever is said next: a layout is announced where a rank is lost before the commit.
                control.decided("commit")
            self.stream = stream
        except CalledAwayError:
            self.stream = None

    def _change(self, news: Header) -> None:
        """Take part in a change; CalledAwayError where another was announced, or this rank has no place in it yet."""
        start = time.monotonic()
        self._probe("epoch")
        self.control.epoch, base = int(news["epoch"]), int(news["version"])
        stream, self.stream = self.stream, None
        before = None if news["before"] is None else layout_from(news["before"])
        after = layout_from(news["after"])
        self._probe("links")
        if self.rank not in after.grid.ranks:
            # It waits to come in, and is told when; until then nobody needs a link to it.
            self.links.edit(self.control.epoch, {})
            raise CalledAwayError
        members = self._edit(news)
        edited = time.monotonic()
        self._probe("moves")
        moved = moved_state(
            self.links,
            self.rank,
            before,
            after,
            self.sizes,
            self._state_before(before, after, base),
            base,
            held=self.snapshots.held,
            layout_epoch=0 if before is None else self.layout_epoch,
            holders={int(rank): tuple(kept) for rank, kept in news["holders"].items()},
            alive=members,
            damaged=self.snapshots.tell_damaged,
            stream=stream,
        )
        assert moved.state is not None
        self.snapshots.send(self.links, self.control.epoch, after, moved.state.slices, base)
        self.snapshots.wait(self.rank, self.control.epoch, after, base)
        reshaped = time.monotonic()
        self._probe("ready")
        self.control.tell("ready", epoch=self.control.epoch)
        self.control.decided("go")
        self._probe("go")
        self._take(news, after, base, moved)
        self._note(news, moved, stream, start, edited, reshaped)
        if before is None:
            self.control.noticed_s = None
        if self._on_change is not None:
            told = {"epoch": self.control.epoch, "version": base, "layout": after, "plan": news["plan"]}
            lost = {int(rank): why for rank, why in news["lost"].items()}
            self._on_change(told | {"step_s": news["step_s"], "warnings": news["warnings"], "lost": lost})

    def _state_before(self, before: Layout | None, after: Layout, base: int) -> State | None:
        """What this rank has in the layout that was; None where it had no place in it."""
        if before is None:
            return self._first_state(after)
        if self.rank not in before.grid.ranks:
            return None
        if base not in self.states:
            raise PeerError(f"version {base} is asked for, and this rank has {sorted(self.states)}")
        return self.states[base]

    def _first_state(self, after: Layout) -> State:
        layers = after.layers_of(self.rank)
        flat = {layer: flat_of(self.layers[layer]) for layer in layers}
        slices = {}
        for layer in layers:
            for owner, first, end in after.slices(layer, self.sizes[layer]):
                if owner == self.rank:
                    own = Slice(first, end, {PARAM: flat[layer][first:end]})
                    slices[layer] = self._loaded[layer].piece(first, end) if self._loaded else own
        return State(flat, slices)

    def _take(self, news: Header, after: Layout, base: int, moved: Moved) -> None:
        """The new layout is what holds."""
        assert moved.state is not None
        self.layout_epoch, self.version = self.control.epoch, base
        self.states = {base: moved.state}
        self.snapshots.keep(self.links, self.layout_epoch)
        for layer, flat in moved.state.flat.items():
            install(self.layers[layer], flat)
        self.work = Work(after, self.rank, self.settings, str(news["schedule"]), news["costs"])
        self.plan = news["plan"]
        self.clock.follow(float(news["plan"]["stages"][self.work.stage]["frequency"]))
        self.control.is_in = True

    def _note(
        self, news: Header, moved: Moved, stream: Stream | None, start: float, edited: float, reshaped: float
    ) -> None:
        now, noticed = time.monotonic(), self.control.noticed_s
        assert noticed is not None
        opened, closed = self._edited
        self.recovery = {
            "epoch": self.control.epoch,
            "detect_s": news["detect_s"],
            "agree_s": start - noticed,
            "edit_s": edited - start,
            "reshard_s": reshaped - edited,
            "ready_s": now - reshaped,
            "links_opened": opened,
            "links_closed": closed,
            "links_kept": self.links.count - opened,
            "moved_bytes": moved.sent_bytes,
            "streamed": moved.streamed,
            "refused": moved.refused,
            "streamed_bytes": 0 if stream is None else stream.sent_bytes,
            "lost": news["lost"],
            "_going": now,
        }
        self._edited = (0, 0)
