"""Peers that vanish at any moment: whoever is left comes to one end, with buffers as they were, and goes on.

A schedule is a seed: how many peers there are, which die, and each of them before which of its own messages. The same seed dies at the same
places. ``-m slow`` runs 200 of them.
"""

import random
import threading
import time

import pytest
import torch

from anabranch.cluster.pccl import Kicked, PeerLost, SharedState, TopologyFailed
from pccl_peers import BOUND_S, Killed, Peer, a_master, together
from waiting import until

# All that a peer is about to do when a schedule may end it, in an order of first appearance.
MOMENTS = (
    "join",
    "links",
    "established",
    "pending",
    "accept",
    "sync",
    "fetch",
    "synced",
    "initiate",
    "ring",
    "complete",
    "optimize",
    "measure",
    "measured",
)


@pytest.fixture(scope="module")
def master():
    with a_master() as found:
        yield found


class Doom:
    """Ends its peer before the ``count``-th time that it is about to do ``moment``."""

    def __init__(self, moment, count):
        self.moment, self.left, self.has_struck = moment, count, False

    def __call__(self, name):
        if name == self.moment:
            self.left -= 1
            if self.left <= 0:
                self.has_struck = True
                raise Killed


def steps(count, optimises=()):
    """A training that goes on with whoever is left: what each peer saw is compared afterwards."""

    def work(number, peers):
        # Where all have left, whoever comes later begins another run, which has nothing to do with theirs.
        state = SharedState({"w": torch.zeros(257), "begun": torch.tensor([time.monotonic_ns()])})
        if number < 100:
            # Those who begin together begin with the same.
            state.tensors["w"] += 1
        log = []
        while state.revision < count:
            try:
                peers.admit()
            except TopologyFailed:
                continue
            state.revision += 1
            try:
                peers.sync_shared_state(state)
            except PeerLost:
                state.revision -= 1
                continue
            log.append(((int(state.tensors["begun"]), state.revision), state.digest()))
            # By what all know: a newcomer had another revision before.
            while state.revision in optimises:
                try:
                    peers.optimize_topology(seconds=0.01, streams=1)
                    break
                except TopologyFailed:
                    continue
            gradient = torch.full((257,), 0.25) + state.tensors["w"] / 8
            before = gradient.clone()
            for _ in range(20):
                try:
                    peers.all_reduce(gradient, op="avg")
                    break
                except PeerLost:
                    assert torch.equal(gradient, before), "an abort left its traces"
            else:
                raise AssertionError("20 tries, and no reduction")
            state.tensors["w"] += gradient
        return log

    return work


def run_schedule(address, seed):
    """Peers by seed; returns what survivors saw."""
    generator = random.Random(seed)
    world = generator.randint(2, 4)
    dooms = {
        number: Doom(generator.choice(MOMENTS), generator.randint(1, 3))
        for number in range(world)
        if number and generator.random() < 0.7
    }
    work = steps(6, optimises=(2,) if generator.random() < 0.5 else ())
    peers = [
        Peer(address, work, number, 1, before=dooms.get(number, lambda name: None), pool=1) for number in range(world)
    ]
    # A newcomer while others may be dying.
    fate = Doom(generator.choice(MOMENTS), generator.randint(1, 4)) if generator.random() < 0.5 else lambda name: None
    late = Peer(address, work, 100, 1, before=fate)
    for peer in (*peers, late):
        peer.wait()
    survivors = [peer for peer in (*peers, late) if not peer.is_killed]
    if all("nobody who is left has the shared state" in str(peer.error) for peer in survivors):
        # All who had shared it are dead, and newcomers do not begin anew in silence.
        return []
    for peer in survivors:
        if peer.error is not None:
            raise AssertionError(f"seed {seed}: peer {peer.number} failed: {peer.error!r}") from peer.error
    return survivors


def check_equal(survivors, seed):
    seen = {}
    for peer in survivors:
        for revision, digest in peer.value:
            assert seen.setdefault(revision, digest) == digest, (
                f"seed {seed}: revision {revision} differs between peers"
            )


