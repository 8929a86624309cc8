"""Deleting, moving, compacting, repairing; files; shards."""

import os
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import BackendError, CapacityError, DataError, InputError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.hnsw import HNSW, ShardedHNSW, brute_force
from anabranch.graph.hnsw.storage import KIND, VERSION, VERSIONS
from hnsw_checks import check_graph, drawn, graph_bytes, lists, naive, recall

VECTORS, QUERIES = drawn(1200, 12, 1), drawn(50, 12, 2)


def built(count=1200, **options):
    index = HNSW(12, **{"M": 8, "ef_construction": 60, "workers": 1, **options})
    index.add(VECTORS[:count])
    return index


# Deleting


def test_deleted_elements_are_walked_over_and_not_returned():
    index = built(compact_at=None)
    gone = np.arange(0, 1200, 3)
    before = graph_bytes(index)["links"]
    index.remove(gone)
    assert graph_bytes(index)["links"] == before
    assert len(index) == 800
    ids, _ = index.search(QUERIES, 10)
    assert not (ids % 3 == 0).any()
    stays = np.setdiff1d(np.arange(1200), gone)
    assert recall(ids, naive(VECTORS[stays], QUERIES, 10, ids=stays)[0]) > 0.97
    assert index.stats()["deleted"] == 400
    assert index.ids.tolist() == stays.tolist()


def test_most_deleted_still_gives_k():
    """With deleted elements the walk goes on until it holds ef that may be returned (hnswlib once stopped early)."""
    index = built(compact_at=None)
    index.remove(np.arange(1180))
    ids, _ = index.search(QUERIES, 20, 20)
    assert (np.sort(ids, 1) == np.arange(1180, 1200)).all()
    index.remove(np.arange(1180, 1200))
    assert (index.search(QUERIES, 3)[0] == -1).all()
    assert len(index) == 0


def test_compacting_takes_them_out():
    index = built(compact_at=None)
    gone = np.random.default_rng(0).permutation(1200)[:600]
    index.remove(gone)
    assert index.compact() == 600
    assert index.compact() == 0
    check_graph(index)
    assert index._storage.count == len(index) == 600
    stats = index.stats()
    assert stats["deleted"] == stats["unreachable"] == 0
    stays = np.setdiff1d(np.arange(1200), gone)
    assert index.ids.tolist() == stays.tolist()
    np.testing.assert_array_equal(index.vectors(stays), VECTORS[stays])
    truth = naive(VECTORS[stays], QUERIES, 10, ids=stays)[0]
    fresh = HNSW(12, M=8, ef_construction=60)
    fresh.add(VECTORS[stays], stays)
    assert recall(index.search(QUERIES, 10, 30)[0], truth) > recall(fresh.search(QUERIES, 10, 30)[0], truth) - 0.02


def test_lists_are_bridged_over_what_goes():
    """On a line 0 - 1 - 2 with one link each way: when 1 goes, 0 and 2 find each other through it."""
    index = HNSW(1, M=2, flat=True, compact_at=None)
    index.add([[0.0], [1.0], [2.0]])
    index._storage.links[0], index._storage.links[2] = [1, -1, -1, -1], [1, -1, -1, -1]
    index.remove([1])
    index.compact()
    assert lists(index, 0) == {0: [1], 1: [0]}
    assert index.ids.tolist() == [0, 2]


def test_compacts_by_itself_beyond_a_share():
    index = built(compact_at=0.2)
    index.remove(np.arange(240))
    assert index._storage.count == 1200
    index.remove([240])
    assert index._storage.count == len(index) == 959
    check_graph(index)


def test_everything_may_go_and_come_back():
    index = built(300, compact_at=0.0)
    index.remove(np.arange(300))
    assert len(index) == 0
    check_graph(index)
    assert (index.search(QUERIES, 3)[0] == -1).all()
    index.add(VECTORS[:300], np.arange(300))
    assert len(index) == 300
    assert recall(index.search(QUERIES, 5)[0], naive(VECTORS[:300], QUERIES, 5)[0]) > 0.97


def test_insert_delete_insert_keeps_len():
    index = built(200, compact_at=None)
    index.remove([5, 7])
    index.add(VECTORS[[5, 7]], ids=[5, 7])
    assert len(index) == 200
    assert index.search(VECTORS[[5, 7]], 1)[0].tolist() == [[5], [7]]
    index.compact()
    check_graph(index)
    assert len(index) == 200


