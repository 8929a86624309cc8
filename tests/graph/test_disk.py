"""The index on disk: searches against all distances, what is opened and closed, filters, processes, damage."""

import multiprocessing
import os
import pickle
import signal
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError, DataError, InputError
from anabranch.graph.array_file import _header, read_arrays, write_arrays
from anabranch.graph.disk import DiskIndex, build, from_hnsw, making
from anabranch.graph.disk.stored import KIND
from anabranch.graph.hnsw import HNSW
from hnsw_checks import WAIT_S, wanted
from hnsw_checks import thread as begun

COUNT, DIM = 1500, 20


def drawn(count, dim=DIM, seed=0):
    draw = np.random.default_rng(seed)
    centre = np.random.default_rng(9).standard_normal((12, dim))
    return (centre[draw.integers(0, 12, count)] + 0.5 * draw.standard_normal((count, dim))).astype(np.float32)


VECTORS, QUERIES = drawn(COUNT), drawn(40, seed=1)


def true_neighbours(vectors, queries, k, metric="l2", ids=None):
    """By numpy in 64 bits, in the order of (distance, id)."""
    x, q = vectors.astype(np.float64), queries.astype(np.float64)
    if metric == "cosine":
        x, q = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, q))
    far = ((q[:, None] - x) ** 2).sum(2) if metric == "l2" else 1 - q @ x.T
    order = np.argsort(far, 1, kind="stable")[:, :k]
    return (order if ids is None else np.asarray(ids)[order]), np.take_along_axis(far, order, 1)


def recall(found, true):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), true.tolist(), strict=True)])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def index(place):
    build(VECTORS, place / "one.anb", M=8, ef_construction=40, workers=1).close()
    # Without memory for blocks, which are read then.
    with DiskIndex(place / "one.anb", workers=1) as made:
        yield made


@pytest.fixture(scope="module")
def sharded(place):
    """Of ids of one's own, in shards."""
    ids = np.random.default_rng(3).permutation(10 * COUNT)[:COUNT]
    build(VECTORS, place / "many.anb", ids=ids, M=6, ef_construction=30, num_shards=4, workers=1).close()
    with DiskIndex(place / "many.anb", workers=1) as made:
        yield made, ids


# Searches


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_distances_are_exact_and_neighbours_are_found(metric, tmp_path):
    with build(VECTORS, tmp_path / "i.anb", metric=metric, M=8, ef_construction=40, workers=1) as index:
        ids, distances = index.search(QUERIES, 10, 100)
        true, far = true_neighbours(VECTORS, QUERIES, 10, metric)
        assert recall(ids, true) > (0.95 if metric != "ip" else 0.85)
        again = true_neighbours(VECTORS, QUERIES, COUNT, metric)
        for row in range(len(QUERIES)):
            place = {id: number for number, id in enumerate(again[0][row].tolist())}
            wanted = [again[1][row][place[id]] for id in ids[row].tolist()]
            np.testing.assert_allclose(distances[row], wanted, rtol=1e-4, atol=1e-4)
        found, exact = index.exact(QUERIES, 10)
        assert recall(found, true) > 0.999
        np.testing.assert_allclose(exact, far, rtol=1e-4, atol=1e-4)


def test_a_pool_of_all_finds_the_true_neighbours(index, sharded):
    for made, ids in ((index, None), (sharded[0], sharded[1])):
        found, distances = made.search(QUERIES, 15, COUNT)
        true, far = true_neighbours(VECTORS, QUERIES, 15, ids=ids)
        np.testing.assert_array_equal(found, true)
        np.testing.assert_allclose(distances, far, rtol=1e-5)


def test_shards_find_what_one_graph_finds(index, sharded):
    true = true_neighbours(VECTORS, QUERIES, 10)[0]
    assert recall(index.search(QUERIES, 10, 64)[0], true) > 0.95
    assert recall(sharded[0].search(QUERIES, 10, 64)[0], sharded[1][true]) > 0.95
    assert sharded[0].stats()["shards"] == 4
    assert index.stats()["shards"] == 1


