"""The files of an index that takes changes: one process at a time writes them, nobody else reads them, and damage is told, not served."""

import errno
import os
import threading
import time

import numpy as np
import pytest
from starlette.testclient import TestClient

from anabranch.errors import CapacityError, DataError, InputError
from anabranch.graph import beside
from anabranch.graph.array_file import read_arrays
from anabranch.graph.beside import FolderLock, segments
from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.storage import KIND, VERSIONS
from anabranch.graph.live import LiveIndex, live_folder, open_index, replacing
from anabranch.graph.live import log as log_module
from anabranch.graph.live.log import Log
from anabranch.graph.serve import Sources, Writes, create_app
from hnsw_checks import drawn

DIM, COUNT = 6, 40
VECTORS = drawn(200, DIM, 7)


def saved(path, rows=COUNT, **options):
    index = HNSW(DIM, M=6, ef_construction=30, workers=1, **options)
    if rows:
        index.add(VECTORS[:rows])
    index.save(path)
    return path


@pytest.fixture
def path(tmp_path):
    return saved(tmp_path / "index.anb")


def opened(path, **options):
    return LiveIndex.open(path, workers=1, **options)


def in_a_thread(work):
    """What another thread is told that does some work."""
    told = []

    def tried():
        try:
            work()
        except DataError as error:
            told.append(str(error).partition(";")[0])

    thread = threading.Thread(target=tried)
    thread.start()
    thread.join()
    return "".join(told)


# Who writes


def test_a_first_change_that_is_refused_keeps_nothing_locked(path, monkeypatch):
    live = opened(path)
    saved(path, 30)
    with pytest.raises(DataError, match="was changed by another process"):
        live.delete([1])
    assert not live_folder(path).exists()
    with opened(path) as other:
        other.delete([2])
        with pytest.raises(DataError, match="is written by another process"):
            live.delete([1])
    with pytest.raises(DataError, match="was changed by another process"):
        live.delete([1])
    with opened(path) as other:
        assert len(other) == 29
    live.close()


def test_a_log_that_cannot_be_begun_keeps_nothing_locked(path, monkeypatch):
    def full(*_, **__):
        raise CapacityError("no room left on disk")

    with opened(path) as live:
        monkeypatch.setattr(Log, "create", full)
        with pytest.raises(CapacityError):
            live.delete([1])
        monkeypatch.undo()
        FolderLock(live_folder(path)).release()
        live.delete([1])
    assert len(open_index(path)) == COUNT - 1


def test_a_reload_after_a_refused_change_takes_changes_again(path):
    source = Sources([path], writes=Writes())
    old = source.load().vectors.live
    saved(path, 30)
    with pytest.raises(DataError, match="read it again"):
        old.delete([1])
    source.load(2).vectors.live.delete([1])
    # Another server took them meanwhile, of the same file.
    source.close()
    first, second = (Sources([path], writes=Writes()) for _ in range(2))
    os.rename(live_folder(path), path.with_suffix(".away"))
    first.load()
    second.load().vectors.live.delete([1, 2])
    with pytest.raises(DataError, match="is written by another process"):
        first.load(2).vectors.live.delete([3])
    second.close()
    found = first.load(3).vectors
    assert (len(found.index), found.live.delete([3])[0]) == (28, 2)
    first.close()


def test_nobody_takes_changes_of_an_index_that_is_replaced(path):
    live = opened(path)
    with replacing(path):
        with pytest.raises(DataError, match="is written by another process"):
            live.delete([1])
        assert in_a_thread(lambda: HNSW.load(path).save(path)) == f"{live_folder(path)} is written by another process"
        # Who holds it may.
        with replacing(path):
            HNSW.load(path).save(path)
    assert not live_folder(path).exists()
    live.delete([1])
    with pytest.raises(InputError, match="which would be lost"), replacing(path):
        pass
    live.close()


def test_changes_that_come_between_a_look_and_the_lock_are_not_lost(path, monkeypatch):
    own = FolderLock.__init__

    def late(self, folder):
        with monkeypatch.context() as patch:
            patch.setattr(FolderLock, "__init__", own)
            with opened(path) as live:
                live.delete([1])
        own(self, folder)

    monkeypatch.setattr(FolderLock, "__init__", late)
    with pytest.raises(InputError, match="which would be lost"), replacing(path):
        pass
    assert len(open_index(path)) == COUNT - 1


def test_nothing_is_made_where_there_is_nothing_to_replace(tmp_path, path):
    with replacing(tmp_path / "none" / "index.anb"):
        pass
    assert not (tmp_path / "none").exists()
    # What a killed one left.
    live_folder(path).mkdir()
    (live_folder(path) / "lock").touch()
    with replacing(path):
        assert live_folder(path).exists()
    assert not live_folder(path).exists()