def test_restored_elements_are_found_again():
    index = built(100, compact_at=None)
    index.remove([3, 4])
    with pytest.raises(InputError, match=r"ids\[1\] is 9, which is not a deleted element"):
        index.restore([3, 9])
    index.restore([4, 3])
    assert len(index) == 100
    assert index.search(VECTORS[3:5], 1)[0].tolist() == [[3], [4]]


@pytest.mark.parametrize("method", ["remove", "vectors"])
def test_unknown_ids(method):
    index = built(100)
    index.remove([3])
    for id in (3, 100, 10**12):
        with pytest.raises(InputError, match=rf"ids\[1\] is {id}, which is not in the index"):
            getattr(index, method)([7, id])
    with pytest.raises(InputError, match=r"ids\[0\] is -1"):
        getattr(index, method)([-1])
    assert 7 in index


# Moving


def test_moved_elements_are_found_where_they_are():
    index = built()
    moved = np.arange(0, 1200, 2)
    to = drawn(600, 12, 77)
    index.update(moved, to)
    check_graph(index)
    assert index.stats()["unreachable"] == 0
    now = VECTORS.copy()
    now[moved] = to
    np.testing.assert_array_equal(index.vectors(np.arange(1200)), now)
    truth = naive(now, QUERIES, 10)[0]
    fresh = HNSW(12, M=8, ef_construction=60)
    fresh.add(now)
    assert recall(index.search(QUERIES, 10, 30)[0], truth) > recall(fresh.search(QUERIES, 10, 30)[0], truth) - 0.02


@pytest.mark.parametrize("count", [1, 2, 50])
def test_all_may_move_at_once(count):
    index = built(count)
    index.update(np.arange(count), VECTORS[:count][::-1])
    check_graph(index)
    assert index.search(VECTORS[:1], 1)[0].tolist() == [[count - 1]]


def test_add_with_update_moves_and_inserts():
    index = built(10)
    index.add(VECTORS[20:22], ids=[3, 50], update=True)
    assert len(index) == 11
    assert index.search(VECTORS[20:22], 1)[0].tolist() == [[3], [50]]
    with pytest.raises(InputError, match=r"ids\[0\] is 60, which is not in the index"):
        index.update([60], VECTORS[:1])


# Repairing


def test_repair_links_what_cannot_be_reached():
    index = built(400, M=4)
    index.repair()
    held = index._storage
    lost = [17, 18, 200]
    for slot in range(400):
        kept = [other for other in held.links[slot].tolist() if other >= 0 and other not in lost]
        held.links[slot] = kept + [-1] * (8 - len(kept))
    assert index.stats()["unreachable"] >= 3
    assert index.repair() >= 1
    assert index.stats()["unreachable"] == 0
    assert index.repair() == 0
    check_graph(index)
    ids, _ = index.search(VECTORS[:400], 1, 400)
    assert ids[:, 0].tolist() == list(range(400))


# Files


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
def test_saved_and_loaded(tmp_path, dtype, mmap):
    index = built(dtype=dtype, compact_at=None, metric="l2")
    index.remove([5, 9])
    path = tmp_path / "index.anb"
    index.save(path)
    loaded = HNSW.load(path, mmap=mmap)
    assert graph_bytes(loaded) == graph_bytes(index)
    assert (loaded.dim, loaded.metric, loaded.dtype, loaded.M) == (12, "l2", dtype, 8)
    for left, right in zip(loaded.search(QUERIES, 10), index.search(QUERIES, 10), strict=True):
        np.testing.assert_array_equal(left, right)
    more = drawn(100, 12, 5)
    for one in (index, loaded):  # goes on as if it had never been away
        one.add(more)
        one.remove([100])
        one.compact()
    assert graph_bytes(loaded) == graph_bytes(index)
    check_graph(loaded)
    assert HNSW.load(path)._storage.count == 1200  # the mapped file was not written to


def test_empty_index_and_pickle(tmp_path):
    index = HNSW(3, "cosine", seed=5)
    index.save(tmp_path / "empty")
    for empty in (
        HNSW.load(tmp_path / "empty"),
        HNSW.load(tmp_path / "empty", mmap=True),
        pickle.loads(pickle.dumps(index)),
    ):
        assert len(empty) == 0
        assert (empty.search(np.eye(3), 1)[0] == -1).all()
        empty.add(np.eye(3))
        assert empty.search(np.eye(3), 1)[0][:, 0].tolist() == [0, 1, 2]
    copied = pickle.loads(pickle.dumps(built(300)))
    assert graph_bytes(copied) == graph_bytes(built(300))


