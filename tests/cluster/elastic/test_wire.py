"""Connections: who does not know the secret is refused, what makes no sense ends one connection and no more."""

import errno
import os
import socket
import struct
import threading
import time
import tracemalloc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from anabranch.cluster.elastic import Coordinator, wire
from anabranch.cluster.elastic.links import CalledAwayError, LinkPool, pack, unpack
from anabranch.cluster.elastic.wire import MOST_HEADER, MOST_HELLO, Listener, connect
from anabranch.errors import InputError, PeerError
from waiting import until


class Ends:
    """Two ends of a channel, and what they were told."""

    def __init__(self, secret=b"s"):
        self.frames, self.closed, self.channels, self.there = [], [], [], threading.Event()
        self.told = []
        self.listener = Listener(
            "127.0.0.1", 0, secret, self.on_frame, lambda channel, why: self.closed.append(why), tell=self.told.append
        )

    def on_frame(self, channel, header, body):
        if channel not in self.channels:
            self.channels.append(channel)
            channel.admit()
        if header.get("raise"):
            raise KeyError("nothing of the kind")
        self.frames.append((header, bytes(body)))
        self.there.set()

    def connect(self, secret=b"s"):
        return connect("127.0.0.1", self.listener.port, secret, on_frame=self.on_frame, on_close=lambda *told: None)


@pytest.fixture
def ends():
    made = Ends()
    yield made
    made.listener.close()


def test_frames_come_whole_and_in_order(ends):
    channel = ends.connect()
    bodies = [os.urandom(size) for size in (0, 1, 1_000_000)]
    for number, body in enumerate(bodies):
        channel.send({"n": number}, body)
    until(lambda: len(ends.frames) == 3)
    assert ends.frames == [({"n": n}, body) for n, body in enumerate(bodies)]
    assert channel.sent_bytes > 1_000_000
    channel.close()
    until(lambda: ends.closed)


def test_what_was_sent_last_comes_though_something_lies_unread(ends):
    """Closing with bytes unread resets a connection, and what was on its way is lost with it."""
    for round_number in range(20):
        reading = threading.Event()

        def wait(channel, header, body, reading=reading):
            reading.wait(60)

        channel = connect("127.0.0.1", ends.listener.port, b"s", on_frame=wait, on_close=lambda *told: None)
        channel.send({"who": round_number})
        until(lambda n=round_number: any(header == {"who": n} for header, _ in ends.frames))
        ends.channels[-1].send({"unread": 1})
        ends.channels[-1].send({"unread": 2}, bytes(100_000))
        channel.send({"last": round_number}, bytes(500_000))
        channel.close(after_sends=True)
        until(lambda n=round_number: any(header == {"last": n} for header, _ in ends.frames))
        ends.channels[-1].close(after_sends=True)
        reading.set()


def test_who_does_not_know_the_secret_is_refused(ends):
    with pytest.raises(PeerError, match="another secret"):
        ends.connect(b"other")
    until(lambda: ends.listener.refused == 1 and not ends.frames)
    with pytest.raises(PeerError, match="nothing answers at"):
        connect("127.0.0.1", 1, b"s", on_frame=print, on_close=print)


def test_a_listener_that_does_not_know_the_secret_is_refused():
    # One that says yes to everything.
    server = socket.create_server(("127.0.0.1", 0))

    def yes():
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"n" * 16)
            connection.recv(1000)
            connection.sendall(b"y" * 32)

    threading.Thread(target=yes, daemon=True).start()
    with pytest.raises(PeerError, match="does not know the secret"):
        connect("127.0.0.1", server.getsockname()[1], b"s", on_frame=print, on_close=print)
    server.close()


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("<IQ", MOST_HEADER + 1, 0),
        struct.pack("<IQ", 2, 2**60),
        struct.pack("<IQ", 2, 0) + b"[]",
        struct.pack("<IQ", 2, 0) + b"\xff\xff",
        struct.pack("<IQ", 14, 0) + b'{"raise":true}',
    ],
)
def test_a_frame_that_makes_no_sense_ends_its_connection_alone(ends, frame):
    channel, sound = ends.connect(), ends.connect()
    channel._connection.sendall(frame)
    until(lambda: ends.closed)
    sound.send({"still": 1})
    until(lambda: ends.frames)


