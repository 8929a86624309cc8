"""An index that takes changes for good: what was acknowledged is there again, after any crash, and of the rest nothing half."""

import contextlib
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest

from anabranch import machine
from anabranch.errors import CapacityError, DataError, InputError
from anabranch.graph.hnsw import HNSW
from anabranch.graph.live import LiveIndex, NoRoomError, background, live_folder, open_index
from anabranch.graph.live.log import Log
from hnsw_checks import check_graph, drawn
from waiting import until

DIM, COUNT = 6, 60
VECTORS = drawn(600, DIM, 5)


@pytest.fixture
def path(tmp_path):
    index = HNSW(DIM, M=6, ef_construction=40, workers=1)
    index.add(VECTORS[:COUNT])
    index.save(tmp_path / "index.anb")
    return tmp_path / "index.anb"


def opened(path, **options):
    return LiveIndex.open(path, workers=1, **options)


def content(index):
    ids = np.sort(index.ids)
    return {id: row.tolist() for id, row in zip(ids.tolist(), index.vectors(ids), strict=True)}


def start():
    return {id: VECTORS[id].tolist() for id in range(COUNT)}


def after_a_crash(path, tmp_path):
    """What a new process finds: a copy of the files as they are now."""
    place = tmp_path / f"crash-{time.monotonic_ns()}"
    place.mkdir()
    shutil.copy(path, place / path.name)
    if live_folder(path).exists():
        shutil.copytree(live_folder(path), live_folder(place / path.name))
    with opened(place / path.name) as live:
        check_graph(live.index)
        found = content(live.index)
    assert content(open_index(place / path.name)) == found
    shutil.rmtree(place)
    return found


def files(path):
    return sorted(file.name for file in live_folder(path).iterdir())


def test_nothing_is_written_before_the_first_change(path):
    before = path.read_bytes()
    with opened(path) as live:
        assert (len(live), live.number, live.log_bytes, live.has_changes) == (COUNT, 0, 0, False)
        assert not live_folder(path).exists()
        live.upsert([], np.empty((0, DIM)))
        live.delete([])
        assert not live_folder(path).exists()
        live.delete([3])
    assert files(path) == ["lock", "log-00000001"]
    assert path.read_bytes() == before


def test_changes_are_there_again(path, tmp_path):
    with opened(path) as live:
        number, known = live.upsert([3, 100], VECTORS[200:202])
        assert (number, known.tolist()) == (1, [True, False])
        number, known = live.delete([5, 999, 100])
        assert (number, known.tolist()) == (2, [True, False, True])
        expected = {**start(), 3: VECTORS[200].tolist()}
        del expected[5]
        assert content(live.index) == expected == after_a_crash(path, tmp_path)
        assert live.index.search(VECTORS[200:201], 1)[0].tolist() == [[3]]
    with opened(path) as live:
        assert (content(live.index), live.number, live.counts.replayed) == (expected, 2, 4)
        assert live.upsert([5], VECTORS[300:301])[0] == 3
        assert after_a_crash(path, tmp_path) == {**expected, 5: VECTORS[300].tolist()}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_crash_after_any_change_loses_nothing(path, tmp_path, seed):
    """Random changes, snapshots and new starts against a dictionary."""
    generator, expected, live = np.random.default_rng(seed), start(), opened(path)
    for turn in range(30):
        what = generator.integers(8)
        ids = generator.choice(90, generator.integers(1, 6), replace=False)
        if what < 4:
            rows = VECTORS[generator.integers(0, 600, len(ids))]
            live.upsert(ids, rows)
            expected |= {id: row.tolist() for id, row in zip(ids.tolist(), rows, strict=True)}
        elif what < 6:
            live.delete(ids)
            expected = {id: row for id, row in expected.items() if id not in ids}
        elif what == 6:
            live.snapshot()
        else:
            live.close()
            live = opened(path)
        assert content(live.index) == expected
        if turn % 3 == 0:
            assert after_a_crash(path, tmp_path) == expected
    live.close()
    assert content(open_index(path)) == expected


def test_a_snapshot_cuts_the_log_and_a_crash_within_it_loses_nothing(path, tmp_path, monkeypatch):
    seen, own = [], background.write_snapshot
    with opened(path) as live:
        live.upsert([1, 70], VECTORS[100:102])
        live.delete([2])
        expected, before = content(live.index), live.log_bytes

        def watched(folder, state, base, number, named):
            seen.append((files(path), after_a_crash(path, tmp_path)))
            # Changes go on meanwhile.
            live.upsert([71], VECTORS[110:111])
            own(folder, state, base, number, named)
            seen.append((files(path), after_a_crash(path, tmp_path)))

        monkeypatch.setattr(background, "write_snapshot", watched)
        live.snapshot()
        later = {**expected, 71: VECTORS[110].tolist()}
        two = ["lock", "log-00000001", "log-00000002"]
        assert seen == [(two, expected), ([*two, "snapshot.anb"], later)]
        assert files(path) == ["lock", "log-00000002", "snapshot.anb"]
        assert after_a_crash(path, tmp_path) == later
        assert live.log_bytes < before
        assert (live.counts.snapshots, live.counts.failed) == (1, 0)
    assert content(HNSW.load(live_folder(path) / "snapshot.anb")) == expected
    with opened(path) as live:
        assert (content(live.index), live.counts.replayed) == (later, 1)


