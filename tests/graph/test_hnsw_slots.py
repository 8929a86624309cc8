"""Which slot holds which id, filters worked out once, and the places of deleted elements."""

import copy
import gc
import pickle
import signal
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError, InputError
from anabranch.graph.hnsw import HNSW, Filter, ShardedHNSW, filters, layout, storage
from anabranch.graph.hnsw.linking import Linker
from anabranch.graph.hnsw.slots import LEAST, Slots
from hnsw_checks import check_graph, drawn, graph_bytes, naive, recall

VECTORS, QUERIES = drawn(3000, 8, 1), drawn(40, 8, 2)


def built(count=1200, **options):
    index = HNSW(8, **{"M": 6, "ef_construction": 40, "workers": 1, "compact_at": None, **options})
    index.add(VECTORS[:count])
    return index


# The table of ids


class Held:
    """As much of a storage as a table of ids sees."""

    def __init__(self, room):
        self.label, self.deleted = np.full(room, -1, np.int64), np.ones(room, np.uint8)
        self.count, self.version = room, 0


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 40), unique=True, max_size=30)),
        max_size=12,
    )
)
@settings(max_examples=80, deadline=None)
def test_a_table_is_a_dictionary(turns):
    held = Held(400)
    slots, known, following = Slots(held), {}, 0
    slots.find(np.array([1]))
    for is_put, ids in turns:
        ids = [id for id in ids if (id in known) != is_put]
        array = np.array(ids, np.int64)
        if is_put:
            places = np.arange(following, following + len(ids))
            following += len(ids)
            held.label[places], held.deleted[places] = array, 0
            held.version += 1
            slots.put(array, places)
            known |= dict(zip(ids, places.tolist(), strict=True))
        else:
            slots.drop(array)
            held.deleted[[known.pop(id) for id in ids]] = 1
            held.version += 1
        asked = np.array([*known, 41, 2**62 + 1], np.int64)
        assert slots.find(asked).tolist() == [known.get(id, -1) for id in asked.tolist()]
    slots.forget()
    asked = np.array([*known, 41, 2**62 + 1], np.int64)
    assert slots.find(asked).tolist() == [known.get(id, -1) for id in asked.tolist()]


def test_a_table_stays_small_while_ids_come_and_go():
    """What is gone takes a place until the table is made anew; there are always free ones, so every search ends."""
    held = Held(64)
    slots = Slots(held)
    slots.find(np.array([0]))
    for id in range(5000):
        array, place = np.array([id]), np.array([id % 64])
        held.label[place], held.deleted[place] = id, 0
        held.version += 1
        slots.put(array, place)
        assert slots.find(np.array([id, id + 1])).tolist() == [id % 64, -1]
        slots.drop(array)
        held.deleted[place] = 1
        held.version += 1
    assert slots.nbytes <= 8 * LEAST


def test_ids_that_a_client_chose_do_not_fall_on_one_place():
    """Two tables hash the same ids differently."""
    held = Held(40)
    held.label[:], held.deleted[:] = np.arange(40) << 40, 0
    tables = []
    for _ in range(2):
        slots = Slots(held)
        slots.find(np.array([0]))
        tables.append(slots._table_T.tolist())
    assert tables[0] != tables[1]


def test_ids_cost_less_than_a_dictionary_and_are_counted():
    index = built(3000)
    before = index.size_bytes
    assert 5 in index
    table = index.size_bytes - before
    assert 6 * 3000 <= table <= 14 * 3000 + 64
    assert index.stats()["size_bytes"] == index.size_bytes == index._storage.nbytes + table
    read_only = np.arange(10)
    read_only.flags.writeable = False
    assert index.contains(read_only).all()
    assert index.contains(np.arange(6000)[::2][::-1]).sum() == 1500
    assert index.contains([]).tolist() == []