class Tired:
    """A socket that cannot take a connection some times."""

    def __init__(self, inner, errors):
        self._inner, self._errors = inner, errors

    def accept(self):
        if self._errors:
            raise self._errors.pop(0)
        return self._inner.accept()

    def __getattr__(self, name):
        return getattr(self._inner, name)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        ConnectionAbortedError("gone"),
        RuntimeError("can't start new thread"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_keeps_a_listener_from_taking_connections_passes(ends, error):
    """It ended the door for ever, and nothing was said."""
    ends.listener._socket = Tired(ends.listener._socket, [error, error])
    # The accept that runs is the last one without an error.
    ends.connect().send({"n": 1})
    until(lambda: len(ends.frames) == 1)
    ends.connect().send({"n": 2})
    until(lambda: len(ends.frames) == 2 and len(ends.told) == 1)
    assert str(error) in ends.told[0]


def test_strangers_who_say_nothing_make_room(ends, monkeypatch):
    monkeypatch.setattr(wire, "MOST_WAITING", 8)
    place = ("127.0.0.1", ends.listener.port)
    silent = [socket.create_connection(place) for _ in range(8 + 20)]
    ends.connect().send({"n": 1})
    until(lambda: ends.frames)
    # The first have been sent away, and are told so by an end of the connection.
    until(lambda: ends.listener.refused >= 20)
    silent[0].settimeout(60)
    assert len(silent[0].recv(100)) == 16
    assert silent[0].recv(100) == b""
    assert len(ends.listener._waiting) <= 8
    for one in silent:
        one.close()
    until(lambda: not ends.listener._waiting)


def test_a_byte_now_and_then_does_not_hold_a_place(ends, monkeypatch):
    monkeypatch.setattr(wire, "HANDSHAKE_S", 0.3)
    slow = socket.create_connection(("127.0.0.1", ends.listener.port))

    def trickle():
        while True:
            slow.sendall(b"x")
            time.sleep(0.05)

    with pytest.raises(ConnectionError):
        trickle()
    until(lambda: ends.listener.refused == 1)
    slow.close()


def test_who_knows_the_secret_and_says_nothing_does_not_hold_a_place(ends, monkeypatch):
    monkeypatch.setattr(wire, "HANDSHAKE_S", 1.0)
    channel = connect("127.0.0.1", ends.listener.port, b"s", on_frame=print, on_close=lambda *told: None, timeout_s=60)
    until(lambda: channel.is_closed and ends.closed)
    assert "TimeoutError" in ends.closed[0]
    # Who has said who it is may be silent for longer.
    gone = [0.0]
    monkeypatch.setattr(wire, "HANDSHAKE_S", 60.0)
    monkeypatch.setattr(wire, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + gone[0]))
    known = connect("127.0.0.1", ends.listener.port, b"s", on_frame=print, on_close=lambda *told: None)
    known.send({"n": 1})
    until(lambda: ends.frames)
    gone[0] = 100.0
    known.send({"n": 2}, b"abc")
    until(lambda: len(ends.frames) == 2)


@pytest.mark.parametrize("sizes", [(2, 1), (2, 600 * 2**20), (MOST_HELLO + 1, 0)])
def test_nobody_sends_much_before_it_is_known_who_it_is(ends, sizes):
    channel = ends.connect()
    channel._connection.sendall(struct.pack("<IQ", *sizes))
    until(lambda: ends.closed)
    assert "is too large" in ends.closed[0]