def test_snapshots_come_by_themselves(path, tmp_path):
    with opened(path, snapshot_bytes=2000) as live:
        for number in range(60):
            live.upsert([number], VECTORS[100 + number][None])
            if number == 40:
                until(lambda: live.counts.snapshots)
        expected = {id: VECTORS[100 + id].tolist() for id in range(60)}
        assert after_a_crash(path, tmp_path) == expected
        until(lambda: live.log_bytes < 2000)
    # A log that is long already is cut when it is opened.
    with opened(path) as live:
        for number in range(60):
            live.upsert([number], VECTORS[200 + number][None])
    with opened(path, snapshot_bytes=2000) as live:
        until(lambda: live.log_bytes < 2000)


def test_a_snapshot_that_fails_costs_nothing_and_is_not_tried_at_every_change(path, tmp_path, monkeypatch):
    calls = []

    def full(*_):
        calls.append(1)
        raise CapacityError("no room left on disk")

    monkeypatch.setattr(background, "write_snapshot", full)
    with opened(path, snapshot_bytes=1000) as live:
        for number in range(40):
            live.upsert([number], VECTORS[100 + number][None])
            if live._snapshots.thread is not None:
                live._snapshots.thread.join()
        # 40 changes of some 70 bytes: after 1,000, and after each 1,000 more.
        assert 1 <= len(calls) <= 4
        assert live.counts.failed == len(calls)
        assert after_a_crash(path, tmp_path) == content(live.index)
        with pytest.raises(CapacityError):
            live.snapshot()
        monkeypatch.undo()
        live.snapshot()
        assert len(files(path)) == 3
        assert after_a_crash(path, tmp_path) == content(live.index)


def test_without_memory_for_a_copy_changes_wait_and_searches_go_on(path, tmp_path, monkeypatch):
    own, inside, order = background.write_snapshot, threading.Event(), []

    def slow(*arguments):
        inside.set()
        order.append(live.index.search(VECTORS[:1], 1)[0].tolist())
        time.sleep(0.05)
        order.append(len(live))
        own(*arguments)

    monkeypatch.setattr(background, "write_snapshot", slow)
    with opened(path) as live:
        live.delete([7])
        monkeypatch.setattr(machine, "room_bytes", lambda: 10)
        thread = threading.Thread(target=live.snapshot)
        thread.start()
        inside.wait(60)
        live.delete([8])
        thread.join()
        assert order == [[[0]], COUNT - 1]
        assert len(live) == COUNT - 2
        assert after_a_crash(path, tmp_path) == content(live.index)


def test_changes_of_many_threads_share_writes(path, tmp_path, monkeypatch):
    own, gate = Log.sync, threading.Event()

    def slow(self):
        gate.wait(60)
        own(self)

    monkeypatch.setattr(Log, "sync", slow)
    with opened(path) as live:
        threads = [
            threading.Thread(target=live.upsert, args=([100 + number], VECTORS[number][None])) for number in range(8)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(live.groups.waiting) == 7)
        # Nobody sees what is not on the disk.
        assert len(live) == COUNT
        gate.set()
        for thread in threads:
            thread.join(60)
        assert (live.counts.writes, live.number, live.counts.syncs) == (2, 2, 2)
        assert after_a_crash(path, tmp_path) == {**start(), **{100 + n: VECTORS[n].tolist() for n in range(8)}}


def test_a_log_is_on_the_disk_before_the_next_one_is_begun(path, monkeypatch):
    """Else a loss of power could leave what came later without what came before."""
    own, seen = Log.create, []
    with opened(path, fsync="never") as live:
        live.delete([1])
        old = live.logs.current

        def watched(*arguments, **options):
            seen.append(old.is_dirty)
            return own(*arguments, **options)

        monkeypatch.setattr(Log, "create", watched)
        assert old.is_dirty
        live.snapshot()
        assert seen == [False]


def test_when_the_disk_is_waited_for(path, tmp_path):
    for fsync in ("always", "never", 0.01):
        with opened(path, fsync=fsync) as live:
            for number in range(5):
                live.upsert([number], VECTORS[100 + number][None])
            if fsync == "always":
                assert live.counts.syncs == 5
            elif fsync == "never":
                assert live.counts.syncs == 0
            else:
                until(lambda live=live: live.counts.syncs and not live.logs.current.is_dirty)
            assert after_a_crash(path, tmp_path) == content(live.index)
        shutil.rmtree(live_folder(path))