def test_a_lock_on_a_file_that_is_removed_is_none(tmp_path):
    """Threads take and remove it all the time: never two at once."""
    folder, inside, most, errors = tmp_path / "f", [0], [0], []

    def work():
        for _ in range(60):
            try:
                lock = FolderLock(folder)
            except DataError as error:
                errors.append(str(error))
                continue
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            os.sched_yield()
            inside[0] -= 1
            lock.release(clean=True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert all("is written by another process" in error for error in errors)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    own, calls = beside.fcntl.flock, []

    def removed(handle, how):
        if how != beside.fcntl.LOCK_UN:
            calls.append(handle)
            if len(calls) == 1:
                (tmp_path / "f" / "lock").unlink()
        own(handle, how)

    monkeypatch.setattr(beside.fcntl, "flock", removed)
    lock = FolderLock(tmp_path / "f")
    assert len(calls) == 2
    with pytest.raises(DataError, match="is written by another process"):
        FolderLock(tmp_path / "f")
    lock.release()


# Who reads


def test_only_the_owner_reads_what_changed(path):
    before = os.umask(0o022)
    try:
        with opened(path) as live:
            live.delete([1])
            live.snapshot()
    finally:
        os.umask(before)
    assert live_folder(path).stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in live_folder(path).iterdir()} == {0o600}


def test_changes_that_may_not_be_read_are_told_not_left_out(path, monkeypatch):
    with opened(path) as live:
        live.delete([1])

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(DataError, match=r"cannot read .*index.anb.live: permission denied"):
        open_index(path)
    monkeypatch.undo()
    assert segments(path) == segments(path.with_suffix(".none")) == segments(path.parent / ("x" * 300)) == []


# Damage


def damaged(file):
    """One bit of a vector, in its place."""
    row = bytes(read_arrays(file, KIND, versions=VERSIONS).arrays["rows"][5])
    content = bytearray(file.read_bytes())
    content[content.index(row)] ^= 1
    with open(file, "r+b") as handle:
        handle.write(content)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_damaged_snapshot_is_not_served(path, mmap):
    with opened(path) as live:
        live.delete([1])
        live.snapshot()
    damaged(live_folder(path) / "snapshot.anb")
    for call in (opened, open_index):
        with pytest.raises(DataError, match=r"snapshot.anb is damaged: the checksum of 'rows' is wrong"):
            call(path, mmap=mmap)


@pytest.mark.parametrize("has_changes", [False, True])
def test_a_damaged_index_does_not_become_a_snapshot(path, has_changes):
    if has_changes:
        with opened(path) as live:
            live.delete([1])
    damaged(path)
    with pytest.raises(DataError, match=r"index.anb is damaged: the checksum of 'rows' is wrong"):
        opened(path, mmap=True)


# Changes


def test_a_change_that_no_frame_can_hold_is_refused(path, monkeypatch):
    monkeypatch.setattr(log_module, "MOST_PAYLOAD", 200)
    with opened(path) as live:
        with pytest.raises(InputError, match=r"7 elements has 232 bytes, and one may have 200; send fewer at once"):
            live.upsert(range(7), VECTORS[50:57])
        with pytest.raises(InputError, match="send fewer at once"):
            live.delete(range(25))
        assert live.number == 0
        live.upsert(range(6), VECTORS[50:56])
        live.delete(range(10, 34))
    assert len(open_index(path)) == COUNT - 24


def test_changes_that_wait_together_fit_in_a_frame_each(path, monkeypatch):
    """Whatever comes at once: a group is cut where its payload would be too large, what stands before numbers included."""
    monkeypatch.setattr(log_module, "MOST_PAYLOAD", 160)
    with opened(path) as live:
        live.delete([0])
        gate, own = threading.Event(), Log.append

        def slow(self, payload):
            gate.wait(60)
            return own(self, payload)

        monkeypatch.setattr(Log, "append", slow)
        threads = [threading.Thread(target=live.upsert, args=([id], VECTORS[id : id + 1])) for id in range(100, 112)]
        for thread in threads:
            thread.start()
        gate.set()
        for thread in threads:
            thread.join()
        assert len(live) == COUNT - 1 + 12
    assert len(open_index(path)) == COUNT - 1 + 12


@pytest.mark.parametrize("dtype", ["f16", "i8"])
def test_rows_that_are_kept_short_are_the_same_after_a_start(tmp_path, dtype):
    """They lie about the mean of the first that came, not of all that came until the start."""
    path = saved(tmp_path / "short.anb", 0, dtype=dtype, rerank=False)
    with opened(path) as live:
        live.delete([9])
        live.upsert([0, 1], VECTORS[:2] + 3)
        live.upsert(range(2, 30), VECTORS[2:30] * 7)
        live.delete([1])
        live.upsert([0], VECTORS[40:41])
        live.delete(live.index.ids)
        live.upsert([50], VECTORS[50:51] - 8)
        live.upsert(range(60, 80), VECTORS[60:80])
        ids = np.sort(live.index.ids)
        before = live.index.vectors(ids)
    after = open_index(path)
    np.testing.assert_array_equal(after.vectors(ids), before)
    assert np.sort(after.ids).tolist() == ids.tolist()


# Over HTTP


def test_a_distance_that_is_no_number_is_told_to_be_damage(path):
    with TestClient(create_app(Sources([path]))) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.01)
        held = client.app.state.serving.loaded().vectors.index._storage
        held.rows.view(np.float32)[:, 0] = np.inf
        answer = client.post("/search", json={"vectors": [[1.0] * DIM], "k": 3})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "damaged_index")
        assert "bring a copy of it back" in answer.json()["error"]["message"]