def test_a_coordinator_takes_words_alone():
    with Coordinator(replicas=1, stages=1) as host:
        place = ("127.0.0.1", int(host.address.rpartition(":")[2]))
        signature = {"sizes": [1], "copies": 1, "micro_batches": 0, "global_batch": 1, "block": 1}
        channel = connect(*place, b"", on_frame=lambda *told: None, on_close=lambda *told: None)
        hello = {"host": "127.0.0.1", "port": 1, "weights": "", "moments": "", "version": 0, "signature": signature}
        channel.send({"kind": "hello", **hello})
        until(lambda: host.ranks == (0,))
        channel.send({"kind": "beat"}, b"x")
        until(lambda: channel.is_closed)
        until(lambda: host.ranks == ())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_without_a_secret_nobody_listens_where_other_machines_reach(host):
    with pytest.raises(InputError, match=f"secret is empty, and other machines reach {host}"):
        Coordinator(replicas=1, stages=1, host=host)
    with pytest.raises(InputError, match="secret is empty"):
        LinkPool(host, b"", on_snapshot=print, interrupted=print, suspect=print, timeout_s=1.0)


def test_a_frame_is_read_into_one_buffer(ends):
    channel, body, size = ends.connect(), os.urandom(2**24), 2**24
    channel.send({"n": 1})
    until(lambda: ends.frames)
    got = []
    ends.channels[0]._on_frame = lambda channel, header, body: got.append(body)
    tracemalloc.start()
    try:
        channel.send({"n": 2}, body)
        until(lambda: got)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bytes(got[0]) == body
    assert peak < 1.5 * size


def test_strangers_do_not_hold_up_a_coordinator():
    with Coordinator(replicas=1, stages=1, secret="s") as host:
        place = ("127.0.0.1", int(host.address.rpartition(":")[2]))
        silent = socket.create_connection(place)
        loud = socket.create_connection(place)
        loud.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
        until(lambda: host._listener.refused == 1)
        channel = connect(*place, b"s", on_frame=lambda *told: None, on_close=lambda *told: None)
        # Known, and no member: whatever it says but hello ends it.
        channel.send({"kind": "vote", "epoch": 1})
        until(lambda: channel.is_closed)
        channel = connect(*place, b"s", on_frame=lambda *told: None, on_close=lambda *told: None)
        channel.send({"kind": "hello"})
        until(lambda: channel.is_closed and host.ranks == ())
        silent.close()
        loud.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"replicas": 0, "stages": 1}, "replicas is 0"),
        ({"replicas": 1, "stages": 1, "patience_s": 1.0}, "patience_s is 1.0"),
    ],
)
def test_a_coordinator_that_cannot_be_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        Coordinator(**options)


def test_tensors_come_back_to_the_bit():
    tensors = [
        torch.randn(3, 4).to(torch.bfloat16),
        torch.tensor(2.5, dtype=torch.float64),
        torch.empty(0, 5),
        torch.tensor([True, False]),
        torch.arange(12).view(3, 4).t(),
    ]
    spec, body = pack(tensors)
    found = unpack(spec, body)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, tensors, strict=True))
    for wrong in (body[:-1], body + b"x"):
        with pytest.raises(ValueError, match="bytes are too"):
            unpack(spec, wrong)


def pool(**changes):
    given = {
        "on_snapshot": lambda *told: None,
        "interrupted": lambda: False,
        "suspect": lambda rank: None,
        "timeout_s": 0.3,
        **changes,
    }
    return LinkPool("127.0.0.1", b"s", **given)


def test_links_that_the_other_end_closes_meanwhile_are_edited_too():
    made = pool()

    class Closing:
        """Of a rank that is gone, like all the others, which hear of it at the same moment and close theirs."""

        peer, sent_bytes = None, 0

        def close(self, why):
            assert why == "its rank is gone"
            made._channels.clear()

    made.rank, made._channels = 0, {rank: Closing() for rank in (1, 2, 3)}
    assert made.edit(1, {0: ("127.0.0.1", made.port)}) == (0, 0)
    assert made.count == 0
    made.close()


class SlowToHear(LinkPool):
    """Whose thread that reads hears of a link's end, and is kept from the processor before it takes it out of the table."""

    def __init__(self, *args, **more):
        self.has_heard, self.goes_on = threading.Event(), threading.Event()
        super().__init__(*args, **more)

    def _on_close(self, channel, why):
        if why != "its rank is gone":
            self.has_heard.set()
            assert self.goes_on.wait(60)
        super()._on_close(channel, why)


