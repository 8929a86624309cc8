"""Transfers: threads of the compiled kernels copy what they are told, in the order that matters, and say how it ended."""

import ctypes
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from anabranch.nn import kernels
from anabranch.nn.kernels.transfers import CACHED, CANCELLED, DIRECT, MEMORY, Piece, Transfers
from waiting import until

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="needs a C++ compiler")
SLOW = 1e-6  # seconds per byte: 100 KB take a tenth of a second
LONG = 2400  # pieces of 50 KB: two minutes of a wire, which is held until its transfer is cancelled


@pytest.fixture
def transfers() -> Iterator[Transfers]:
    made = Transfers(3)
    yield made
    made.stop()
    made.close()


@pytest.fixture
def wire() -> Iterator[Transfers]:
    made = Transfers(3, SLOW)
    yield made
    made.stop()
    made.close()


def memory(source: np.ndarray, target: np.ndarray) -> Piece:
    return Piece(MEMORY, 0, source.ctypes.data, source.nbytes, target.ctypes.data)


def endings(transfers: Transfers, number: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    while len(found) < number:
        assert transfers.wait(transfers.seen, 60.0), f"only {found} have ended"
        found += transfers.take()
    return found


def test_pieces_of_memory_and_files_arrive(transfers: Transfers, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8)
    (tmp_path / "file").write_bytes(stored.tobytes())
    handles = [os.open(tmp_path / "file", os.O_RDONLY)]
    if hasattr(os, "O_DIRECT"):
        handles.append(os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT))
    target = np.zeros((len(handles) + 1, 2, 100_000), np.uint8)
    for number, kind in enumerate((CACHED, DIRECT)[: len(handles)]):
        pieces = [
            Piece(kind, handles[number], 4097 * place, 100_000, target[number, place].ctypes.data) for place in (0, 1)
        ]
        transfers.begin(number, True, pieces)
    transfers.begin(9, False, [memory(stored[5:100_005], target[-1, 0])])
    assert sorted(endings(transfers, len(handles) + 1)) == [*((number, 0) for number in range(len(handles))), (9, 0)]
    for number in range(len(handles)):
        for place in (0, 1):
            assert (target[number, place] == stored[4097 * place :][:100_000]).all()
    assert (target[-1, 0] == stored[5:100_005]).all()
    for handle in handles:
        os.close(handle)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no O_DIRECT")
def test_whole_blocks_go_straight_to_their_place(transfers: Transfers, tmp_path: Path) -> None:
    stored = np.random.default_rng(1).integers(0, 256, 1 << 20, np.uint8)
    (tmp_path / "file").write_bytes(stored.tobytes())
    handle = os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT)
    room = np.zeros((1 << 20) + 4096, np.uint8)
    skip = -room.ctypes.data % 4096
    transfers.begin(1, True, [Piece(DIRECT, handle, 8192, 65536, room.ctypes.data + skip)])
    assert endings(transfers, 1) == [(1, 0)]
    assert (room[skip:][:65536] == stored[8192:][:65536]).all()
    assert not room[skip + 65536 :].any()
    os.close(handle)


def test_what_goes_wrong_is_told(transfers: Transfers, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 100)
    handle = os.open(tmp_path / "short", os.O_RDONLY)
    target = np.zeros(5000, np.uint8)
    transfers.begin(1, True, [Piece(CACHED, handle, 50, 5000, target.ctypes.data)])
    assert endings(transfers, 1) == [(1, errno.EIO)]
    transfers.begin(2, True, [Piece(DIRECT, handle, 0, 5000, target.ctypes.data)])
    assert endings(transfers, 1)[0] in ((2, errno.EIO), (2, errno.EINVAL))
    os.close(handle)
    transfers.begin(3, True, [Piece(CACHED, handle, 0, 10, target.ctypes.data)])
    assert endings(transfers, 1) == [(3, errno.EBADF)]