def test_memory_and_file_shrink_when_it_is_compacted(tmp_path):
    index = built(3000)
    index.save(tmp_path / "a")
    before = index.size_bytes
    index.remove(np.arange(2000))
    assert index.size_bytes >= before
    index.compact()
    assert index.size_bytes < 0.4 * before
    assert index._storage.capacity == len(index) == 1000
    index.save(tmp_path / "b")
    assert (tmp_path / "b").stat().st_size < 0.4 * (tmp_path / "a").stat().st_size
    check_graph(index)
    index.add(VECTORS[:1])
    assert index.search(VECTORS[2500:2501], 1)[0].tolist() == [[2500]]
    # By itself too, where much has gone.
    index = built(3000, compact_at=0.2)
    index.remove(np.arange(1500))
    assert index._storage.capacity == 1500


def test_where_memory_is_short_compacting_leaves_arrays_as_they_are(monkeypatch):
    index = built(600)
    index.remove(np.arange(300))

    def none(*_):
        raise MemoryError

    monkeypatch.setattr(storage, "grown", none)
    assert index.compact() == 300
    monkeypatch.undo()
    assert index._storage.capacity == 600
    check_graph(index)
    assert index.search(VECTORS[400:401], 1)[0].tolist() == [[400]]


# The places of deleted elements


def test_places_of_deleted_elements_are_used_again():
    index = built()
    index.remove(np.arange(0, 600, 2))
    assert index.add(VECTORS[1200:1400]).tolist() == list(range(1200, 1400))
    assert index._storage.count == 1200
    assert index.growth_bytes(100) == 0
    index.add(VECTORS[1400:1600])
    # 100 places were left.
    assert index._storage.count == 1300
    assert len(index) == 1300
    check_graph(index)
    stats = index.stats()
    assert (stats["count"], stats["deleted"], stats["unreachable"]) == (1300, 0, 0)
    ids = np.sort(index.ids)
    np.testing.assert_array_equal(ids, np.setdiff1d(np.arange(1600), np.arange(0, 600, 2)))
    np.testing.assert_array_equal(index.vectors(ids), VECTORS[ids])
    truth = naive(VECTORS[ids], QUERIES, 10, ids=ids)[0]
    fresh = HNSW(8, M=6, ef_construction=40, workers=1)
    fresh.add(VECTORS[ids], ids)
    assert recall(index.search(QUERIES, 10, 30)[0], truth) > recall(fresh.search(QUERIES, 10, 30)[0], truth) - 0.02


@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_vacant_places_are_not_found_linked_or_lost(tmp_path, dtype, metric):
    index = built(300, dtype=dtype, metric=metric)
    index.remove(np.arange(100))
    index.add(VECTORS[300:310])
    assert len(index._storage.vacant_S) == 90
    assert (index.search(QUERIES, 250, 400)[0] >= 0).sum(1).tolist() == [210] * len(QUERIES)
    assert index.repair() == 0
    check_graph(index)
    for again in (pickle.loads(pickle.dumps(index)), saved(index, tmp_path), saved(index, tmp_path, mmap=True)):
        assert len(again) == 210
        np.testing.assert_array_equal(again.search(QUERIES, 5, 400)[0], index.search(QUERIES, 5, 400)[0])
        again.add(VECTORS[310:400])
        assert again._storage.count == 300
        check_graph(again)
        assert again.compact() == 0
    assert index.compact() == 90
    check_graph(index)
    assert len(index) == index._storage.count == 210
    index.update([305], VECTORS[500:501])
    assert index.search(VECTORS[500:501], 1)[0].tolist() == [[305]]


def saved(index, folder, mmap=False):
    index.save(folder / "index")
    return HNSW.load(folder / "index", mmap=mmap)


def test_when_all_are_deleted_new_ones_take_their_places():
    index = built(200)
    index.remove(np.arange(200))
    assert index._storage.graph[layout.ENTRY] >= 0
    index.add(VECTORS[200:350])
    check_graph(index)
    assert (index._storage.count, len(index)) == (200, 150)
    assert (index.search(VECTORS[200:350], 1, 60)[0][:, 0] == np.arange(200, 350)).mean() > 0.98
    index.remove(index.ids)
    index.add(VECTORS[:10])
    assert (index._storage.count, len(index)) == (200, 10)
    assert index.search(VECTORS[:10], 1)[0][:, 0].tolist() == list(range(350, 360))