@pytest.mark.parametrize("slow", [0, 1])
def test_a_rank_that_left_and_comes_back_has_links_though_their_end_is_heard_late(slow):
    """The one that opens it took the link that had ended for one that was there, and the other waited for a new one for ever."""
    suspects = []
    late = SlowToHear(
        "127.0.0.1",
        b"s",
        on_snapshot=print,
        interrupted=lambda: False,
        suspect=suspects.append,
        timeout_s=60.0,
    )
    pools = [pool(suspect=suspects.append, timeout_s=60.0)]
    pools.insert(slow, late)
    for rank, one in enumerate(pools):
        one.rank = rank
    at = {rank: ("127.0.0.1", one.port) for rank, one in enumerate(pools)}

    def both(epoch):
        other = threading.Thread(target=pools[1].edit, args=(epoch, at))
        other.start()
        pools[0].edit(epoch, at)
        other.join(60)

    both(1)
    other = pools[1 - slow]
    other.edit(2, {other.rank: at[other.rank]})
    assert late.has_heard.wait(60)
    late.edit(2, {late.rank: at[late.rank]})
    both(3)
    late.goes_on.set()
    for one in pools:
        one.send(1 - one.rank, "x", [torch.ones(1)])
    assert [one.receive(1 - one.rank, "x")[0][0].item() for one in pools] == [1, 1]
    assert (suspects, late.opened, late.closed, late.count) == ([], 2, 1, 1)
    for one in pools:
        one.close()


def test_a_link_that_broke_is_opened_anew_at_an_edit_and_told_of():
    """Where nobody heard of it before the edit: the other end may not know."""
    suspects = []
    pools = [pool(suspect=suspects.append, timeout_s=60.0) for _ in range(2)]
    for rank, one in enumerate(pools):
        one.rank = rank
    at = {rank: ("127.0.0.1", one.port) for rank, one in enumerate(pools)}
    other = threading.Thread(target=pools[1].edit, args=(1, at))
    other.start()
    pools[0].edit(1, at)
    other.join(60)
    broken = pools[1]._channels[0]
    with broken._lock:
        broken._is_closed = True
    pools[1].edit(2, at)
    assert (suspects, pools[1].opened, pools[1].closed) == ([0], 2, 1)
    pools[1].send(0, "x", [torch.ones(1)])
    pools[0].edit(2, at)
    assert pools[0].receive(1, "x")[0][0].item() == 1
    for one in pools:
        one.close()


def test_a_link_that_another_replaces_is_counted_as_closed_with_what_it_sent():
    """Where the rank that opens links was told twice to, and the other has not heard that the first one ended."""
    pools = [pool(timeout_s=60.0) for _ in range(2)]
    for rank, one in enumerate(pools):
        one.rank = rank
    at = {rank: ("127.0.0.1", one.port) for rank, one in enumerate(pools)}
    other = threading.Thread(target=pools[1].edit, args=(1, at))
    other.start()
    pools[0].edit(1, at)
    other.join(60)
    pools[0].send(1, "x", [torch.ones(1)])
    pools[1].receive(0, "x")
    until(lambda: pools[0]._channels[1].sent_bytes)
    sent = pools[0]._channels[1].sent_bytes
    pools[1]._open(0, *at[0])
    until(lambda: pools[0].opened == 2 and pools[0].closed == 1)
    for one in pools:
        assert (one.opened, one.closed, one.count) == (2, 1, 1)
    assert pools[0].sent_bytes == {1: sent}
    for one in pools:
        one.close()


def test_a_link_that_ends_at_once_is_told_of(monkeypatch):
    """It stood among the open ones for good, nobody was suspected, and what was sent was lost."""
    suspects = []

    def connect(*given, **more):
        channel = wire.connect(*given, **more)
        channel.close()
        return channel

    monkeypatch.setattr("anabranch.cluster.elastic.links.connect", connect)
    pools = [pool(suspect=suspects.append, timeout_s=60.0) for _ in range(2)]
    for rank, one in enumerate(pools):
        one.rank = rank
    pools[1]._interrupted = lambda: suspects == [0]
    with pytest.raises(CalledAwayError):
        pools[1].edit(1, {rank: ("127.0.0.1", one.port) for rank, one in enumerate(pools)})
    assert (pools[1].count, pools[1].opened, pools[1].closed) == (0, 1, 1)
    for one in pools:
        one.close()


