"""Links between neighbours: what is offered and never awaited takes nobody's place, and who makes calls hears of an end meanwhile."""

import socket
import threading
import time

import pytest

from anabranch.cluster.pccl import links as module
from anabranch.cluster.pccl.links import AbortedError, LinkError, Links, Listener, Place, call_peer
from waiting import until

KEY = b"s"


class Two:
    """Two peers that listen.

    Args:
        pool: links with each neighbour.
        connect_s: for them.
    """

    def __init__(self, pool=1, connect_s=50.0):
        self.links = [Links(KEY, connect_s, None) for _ in range(2)]
        self.listeners = [Listener("127.0.0.1", 0, KEY, {"link": links.offer}) for links in self.links]
        for listener in self.listeners:
            listener.run = "run"
        self.places = [Place(peer, "127.0.0.1", one.port, pool) for peer, one in enumerate(self.listeners)]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for one in (*self.links, *self.listeners):
            one.close()

    def build(self, epoch, others=()):
        """What both make of a ring of the two, and ``others`` after them: None where links stand, or whom they accuse."""
        ring, found = [*self.places, *others], {}

        def one(peer):
            try:
                self.links[peer].build(epoch, ring, peer, "run")
                found[peer] = None
            except LinkError as error:
                found[peer] = error.accused

        threads = [threading.Thread(target=one, args=(peer,), daemon=True) for peer in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found


def test_links_of_rings_that_were_given_up_take_no_place(monkeypatch):
    """A newcomer that nobody reaches, again and again: the second keeps what the first has made for it."""
    monkeypatch.setattr(module, "_MOST_OFFERS", 8)
    with Two(pool=4) as two:
        unreached = Place(9, "127.0.0.1", 9, 4)
        for links in two.links:
            links.connect_s = 0.3
        for epoch in range(1, 5):
            two.build(epoch, [unreached])
            assert len(two.links[1]._offers) <= 4
        for links in two.links:
            links.connect_s = 50.0
        assert two.build(5) == {0: None, 1: None}
        assert [len(links.to_next) for links in two.links] == [4, 4]
        assert not two.links[0]._offers
        assert not two.links[1]._offers


@pytest.mark.parametrize("epoch", [2, 2**61])
def test_who_fills_the_places_for_links_takes_none_of_others(monkeypatch, epoch):
    """Anybody who was told the name of the run can offer links that nobody awaits."""
    monkeypatch.setattr(module, "_MOST_OFFERS", 6)
    with Two() as two:
        for index in range(module._MOST_OFFERS + 8):
            hello = {"purpose": "link", "run": "run", "epoch": epoch, "from": 5 + index, "index": 0}
            call_peer(two.places[1], KEY, "run", hello, time.monotonic() + 60)[0].close()
        until(lambda: len(two.links[1]._offers) == module._MOST_OFFERS)
        assert len(two.links[1]._offers) == module._MOST_OFFERS
        assert two.build(2) == {0: None, 1: None}
        assert two.build(3) == {0: None, 1: None}


def test_of_a_full_house_the_host_that_offered_most_gives_way(monkeypatch):
    monkeypatch.setattr(module, "_MOST_OFFERS", 4)
    links = Links(KEY, 1.0, None)
    pairs = [socket.socketpair() for _ in range(10)]
    for number, (ours, _) in enumerate(pairs[:8]):
        monkeypatch.setattr(module, "_host_of", lambda _, number=number: "neighbour" if number == 1 else "flood")
        links.offer(ours, {"epoch": 7, "from": number, "index": 0})
    assert [key[1] for key in links._offers] == [1, 5, 6, 7]
    # One that is awaited has a place whatever there is.
    links._wanted = (7, 9)
    links.offer(pairs[8][0], {"epoch": 7, "from": 9, "index": 0})
    links.offer(pairs[9][0], {"epoch": 7, "from": 10, "index": 0})
    assert [key[1] for key in links._offers] == [1, 6, 7, 9, 10]
    links.close()
    for pair in pairs:
        for end in pair:
            end.close()


@pytest.mark.parametrize("pool", [1, 20])
def test_who_calls_a_neighbour_that_hangs_hears_meanwhile_that_it_is_over(pool):
    """The neighbour takes the connection and says nothing, as one does that is stopped; the master ends the collective."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        links, over = Links(KEY, 30.0, None), threading.Event()

        def check():
            if over.is_set():
                raise AbortedError("another peer was lost")

        timer = threading.Timer(0.3, over.set)
        timer.start()
        ring = [Place(0, "127.0.0.1", 1, pool), Place(1, "127.0.0.1", server.getsockname()[1], pool)]
        # Within the 30 s that a call may take: a later error would be another.
        with pytest.raises(AbortedError):
            links.build(1, ring, 0, "run", check)
        assert not links.to_next
        links.close()


def test_links_that_come_after_the_end_are_closed():
    """A call that was under way when it ended comes to something, and nobody has it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        called, over = threading.Event(), threading.Event()

        def call(index):
            called.set()
            assert over.wait(60)
            return socket.create_connection(server.getsockname())

        def check():
            if called.is_set():
                raise AbortedError("it is over")

        with pytest.raises(AbortedError):
            module._Calls(call, 1).wait(check)
        over.set()
        came, _ = server.accept()
        came.settimeout(60)
        with came:
            assert came.recv(1) == b""


def test_over_a_long_way_calls_do_not_wait_for_each_other(monkeypatch):
    """64 links of three round trips each, of 0.1 s, would take 19 s one after another."""
    counted, most, lock, are_many = [0], [0], threading.Lock(), threading.Event()

    def far(place, secret, run, hello, deadline, congestion=None):
        with lock:
            counted[0] += 1
            most[0] = max(most[0], counted[0])
        if most[0] > 2:
            are_many.set()
        # None goes on before others have begun.
        assert are_many.wait(60)
        with lock:
            counted[0] -= 1
        return call_peer(place, secret, run, hello, deadline, congestion)

    monkeypatch.setattr(module, "call_peer", far)
    with Two(pool=24) as two:
        assert two.build(1) == {0: None, 1: None}
        # Each number of a link is that of the other end.
        for index in range(24):
            two.links[0].to_next[index].sendall(bytes([index]))
            assert two.links[1].from_previous[index].recv(1) == bytes([index])
    assert 2 < most[0] <= 2 * module._CALLS


def test_what_fails_of_several_calls_is_told_once():
    def call(index):
        raise LinkError(f"link {index}", 3)

    with pytest.raises(LinkError, match="link") as told:
        module._Calls(call, 5).wait(lambda: None)
    assert told.value.accused == 3
