"""A rank among others: how it comes into a layout, what it has of versions, and whom a newcomer listens to."""

import threading
import time

import pytest
import torch
from torch import nn

from anabranch.cluster.elastic.clocks import SimulatedFrequency, StageClock
from anabranch.cluster.elastic.control import Control
from anabranch.cluster.elastic.execution import StepSettings
from anabranch.cluster.elastic.layout import Grid, Layout, layout_to
from anabranch.cluster.elastic.links import LinkPool
from anabranch.cluster.elastic.member import Member
from anabranch.cluster.elastic.snapshots import Snapshots
from anabranch.cluster.elastic.state import Slice, State, flat_of, learning
from anabranch.cluster.elastic.streaming import Stream
from anabranch.cluster.elastic.updating import Updater
from anabranch.errors import PeerError
from waiting import until

SIZES = [20, 15]


class Words(Control):
    """A control without a connection: what is told is kept, and answered by a test."""

    def __init__(self, changed):
        super().__init__(changed, timeout_s=30.0)
        self.told, self.on_tell = [], lambda kind: None

    def tell(self, kind, **more):
        self.told.append((kind, more))
        self.on_tell(kind)

    def hear(self, kind, **more):
        self._on_frame(None, {"kind": kind, **more}, b"")


class One:
    """A rank with links, and no steps."""

    def __init__(self, rank, **more):
        torch.manual_seed(0)
        self.layers = [nn.Linear(4, 4), nn.Linear(4, 3)]
        assert [sum(p.numel() for p in learning(layer)) for layer in self.layers] == SIZES
        self.states, self.changes = [], []
        self.links = LinkPool(
            "127.0.0.1",
            b"s",
            on_snapshot=lambda *told: self.snapshots.take(self.links, *told),
            interrupted=lambda: self.control.is_called(),
            suspect=lambda rank: None,
            timeout_s=120.0,
        )
        self.links.rank = rank
        self.control = Words(self.links.changed)
        self.snapshots = Snapshots(self.control, 0, self.states.append)
        self.updater = Updater(torch.optim.AdamW)
        self.member = Member(
            self.layers,
            SIZES,
            self.updater,
            links=self.links,
            control=self.control,
            snapshots=self.snapshots,
            probe=self.states.append,
            on_change=self.changes.append,
            **{"loaded": {}, "version": 0, "clock": StageClock(None), **more},
        )
        self.member.settings = StepSettings(4, 2, 1, True, None, 0, (False, False))

    def epoch(self, number, after, before=None, *, pools=(), version=0, lost=(), frequency=1.0):
        members = {str(one.links.rank): ["127.0.0.1", one.links.port] for one in (self, *pools)}
        self.control.hear(
            "epoch",
            epoch=number,
            version=version,
            before=None if before is None else layout_to(before),
            after=layout_to(after),
            schedule="1f1b",
            costs=[1.0, 1.0],
            holders={str(rank): [] for rank in lost},
            lost={str(rank): "gone" for rank in lost},
            members=members,
            plan={"step_s": 1.0, "stages": [{"frequency": frequency}]},
            detect_s=0.25,
            step_s=1.0,
            warnings=[],
        )

    def goes(self, number):
        """As soon as it is ready all are."""
        self.control.on_tell = lambda kind: self.control.hear("go", epoch=number) if kind == "ready" else None


@pytest.fixture
def make():
    made = []

    def one(rank, **more):
        made.append(One(rank, **more))
        return made[-1]

    yield one
    for each in made:
        each.links.close()


ALONE = Layout(Grid(((0,),), 1), (), 2)


def test_a_rank_comes_into_its_first_layout(make):
    one = make(0)
    one.goes(1)
    one.epoch(1, ALONE)
    one.member.follow()
    assert one.control.is_in
    assert (one.member.version, one.member.layout, one.member.layout_epoch) == (0, ALONE, 1)
    assert torch.equal(one.member.state.flat[0], flat_of(one.layers[0]))
    assert one.states == ["epoch", "links", "moves", "snapshot", "ready", "go"]
    plan = {"step_s": 1.0, "stages": [{"frequency": 1.0}]}
    assert one.member.plan == plan
    (change,) = one.changes
    assert (change["layout"], change["version"], change["plan"], change["lost"]) == (ALONE, 0, plan, {})
    assert one.member.recovery["detect_s"] == 0.25


def test_its_clock_follows_the_plan_of_each_layout(make):
    control = SimulatedFrequency()
    one = make(0, clock=StageClock(control))
    for number, frequency, mhz in ((1, 1.2, 1200), (2, 0.7, 700), (3, 1.0, 1000)):
        one.goes(number)
        one.epoch(number, ALONE, None if number == 1 else ALONE, frequency=frequency)
        one.member.follow()
        assert control.get() == mhz