def test_links_of_a_newcomer_are_opened_at_once(monkeypatch):
    """One after another each waited for the round trips of those before, or for ten seconds where one did not answer."""
    suspects, together = [], threading.Barrier(4)

    def connect(host, port, *given, **more):
        together.wait(60)
        return wire.connect(host, port, *given, **more)

    monkeypatch.setattr("anabranch.cluster.elastic.links.connect", connect)
    gone = socket.create_server(("127.0.0.1", 0))
    pools = [pool(suspect=suspects.append, timeout_s=60.0) for _ in range(4)]
    for rank, one in enumerate(pools):
        one.rank = rank if rank < 3 else 4
    # Rank 3 is not there any more when it is its turn, which costs nobody else a link.
    at = {one.rank: ("127.0.0.1", one.port) for one in pools} | {3: gone.getsockname()}
    gone.close()
    pools[-1]._interrupted = lambda: len(suspects) == 1 and pools[-1].count == 3
    with pytest.raises(CalledAwayError):
        pools[-1].edit(1, at)
    assert suspects == [3]
    assert sorted(pools[-1]._channels) == [0, 1, 2]
    for one in pools:
        one.close()


def test_links_are_edited_in_place():
    suspects = []
    pools = [pool(suspect=suspects.append, timeout_s=60.0) for _ in range(3)]
    for rank, one in enumerate(pools):
        one.rank = rank
    at = {rank: ("127.0.0.1", one.port) for rank, one in enumerate(pools)}

    def edit(epoch, members):
        found = {}
        threads = [
            threading.Thread(
                target=lambda rank=rank: found.update({rank: pools[rank].edit(epoch, {r: at[r] for r in members})})
            )
            for rank in members
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    assert edit(1, [0, 1]) == {0: (1, 0), 1: (1, 0)}
    # The link that is there stays, two are new.
    assert edit(2, [0, 1, 2]) == {0: (1, 0), 1: (1, 0), 2: (2, 0)}
    pools[0].send(1, "x", [torch.ones(2)])
    assert pools[1].receive(0, "x")[0][0].tolist() == [1, 1]
    assert edit(3, [0, 2]) == {0: (0, 1), 2: (0, 1)}
    until(lambda: pools[1].count == 0)
    # What was sent in an older epoch is not found in a newer one.
    pools[0].send(2, "late", [torch.ones(1)])
    time.sleep(0.05)
    edit(4, [0, 2])
    pools[2]._timeout_s = 0.2
    with pytest.raises(PeerError, match=r"rank 0 did not send 'late' in 0.2 s"):
        pools[2].receive(0, "late")
    for one in pools:
        one.close()


def test_a_wait_is_told_while_it_lasts():
    told = []

    @contextmanager
    def waiting(of):
        told.append(of())
        try:
            yield
        finally:
            told.append(None)

    one = pool(waiting=waiting, timeout_s=0.1)
    one.rank = 2
    with pytest.raises(PeerError):
        one.receive(1, "x")
    with pytest.raises(PeerError):
        one.edit(1, dict.fromkeys((2, 3, 4), ("127.0.0.1", 1)))
    assert told == [{"ranks": [1]}, None, {"ranks": [3, 4]}, None]
    one.close()


def test_a_wait_is_called_away():
    calls = [False]
    one = pool(interrupted=lambda: calls[0], timeout_s=60.0)
    one.rank = 0

    def call():
        time.sleep(0.05)
        with one.changed:
            calls[0] = True
            one.changed.notify_all()

    threading.Thread(target=call).start()
    with pytest.raises(CalledAwayError):
        one.receive(1, "x")
    one.close()


def test_a_rank_that_is_not_there_is_suspected():
    suspects = []
    one = pool(suspect=suspects.append)
    one.rank = 1
    with pytest.raises(PeerError, match=r"no link to ranks \[0\]"):
        one.edit(1, {0: ("127.0.0.1", 1), 1: ("127.0.0.1", one.port)})
    assert suspects == [0]
    one.close()
