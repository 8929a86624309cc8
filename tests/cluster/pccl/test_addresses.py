"""Calls end in time: finding the addresses of a name, trying each of them, and whatever who is called does then."""

import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from anabranch.cluster.pccl import Kicked, TopologyFailed, addresses
from anabranch.cluster.pccl.handshake import take
from anabranch.cluster.pccl.links import LinkError, Links, Place, call_peer, link_key
from anabranch.cluster.pccl.wire import Kind, WireError, packed
from pccl_peers import Peer, a_master, together


@pytest.fixture
def slow_names(monkeypatch):
    """Names that end in ``.slow`` are looked up until the test has ended, and then not found."""
    real, over = socket.getaddrinfo, threading.Event()

    def look_up(host, *rest, **more):
        if str(host).endswith(".slow"):
            over.wait(3000)
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield
    over.set()


def test_a_name_that_is_not_resolved_takes_no_longer_than_there_is_time(slow_names):
    with pytest.raises(LinkError, match="was not resolved in time") as told:
        call_peer(Place(3, "a.slow", 1, 1), b"", "run", {"purpose": "link"}, time.monotonic() + 0.3)
    assert told.value.accused == 3


def test_names_that_are_looked_up_at_a_time_are_bounded(monkeypatch, slow_names):
    """Each has a thread until the resolver answers."""
    monkeypatch.setattr(addresses, "_lookups", threading.Semaphore(2))
    for name in ("a.slow", "b.slow"):
        with pytest.raises(TimeoutError):
            addresses.connected(name, 1, time.monotonic() + 0.01)
    with pytest.raises(OSError, match="being looked up"):
        addresses.connected("c.slow", 1, time.monotonic() + 0.01)


def test_a_name_of_many_addresses_takes_no_longer_than_there_is_time(monkeypatch):
    """Each once had five seconds of its own. By a clock that goes on by what is waited."""
    now = [100.0]
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", server.getsockname())] * 4
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        tried = []

        def connect(self, address):
            tried.append(self.gettimeout())
            now[0] += self.gettimeout()
            raise TimeoutError("timed out")

        silent = type("Silent", (socket.socket,), {"connect": connect})
        with monkeypatch.context() as patched:
            patched.setattr(socket, "socket", silent)
            patched.setattr(addresses, "time", SimpleNamespace(monotonic=lambda: now[0]))
            with pytest.raises(TimeoutError):
                addresses.connected("many.example", 1, 100.4)
        assert tried == pytest.approx([0.1] * 4)
        # And the first that answers is taken.
        addresses.connected("many.example", 1, time.monotonic() + 60.0).close()


def neighbour(way, server, key):
    """What another peer does with who calls it; nobody is told of it."""
    with contextlib.suppress(OSError, WireError), server.accept()[0] as sock:
        if way == "trickles":
            for byte in packed(Kind.CHALLENGE, {"nonce": "x" * 1000}):
                sock.sendall(bytes([byte]))
                time.sleep(0.05)
        elif way == "makes no link":
            take(sock, key)
            sock.sendall(packed(Kind.WELCOME))
        while sock.recv(4096):
            pass


@pytest.mark.parametrize("way", ["name", "is silent", "trickles", "makes no link"])
def test_whatever_a_neighbour_does_links_stand_or_fail_in_time(slow_names, way):
    """The master waits for twice as long, and then it would be this peer that is late."""
    links = Links(b"s", 0.4, None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=neighbour, args=(way, server, link_key(b"s", "run")), daemon=True)
        thread.start()
        host = "neighbour.slow" if way == "name" else "127.0.0.1"
        ring = [Place(0, "127.0.0.1", 1, 1), Place(1, host, server.getsockname()[1], 1)]
        with pytest.raises(LinkError) as told:
            links.build(1, ring, 0, "run")
        assert told.value.accused == 1
        links.close()
    if way != "name":
        thread.join(60)


def test_a_newcomer_whose_name_is_resolved_slowly_is_sent_away_alone(slow_names):
    """Those who called it were once late with their links, and the master dropped them for it."""
    late = []

    def work(number, peers):
        if number == 0:
            late.append(Peer(master.address, lambda _, mine: None, 9, advertise="newcomer.slow:5000", connect_s=1.0))
        failed, is_over = 0, torch.zeros(1)
        while not is_over:
            try:
                peers.admit()
            except TopologyFailed:
                failed += 1
                continue
            is_over.fill_(bool(late and late[0].error))
            assert peers.all_reduce(is_over, op="max").world == 2
        return failed

    # The master would wait for 32 s.
    with a_master(connect_s=1.0) as master:
        assert all(failed >= 2 for failed in together(master.address, 2, work))
        assert isinstance(late[0].wait().error, Kicked)
