import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from anabranch.cluster.fabric import Flows, Topology, plan, sending
from anabranch.cluster.fabric.sending import FRAME, MAGIC, SplitReceiver, SplitSender, TransferError, as_bytes
from anabranch.errors import InputError
from waiting import until

ANY = ("", 0)


@pytest.fixture
def receiver():
    with SplitReceiver(secret=b"s3cret") as made:
        yield made


class Receiving(threading.Thread):
    """A receive in a thread; `end` gives its error back."""

    def __init__(self, receiver, buffer, timeout_s=20.0):
        super().__init__(daemon=True)
        self.error, self.call = None, lambda: receiver.receive(buffer, timeout_s)
        self.start()

    def run(self):
        try:
            self.call()
        except Exception as error:
            self.error = error

    def end(self):
        self.join(60)
        assert not self.is_alive()
        return self.error


def test_a_receiver_that_is_closed_when_it_has_all_has_told_the_sender(monkeypatch):
    told, tell = [], socket.socket.sendall

    def slowly(link, data):
        if bytes(data) == b"\x01":
            time.sleep(0.2)
            told.append(data)
        tell(link, data)

    monkeypatch.setattr(socket.socket, "sendall", slowly)
    sent, got = np.arange(1000, dtype=np.uint8), np.zeros(1000, np.uint8)
    with SplitReceiver() as receiver, ThreadPoolExecutor(1) as pool:
        with SplitSender(receiver.address, [ANY, ANY]) as sender:
            under_way = pool.submit(sender.send, sent, [(0, 0, 600), (1, 600, 400)])
            receiver.receive(got, 60.0)
            receiver.close()
            under_way.result(60)
    assert (got == sent).all()
    assert told == [b"\x01"] * 2