def test_missing_foreign_and_wrong_files(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        HNSW.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match="is not one of our array files"):
        HNSW.load(tmp_path / "text")
    write_arrays(tmp_path / "graph", "graph", {})
    with pytest.raises(DataError, match="holds a graph, not a hnsw index"):
        HNSW.load(tmp_path / "graph")
    write_arrays(tmp_path / "bare", KIND, {}, {}, VERSION)
    with pytest.raises(DataError, match="does not describe an index"):
        HNSW.load(tmp_path / "bare")
    with pytest.raises(DataError, match="cannot read"):
        HNSW.load(tmp_path)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.9, 0.9999])
def test_truncated_files(tmp_path, share, mmap):
    path = tmp_path / "index"
    built(200).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError):
        HNSW.load(path, mmap=mmap)


def test_flipped_bits_are_seen(tmp_path):
    """Anywhere at all without mmap; with it nothing but vectors may differ, and no search runs out of its arrays."""
    path = tmp_path / "index"
    index = built(200)
    index.save(path)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    seen = 0
    for place in [*range(0, 200, 7), *generator.integers(0, len(content), 150).tolist()]:
        altered = bytearray(content)
        altered[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(altered)
        try:
            HNSW.load(path)
        except DataError:
            seen += 1
        else:
            assert content[place] == 0  # padding between arrays is nobody's
        try:
            loaded = HNSW.load(path, mmap=True)
        except DataError:
            continue
        ids, _ = loaded.search(np.nan_to_num(QUERIES), 5)
        assert ((ids >= -1) & (ids < 2**62)).all()
    assert seen > 100


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("compact_at", [0.2, None])
def test_what_is_left_when_the_highest_went_is_read_again(tmp_path, compact_at, mmap):
    """Places that wait to be used again keep their level, which may be above all that is left."""
    vectors = drawn(620, 8, 3)
    index = HNSW(8, M=8, ef_construction=40, compact_at=compact_at, workers=1)
    index.add(vectors[:500])
    level_S = index._storage.level[:500]
    index.remove(np.union1d([0, 1], np.flatnonzero(level_S == level_S.max())))
    index.add(vectors[500])
    assert len(index._storage.vacant_S)
    index.save(tmp_path / "x.anb")
    again = HNSW.load(tmp_path / "x.anb", mmap=mmap)
    for one in (index, again, pickle.loads(pickle.dumps(index))):
        assert sorted(one.ids.tolist()) == sorted(index.ids.tolist())
        assert np.array_equal(one.search(vectors[:50], 5, 64)[0], index.search(vectors[:50], 5, 64)[0])
    # Those places are used again, at their level.
    for vector in vectors[501:]:
        again.add(vector)
    found = again.search(vectors[501:], 1, 64)[1]
    assert (found[:, 0] < 1e-6).mean() > 0.95


@pytest.mark.parametrize("mmap", [False, True])
def test_an_index_whose_elements_all_went_is_read_again(tmp_path, mmap):
    index = HNSW(8, M=8, ef_construction=40, compact_at=None, workers=1)
    index.add(drawn(100, 8, 3))
    index.remove(index.ids)
    index.save(tmp_path / "x.anb")
    again = HNSW.load(tmp_path / "x.anb", mmap=mmap)
    assert len(again) == 0
    again.add(drawn(50, 8, 4))
    again.save(tmp_path / "x.anb")
    assert len(HNSW.load(tmp_path / "x.anb")) == 50


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.2, None]))
def test_whatever_came_and_went_is_read_again(seed, compact_at):
    generator = np.random.default_rng(seed)
    index = HNSW(4, M=4, ef_construction=8, compact_at=compact_at, seed=seed, workers=1)
    for _ in range(8):
        index.add(generator.standard_normal((int(generator.integers(1, 40)), 4)).astype(np.float32))
        ids = index.ids
        level_N = index._storage.level[: index._storage.count]
        high = np.intersect1d(ids, index._storage.label[np.flatnonzero(level_N == level_N.max())])
        gone = generator.choice(ids, int(generator.integers(0, len(ids))), replace=False)
        index.remove(np.union1d(gone, high[: int(generator.integers(0, 2)) * len(high)]))
        again = pickle.loads(pickle.dumps(index))
        assert sorted(again.ids.tolist()) == sorted(index.ids.tolist())