@pytest.mark.parametrize("seed", range(12))
def test_whoever_dies_the_others_go_on_with_the_same_bits(master, seed):
    check_equal(run_schedule(master.address, seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_200_schedules(master, seed):
    check_equal(run_schedule(master.address, seed), seed)


@pytest.mark.parametrize("moment", MOMENTS)
def test_at_each_moment(master, moment):
    """Of three, one dies at this moment; the other two end with the same."""
    doom = Doom(moment, 2 if moment in ("links", "established") else 1)
    work = steps(4, optimises=(1,))
    peers = [
        Peer(master.address, work, number, 1, before=doom if number == 2 else lambda name: None) for number in range(3)
    ]
    for peer in peers:
        peer.wait()
    assert [peer.error for peer in peers[:2]] == [None, None]
    assert peers[2].is_killed == doom.has_struck
    check_equal(peers[:2], moment)


def test_survivors_hear_of_it_and_have_their_buffers_back(master):
    def work(number, peers):
        if number == 2:
            peers._before = Doom("ring", 1)
        value, recv = torch.arange(9.0) + number, torch.full((9,), 7.0)
        with pytest.raises(PeerLost) as told:
            peers.all_reduce(value, recv)
        assert told.value.retryable
        kept = (torch.equal(value, torch.arange(9.0) + number), recv.tolist() == [7.0] * 9)
        assert peers.group_size == 2
        peers.all_reduce(value, recv)
        return kept, recv[0].item()

    peers = [Peer(master.address, work, number, 3) for number in range(3)]
    found = [peer.wait().value for peer in peers]
    assert [peer.error for peer in peers] == [None] * 3
    assert found[:2] == [((True, True), 1.0)] * 2


def test_the_last_one_is_alone_and_told_so(master):
    def work(number, peers):
        if number:
            peers._before = Doom("complete", 1)
        with pytest.raises(PeerLost):
            peers.all_reduce(torch.ones(2))
        value = torch.ones(2)
        return peers.all_reduce(value), value.tolist()

    peers = [Peer(master.address, work, number, 2) for number in range(2)]
    told, value = peers[0].wait().value
    assert (told.world, told.alone, value) == (1, True, [1.0, 1.0])
    peers[1].wait()


def test_of_many_at_a_time_those_that_failed_are_tried_again(master):
    from anabranch.cluster.pccl import Reduction

    def work(number, peers):
        if number == 2:
            peers._before = Doom("ring", 3)
        values = [torch.full((100,), float(10 * number + tag)) for tag in range(8)]
        told = peers.all_reduce_many([Reduction(value, tag=tag) for tag, value in enumerate(values)], max_in_flight=4)
        return [one.world for one in told], [value[0].item() for value in values]

    peers = [Peer(master.address, work, number, 3, pool=2) for number in range(3)]
    first, second = (peer.wait().value for peer in peers[:2])
    peers[2].wait()
    assert first == second
    worlds, values = first
    for tag, (world, value) in enumerate(zip(worlds, values, strict=True)):
        assert value == {3: 30.0 + 3 * tag, 2: 10.0 + 2 * tag}[world]
    assert 2 in worlds


def test_a_peer_that_hangs_is_dropped_and_told_when_it_wakes(master):
    """Its process is stopped, not ended: connections stay open, and nothing comes."""
    woken = threading.Event()

    def begin(number, peers):
        peers.all_reduce(torch.ones(1))
        if number == 0:
            # The vote stays open until the other is dropped; then the first is alone with it.
            assert peers.all_reduce(torch.ones(3)).alone
            woken.set()
            return peers.group_size
        # As SIGSTOP: it neither beats nor votes.
        with peers._line._lock:
            until(lambda: len([line for line in patient._lines.values() if line.peer == peers.peer]) == 1)
            [line] = [line for line in list(patient._lines.values()) if line.peer == peers.peer]
            while not woken.wait(0.01):
                # For longer than anybody may be silent.
                line.heard -= 100.0
        with pytest.raises(Kicked, match=r"not in this run, or no more|nothing was heard of it"):
            peers.all_reduce(torch.ones(3))
        return "told"

    with a_master() as patient:
        assert together(patient.address, 2, begin) == [1, "told"]


@pytest.mark.parametrize(("dead_s", "left"), [(30.0, 3), (3.0, 2)])
def test_a_neighbour_that_does_nothing_is_given_up(dead_s, left):
    """Its connections stand and it shows signs of life; but its part of the collective does not move."""
    has_stalled, is_over = threading.Event(), threading.Event()

    def work(number, peers):
        if number == 2:

            def stall(name):
                if name == "ring" and not has_stalled.is_set():
                    has_stalled.set()
                    # Until it hears that the others have given it up, or they are done without it.
                    if left == 3:
                        until(lambda: any(op.is_aborted for op in list(peers._ops.values())))
                    else:
                        assert is_over.wait(60)

            peers._before = stall
        value = torch.ones(3)
        lost = 0
        while True:
            try:
                found = peers.all_reduce(value).world, value.tolist(), lost
                is_over.set()
                return found
            except PeerLost:
                lost += 1
            except Kicked as error:
                return str(error)

    with a_master(dead_s=dead_s) as master:
        *others, last = together(master.address, 3, work, idle_s=0.3)
    assert {(world, tuple(value)) for world, value, _ in others} == {(left, (float(left),) * 3)}
    assert all(lost >= 1 for _, _, lost in others)
    if left == 3:
        assert last[:2] == others[0][:2]
    else:
        assert "did not answer an abort" in last


def test_after_a_newcomer_that_nobody_reaches_the_next_reduction_goes_through(master):
    """Some had made the links of its ring, and some had not: none of them goes on with half of it."""
    late = []

    def work(number, peers):
        peers.all_reduce(torch.ones(2))
        if number == 0:
            late.append(Peer(master.address, lambda _, mine: None, 9, advertise="127.0.0.1:1"))
        until(peers.are_peers_pending)
        with pytest.raises(TopologyFailed):
            peers.update_topology()
        return peers.all_reduce(torch.ones(2)).world, [row.failures for row in master.state.members.values()]

    for world, failures in together(master.address, 3, work, connect_s=3.0):
        assert world == 3
        # The newcomer alone.
        assert sum(failures) <= 1
    late[0].communicator.close()
    late[0].wait()


def test_of_two_at_a_time_neither_waits_for_the_other_when_a_third_dies(master):
    """The older one has its buffer still to copy when the ring that the newer one needs is already another."""
    gate = threading.Event()

    def work(number, peers):
        peers.all_reduce(torch.ones(1))
        copied = peers._backup

        def slow(flat):
            # As the copy of a large buffer.
            if flat.numel() == 5:
                gate.wait(60)
                time.sleep(0.3)
            return copied(flat)

        peers._backup = slow
        first = peers.all_reduce_async(torch.ones(5), tag=1)
        if number == 2:
            until(lambda: peers.peer not in master.state.members or master.state.running)
            gate.set()
            raise Killed
        second = peers.all_reduce_async(torch.ones(7), tag=2)
        with pytest.raises(PeerLost):
            first.result(BOUND_S)
        return second.result(BOUND_S).world

    peers = [Peer(master.address, work, number, 3) for number in range(3)]
    found = [peer.wait() for peer in peers]
    assert [(peer.value, peer.error) for peer in found] == [(2, None), (2, None), (None, None)]