def test_urgent_ones_go_first_and_others_alone(wire: Transfers) -> None:
    source, target = np.ones(50_000, np.uint8), np.zeros(50_000, np.uint8)
    order = [(0, True), (1, False), (2, False), (3, True), (4, True)]
    for id, urgent in order:
        wire.begin(id, urgent, [memory(source, target)] * (LONG if id == 0 else 1))
    wire.change(0, urgent=True, cancelled=True)
    assert [id for id, _ in endings(wire, 5)] in ([0, 3, 4, 1, 2], [0, 4, 3, 1, 2])


def test_one_that_becomes_urgent_is_no_longer_held_back(wire: Transfers) -> None:
    source, target = np.ones(50_000, np.uint8), np.zeros(50_000, np.uint8)
    wire.begin(0, True, [memory(source, target)] * LONG)
    wire.begin(1, False, [memory(source, target)])
    wire.begin(2, False, [memory(source, target)])
    wire.change(2, urgent=True, cancelled=False)
    wire.change(0, urgent=True, cancelled=True)
    assert [id for id, _ in endings(wire, 3)] == [0, 2, 1]


def test_what_nobody_wants_is_given_up_before_it_begins_or_between_its_pieces(wire: Transfers) -> None:
    source, target = np.ones(50_000, np.uint8), np.zeros((3, 50_000), np.uint8)
    wire.begin(0, True, [memory(source, target[0])] * LONG + [memory(source, target[2])])
    wire.begin(1, False, [memory(source, target[1])])
    wire.change(1, urgent=False, cancelled=True)
    assert endings(wire, 1) == [(1, CANCELLED)]
    until(lambda: target[0].all())
    wire.change(0, urgent=True, cancelled=True)
    assert endings(wire, 1) == [(0, CANCELLED)]
    assert not target[1:].any()
    wire.change(7, urgent=True, cancelled=True)  # one that is not there: it has ended meanwhile
    assert wire.take() == []


def test_copies_over_a_wire_take_their_time_one_after_another(wire: Transfers) -> None:
    source, target = np.ones(50_000, np.uint8), np.zeros(50_000, np.uint8)
    begin = time.perf_counter()
    for id in range(3):
        wire.begin(id, True, [memory(source, target)])
    endings(wire, 3)
    assert time.perf_counter() - begin >= 3 * 50_000 * SLOW


def test_waits_end_by_an_ending_a_poke_a_limit_or_a_stop(transfers: Transfers) -> None:
    assert not transfers.wait(transfers.seen, 0.01)
    threading.Timer(0.05, transfers.poke).start()
    assert transfers.wait(transfers.seen, 60.0)
    assert transfers.take() == []
    assert not transfers.wait(transfers.seen, 0.01), "a poke counts once"
    stopping = threading.Timer(0.05, transfers.stop)
    stopping.start()
    # It would be ended by the time that a test may take.
    transfers.wait(transfers.seen, 3000.0)
    stopping.join()


def test_who_feeds_is_woken_by_endings_that_nobody_waits_for_and_by_kicks(transfers: Transfers) -> None:
    woken = threading.Semaphore(0)

    def feed() -> None:
        while transfers.wait_for_kick():
            woken.release()
        woken.release()

    thread = threading.Thread(target=feed)
    thread.start()
    transfers.kick()
    assert woken.acquire(timeout=60)
    source, target = np.ones(10, np.uint8), np.zeros(10, np.uint8)
    transfers.begin(0, True, [memory(source, target)])
    assert woken.acquire(timeout=60)
    assert transfers.take() == [(0, 0)]
    transfers.stop()
    assert woken.acquire(timeout=60)
    thread.join(60)
    assert not thread.is_alive()


def test_more_endings_than_are_taken_at_once(transfers: Transfers) -> None:
    target = np.zeros(200, np.uint8)
    source = np.arange(200, dtype=np.uint8)
    for id in range(200):
        transfers.begin(id, True, [memory(source[id : id + 1], target[id : id + 1])])
    while (target != source).any():
        time.sleep(0.001)
    assert sorted(endings(transfers, 200)) == [(id, 0) for id in range(200)]


def test_a_piece_is_laid_out_as_the_kernels_read_it() -> None:
    assert ctypes.sizeof(Piece) == 40
