"""A single element comes beside searches: the same bytes as alone, nobody kept out but for its last step, and all or nothing."""

import pickle
import threading

import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.changing import Changes
from anabranch.graph.hnsw.linking import Linker
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.hnsw.storage import Storage
from hnsw_checks import WAIT_S, check_graph, drawn, graph_bytes, thread, waits, wanted

VECTORS = drawn(300, 16, 5)
# Groups of equals, larger than half a list.
VECTORS[40:52] = VECTORS[7]
VECTORS[200:220] = VECTORS[8]
BITS = np.random.default_rng(0).integers(0, 256, (300, 8), np.uint8)


def made(count=0, **options):
    index = HNSW(16, **{"M": 4, "ef_construction": 40, "workers": 1, **options})
    if count:
        index.add(VECTORS[:count])
    return index


@pytest.fixture
def beside(monkeypatch):
    """How often an element came beside searches, and how often it did not."""
    came, whole = [0, 0], Changes.insert_beside

    def counted(self, *arguments, **options):
        found = whole(self, *arguments, **options)
        came[found is None] += 1
        return found

    monkeypatch.setattr(Changes, "insert_beside", counted)
    return came


CASES = {
    "l2": {},
    "ip": {"metric": "ip"},
    "cosine": {"metric": "cosine"},
    "i8": {"dtype": "i8"},
    "f16": {"dtype": "f16", "rerank": False},
    "flat": {"flat": True},
    "simple": {"heuristic": "simple"},
    "extended": {"extend_candidates": True, "keep_pruned": True},
}


def come_and_go(index, vectors):
    """Singles, some by ids of their own; some go, and others take their places, or none."""
    for number, vector in enumerate(vectors):
        index.add(vector, [10_000 - number] if number % 3 == 0 else None, reuse=number % 2 == 0)
        if number % 50 == 49:
            index.remove(index.ids[[3, 20]])
    return index


@pytest.mark.parametrize("name", CASES)
def test_beside_searches_it_gives_the_same_bytes(name, beside, monkeypatch):
    index = come_and_go(made(**CASES[name]), VECTORS)
    check_graph(index)
    assert beside[0] > 200
    assert beside[1] > 0
    monkeypatch.setattr(Changes, "insert_beside", lambda *_, **__: None)
    other = come_and_go(made(**CASES[name]), VECTORS)
    assert graph_bytes(index) == graph_bytes(other)
    # And in one call, where nothing goes.
    monkeypatch.undo()
    single, whole = made(**CASES[name]), made(**CASES[name])
    for vector in VECTORS:
        single.add(vector)
    whole.add(VECTORS)
    # By the inner product short ones cannot be reached, and with `simple` what stands alone among many near each other: these are
    # linked when that is seen, after a sixteenth more or a call.
    if not CASES[name].get("dtype") and name not in ("ip", "simple"):
        assert graph_bytes(single) == graph_bytes(whole)
    if name == "simple":
        assert single.repair() >= 0
        assert whole.repair() >= 0
    found = single.search(VECTORS[:20], 3, 80)[0]
    # Of few links, as `simple` leaves them, the nearest is what is found in both.
    same = 1 if name == "simple" else 3
    assert np.array_equal(found[:, :same], whole.search(VECTORS[:20], 3, 80)[0][:, :same]) or CASES[name].get("dtype")


def test_bits_come_so_too(beside):
    index = HNSW(64, "hamming", M=4, ef_construction=40, workers=1)
    for row in BITS:
        index.add(row)
    whole = HNSW(64, "hamming", M=4, ef_construction=40, workers=1)
    whole.add(BITS)
    assert beside[0] > 200
    assert graph_bytes(index) == graph_bytes(whole)


def test_what_wants_more_goes_the_long_way(beside):
    index = made(100)
    index.add(VECTORS[100])
    came = beside[0]
    with pytest.raises(InputError, match=r"ids\[0\] is 5, which is in the index"):
        index.add(VECTORS[101], [5])
    index.add(VECTORS[101], [5], update=True)
    assert np.array_equal(index.vectors([5])[0], VECTORS[101])
    index.add(VECTORS[102], repair=True)
    index.remove([9])
    index.add(VECTORS[103], [500])
    # In the place of the one that went.
    assert index._storage.count == 102
    coded = made(quantization="int4")
    coded.add(VECTORS[0])
    coded.add(VECTORS[1])
    assert beside[0] == came
    index.add(VECTORS[104])
    assert beside[0] == came + 1
    assert 501 in index