def test_names_of_files_are_brought_to_the_disk_before_anything_is_acknowledged(path, monkeypatch):
    """A file whose name was not written is gone after a loss of power: that of the folder, of each log and of a snapshot."""
    own, synced = os.fsync, []

    def noted(handle):
        synced.append(os.fstat(handle).st_ino)
        own(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with opened(path) as live:
        live.delete([1])
        folder = live_folder(path)
        assert {path.parent.stat().st_ino, folder.stat().st_ino, (folder / "log-00000001").stat().st_ino} <= set(synced)
        synced.clear()
        live.delete([2])
        assert synced == []
        live.snapshot()
        assert synced.count(folder.stat().st_ino) == 2
        assert (folder / "snapshot.anb").stat().st_ino in synced


@pytest.mark.parametrize(
    "options", [{"fsync": "often"}, {"fsync": 0}, {"fsync": True}, {"snapshot_bytes": 0}, {"most": 0}]
)
def test_settings_that_make_no_sense(path, options):
    with pytest.raises(InputError, match=next(iter(options))):
        opened(path, **options)


def test_one_at_a_time(path):
    with opened(path) as live:
        other = opened(path)
        live.delete([1])
        with pytest.raises(DataError, match="written by another process"):
            opened(path)
        with pytest.raises(DataError, match="written by another process"):
            other.delete([2])
        assert len(other) == COUNT
    # What the first has written the other does not know.
    with pytest.raises(DataError, match="changed by another process"):
        other.delete([2])
    other.close()


BAD = [
    ([1, 1], VECTORS[:2], r"ids\[1\] is 1, which stands there before"),
    ([-1], VECTORS[:1], r"ids\[0\] is -1"),
    ([1], VECTORS[:2], "one for each of the 2 vectors"),
    ([1], [[1.0, 2.0]], "rows of 6 numbers"),
    ([1], [[np.nan] * 6], "row 0 of vectors is not finite"),
    ([1, 2], [[1.0] * 6, [1e19] * 6], "row 1 of vectors is longer"),
    ([1.5], VECTORS[:1], "ids must be integers"),
    ([2**64 - 1], VECTORS[:1], r"ids\[0\] is 18446744073709551615"),
]


@pytest.mark.parametrize(("ids", "vectors", "message"), BAD)
def test_bad_changes_change_nothing(path, ids, vectors, message):
    with opened(path) as live:
        with pytest.raises(InputError, match=message):
            live.upsert(ids, vectors)
        assert not live.has_changes
        assert content(live.index) == start()


def test_an_index_that_is_full_says_so(path, tmp_path):
    with opened(path, most=COUNT + 2) as live:
        live.upsert([100, 101, 3], VECTORS[100:103])
        with pytest.raises(NoRoomError, match="holds 62 vectors and takes 62; 1 more do not fit"):
            live.upsert([3, 102], VECTORS[100:102])
        live.upsert([3], VECTORS[120:121])
        live.delete([3])
        live.upsert([102], VECTORS[:1])
        assert after_a_crash(path, tmp_path) == content(live.index)
        assert len(live) == COUNT + 2


def test_no_memory_is_told_before_anything_is_logged(path, monkeypatch):
    with opened(path) as live:
        monkeypatch.setattr(machine, "room_bytes", lambda: 10)
        with pytest.raises(CapacityError, match="no memory for 1 more vectors"):
            live.upsert([100], VECTORS[:1])
        assert not live.has_changes


def test_a_change_that_is_logged_and_cannot_be_made_ends_the_writing(path, tmp_path, monkeypatch):
    with opened(path) as live:
        live.delete([1])

        def fails(*_, **__):
            raise MemoryError

        monkeypatch.setattr(live.index, "add", fails)
        with pytest.raises(MemoryError):
            live.upsert([100], VECTORS[:1])
        monkeypatch.undo()
        with pytest.raises(DataError, match="could not be made"):
            live.upsert([101], VECTORS[:1])
        assert live.failure is not None
        # Nobody was told whether it is there; now it is.
        assert 100 in after_a_crash(path, tmp_path)


def test_a_log_that_cannot_be_written_changes_nothing(path, monkeypatch):
    with opened(path) as live:
        live.delete([1])
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CapacityError, match="no room left on disk"):
            live.upsert([1], VECTORS[:1])
        monkeypatch.undo()
        assert 1 not in live.index
        live.upsert([1], VECTORS[:1])
        assert 1 in live.index


# What belongs together