def test_no_block_is_read_twice(index):
    for ef in (10, 200, COUNT):
        index.search(QUERIES[:1], 5, ef)
        assert 0 < index.stats()["blocks"] <= -(-COUNT // index.stats()["per_block"])
    assert index.stats()["blocks"] == -(-COUNT // index.stats()["per_block"])
    assert index.stats()["exact"] == COUNT


@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 30), ef=st.integers(1, 300), beam=st.integers(1, 9), seed=st.integers(0, 1000))
def test_beams_threads_and_memory_change_nothing_that_is_wrong(index, k, ef, beam, seed):
    query = drawn(3, seed=seed)
    ids, distances = index.search(query, k, ef, beam=beam)
    far = ((VECTORS[ids].astype(np.float64) - query[:, None]) ** 2).sum(2)
    np.testing.assert_allclose(distances, far, rtol=1e-5)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert (np.diff(distances, axis=1) >= 0).all()
    again = index.search(query, k, ef, beam=beam, workers=2)
    np.testing.assert_array_equal(again[0], ids)


def test_tensors_come_back_as_tensors(index):
    torch = pytest.importorskip("torch")
    ids, distances = index.search(torch.from_numpy(QUERIES), 3)
    np.testing.assert_array_equal(ids.numpy(), index.search(QUERIES, 3)[0])
    assert distances.dtype == torch.float32
    assert index.search(QUERIES[0], 3)[0].shape == (1, 3)


def test_equal_distances_are_in_the_order_of_ids(tmp_path):
    same = np.repeat(drawn(5), 40, 0)
    with build(same, tmp_path / "i.anb", M=4, workers=1) as index:
        ids, distances = index.search(same[:1], 50, 200)
        assert ids[0, :40].tolist() == sorted(ids[0, :40].tolist()) == list(range(40))
        assert (distances[0, :40] == 0).all()
        # More at one distance than are asked for.
        for found in (index.search(same[:1], 10, 200), index.exact(same[:1], 10)):
            assert found[0][0].tolist() == list(range(10))


def test_fewer_than_asked_for(tmp_path):
    for count in (1, 2, 7):
        with build(VECTORS[:count], tmp_path / "i.anb", workers=1) as index:
            ids, distances = index.search(QUERIES[:2], 9)
            assert (ids[:, count:] == -1).all()
            assert np.isinf(distances[:, count:]).all()
            np.testing.assert_array_equal(ids[:, :count], true_neighbours(VECTORS[:count], QUERIES[:2], count)[0])


def test_vectors_wider_than_a_page(tmp_path):
    wide = drawn(60, 2100)
    with build(wide, tmp_path / "i.anb", M=4, code_bytes=8, workers=1) as index:
        assert index.stats()["block_bytes"] == 12288
        assert index.stats()["per_block"] == 1
        np.testing.assert_array_equal(index.search(wide, 1, 60)[0][:, 0], np.arange(60))
        np.testing.assert_array_equal(index.vectors(np.arange(60)), wide)


