"""The log of changes: what was written is read, what was torn is cut off, and whatever else is wrong is told with its place."""

import errno
import os
import shutil
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError, DataError
from anabranch.graph.live import log as log_module
from anabranch.graph.live.changes import Change, decode, encode
from anabranch.graph.live.log import CRC, HEAD, LEAST_PIECE, MARK, SECTOR, Log, read_log

DIM = 3


def change(*ids, seed=0):
    vectors = np.random.default_rng(seed + sum(ids)).normal(size=(len(ids), DIM)).astype(np.float32)
    return Change(np.array(ids, np.int64), vectors)


def gone(*ids):
    return Change(np.array(ids, np.int64), None)


def same(left, right):
    assert [one.ids.tolist() for one in left] == [one.ids.tolist() for one in right]
    for one, other in zip(left, right, strict=True):
        assert (one.vectors is None) == (other.vectors is None)
        if one.vectors is not None:
            np.testing.assert_array_equal(one.vectors, other.vectors)


WRITTEN = [[change(1, 2)], [gone(2), change(7)], [change(3, 4, 5)]]


@pytest.fixture
def path(tmp_path):
    log = Log.create(tmp_path / "log", dim=DIM, base="b", segment=1, first=5)
    assert [log.append(encode(changes)) for changes in WRITTEN] == [5, 6, 7]
    log.sync()
    log.close()
    return tmp_path / "log"


def test_what_was_written_is_read(path):
    found = read_log(path, is_last=True)
    assert [frame.number for frame in found.frames] == [5, 6, 7]
    for frame, changes in zip(found.frames, WRITTEN, strict=True):
        same(frame.changes, changes)
    assert (found.size, found.torn) == (path.stat().st_size, 0)
    assert (found.header.dim, found.header.base, found.header.segment, found.header.first) == (DIM, "b", 1, 5)
    assert path.stat().st_mode & 0o777 == 0o600


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2**63 - 1), unique=True, max_size=4), st.booleans()), max_size=5),
    st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_any_changes_go_both_ways(drawn, dim):
    made = []
    for ids, is_gone in drawn:
        vectors = np.random.default_rng(len(ids)).normal(size=(len(ids), dim)).astype(np.float32)
        made.append(Change(np.array(ids, np.int64), None if is_gone else vectors))
    same(decode(encode(made), dim), made)


def test_a_log_ends_anywhere_in_its_last_frame_and_nothing_before_is_lost(path):
    content, ends = path.read_bytes(), [frame.end for frame in read_log(path, is_last=True).frames]
    for size in range(ends[0], len(content)):
        path.write_bytes(content[:size])
        found = read_log(path, is_last=True)
        kept = sum(end <= size for end in ends)
        assert (len(found.frames), found.torn) == (kept, size - ends[kept - 1])
        if found.torn:
            with pytest.raises(DataError, match=f"damaged at byte {ends[kept - 1]:,}, in change {5 + kept}"):
                read_log(path, is_last=False)


def test_a_torn_tail_is_cut_off_and_the_log_goes_on(path):
    path.write_bytes(path.read_bytes()[:-3])
    log = Log.resume(path, read_log(path, is_last=True))
    assert log.append(encode([gone(9)])) == 7
    log.close()
    found = read_log(path, is_last=True)
    assert [frame.number for frame in found.frames] == [5, 6, 7]
    same(found.frames[-1].changes, [gone(9)])


def test_a_byte_that_changed_is_never_taken_for_a_torn_tail(path):
    content = path.read_bytes()
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 0x40
        path.write_bytes(altered)
        with pytest.raises(DataError, match=r"damaged|is not a log"):
            read_log(path, is_last=True)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_frame_that_is_missing_in_between_is_damage(path, place):
    content, found = path.read_bytes(), read_log(path, is_last=True)
    ends = [found.frames[0].end - (found.frames[1].end - found.frames[0].end), *(frame.end for frame in found.frames)]
    begin = content.index(MARK) if place == 0 else ends[place]
    path.write_bytes(content[:begin] + content[ends[place + 1] :])
    if place == 2:
        # The last one: as if it had never been.
        assert len(read_log(path, is_last=True).frames) == 2
        return
    with pytest.raises(DataError, match=f"in change {5 + place}"):
        read_log(path, is_last=True)


