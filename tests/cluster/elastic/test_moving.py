"""From one layout to another: every number comes to its new owner as it was, or it is told that it did not."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.cluster.elastic.layout import Grid, Layout
from anabranch.cluster.elastic.links import CalledAwayError, pack, unpack
from anabranch.cluster.elastic.moving import moved_state
from anabranch.cluster.elastic.state import PARAM, Slice, State, snapshot_of
from anabranch.errors import PeerError

SIZES = [7, 0, 5, 3]


class Post:
    """Links of several ranks in one process; ``spoil`` changes what is under a tag that begins so."""

    def __init__(self, spoil=None):
        self.there, self.mail, self.spoil = threading.Condition(), {}, spoil

    def of(self, rank):
        return _Links(self, rank)


class _Links:
    def __init__(self, post, rank):
        self.post, self.rank = post, rank

    def send(self, target, tag, tensors, **more):
        spec, body = pack(tensors)
        if self.post.spoil is not None and tag.startswith(self.post.spoil) and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        with self.post.there:
            self.post.mail[self.rank, target, tag] = (spec, body, more)
            self.post.there.notify_all()
        return len(body)

    def receive(self, source, tag):
        with self.post.there:
            assert self.post.there.wait_for(lambda: (source, self.rank, tag) in self.post.mail, 60), (
                source,
                self.rank,
                tag,
            )
            spec, body, more = self.post.mail.pop((source, self.rank, tag))
        return unpack(spec, body), more


def whole(layer):
    numbers = torch.arange(float(SIZES[layer])) + 100 * layer
    return Slice(0, SIZES[layer], {PARAM: numbers, "exp_avg": -numbers}, {"step": torch.tensor(3.0)})


def state_of(layout, rank):
    layers = layout.layers_of(rank)
    slices = {
        layer: whole(layer).piece(first, end)
        for layer in layers
        for owner, first, end in layout.slices(layer, SIZES[layer])
        if owner == rank
    }
    return State({layer: whole(layer).tensors[PARAM] for layer in layers}, slices)


def move(before, after, *, lost=(), spoil=None, damage=None):
    """(what each rank has then, errors) of all that are left, each in a thread."""
    post, found, errors = Post(spoil), {}, {}
    ranks = sorted({*before.grid.ranks, *after.grid.ranks} - set(lost))
    holders = {owner: before.holders(owner, 1) for owner in lost}
    damaged = []

    def run(rank):
        held = {
            (1, owner): {4: snapshot_of(state_of(before, owner).slices, 4)}
            for owner, kept in holders.items()
            if rank in kept
        }
        if rank == damage:
            held.clear()
        state = state_of(before, rank) if rank in before.grid.ranks else None
        try:
            found[rank] = moved_state(
                post.of(rank),
                rank,
                before,
                after,
                SIZES,
                state,
                4,
                held=held,
                layout_epoch=1,
                holders=holders,
                alive=ranks,
                damaged=lambda *told: damaged.append(told),
            )
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found, errors, damaged


def check(found, after):
    for rank in after.grid.ranks:
        expected, state = state_of(after, rank), found[rank].state
        assert state.slices.keys() == expected.slices.keys()
        for layer, own in expected.slices.items():
            mine = state.slices[layer]
            assert (mine.first, mine.end, mine.scalars) == (own.first, own.end, own.scalars)
            assert all(torch.equal(mine.tensors[name], value) for name, value in own.tensors.items())
        assert all(torch.equal(state.flat[layer], flat) for layer, flat in expected.flat.items())


BEFORE = Layout(Grid(((0, 1), (2, 3)), 2), (2,), 4)


def test_a_lost_rank_is_answered_for_by_its_neighbour():
    after = Layout(BEFORE.grid.without([1]), (2,), 4)
    found, errors, _ = move(BEFORE, after, lost=[1])
    assert not errors
    check(found, after)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_moves_comes_as_it_was(data):
    cut = st.integers(1, 3)
    before = Layout(BEFORE.grid, (data.draw(cut),), 4)
    lost = data.draw(st.sampled_from([(), (0,), (3,), (1, 2)]))
    grid = before.grid.without(lost)
    if data.draw(st.booleans()):
        grid = grid.with_rank(9)
    after = Layout(grid, (data.draw(cut),), 4)
    found, errors, _ = move(before, after, lost=lost)
    assert not errors
    check(found, after)


@pytest.mark.parametrize("spoil", ["m", "p"])
def test_a_piece_that_came_otherwise_than_it_was_sent_is_not_taken(spoil):
    """Also without a stream: slices with their state, and weights of layers that a stage did not have."""
    after = Layout(BEFORE.grid.without([1]).with_rank(9), (1,), 4)
    found, errors, _ = move(BEFORE, after, lost=[1], spoil=spoil)
    assert isinstance(errors[9], PeerError)
    assert "has another checksum here" in str(errors[9])
    assert 9 not in found


def test_a_snapshot_that_is_not_there_is_told_of_and_waited_for():
    after = Layout(BEFORE.grid.without([1]), (2,), 4)
    _, errors, damaged = move(BEFORE, after, lost=[1], damage=0)
    assert isinstance(errors[0], CalledAwayError)
    assert damaged == [(1, "there is none of version 4")]
