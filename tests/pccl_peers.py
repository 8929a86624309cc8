"""Peers of PCCL for tests: threads with a communicator each, in one process, so that a world starts in milliseconds."""

import threading
import time
from contextlib import contextmanager

from anabranch.cluster.pccl import Communicator, Master
from anabranch.cluster.pccl.records import waits_for

# No wait of a test is longer; nothing is measured by it.
BOUND_S = 60.0


@contextmanager
def a_master(**settings):
    with Master("127.0.0.1:0", **{"heartbeat_s": 0.2, "dead_s": 30.0, "connect_s": 30.0, **settings}) as master:
        yield master


class Killed(BaseException):
    """A peer ends here, as by kill -9."""


class Peer:
    """One of them: ``value`` is what ``work`` returned, ``error`` what it raised."""

    def __init__(self, address, work, number=0, world=1, **settings):
        self.work, self.number, self.world = work, number, world
        self.communicator = Communicator(
            address, **{"idle_s": 60.0, "connect_s": 30.0, "master_wait_s": 30.0, **settings}
        )
        self.value = self.error = None
        self.is_killed = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        try:
            with self.communicator as peers:
                if self.world > 1:
                    peers.wait_for(self.world)
                self.value = self.work(self.number, peers)
        except Killed:
            self.is_killed = True
            self.communicator._die()
        except BaseException as error:
            self.error = error

    def wait(self, bound_s=BOUND_S):
        self.thread.join(bound_s)
        assert not self.thread.is_alive(), f"peer {self.number} hangs"
        return self


def together(address, world, work, **settings):
    """What ``work(number, communicator)`` returned in each of ``world`` peers that began it together, in order of their rings."""
    peers = [Peer(address, work, number, world, **settings) for number in range(world)]
    for peer in peers:
        peer.wait()
    for peer in peers:
        if peer.error is not None:
            raise peer.error
    return [peer.value for peer in peers]


def until_somebody_waits(master):
    """To be let in, which the next who ask hear of."""
    while not any(waits_for(member, "join") for member in list(master.state.members.values())):
        time.sleep(0.005)


def in_time(work):
    """What ``work`` returns or raises; fails where it hangs."""
    found = []

    def run():
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(BOUND_S)
    assert found, "it hangs"
    value, error = found[0]
    if error is not None:
        raise error
    return value