def test_wrong_arguments_are_told(index):
    for call, said in (
        (lambda: index.search(QUERIES[:, :3]), "rows of 20 numbers"),
        (lambda: index.search(np.full((1, DIM), np.nan)), "not finite"),
        (lambda: index.search(QUERIES, 0), "k is 0"),
        (lambda: index.search(QUERIES, ef=0), "ef is 0"),
        (lambda: index.search(QUERIES, beam=0), "beam is 0"),
        (lambda: index.search(QUERIES, filter=np.ones(3, bool)), "filter is a mask of 3"),
        (lambda: index.vectors([COUNT]), "not in the index"),
        (lambda: index.contains([-1]), "ids are 0 to"),
        (lambda: DiskIndex(index.path, workers=0), "workers is 0"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    with pytest.raises(CapacityError, match="ask for fewer"):
        index.search(QUERIES, 2**60)


# Filters


@pytest.mark.parametrize("share", [0.004, 0.05, 0.5])
def test_a_filter_lets_only_its_own_through(index, sharded, share):
    # Measured whole; codes of all compared; a wider walk.
    mask = np.random.default_rng(5).random(COUNT) < share
    rows = np.flatnonzero(mask)
    true = rows[true_neighbours(VECTORS[rows], QUERIES, 5)[0]]
    for allowed in (mask, rows, index.prepare_filter(mask)):
        found = index.search(QUERIES, 5, 40, allowed)[0]
        assert mask[found].all()
        assert recall(found, true) > (0.99 if share < 0.01 else 0.9)
    made, ids = sharded
    found = made.search(QUERIES, 5, 40, ids[rows])[0]
    assert recall(found, ids[true]) > (0.99 if share < 0.01 else 0.9)
    assert np.isin(found, ids[rows]).all()
    np.testing.assert_array_equal(made.exact(QUERIES, 5, ids[rows])[0], ids[true])


def test_a_walk_holds_as_many_as_the_filter_asks_for(index):
    index.search(QUERIES, 5, 40)
    before = index.stats()["blocks"]
    index.search(QUERIES, 5, 40, np.arange(COUNT) % 3 == 0)
    assert index.stats()["blocks"] > 1.4 * before


def test_a_filter_that_lets_nothing_through(index):
    ids, distances = index.search(QUERIES[:2], 3, filter=[COUNT + 5])
    assert (ids == -1).all()
    assert np.isinf(distances).all()


# What is in it


def test_ids_and_vectors(index, sharded):
    assert len(index) == COUNT
    np.testing.assert_array_equal(index.ids, np.arange(COUNT))
    np.testing.assert_array_equal(index.vectors([7, 3, 7]), VECTORS[[7, 3, 7]])
    made, ids = sharded
    np.testing.assert_array_equal(made.ids, np.sort(ids))
    np.testing.assert_array_equal(made.vectors(ids), VECTORS)
    absent = np.setdiff1d(np.arange(10 * COUNT), ids)[:5]
    np.testing.assert_array_equal(made.contains([*absent, ids[0]]), [False] * 5 + [True])
    assert ids[3] in made
    assert absent[0] not in made
    assert -1 not in made
    assert 2**70 not in made


def test_memory_beyond_what_is_needed_holds_blocks(index):
    needed = index.memory_bytes
    with pytest.raises(CapacityError, match="shorter codes"):
        DiskIndex(index.path, memory=needed - 1)
    with DiskIndex(index.path, memory=needed + (1 << 19)) as held:
        # Some is left to searches.
        assert 20 < held.num_cached < 127
        assert held.memory_bytes <= needed + (1 << 18)
        np.testing.assert_array_equal(held.search(QUERIES, 5)[0], index.search(QUERIES, 5)[0])
    with DiskIndex(index.path, memory=1 << 30) as held:
        # The file is not needed any more.
        os.dup2(os.open(os.devnull, os.O_RDONLY), held._form.file)
        np.testing.assert_array_equal(held.search(QUERIES, 5)[0], index.search(QUERIES, 5)[0])


# Opening, closing, processes


def test_a_closed_index_says_so(index):
    held = DiskIndex(index.path)
    held.close()
    held.close()
    for call in (lambda: held.search(QUERIES), lambda: held.vectors([1]), held.verify):
        with pytest.raises(InputError, match="was closed"):
            call()


def test_it_is_not_closed_under_a_search(index):
    held, told = DiskIndex(index.path), []

    def ask():
        while True:
            try:
                held.search(QUERIES, 5)
            except InputError as error:
                told.append(str(error))
                return

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    held.close()
    for thread in threads:
        thread.join()
    assert all("was closed" in text for text in told)
    assert len(told) == 3


def _found(index, queue):
    queue.put(index.search(QUERIES, 5)[0])


def test_processes_share_one_file(index):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with DiskIndex(index.path, mmap=True) as held:
        workers = [context.Process(target=_found, args=(held, queue)) for _ in range(2)]
        for worker in workers:
            worker.start()
        for _ in workers:
            np.testing.assert_array_equal(queue.get(timeout=120), index.search(QUERIES, 5)[0])
        for worker in workers:
            worker.join()


def test_a_pickle_is_of_that_file(tmp_path):
    with build(VECTORS[:50], tmp_path / "i.anb", workers=1) as index:
        stored = pickle.dumps(index)
        np.testing.assert_array_equal(pickle.loads(stored).search(QUERIES, 3)[0], index.search(QUERIES, 3)[0])
        build(VECTORS[:50], tmp_path / "i.anb", workers=1).close()
        # What was open stays what it was.
        np.testing.assert_array_equal(index.search(VECTORS[:1], 1)[0], [[0]])
        with pytest.raises(DataError, match="replaced"):
            pickle.loads(stored)


# Damage


def spoilt(path, name, at=0, value=0x41):
    """The same file with one byte of an array changed, all checksums left."""
    header, start = _header(path)
    entry = next(entry for entry in header["arrays"] if entry["name"] == name)
    data = bytearray(path.read_bytes())
    data[start + entry["offset"] + at] ^= value
    other = path.with_name(f"spoilt-{name}.anb")
    other.write_bytes(data)
    return other


def test_every_byte_of_a_block_is_looked_at(index, tmp_path):
    size = index.stats()["block_bytes"]
    for at in (0, 1, 77, 81, 90, size // 2, size - 9, size - 8, size - 1):
        with DiskIndex(spoilt(index.path, "blocks", 3 * size + at, 1 << (at % 8))) as held:
            for call in (
                lambda held=held: held.search(QUERIES, 5, COUNT),
                lambda held=held: held.exact(QUERIES),
                held.verify,
            ):
                with pytest.raises(DataError, match="block 3 is not what was written"):
                    call()
    index.verify()


def test_a_block_of_another_place_or_file_is_not_taken(index, tmp_path):
    header, start = _header(index.path)
    place = start + next(entry["offset"] for entry in header["arrays"] if entry["name"] == "blocks")
    other = build(VECTORS, tmp_path / "o.anb", M=8, ef_construction=40, workers=1)
    data, theirs = bytearray(index.path.read_bytes()), other.path.read_bytes()
    assert len(data) == len(theirs)
    for block in (data[place : place + 4096], theirs[place + 4096 : place + 8192]):
        (tmp_path / "bad.anb").write_bytes(data[: place + 4096] + block + data[place + 8192 :])
        with DiskIndex(tmp_path / "bad.anb") as held, pytest.raises(DataError, match="block 1 is not"):
            held.search(QUERIES, 5, COUNT)
    other.close()


@pytest.mark.parametrize("mmap", ["no", 1, None])
def test_how_it_is_read_is_said_by_truth_values(index, mmap):
    with pytest.raises(InputError, match=r"mmap is .*; it must be True or False"):
        DiskIndex(index.path, mmap=mmap)


@pytest.mark.parametrize("name", ["codes", "centres", "slots", "roots", "entry_slots", "entry_links"])
@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_in_memory_is_checked_when_it_is_opened(index, name, mmap):
    with pytest.raises(DataError, match=f"checksum of '{name}'"):
        DiskIndex(spoilt(index.path, name, 1), mmap=mmap)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("slots", lambda a: a.__setitem__(0, a[1])),
        ("slots", lambda a: a.__setitem__(0, COUNT)),
        ("ids", lambda a: a.__setitem__(slice(0, 2), a[1::-1])),
        ("ids", lambda a: a.__setitem__(0, -1)),
        ("roots", lambda a: a.__setitem__(0, -1)),
        ("entry_slots", lambda a: a.__setitem__(0, a[1])),
        ("entry_slots", lambda a: a.__setitem__(0, COUNT)),
        ("entry_links", lambda a: a.__setitem__((0, 0), len(a))),
        ("entry_links", lambda a: a.__setitem__((0, 0), -2)),
        ("centres", lambda a: a.__setitem__((0, 0, 0), np.nan)),
    ],
)
def test_what_does_not_fit_together_is_damage_whatever_its_checksums(sharded, tmp_path, name, change):
    found = read_arrays(sharded[0].path, KIND)
    change(found.arrays[name])
    write_arrays(tmp_path / "bad.anb", KIND, found.arrays, found.meta)
    with pytest.raises(DataError, match="is damaged"):
        DiskIndex(tmp_path / "bad.anb")


def test_a_file_that_is_cut_while_it_is_open_is_no_signal(index, tmp_path):
    copy = tmp_path / "cut.anb"
    copy.write_bytes(index.path.read_bytes())
    with DiskIndex(copy) as held:
        os.truncate(copy, copy.stat().st_size // 2)
        with pytest.raises(DataError, match="ends after"):
            held.search(QUERIES, 5, COUNT)
    with pytest.raises(DataError, match="truncated"):
        DiskIndex(copy)


def test_a_disk_that_fails_is_told(index):
    with DiskIndex(index.path) as held:
        folder = os.open(index.path.parent, os.O_RDONLY)
        os.dup2(folder, held._form.file)
        with pytest.raises(DataError, match="cannot be read: is a directory"):
            held.search(QUERIES, 5)
        os.close(folder)


def test_foreign_files(tmp_path):
    HNSW(4).save(tmp_path / "h.anb")
    for path, said in ((tmp_path / "h.anb", "not a disk vector index"), (tmp_path / "none.anb", "no such file")):
        with pytest.raises(DataError, match=said):
            DiskIndex(path)


def test_it_is_what_an_hnsw_was(tmp_path):
    made = HNSW(DIM, M=8, ef_construction=40, workers=1)
    ids = np.random.default_rng(1).permutation(5000)[:600]
    made.add(VECTORS[:600], ids)
    made.save(tmp_path / "h.anb")
    for source in (made, HNSW.load(tmp_path / "h.anb", mmap=True)):
        with from_hnsw(source, tmp_path / "d.anb") as index:
            np.testing.assert_array_equal(index.vectors(ids), VECTORS[:600])
            true = true_neighbours(VECTORS[:600], QUERIES, 5, ids=ids)[0]
            np.testing.assert_array_equal(index.search(QUERIES, 5, 600)[0], true)
            assert index.stats()["max_degree"] <= 16
    before = made.search(QUERIES, 5)[0]
    made.remove(ids[:3])
    with pytest.raises(InputError, match="call compact"):
        from_hnsw(made, tmp_path / "d.anb")
    with pytest.raises(InputError, match="not 'hamming'"):
        from_hnsw(HNSW(8, metric="hamming"), tmp_path / "d.anb")
    made.restore(ids[:3])
    np.testing.assert_array_equal(made.search(QUERIES, 5)[0], before)


def test_what_is_put_on_disk_is_one_state_of_an_index_that_others_change(tmp_path, monkeypatch):
    """One that adds waits until it is written: links to what came later led beyond the end of arrays."""
    made = HNSW(DIM, M=8, ef_construction=40, workers=1)
    made.add(VECTORS[:600])
    others, searches, sample = [], [], making._sample

    def and_others_come(*asked):
        others.append(begun(lambda: made.add(VECTORS[600:])))
        others.append(begun(lambda: made.update(np.arange(50), VECTORS[600:650])))
        wanted(made._lock, 2)
        # Searches do not wait behind these.
        for query in (QUERIES, QUERIES[0]):
            reader = begun(lambda query=query: searches.append(made.search(query, 5)[0]))
            reader.join(WAIT_S)
        assert len(searches) == 2
        return sample(*asked)

    monkeypatch.setattr(making, "_sample", and_others_come)
    with from_hnsw(made, tmp_path / "d.anb") as index:
        assert len(index) == 600
        np.testing.assert_array_equal(index.vectors(np.arange(600)), VECTORS[:600])
        true = true_neighbours(VECTORS[:600], QUERIES, 5)[0]
        np.testing.assert_array_equal(index.search(QUERIES, 5, 600)[0], true)
    for one in others:
        one.join(WAIT_S)
    assert len(made) == COUNT


def test_an_interrupt_ends_it_between_two_pieces_and_leaves_nothing(tmp_path, monkeypatch):
    made = HNSW(DIM, M=8, ef_construction=40, workers=1)
    made.add(VECTORS[:600])
    sample = making._sample

    def and_one_comes(*asked):
        signal.raise_signal(signal.SIGINT)
        return sample(*asked)

    monkeypatch.setattr(making, "_sample", and_one_comes)
    with pytest.raises(KeyboardInterrupt):
        from_hnsw(made, tmp_path / "d.anb")
    assert not list(tmp_path.iterdir())
    # It was given back.
    made.add(VECTORS[600:700])


def test_links_that_lead_beyond_the_last_element_are_told(tmp_path):
    made = HNSW(DIM, M=8, ef_construction=40, workers=1)
    made.add(VECTORS[:600])
    made._storage.links[7, 3] = 600
    with pytest.raises(DataError, match="links of the index lead to what is not there"):
        from_hnsw(made, tmp_path / "d.anb")
    assert not list(tmp_path.iterdir())