def test_searches_come_in_until_its_last_step_and_see_nothing_of_it(monkeypatch):
    index, whole, seen = made(200), Linker.prepare, []
    query = VECTORS[230] + np.float32(1e-3)
    before = index.search(query, 5, 80), index.search(VECTORS[:9], 5, 80)

    def prepare(self, slot_1):
        prepared = whole(self, slot_1)
        # Neither who waits with others in line nor a compiled search of one query is kept out.
        for queries in (query, VECTORS[:9]):
            reader = thread(lambda queries=queries: seen.append(index.search(queries, 5, 80)))
            reader.join(WAIT_S)
        return prepared

    monkeypatch.setattr(Linker, "prepare", prepare)
    new = int(index.add(VECTORS[230])[0])
    assert len(seen) == 2
    for (ids, distances), (old_ids, old_distances) in zip(seen, before, strict=True):
        assert np.array_equal(ids, old_ids)
        assert np.array_equal(distances, old_distances)
    assert index.search(query, 1, 80)[0][0, 0] == new


def test_who_wants_it_whole_waits_until_it_has_come(monkeypatch, tmp_path):
    index, whole, savers = made(200), Linker.prepare, []

    def prepare(self, slot_1):
        savers.append(thread(lambda: index.save(tmp_path / "x.anb")))
        wanted(index._lock, 1)
        return whole(self, slot_1)

    monkeypatch.setattr(Linker, "prepare", prepare)
    index.add(VECTORS[200])
    savers[0].join(WAIT_S)
    assert len(HNSW.load(tmp_path / "x.anb")) == 201


def test_what_fails_before_its_last_step_leaves_the_index_as_it_was(monkeypatch):
    index = made(200)
    index.add(VECTORS[200])
    before, whole = graph_bytes(index), Linker.prepare

    def fail(self, slot_1):
        whole(self, slot_1)
        raise MemoryError("none left")

    with monkeypatch.context() as patched:
        patched.setattr(Linker, "prepare", fail)
        with pytest.raises(MemoryError):
            index.add(VECTORS[250])
    assert graph_bytes(index) == before
    lock = index._lock
    assert (lock._is_owned, lock._is_exclusive, lock._is_closing, lock.gate.tolist()) == (False, False, False, [0, 0])
    # The next has the level, the id and the place that it had not taken.
    index.add(VECTORS[201])
    assert graph_bytes(index) == graph_bytes(made(202))


# The lock


def test_a_writer_beside_readers_keeps_them_out_for_a_moment():
    lock, order, stay = ReadWriteLock(), [], threading.Event()

    def read(name):
        with lock.read():
            order.append(name)

    def hold():
        with lock.read():
            order.append("inside")
            stay.wait(WAIT_S)
            order.append("gone")

    with lock.write_beside():
        holder = thread(hold)
        while not order:
            pass
        thread(lambda: read("beside")).join(WAIT_S)
        assert lock.gate.tolist() == [0, 0]
        threading.Timer(0.05, stay.set).start()
        with lock.exclusive():
            order.append("alone")
            assert lock.gate.tolist() == [1, 0]
            late = thread(lambda: read("late"))
            waits(lock, 1)
            order.append("still alone")
        late.join(WAIT_S)
        order.append("end")
    holder.join(WAIT_S)
    assert order == ["inside", "beside", "gone", "alone", "still alone", "late", "end"]
    assert lock.gate.tolist() == [0, 0]