def test_one_in_many_waits_until_it_is_worth_it(monkeypatch):
    monkeypatch.setattr("anabranch.graph.hnsw.changing.WORTH", 100)
    index = built(1000)
    index.remove(np.arange(9))
    index.add(VECTORS[1000:1001])
    assert index._storage.count == 1001
    index.remove([9, 10])
    index.add(VECTORS[1001:1002])
    assert (index._storage.count, len(index._storage.vacant_S)) == (1001, 10)
    # Vacant ones are used at once, however few.
    index.add(VECTORS[1002:1003])
    assert (index._storage.count, len(index._storage.vacant_S)) == (1001, 9)


def test_deleted_elements_may_be_kept_for_restoring():
    index = built(100)
    index.remove([3, 4, 5])
    index.add(VECTORS[100:102], reuse=False)
    assert index._storage.count == 102
    index.restore([4])
    index.remove([4])
    index.restore([4])
    assert index.search(VECTORS[4:5], 1)[0].tolist() == [[4]]
    index.add(VECTORS[102:103])
    with pytest.raises(InputError, match=r"ids\[0\] is 3, which is not a deleted element"):
        index.restore([3, 5])
    assert len(index) == 100 - 2 + 3


def test_of_one_id_that_was_deleted_twice_the_last_comes_back():
    index = built(50)
    index.remove([7])
    index.add(VECTORS[100:101], [7], reuse=False)
    index.remove([7])
    index.restore([7])
    np.testing.assert_array_equal(index.vectors([7]), VECTORS[100:101])
    with pytest.raises(InputError, match="which is not a deleted element"):
        index.restore([7])


@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_are_the_same_for_any_number_of_threads(threads):
    index = built(1500, workers=threads)
    index.remove(np.arange(0, 900, 3))
    index.add(VECTORS[1500:2300])
    one = built(1500)
    one.remove(np.arange(0, 900, 3))
    one.add(VECTORS[1500:2300])
    assert graph_bytes(index) == graph_bytes(one)


