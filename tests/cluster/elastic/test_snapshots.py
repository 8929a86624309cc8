"""What a rank keeps of its neighbours: verified, of two versions, and there before it is told of."""

import threading
from types import SimpleNamespace

import pytest
import torch

from anabranch.cluster.elastic.layout import Grid, Layout
from anabranch.cluster.elastic.snapshots import Snapshots
from anabranch.cluster.elastic.state import Slice, snapshot_of

LAYOUT = Layout(Grid.full(replicas=3, stages=1), (), 2)


class Words:
    """A control that keeps what is told, with what was held then, and waits for nothing."""

    def __init__(self):
        self.epoch, self.told, self.waits, self.snapshots = 4, [], [], None
        self.is_locked = lambda: False

    def tell(self, kind, **more):
        self.told.append((kind, more))
        if kind == "held":
            # Nobody here has seen it yet, so nothing that follows from it can be told before.
            assert self.is_locked()
            assert more["version"] in self.snapshots.held[more["layout"], more["owner"]]

    def wait_until(self, holds, of, *, is_called=False):
        self.waits.append((holds(), of()))


class Sent:
    """Links that keep what is sent."""

    def __init__(self, rank):
        self.rank, self.changed, self.sent = rank, threading.Condition(), []

    def send_packed(self, target, header, body):
        self.sent.append((target, header, body))


@pytest.fixture
def one():
    control, probed = Words(), []
    made = Snapshots(control, 1, probed.append)
    control.snapshots = made
    links = Sent(1)
    control.is_locked = links.changed._is_owned
    return SimpleNamespace(made=made, control=control, links=links, probed=probed)


def slices(at=0.0):
    return {0: Slice(0, 3, {"param": torch.arange(3.0) + at}, {"step": torch.tensor(2.0)})}


def frame(version, epoch=4, at=0.0):
    snapshot = snapshot_of(slices(at), version)
    layers = [list(layer) for layer in snapshot.layers]
    return {
        "kind": "snapshot",
        "layout": epoch,
        "version": version,
        "layers": layers,
        "digest": snapshot.digest,
    }, snapshot.body


def test_slices_go_to_those_who_keep_them_and_no_others(one):
    one.made.send(one.links, 4, LAYOUT, slices(), 7)
    (target,) = LAYOUT.holders(1, 1)
    assert one.links.sent == [(target, one.links.sent[0][1], frame(7)[1])]
    assert one.links.sent[0][1]["digest"] == frame(7)[0]["digest"]
    assert one.probed == ["snapshot"]


def test_what_came_is_there_when_it_is_told_of_and_is_what_was_sent(one):
    one.made.take(one.links, 0, *frame(7))
    assert one.control.told == [("held", {"owner": 0, "version": 7, "layout": 4})]
    kept = one.made.held[4, 0][7].slices()[0]
    assert kept.tensors["param"].tolist() == [0, 1, 2]
    assert kept.scalars["step"] == 2


def test_two_versions_are_kept_whatever_order_they_come_in(one):
    for version in (7, 9, 8):
        one.made.take(one.links, 0, *frame(version))
    assert sorted(one.made.held[4, 0]) == [8, 9]


def test_those_of_the_next_layout_stay_where_a_rank_is_late_with_one_before(one):
    """They were thrown away, and both ranks waited for each other for as long as a wait may last."""
    for epoch in (4, 5, 6):
        one.made.take(one.links, 0, *frame(1, epoch=epoch))
    one.made.keep(one.links, 5)
    assert sorted(one.made.held) == [(5, 0), (6, 0)]


def test_a_damaged_one_is_not_kept_and_told_of(one):
    header, body = frame(7)
    wrong = bytearray(body)
    wrong[5] ^= 1
    one.made.take(one.links, 0, header, bytes(wrong))
    ((kind, told),) = one.control.told
    assert (kind, told["owner"], told["epoch"]) == ("bad", 0, 4)
    assert "another checksum" in told["why"]
    assert one.made.held == {}


def test_a_wait_is_for_those_whose_snapshots_are_missing(one):
    (owner,) = [other for other in LAYOUT.grid.ranks if 1 in LAYOUT.holders(other, 1)]
    one.made.wait(1, 4, LAYOUT, 7)
    one.made.take(one.links, owner, *frame(7))
    one.made.wait(1, 4, LAYOUT, 7)
    assert one.control.waits == [(False, {"ranks": [owner]}), (True, {"ranks": []})]