def test_what_was_loaded_is_what_it_begins_with(make):
    loaded = {
        n: Slice(0, size, {"param": torch.zeros(size), "exp_avg": torch.ones(size)}) for n, size in enumerate(SIZES)
    }
    one = make(0, loaded=loaded, version=7)
    one.goes(1)
    one.epoch(1, ALONE, version=7)
    one.member.follow()
    assert one.member.version == 7
    assert one.member.state.slices[1].tensors["exp_avg"].tolist() == [1.0] * 15


def test_the_version_before_stays_until_the_next(make):
    one = make(0)
    one.goes(1)
    one.epoch(1, ALONE)
    one.member.follow()
    for step in range(2):
        before = one.member.state
        flat = {n: value + 1 for n, value in before.flat.items()}
        one.member.commit(step, State(flat, before.slices))
        assert sorted(one.member.states) == [step, step + 1]
        assert torch.equal(flat_of(one.layers[0]), flat[0])
    with pytest.raises(PeerError, match="committed step 7, and this rank is at 2"):
        one.member.commit(7, before)
    # Taken back, and no further than what is here.
    one.goes(2)
    one.epoch(2, ALONE, ALONE, version=1)
    one.member.follow()
    assert one.member.version == 1
    assert torch.equal(flat_of(one.layers[0]), before.flat[0])
    one.epoch(3, ALONE, ALONE, version=0)
    with pytest.raises(PeerError, match=r"version 0 is asked for, and this rank has \[1\]"):
        one.member.follow()


def test_of_two_layouts_the_newer_one_counts(make):
    one = make(0)
    one.goes(2)
    one.epoch(1, Layout(Grid(((0, 9),), 2), (), 2))
    one.epoch(2, ALONE)
    one.member.follow()
    assert one.member.layout == ALONE


def test_a_layout_that_held_for_a_moment_is_where_the_next_one_begins(make):
    """A newcomer ends right after it was ready: what it was to have is with those who took that layout."""
    one = make(0)
    one.goes(1)
    one.epoch(1, ALONE)
    one.member.follow()

    def ready(kind):
        if kind == "ready" and one.control.epoch == 2:
            one.control.hear("go", epoch=2)
            one.epoch(3, ALONE, ALONE)
        elif kind == "ready":
            one.control.hear("go", epoch=3)

    one.control.on_tell = ready
    one.epoch(2, ALONE, ALONE)
    one.member.follow()
    assert (one.member.layout_epoch, one.control.is_called()) == (2, True)
    one.member.follow()
    assert (one.member.layout_epoch, one.control.is_called()) == (3, False)


def test_a_newcomer_takes_no_layout_for_a_commit_and_waits_for_its_turn(make):
    """A rank is lost while it waits for the commit of a step: it went on as if that was the commit, and held up all."""
    first, new = make(0), make(1)
    after = Layout(Grid(((0, 1),), 2), (), 2)
    members = {str(one.links.rank): ["127.0.0.1", one.links.port] for one in (first, new)}
    words = {
        "epoch": 5,
        "version": 3,
        "chunk": 4,
        "before": layout_to(ALONE),
        "after": layout_to(after),
        "members": members,
    }
    with new.links.changed:
        new.control.hear("commit", epoch=5, step=2, loss={}, live={"kind": "live", **words})
    found = []

    def follow():
        try:
            new.member.follow()
        except PeerError as error:
            found.append(str(error))

    thread = threading.Thread(target=follow)
    thread.start()
    first.links.edit(5, {0: ("127.0.0.1", first.links.port), 1: ("127.0.0.1", new.links.port)})
    slices = {n: Slice(0, size, {"param": torch.arange(float(size))}) for n, size in enumerate(SIZES)}
    stream = Stream(ALONE, after, SIZES, 4, 3, 0, first.updater)
    gradients = {n: torch.ones(size) for n, size in enumerate(SIZES)}

    def step(version):
        nonlocal slices
        stream.send_chunks(first.links, slices, version)
        stream.send_gradients(first.links, slices, gradients, version)
        slices = first.updater.next_slices(slices, gradients, version)
        until(lambda: ("vote", version) in [(kind, more.get("step")) for kind, more in new.control.told])

    step(3)
    new.control.hear("commit", epoch=5, step=3, loss={})
    step(4)
    # In place of the commit another layout, without the newcomer, to which it has links all the same.
    new.epoch(6, ALONE, ALONE, pools=[first], version=4)
    until(lambda: new.control.epoch == 6)
    time.sleep(0.05)
    assert [more["step"] for kind, more in new.control.told if kind == "vote"] == [3, 4]
    assert "observe" in new.states
    assert thread.is_alive()
    new.control.hear("stop", why="training has ended")
    thread.join(60)
    assert found == ["training has ended"]