def changed(arrays, name, place, value):
    copied = {key: np.array(array) for key, array in arrays.items()}
    copied[name][place] = value
    return copied


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("links", (3, 0), 200),  # beyond the last slot
        ("links", (3, 0), -2),
        ("links", (3, 0), -1),  # a hole before the end
        ("level", 5, 60),
        ("level", 5, -1),
        ("first", 5, 10**6),
        ("upper", (0, 0), 199),  # an element that is not on level 1
        ("label", 0, 1),  # an id that is there twice
    ],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_files_whose_parts_do_not_fit(tmp_path, name, place, value, mmap):
    """Sound checksums, unsound content: what a kernel would follow blindly."""
    path = tmp_path / "index"
    index = built(200)
    assert index._storage.level[199] == 0
    index.save(path)
    found = read_arrays(path, KIND, versions=VERSIONS)
    if name == "level":
        place = int(np.flatnonzero(found.arrays["level"] == 0)[0])
    write_arrays(path, KIND, changed(found.arrays, name, place, value), found.meta, VERSION)
    with pytest.raises(DataError, match="do not fit together"):
        HNSW.load(path, mmap=mmap)


@pytest.mark.parametrize(("field", "value"), [("entry", 200), ("entry", -1), ("entry", "x"), ("top", 50)])
def test_files_with_a_wrong_header(tmp_path, field, value):
    path = tmp_path / "index"
    built(200).save(path)
    found = read_arrays(path, KIND, versions=VERSIONS)
    write_arrays(path, KIND, found.arrays, {**found.meta, field: value}, VERSION)
    with pytest.raises(DataError, match="is damaged"):
        HNSW.load(path)
    options = {**found.meta["options"], "M": 9}
    write_arrays(path, KIND, found.arrays, {**found.meta, "options": options}, VERSION)
    with pytest.raises(DataError, match=r"is damaged: 'links' is int32 \[200, 16\], not int32 \[200, 18\]"):
        HNSW.load(path)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "index"
    built(50).save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match="no room left on disk"):
        built(100).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["index"]


def test_no_memory_leaves_the_index_as_it_was(monkeypatch):
    from anabranch.graph.hnsw import storage

    index = built(100)
    before = graph_bytes(index)

    def none(*_):
        raise MemoryError

    monkeypatch.setattr(storage, "grown", none)
    with pytest.raises(CapacityError, match="no memory for 150 elements of"):
        index.add(VECTORS[:10])
    monkeypatch.undo()
    assert graph_bytes(index) == before
    assert index.add(VECTORS[:10]).tolist() == list(range(100, 110))
    assert index.search(VECTORS[100:101], 1)[0].shape == (1, 1)
    with pytest.raises(CapacityError, match="no memory for"):
        index.search(QUERIES, 10**15)


# The exact twin and shards


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_brute_force_is_the_definition(metric):
    ids = np.random.default_rng(0).permutation(5000)[:1200]
    found, distances = brute_force(VECTORS + 50, QUERIES + 50, 20, metric, ids=ids)
    _, exact = naive(VECTORS + 50, QUERIES + 50, 20, metric, ids)
    np.testing.assert_allclose(distances, exact, rtol=1e-4, atol=1e-5)
    again = naive(VECTORS[[*ids].index(found[3, 7])][None] + 50, QUERIES[3:4] + 50, 1, metric)[1]
    assert distances[3, 7] == pytest.approx(float(again[0, 0]), rel=1e-4, abs=1e-5)