def test_pieces_that_the_disk_never_wrote_are_a_torn_tail(path):
    log = Log.resume(path, read_log(path, is_last=True))
    begin = log.size
    log.append(encode([change(*range(200))]))
    log.close()
    content = path.read_bytes()
    for sector in range(begin // SECTOR + 1, len(content) // SECTOR):
        torn = bytearray(content)
        torn[sector * SECTOR : (sector + 1) * SECTOR] = bytes(SECTOR)
        path.write_bytes(torn)
        found = read_log(path, is_last=True)
        assert (len(found.frames), found.size) == (3, begin)
    path.write_bytes(content[:begin] + bytes(3000))
    assert read_log(path, is_last=True).torn == 3000
    # A whole frame behind it was written later, so it was not the last.
    path.write_bytes(content[: begin - 100] + bytes(100) + content[begin:])
    with pytest.raises(DataError, match="damaged"):
        read_log(path, is_last=True)


@pytest.mark.parametrize("before", [0, 200, 408, 424, 472, 488])
def test_zeros_that_were_written_are_not_pieces_that_are_missing(tmp_path, before):
    """Whatever a frame holds and wherever it lies, a byte of it that changed is damage, though all its vectors are zeros."""
    path = tmp_path / "log"
    log = Log.create(path, dim=1, base="b", segment=1, first=1)
    if before:
        log.append(encode([gone(*range(1, before // 8 + 1))]))
    begin = log.size
    log.append(encode([Change(np.arange(1, 301), np.zeros((300, 1), np.float32)), gone(0)]))
    log.close()
    content, last = path.read_bytes(), len(read_log(path, is_last=True).frames)
    assert begin % SECTOR == 0 or LEAST_PIECE <= begin % SECTOR <= SECTOR - LEAST_PIECE
    assert len(content) % SECTOR == 0 or LEAST_PIECE <= len(content) % SECTOR <= SECTOR - LEAST_PIECE
    # All of head and tail, and some in between; to zero, and a bit.
    for place in [
        *range(begin, begin + 24),
        *range(begin + 24, len(content) - 20, 97),
        *range(len(content) - 20, len(content)),
    ]:
        for byte in {0, content[place] ^ 0x10} - {content[place]}:
            path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
            with pytest.raises(DataError, match=f"damaged at byte {begin:,}, in change {last}"):
                read_log(path, is_last=True)


def test_a_frame_is_not_called_torn_for_what_is_missing_behind_it(path):
    """One that was acknowledged is damaged, and the one behind it was never written."""
    content, begin = path.read_bytes(), read_log(path, is_last=True).frames[1].end
    for place in (begin + 1, len(content) - 1):
        altered = bytearray(content)
        altered[place] ^= 1
        path.write_bytes(altered + bytes(2 * SECTOR))
        with pytest.raises(DataError, match=f"damaged at byte {begin:,}"):
            read_log(path, is_last=True)


def test_what_would_not_be_read_again_is_not_written(path, monkeypatch):
    log = Log.resume(path, read_log(path, is_last=True))
    before = path.read_bytes()
    monkeypatch.setattr(log_module, "MOST_PAYLOAD", 100)
    with pytest.raises(CapacityError, match=r"104 bytes is too large .* at most 100"):
        log.append(encode([gone(*range(12))]))
    assert path.read_bytes() == before
    assert log.append(encode([gone(*range(11))])) == 8
    log.close()
    assert len(read_log(path, is_last=True).frames) == 4


def test_who_has_nothing_to_bring_to_the_disk_waits_for_who_brings_it(path, monkeypatch):
    """Two threads: the first is told by the disk that it failed, and the second must not go on as if all were there."""
    log = Log.resume(path, read_log(path, is_last=True))
    log.append(encode([gone(1)]))
    inside, go_on, told = threading.Event(), threading.Event(), []

    def broken(handle):
        inside.set()
        assert go_on.wait(60)
        raise OSError(errno.EIO, "Input/output error")

    def sync():
        try:
            log.sync()
        except DataError as error:
            told.append(str(error))

    monkeypatch.setattr(os, "fdatasync", broken)
    threads = [threading.Thread(target=sync) for _ in range(2)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    threads[1].join(0.05)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(told) == 2
    log.close()


def test_vectors_that_look_like_a_frame_are_none(tmp_path):
    """A client sends the bytes of a frame as numbers, and the write is torn: without the salt the rest would be called damage.

    Whether it knows what all are xor with, which is in a file that it cannot read, makes no difference.
    """
    log = Log.create(tmp_path / "log", dim=8, base="b", segment=1, first=1)
    head = HEAD.pack(MARK, 0, 9)
    forged = head + CRC.pack(zlib.crc32(head)) + CRC.pack(zlib.crc32(b""))
    for sent in (forged.ljust(32, b"\1"), log.header.masked(forged.ljust(32, b"\1"))):
        vector = np.frombuffer(sent, "<f4")[None].astype(np.float32)
        log.append(encode([Change(np.array([1]), vector)]))
    log.close()
    content = (tmp_path / "log").read_bytes()
    assert forged in content
    (tmp_path / "log").write_bytes(content[:-2])
    assert len(read_log(tmp_path / "log", is_last=True).frames) == 1


def test_foreign_files(tmp_path, path):
    with pytest.raises(DataError, match="cannot read"):
        read_log(tmp_path / "none", is_last=True)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match="is not a log of changes"):
        read_log(tmp_path / "text", is_last=True)
    content = path.read_bytes()
    for size in range(8, content.index(MARK)):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match="its header is not what was written"):
            read_log(path, is_last=True)


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_takes_nothing_and_the_log_goes_on(path, monkeypatch):
    log = Log.resume(path, read_log(path, is_last=True))
    before, own, calls = path.read_bytes(), os.pwrite, []

    def partly(handle, content, place):
        calls.append(len(content))
        if len(calls) > 1:
            no_room()
        return own(handle, content[:10], place)

    monkeypatch.setattr(os, "pwrite", partly)
    with pytest.raises(CapacityError, match="no room left on disk"):
        log.append(encode([gone(1)]))
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert log.append(encode([gone(1)])) == 8
    log.close()
    assert len(read_log(path, is_last=True).frames) == 4


def test_a_frame_that_cannot_be_taken_back_ends_the_writing(path, monkeypatch):
    log = Log.resume(path, read_log(path, is_last=True))
    monkeypatch.setattr(os, "pwrite", no_room)
    monkeypatch.setattr(os, "ftruncate", no_room)
    with pytest.raises(CapacityError):
        log.append(encode([gone(1)]))
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"no changes are taken any more: .* nor cut back"):
        log.append(encode([gone(1)]))
    log.close()


def test_what_cannot_be_brought_to_the_disk_ends_the_writing(path, monkeypatch):
    log = Log.resume(path, read_log(path, is_last=True))
    log.append(encode([gone(1)]))

    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(DataError, match="input/output error"):
        log.sync()
    monkeypatch.undo()
    for call in (log.sync, lambda: log.append(encode([gone(1)]))):
        with pytest.raises(DataError, match=r"no changes are taken any more: .*Input/output error"):
            call()
    log.close()


def test_a_file_that_is_begun_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(CapacityError):
        Log.create(tmp_path / "log", dim=DIM, base="b", segment=1, first=1)
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