@pytest.mark.parametrize("links", [1, 3])
@pytest.mark.parametrize("has_one_sender", [True, False])
def test_transfers_follow_each_other_at_once(links, has_one_sender):
    rows, size = 300 if has_one_sender else 60, 300
    sent = np.random.default_rng(links).integers(0, 256, (rows, size), np.uint8)
    pieces = [(path, path * size // links, size // links) for path in range(links)]
    with SplitReceiver() as receiver, ThreadPoolExecutor(1) as pool:

        def send(some):
            with SplitSender(receiver.address, [ANY] * links) as sender:
                for row in some:
                    sender.send(row, pieces)

        under_way = pool.submit(lambda: [send(some) for some in ([sent] if has_one_sender else sent[:, None])])
        for row in sent:
            got = np.zeros(size, np.uint8)
            receiver.receive(got, 60.0)
            assert (got == row).all()
        under_way.result(60)


def test_a_plan_is_carried_out(receiver):
    # One flow over three paths, as the planner cuts it.
    made = plan(Flows.of([(0, 1, 3_000_001)]), Topology.leaf_spine(2, 3, 1))
    pieces = [(piece.path, piece.offset, piece.size) for piece in made]
    assert len(pieces) == 3
    sent = np.random.default_rng(0).integers(0, 256, 3_000_001, np.uint8)
    got = np.zeros_like(sent)
    paths = [("127.0.0.1", 0), ("127.0.0.2", 0), ANY]
    with SplitSender(receiver.address, paths, secret=b"s3cret") as sender:
        # Three buffers one after the other over the same connections.
        for _ in range(3):
            got[:] = 0
            waiting = Receiving(receiver, got)
            sender.send(sent, pieces)
            assert waiting.end() is None
            assert (got == sent).all()


def test_tensors_and_arrays_of_any_type(receiver):
    torch = pytest.importorskip("torch")
    sent, got = torch.arange(1000, dtype=torch.float32).reshape(10, 100), np.zeros((10, 100), np.float32)
    with SplitSender(receiver.address, [ANY, ANY], secret=b"s3cret") as sender:
        waiting = Receiving(receiver, got)
        sender.send(sent, [(1, 0, 2400), (0, 2400, 1600)])
        assert waiting.end() is None
    assert (got == sent.numpy()).all()


def test_pieces_that_are_not_the_buffer_are_refused(receiver):
    with SplitSender(receiver.address, [ANY, ANY], secret=b"s3cret") as sender:
        for pieces, said in (
            ([(0, 0, 5)], "pieces have 5 bytes, and the buffer has 10"),
            ([(0, 0, 5), (1, 6, 4)], "pieces end at byte 5 and go on at 6"),
            ([(0, 0, 5), (1, 4, 6)], "pieces end at byte 5 and go on at 4"),
            ([(0, 0, 5), (2, 5, 5)], "path is 2; it must be a whole number from 0 to 1"),
            ([(0, 0, 0)], "bytes is 0"),
        ):
            with pytest.raises(InputError, match=said):
                sender.send(bytes(10), pieces)


@pytest.mark.parametrize(
    ("buffer", "writable", "said"),
    [
        (np.zeros((4, 4))[:, ::2], False, "is not one row of bytes; make it contiguous"),
        (np.array([None]), False, "a buffer of object"),
        (bytes(4), True, "read-only"),
    ],
)
def test_what_is_no_buffer_is_refused(buffer, writable, said):
    with pytest.raises(InputError, match=said):
        as_bytes(buffer, writable=writable)


def test_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with pytest.raises(
        TransferError, match=rf"no connection to 127.0.0.1:{address[1]} from \('', 0\): connection refused"
    ):
        SplitSender(address, [ANY])
    with pytest.raises(InputError, match="paths is 0"):
        SplitSender(address, [])
    with SplitReceiver() as taken, pytest.raises(TransferError, match="cannot listen at 127"):
        SplitReceiver(taken.address)


def test_a_wrong_secret_writes_nothing(receiver):
    got = np.zeros(10, np.uint8)
    waiting = Receiving(receiver, got, timeout_s=0.5)
    with SplitSender(receiver.address, [ANY], secret=b"guess") as sender, pytest.raises(TransferError):
        sender.send(b"\x01" * 10, [(0, 0, 10)])
    assert "10 of 10 bytes did not come: after 0.5 s" in str(waiting.end())
    assert not got.any()


def hello(receiver):
    link = socket.create_connection(receiver.address)
    link.settimeout(60)
    link.sendall(MAGIC + sending._key(b"s3cret"))
    return link


@pytest.mark.parametrize(
    "frame",
    [
        (1, 11, 0, 10),  # of another size
        (1, 10, 5, 6),  # beyond the end
        (1, 10, 2**64 - 1, 2),  # whose end has no 64 bits
        (1, 10, 0, 0),  # of nothing
    ],
)
def test_a_frame_that_does_not_fit_ends_its_connection(receiver, frame):
    got = np.zeros(10, np.uint8)
    waiting = Receiving(receiver, got, timeout_s=0.4)
    with hello(receiver) as link:
        link.sendall(FRAME.pack(*frame))
        assert link.recv(1) == b""
    assert isinstance(waiting.end(), TransferError)
    assert not got.any()


def test_no_byte_is_written_twice_or_by_two_transfers(receiver):
    got = np.zeros(10, np.uint8)
    waiting = Receiving(receiver, got)
    with hello(receiver) as first, hello(receiver) as second, hello(receiver) as third, hello(receiver) as last:
        first.sendall(FRAME.pack(7, 10, 0, 6) + b"\x01" * 6)
        assert first.recv(1) == b"\x01"
        second.sendall(FRAME.pack(7, 10, 5, 5))
        assert second.recv(1) == b""
        third.sendall(FRAME.pack(8, 10, 6, 4))
        assert third.recv(1) == b""
        last.sendall(FRAME.pack(7, 10, 6, 4) + b"\x04" * 4)
        assert last.recv(1) == b"\x01"
        assert waiting.end() is None
    assert got.tolist() == [1] * 6 + [4] * 4


def test_a_sender_that_leaves_in_a_piece_is_told_by_the_clock(receiver):
    got = np.zeros(1000, np.uint8)
    waiting = Receiving(receiver, got, timeout_s=0.5)
    link = hello(receiver)
    link.sendall(FRAME.pack(1, 1000, 0, 1000) + b"\x01" * 10)
    link.close()
    assert "1,000 of 1,000 bytes did not come" in str(waiting.end())
    # A transfer that stands still does not hold up whoever waits.
    waiting = Receiving(receiver, got, timeout_s=0.5)
    with hello(receiver) as link:
        link.sendall(FRAME.pack(1, 1000, 0, 1000) + b"\x01" * 10)
        assert "did not come: after 0.5 s" in str(waiting.end())


@pytest.mark.parametrize("half", [False, True], ids=["in a piece", "between pieces"])
def test_a_sender_that_left_is_followed_by_another(receiver, half):
    """What it had claimed, and what it had sent, is the next one's from the start."""
    got = np.zeros(1000, np.uint8)
    waiting = Receiving(receiver, got)
    link = hello(receiver)
    if half:
        link.sendall(FRAME.pack(1, 1000, 0, 500) + b"\x01" * 500)
        assert link.recv(1) == b"\x01"
    else:
        link.sendall(FRAME.pack(1, 1000, 0, 1000) + b"\x01" * 10)
    link.close()
    end = time.monotonic() + 120
    while waiting.is_alive():
        # Until the receiver has seen that the first one is gone, it refuses the second.
        assert time.monotonic() < end
        with (
            contextlib.suppress(TransferError),
            SplitSender(receiver.address, [ANY], secret=b"s3cret", timeout_s=5) as sender,
        ):
            sender.send(b"\x02" * 1000, [(0, 0, 1000)])
    assert waiting.end() is None
    assert (got == 2).all()


def test_a_transfer_stays_its_senders_while_one_of_its_connections_is_there(receiver):
    got = np.zeros(10, np.uint8)
    waiting = Receiving(receiver, got)
    with hello(receiver) as first, hello(receiver) as second, hello(receiver) as other:
        first.sendall(FRAME.pack(7, 10, 0, 6) + b"\x01" * 6)
        assert first.recv(1) == b"\x01"
        second.sendall(FRAME.pack(7, 10, 6, 2) + b"\x02" * 2)
        assert second.recv(1) == b"\x01"
        first.close()
        other.sendall(FRAME.pack(8, 10, 0, 10))
        assert other.recv(1) == b""
        second.sendall(FRAME.pack(7, 10, 8, 2) + b"\x03" * 2)
        assert second.recv(1) == b"\x01"
        assert waiting.end() is None
    assert got.tolist() == [1] * 6 + [2, 2, 3, 3]


def test_whoever_has_no_secret_makes_room_for_others(receiver, monkeypatch):
    monkeypatch.setattr(sending, "MOST_LINKS", 4)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(receiver.address)) for _ in range(4)]
        until(lambda: len(receiver._strangers) == 4)
        got = np.zeros(10, np.uint8)
        waiting = Receiving(receiver, got)
        with SplitSender(receiver.address, [ANY, ANY], secret=b"s3cret") as sender:
            sender.send(b"\x05" * 10, [(0, 0, 5), (1, 5, 5)])
        assert waiting.end() is None
        assert (got == 5).all()
        # The oldest had to go.
        for link, is_there in zip(idle, (False, False, True, True), strict=True):
            link.settimeout(10 if not is_there else 0.05)
            if is_there:
                with pytest.raises(TimeoutError):
                    link.recv(1)
            else:
                assert link.recv(1) == b""


def test_whoever_has_the_secret_stays(receiver, monkeypatch):
    monkeypatch.setattr(sending, "MOST_LINKS", 2)
    with hello(receiver) as first, hello(receiver) as second:
        until(lambda: len(receiver._links) == 2 and not receiver._strangers)
        with socket.create_connection(receiver.address) as late:
            late.settimeout(60)
            assert late.recv(1) == b""
        got = np.zeros(2, np.uint8)
        waiting = Receiving(receiver, got)
        first.sendall(FRAME.pack(1, 2, 0, 1) + b"\x01")
        second.sendall(FRAME.pack(1, 2, 1, 1) + b"\x02")
        assert waiting.end() is None
    assert got.tolist() == [1, 2]


def test_one_buffer_at_a_time_and_closing_ends_it():
    receiver = SplitReceiver()
    waiting = Receiving(receiver, np.zeros(4, np.uint8))
    until(lambda: receiver._waiting is not None)
    with pytest.raises(InputError, match="one at a time"):
        receiver.receive(np.zeros(4, np.uint8))
    receiver.close()
    assert "did not come: the receiver was closed" in str(waiting.end())
    receiver._thread.join(60)
    assert not receiver._thread.is_alive()