def test_beside_who_changes_nothing_all_read_and_nobody_writes():
    lock, order = ReadWriteLock(), []

    def hold(name, how, **options):
        with how(**options):
            order.append(name)

    with lock.still():
        writers = [
            thread(lambda name=name, how=how: hold(name, how))
            for name, how in (("w", lock.write), ("b", lock.write_beside))
        ]
        wanted(lock, 2)
        for name, whole in (("part", False), ("whole", True)):
            reader = thread(lambda name=name, whole=whole: hold(name, lock.read, whole=whole))
            reader.join(WAIT_S)
        # Nor do searches in compiled code wait.
        assert lock.gate.tolist() == [0, 0]
        order.append("end")
    for one in writers:
        one.join(WAIT_S)
    assert order[:3] == ["part", "whole", "end"]
    assert sorted(order[3:]) == ["b", "w"]
    # One that waits for it comes in when it begins.
    with lock.write():
        keeper = thread(lambda: hold("still", lock.still))
        wanted(lock, 1)
        reader = thread(lambda: hold("late", lock.read, whole=True))
        waits(lock, 1)
    for one in (keeper, reader):
        one.join(WAIT_S)
    assert sorted(order[5:]) == ["late", "still"]
    assert (lock._is_owned, lock._is_still, lock._readers, lock.gate.tolist()) == (False, False, 0, [0, 0])


@pytest.mark.parametrize("how", ["save", "pickle"])
def test_searches_go_on_while_it_is_written_and_changes_wait(how, monkeypatch, tmp_path):
    """They stood still for as long as it took, behind the first change that waited."""
    index, seen, others, whole = made(200), [], [], Storage.arrays

    def arrays(self):
        others.append(thread(lambda: index.add(VECTORS[200:210])))
        others.append(thread(lambda: index.add(VECTORS[210])))
        wanted(index._lock, 2)
        for ask in (
            lambda: index.search(VECTORS[7], 1),
            lambda: index.search(VECTORS[:9], 1),
            lambda: index.ids,
            index.stats,
        ):
            reader = thread(lambda ask=ask: seen.append(ask()))
            reader.join(WAIT_S)
        assert len(seen) == 4
        assert index._storage.count == 200
        return whole(self)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "arrays", arrays)
        if how == "save":
            index.save(tmp_path / "x.anb")
        else:
            (tmp_path / "x.pickle").write_bytes(pickle.dumps(index))
    for one in others:
        one.join(WAIT_S)
    again = HNSW.load(tmp_path / "x.anb") if how == "save" else pickle.loads((tmp_path / "x.pickle").read_bytes())
    assert (len(again), len(index)) == (200, 211)


def test_writers_of_both_kinds_go_in_the_order_in_which_they_came():
    lock, order, writers = ReadWriteLock(), [], []

    def write(name, how):
        with how():
            order.append(name)

    with lock.write_beside():
        for number in range(6):
            how = lock.write if number % 2 else lock.write_beside
            writers.append(thread(lambda number=number, how=how: write(number, how)))
            wanted(lock, number + 1)
    for one in writers:
        one.join(WAIT_S)
    assert order == [0, 1, 2, 3, 4, 5]


def test_one_who_comes_beside_waits_behind_a_writer_that_waits_for_readers():
    lock, order, stay = ReadWriteLock(), [], threading.Event()

    def write(name, how):
        with how():
            order.append(name)

    def hold():
        with lock.read():
            stay.wait(WAIT_S)

    holder = thread(hold)
    while not lock._readers:
        pass
    first = thread(lambda: write("alone", lock.write))
    wanted(lock, 1)
    second = thread(lambda: write("beside", lock.write_beside))
    wanted(lock, 2)
    stay.set()
    for one in (holder, first, second):
        one.join(WAIT_S)
    assert order == ["alone", "beside"]


def test_many_singles_beside_many_searches_lose_nothing():
    index, stop, wrong = made(60, M=8), threading.Event(), []

    def search():
        while not stop.is_set():
            ids, distances = index.search(VECTORS[7], 4, 20)
            if (ids < 0).any() or (np.diff(distances) < 0).any():
                wrong.append(ids)
            index.search(VECTORS[:3], 4, 20)

    def add(part):
        for number in part:
            index.add(VECTORS[number], [number])

    readers = [thread(search), thread(search)]
    writers = [thread(lambda part=part: add(part)) for part in (range(60, 180), range(180, 300))]
    for one in writers:
        one.join(WAIT_S)
    stop.set()
    for one in readers:
        one.join(WAIT_S)
    assert not wrong
    assert sorted(index.ids.tolist()) == list(range(300))
    check_graph(index)
    found = index.search(VECTORS, 1, 100)[1]
    assert (found[:, 0] < 1e-4).all()