@pytest.mark.parametrize("at", [0, 2])
def test_an_interrupt_gives_places_back(monkeypatch, at):
    index = built(1600)
    index.remove(np.arange(400))
    calls, own = [], Linker._link_batch

    def interrupted(self, batch_B, workers):
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        calls.append(len(batch_B))
        own(self, batch_B, workers)

    monkeypatch.setattr(Linker, "_link_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.add(VECTORS[1600:2200], np.arange(5000, 5600))
    monkeypatch.undo()
    kept = sum(calls)
    assert 0 < kept < 400
    assert len(index) == 1200 + kept
    assert (index._storage.count, len(index._storage.vacant_S)) == (1600, 400 - kept)
    check_graph(index)
    assert index.stats()["unreachable"] == 0
    assert index.contains(np.arange(5000, 5600)).sum() == kept
    index.add(VECTORS[1600 + kept : 2200], np.arange(5000 + kept, 5600))
    check_graph(index)
    assert (len(index), index._storage.count) == (1800, 1800)
    assert (index.search(VECTORS[1600:2200], 1, 80)[0][:, 0] == np.arange(5000, 5600)).mean() > 0.97


def test_no_memory_for_new_rows_leaves_the_places_vacant(monkeypatch):
    index = built(300)
    index.remove(np.arange(100))
    index.add(VECTORS[300:301])

    def none(*_):
        raise MemoryError

    monkeypatch.setattr(index._storage, "refill", none)
    with pytest.raises(MemoryError):
        index.add(VECTORS[301:450])
    monkeypatch.undo()
    assert (len(index), index._storage.count, len(index._storage.vacant_S)) == (201, 300, 99)
    monkeypatch.setattr(storage, "grown", none)
    with pytest.raises(CapacityError):
        index.add(VECTORS[301:650])
    monkeypatch.undo()
    check_graph(index)
    index.add(VECTORS[301:450])
    assert len(index) == 350
    check_graph(index)


# Filters that are worked out once


@pytest.mark.parametrize("dtype", ["f32", "i8"])
def test_a_prepared_filter_finds_what_its_source_finds(dtype):
    index = built(dtype=dtype)
    index.remove([3, 5])
    mask = np.random.default_rng(0).random(1200) < 0.5
    for source in (mask, np.flatnonzero(mask), np.array([7, 8, 99_999]), np.empty(0, np.int64), mask.tolist()):
        made = index.prepare_filter(source)
        for found, expected in zip(
            index.search(QUERIES, 7, filter=made), index.search(QUERIES, 7, filter=source), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


def test_a_filter_is_worked_out_once_and_again_when_the_index_changes(monkeypatch):
    index = built()
    made = index.prepare_filter(np.arange(5000) % 2 == 0)
    calls, own = [], filters.prepared

    def counted(value, slots):
        calls.append(1)
        return own(value, slots)

    monkeypatch.setattr("anabranch.graph.hnsw.filters.prepared", counted)
    for change, times in (
        (lambda: None, 0),
        (lambda: index.remove([0, 2]), 1),
        (lambda: index.add(VECTORS[1200:1202]), 1),
        (lambda: index.repair(), 0),
        (lambda: index.add(VECTORS[:3], [4000, 4001, 4002]), 1),
    ):
        change()
        expected = index.search(QUERIES, 9, filter=np.arange(5000) % 2 == 0)
        before = len(calls)
        for _ in range(3):
            np.testing.assert_array_equal(index.search(QUERIES, 9, filter=made)[0], expected[0])
        assert len(calls) - before == times
    assert repr(made) == "Filter(a mask of 2,500 of 5,000 ids)"


def test_a_filter_is_a_copy_and_serves_several_indexes():
    one, two = built(300), built(500)
    ids = np.arange(10)
    made = one.prepare_filter(ids)
    ids[:] = 0
    for index in (one, two, one):
        assert np.sort(index.search(VECTORS[400:401], 10, filter=made)[0]).tolist() == [list(range(10))]
    assert repr(made) == "Filter(10 ids)"
    del one, index
    gc.collect()
    assert len(made._on) == 1
    sharded = ShardedHNSW(8, 3)
    sharded.add(VECTORS[:300])
    made = sharded.prepare_filter(np.arange(100))
    assert isinstance(made, Filter)
    np.testing.assert_array_equal(
        sharded.search(QUERIES, 5, filter=made)[0], sharded.search(QUERIES, 5, filter=np.arange(100))[0]
    )


def test_what_is_no_filter_is_told_at_once():
    index = built(100)
    for value, message in (
        (np.ones((2, 2), bool), "filter has the shape"),
        ([1.5], "filter is of float64"),
        (np.ones(50, bool), "a mask of 50 entries and the largest id is 99"),
        (["a"], "filter must be numbers"),
    ):
        with pytest.raises(InputError, match=message):
            index.prepare_filter(value)
    made = index.prepare_filter(np.ones(100, bool))
    index.add(VECTORS[:1])
    with pytest.raises(InputError, match="a mask of 100 entries and the largest id is 100"):
        index.search(QUERIES, 3, filter=made)


@pytest.mark.parametrize("value", [np.arange(0, 40, 3), np.arange(5000) % 3 == 0, [], range(4)])
def test_a_filter_goes_to_another_process(value):
    index = built()
    made = index.prepare_filter(value)
    expected = index.search(QUERIES, 7, filter=made)
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert repr(other) == repr(made)
        for found, wanted in zip(index.search(QUERIES, 7, filter=other), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_many_threads_use_one_filter():
    index, wrong = built(), []
    made = index.prepare_filter(np.arange(0, 1200, 3))
    expected = index.search(QUERIES, 5, filter=np.arange(0, 1200, 3))[0]

    def search():
        found = [index.search(QUERIES, 5, filter=made, workers=1)[0] for _ in range(20)]
        wrong.extend(one for one in found if not (one == expected).all())

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