def changed_and_closed(path, *, snapshot=False):
    with opened(path) as live:
        live.delete([1])
        if snapshot:
            live.snapshot()
            live.delete([2])


def test_a_file_that_was_replaced_is_not_taken_for_the_one_that_was_changed(path):
    changed_and_closed(path)
    index = HNSW(DIM, M=6, workers=1)
    index.add(VECTORS[:20])
    # By another program: our own would not.
    index.save(path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    for call in (opened, open_index):
        with pytest.raises(DataError, match="holds changes of another index than"):
            call(path)
    # And not while it is written.
    shutil.rmtree(live_folder(path))
    with opened(path) as live:
        index.add(VECTORS[20:30])
        index.save(path)
        with pytest.raises(DataError, match="was changed by another process"):
            live.delete([1])


@pytest.mark.parametrize("what", ["folder", "log", "index"])
def test_nothing_is_acknowledged_that_nobody_would_find(path, tmp_path, what):
    """A file or the folder went, or has another name now: what is written would be lost. It may come back."""
    with opened(path) as live:
        live.upsert([100], VECTORS[100:101])
        place = {"folder": live_folder(path), "log": live_folder(path) / "log-00000001", "index": path}[what]
        aside = tmp_path / "aside"
        place.rename(aside)
        for _ in range(2):
            with pytest.raises(DataError, match="was removed or renamed while"):
                live.upsert([101], VECTORS[101:102])
        assert 101 not in live.index
        aside.rename(place)
        live.delete([100])
        live.upsert([102], VECTORS[102:103])
        held = content(live.index)
    assert content(open_index(path)) == held
    assert 102 in held


def test_what_is_missing_is_told(path):
    changed_and_closed(path, snapshot=True)
    folder = live_folder(path)
    aside = folder.with_name("aside")

    def without(name, message):
        shutil.copytree(folder, aside)
        (folder / name).unlink()
        with pytest.raises(DataError, match=message):
            opened(path)
        shutil.rmtree(folder)
        aside.rename(folder)

    without("snapshot.anb", "has a gap: log-00000002 begins with change 2, and 1 is missing")
    without("log-00000002", "holds a snapshot and no log")
    (folder / "log-00000002").rename(folder / "log-00000007")
    with pytest.raises(DataError, match="says that it is log 2"):
        opened(path)
    (folder / "log-00000007").rename(folder / "log-00000002")
    shutil.copy(path, folder / "snapshot.anb")
    with pytest.raises(DataError, match="is an index, but no snapshot of one that takes changes"):
        opened(path)


def test_a_log_in_between_that_is_missing_is_told(path, monkeypatch):
    def fails(*_):
        raise CapacityError("no room")

    monkeypatch.setattr(background, "write_snapshot", fails)
    with opened(path) as live:
        for id in (1, 2):
            live.delete([id])
            with pytest.raises(CapacityError):
                live.snapshot()
        live.delete([3])
    assert files(path) == ["lock", "log-00000001", "log-00000002", "log-00000003"]
    assert len(open_index(path)) == COUNT - 3
    (live_folder(path) / "log-00000002").unlink()
    with pytest.raises(DataError, match="log-00000003 begins with change 3, and 2 is missing"):
        opened(path)


def test_what_a_crash_left_of_a_write_is_removed(path):
    changed_and_closed(path)
    for name in (".log-00000002.abc", ".snapshot.anb.x1"):
        (live_folder(path) / name).write_bytes(b"half")
    opened(path).close()
    assert files(path) == ["lock", "log-00000001"]


# Ends


def test_a_closed_one_takes_nothing_and_is_searched(path):
    live = opened(path)
    live.delete([1])
    live.close()
    with pytest.raises(DataError, match="it was closed"):
        live.delete([2])
    live.close()
    assert live.index.search(VECTORS[:1], 1)[0].tolist() == [[0]]


def test_one_that_took_changes_cannot_be_retired(path):
    live = opened(path)
    assert live.retire()
    with pytest.raises(DataError, match="it was closed"):
        live.delete([1])
    live.close()
    with opened(path) as live:
        live.delete([1])
        assert not live.retire()
        live.delete([2])


def test_a_forked_process_changes_nothing(path):
    with opened(path) as live:
        live.delete([1])
        live._process = 1
        with pytest.raises(DataError, match="not in one that was forked"):
            live.delete([2])
        live._process = os.getpid()


def test_an_interrupt_comes_after_the_change_is_made(path, monkeypatch):
    own = Log.sync

    def interrupted(self):
        signal.raise_signal(signal.SIGINT)
        own(self)

    with opened(path) as live:
        monkeypatch.setattr(Log, "sync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            live.delete([1])
        monkeypatch.undo()
        assert 1 not in live.index
        with contextlib.suppress(KeyboardInterrupt):
            live.delete([2])
        assert live.number == 2