def test_brute_force_edges():
    found, distances = brute_force(torch.eye(2), torch.tensor([1.0, 0.0]), 3, ids=[9, 4])
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == [[9, 4, -1]]
    assert distances.tolist() == [[0, 2, np.inf]]
    assert brute_force(np.zeros((5, 2)), np.zeros((1, 2)), 3, ids=[5, 4, 3, 2, 1])[0].tolist() == [[1, 2, 3]]
    assert brute_force(np.empty((0, 2)), np.zeros((1, 2)), 2)[0].tolist() == [[-1, -1]]
    with pytest.raises(InputError, match="metric is 'l1'"):
        brute_force(np.eye(2), np.eye(2), metric="l1")
    with pytest.raises(InputError, match="they must be rows"):
        brute_force(np.ones(2), np.eye(2))
    with pytest.raises(InputError, match="queries have the shape"):
        brute_force(np.eye(2), np.eye(3))
    with pytest.raises(BackendError, match="torch has no device"):
        brute_force(np.eye(2), np.eye(2), device="nowhere")


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine", "hamming"])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_every_distance_is_the_same_without_torch_and_with_it(metric, k, monkeypatch):
    generator = np.random.default_rng(k)
    row_ND, query_QD = generator.standard_normal((50, 24)), generator.standard_normal((9, 24))
    row_ND[20:30] = row_ND[3]
    if metric == "hamming":
        row_ND, query_QD = row_ND > 0, query_QD > 0
    ids = generator.permutation(1000)[:50]
    by_torch = brute_force(row_ND, query_QD, k, metric, ids=ids, device="cpu")
    monkeypatch.setitem(sys.modules, "torch", None)
    found, distances = brute_force(row_ND, query_QD, k, metric, ids=ids)
    np.testing.assert_allclose(distances, by_torch[1], rtol=1e-5, atol=1e-6)
    if metric in ("l2", "hamming"):
        np.testing.assert_array_equal(found, by_torch[0])


def test_shards_merge_exactly():
    sharded = ShardedHNSW(12, 3, M=8, ef_construction=60)
    assert sharded.add(VECTORS).tolist() == list(range(1200))
    parts = [shard.search(QUERIES, 10, 40) for shard in sharded.shards]
    ids, distances = sharded.search(QUERIES, 10, 40)
    every = sorted(
        (float(d), int(i)) for part in parts for i, d in zip(part[0][0].tolist(), part[1][0].tolist(), strict=True)
    )
    assert list(zip(distances[0].tolist(), ids[0].tolist(), strict=True)) == every[:10]
    assert recall(ids, naive(VECTORS, QUERIES, 10)[0]) > 0.99
    mask = np.arange(1200) % 2 == 0
    assert (sharded.search(QUERIES, 10, filter=mask)[0] % 2 == 0).all()
    assert isinstance(sharded.search(torch.from_numpy(QUERIES), 2)[0], torch.Tensor)


def test_shards_change_and_are_saved(tmp_path):
    sharded = ShardedHNSW(12, 4, "cosine", dtype="i8", workers=2, compact_at=None)
    sharded.add(VECTORS[:500], np.arange(500) * 7)
    sharded.remove([7, 14])
    sharded.update([0], VECTORS[600:601])
    sharded.add(VECTORS[601:602])
    assert len(sharded) == 499
    assert sharded.search(VECTORS[600:602], 1)[0].tolist() == [[0], [499 * 7 + 1]]
    assert 7 not in sharded
    assert 21 in sharded
    sharded.save(tmp_path / "shards")
    for mmap in (False, True):
        loaded = ShardedHNSW.load(tmp_path / "shards", mmap=mmap)
        np.testing.assert_array_equal(loaded.search(QUERIES, 5)[0], sharded.search(QUERIES, 5)[0])
        assert loaded.ids.tolist() == sharded.ids.tolist()
    # The other's place was taken by the one that came after.
    assert sharded.compact() == 1
    stats = sharded.stats()
    assert (stats["count"], stats["deleted"], len(stats["shards"])) == (499, 0, 4)
    assert sharded.repair() == 0
    with pytest.raises(InputError, match=r"ids\[1\] is 21, which is in the index"):
        sharded.add(VECTORS[:2], [1, 21])
    assert 1 not in sharded
    with pytest.raises(InputError, match=r"ids\[0\] is 8, which is not in the index"):
        sharded.remove([8])
    sharded.add(VECTORS[:2], [1, 21], update=True)
    assert len(sharded) == 500


def test_fewer_elements_than_shards():
    sharded = ShardedHNSW(12, 5)
    sharded.add(VECTORS[:2])
    ids, distances = sharded.search(VECTORS[:1], 4)
    assert ids[0, :1].tolist() == [0]
    assert ids[0, 2:].tolist() == [-1, -1]
    assert np.isinf(distances[0, 2:]).all()
