"""Who is let in, and who waits for whom."""

import threading
import time

import pytest
import torch

from anabranch.cluster.pccl import Communicator, PeerLost, SharedState
from pccl_peers import Peer, a_master, in_time, together


@pytest.fixture(scope="module")
def master():
    with a_master() as found:
        yield found


def test_who_does_not_want_to_wait_withdraws_and_goes_on(master):
    together_now = threading.Event()

    def work(number, peers):
        if number:
            assert together_now.wait(60)
            return peers.all_reduce(torch.ones(1)).world
        peers._wait_s = 0.05
        for call in (lambda: peers.all_reduce(torch.ones(1)), peers.update_topology):
            with pytest.raises(PeerLost, match="did not come in time") as told:
                call()
            # The same call would wait as long again.
            assert not told.value.retryable
        peers._wait_s = None
        together_now.set()
        return peers.all_reduce(torch.ones(1)).world

    assert together(master.address, 2, work) == [2, 2]


def test_who_waits_for_peers_that_do_not_come_gives_up_in_time(master):
    with Communicator(master.address) as peers:
        peers._wait_s = 0.3
        with pytest.raises(PeerLost, match=r"1 of 2 peers were there after 0\.3 s"):
            in_time(lambda: peers.wait_for(2))
        assert peers.all_reduce(torch.ones(1)).alone
        # And one that nobody lets in.
        with pytest.raises(PeerLost, match="did not let it in in time"):
            in_time(Communicator(master.address, wait_s=0.3).connect)
        assert not peers.are_peers_pending()


def test_those_who_wait_for_other_numbers_begin_together(master):
    """The number of the first counts; one that named a smaller one once ended all."""
    came = []

    def work(number, peers):
        peers.wait_for((3, 1, 5)[number])
        came.append(peers.world_size)
        peers.admit()
        return peers.all_reduce(torch.ones(1)).world

    peers = []
    for number in range(3):
        peers.append(Peer(master.address, work, number))
        # The last may have come, reduced and left meanwhile.
        while number < 2 and len(master.state.accepted) <= number:
            time.sleep(0.01)
    assert [(peer.wait().error, peer.value) for peer in peers] == [(None, 3)] * 3


@pytest.mark.parametrize("gathered", [1, 2])
def test_who_comes_late_and_waits_for_others_goes_on_with_those_who_run(master, gathered):
    """The one call serves those who begin together and those who come to them: whoever is let in does next what the others do."""
    late = []

    def work(number, peers):
        peers.wait_for(gathered)
        state, steps = SharedState({"w": torch.zeros(3)}), 0
        # By what all know.
        while state.revision < 6 or peers.world_size < gathered + 2:
            peers.admit()
            state.revision += 1
            peers.sync_shared_state(state)
            if number == 0 and not late:
                late.extend(Peer(master.address, work, 10 + more) for more in range(2))
            peers.all_reduce(torch.ones(2))
            steps += 1
        return state.revision, steps

    founders = [Peer(master.address, work, number) for number in range(gathered)]
    found = [peer.wait() for peer in founders]
    found += [peer.wait() for peer in late]
    assert [peer.error for peer in found] == [None] * (gathered + 2)
    revision, steps = found[0].value
    assert revision == steps
    assert {peer.value[0] for peer in found} == {revision}
    assert all(peer.value[1] < steps for peer in late)
