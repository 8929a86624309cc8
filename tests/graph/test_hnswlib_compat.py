"""What code written for hnswlib 0.8 relies on."""

import pickle
import signal
import threading

import numpy as np
import pytest

import anabranch.graph.hnswlib_compat as hnswlib
from anabranch.errors import CapacityError
from anabranch.graph.array_file import write_arrays
from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.storage import VERSION, Storage
from anabranch.graph.hnswlib_compat import brute
from hnsw_checks import WAIT_S, check_graph, drawn, naive, recall, wanted
from hnsw_checks import thread as begun

VECTORS, QUERIES = drawn(600, 8, 1), drawn(30, 8, 2)


def built(space="l2", count=600, max_elements=600, **options):
    index = hnswlib.Index(space=space, dim=8)
    index.init_index(max_elements=max_elements, ef_construction=100, M=16, **options)
    index.add_items(VECTORS[:count])
    return index


@pytest.mark.parametrize("space", ["l2", "ip", "cosine"])
def test_queries(space):
    index = built(space)
    index.set_ef(100)
    labels, distances = index.knn_query(QUERIES, k=5)
    assert (labels.dtype, distances.dtype) == (np.uint64, np.float32)
    truth, exact = naive(VECTORS, QUERIES, 5, space)
    assert recall(labels.astype(np.int64), truth) > 0.97
    np.testing.assert_allclose(distances[:, 0], exact[:, 0], rtol=1e-4, atol=1e-5)
    assert index.knn_query(QUERIES[0], k=2)[0].shape == (1, 2)


def test_same_answers_as_hnswlib():
    theirs = pytest.importorskip("hnswlib")
    for space in ("l2", "ip", "cosine"):
        other = theirs.Index(space=space, dim=8)
        other.init_index(max_elements=600, ef_construction=100, M=16)
        other.add_items(VECTORS, num_threads=1)
        ours = built(space)
        for index in (ours, other):
            index.set_ef(600)
        labels, distances = ours.knn_query(QUERIES, k=10)
        their_labels, their_distances = other.knn_query(QUERIES, k=10)
        assert (labels == their_labels).mean() > 0.99
        np.testing.assert_allclose(distances, their_distances, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(ours.get_items([3, 4]), other.get_items([3, 4]), rtol=1e-5)


def test_properties():
    index = hnswlib.Index("cosine", 8)
    assert (index.space, index.dim, index.ef) == ("cosine", 8, 10)
    assert (index.max_elements, index.element_count, index.M, index.ef_construction) == (0, 0, 0, 0)
    index.ef = 33
    index.init_index(max_elements=50, M=5, ef_construction=3, random_seed=7)
    assert (index.ef, index.M, index.ef_construction, index.get_max_elements()) == (33, 5, 5, 50)
    index.num_threads = 3
    index.set_num_threads(4)
    assert index.num_threads == 4
    assert repr(index) == "<hnswlib.Index(space='cosine', dim=8)>"
    index.add_items(VECTORS[:10])
    assert index.get_current_count() == index.element_count == 10
    assert index.index_file_size() > 10 * 32


def test_labels_go_on_by_rows_added():
    index = built(count=3)
    index.add_items(VECTORS[3], 77)
    index.add_items(VECTORS[4:6])
    assert sorted(index.get_ids_list()) == [0, 1, 2, 4, 5, 77]  # 77 counted as row 3, as there
    index.add_items(VECTORS[10:11], [77])
    assert index.element_count == 6
    np.testing.assert_array_equal(index.get_items([77]), VECTORS[10:11])
    index.add_items(VECTORS[11:13], [200, 200])
    np.testing.assert_array_equal(index.get_items([200]), VECTORS[12:13])


def test_get_items():
    index = built(count=5)
    assert isinstance(index.get_items([0, 1]), np.ndarray)
    assert index.get_items([0], return_type="list")[0] == VECTORS[0].tolist()
    np.testing.assert_array_equal(index.get_items(np.array([[2], [3]])), VECTORS[2:4])
    assert len(index.get_items()) == 0
    with pytest.raises(ValueError, match="accepts a list of indices"):
        index.get_items(0)
    with pytest.raises(ValueError, match="return_type should be"):
        index.get_items([0], return_type="tensor")
    with pytest.raises(RuntimeError, match="Label not found"):
        index.get_items([9])


def test_filters():
    index = built()
    labels, _ = index.knn_query(QUERIES, k=3, num_threads=1, filter=lambda label: label % 2 == 0)
    assert (labels % 2 == 0).all()
    with pytest.raises(RuntimeError, match="contiguous 2D array"):
        index.knn_query(QUERIES, k=3, filter=lambda label: label < 2)


def test_deleting():
    index = built(count=50)
    index.mark_deleted(7)
    assert 7 not in index.knn_query(VECTORS[7], k=49)[0]
    assert index.get_current_count() == 50
    assert 7 in index.get_ids_list()
    for message, call in (
        ("already deleted", lambda: index.mark_deleted(7)),
        ("Label not found", lambda: index.mark_deleted(50)),
        ("Label not found", lambda: index.unmark_deleted(50)),
        ("is not deleted", lambda: index.unmark_deleted(8)),
        ("Label not found", lambda: index.get_items([7])),
        ("contiguous 2D array", lambda: index.knn_query(VECTORS[7], k=50)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    index.unmark_deleted(np.uint64(7))
    assert index.knn_query(VECTORS[7], k=1)[0].tolist() == [[7]]
    index.mark_deleted(7)
    index.add_items(VECTORS[60:61], [7])  # revives it
    assert index.knn_query(VECTORS[60], k=1)[0].tolist() == [[7]]
    assert index.get_current_count() == 50


def test_replacing_deleted():
    index = built(count=100, max_elements=100, allow_replace_deleted=True)
    for label in range(0, 100, 2):
        index.mark_deleted(label)
    with pytest.raises(RuntimeError, match="exceeds the specified limit"):
        index.add_items(VECTORS[200:210], np.arange(200, 210))
    with pytest.raises(RuntimeError, match="Can't use addPoint to update deleted elements"):
        index.add_items(VECTORS[200:201], [0])
    index.add_items(VECTORS[200:250], np.arange(200, 250), replace_deleted=True)
    check_graph(index._index)
    assert index.get_current_count() == 100
    assert sorted(index.get_ids_list()) == [*range(1, 100, 2), *range(200, 250)]
    index.set_ef(50)
    assert index.knn_query(VECTORS[200:250], k=1)[0][:, 0].tolist() == list(range(200, 250))
    with pytest.raises(RuntimeError, match="exceeds the specified limit"):
        index.add_items(VECTORS[300:301], [300], replace_deleted=True)
    with pytest.raises(RuntimeError, match="disabled in constructor"):
        built(count=5).add_items(VECTORS[:1], replace_deleted=True)


def test_limits():
    index = built(count=4, max_elements=5)
    with pytest.raises(RuntimeError, match="exceeds the specified limit"):
        index.add_items(VECTORS[:2])
    index.resize_index(6)
    index.add_items(VECTORS[4:6])
    assert (index.get_max_elements(), index.get_current_count()) == (6, 6)
    with pytest.raises(RuntimeError, match="Cannot resize"):
        index.resize_index(5)
    with pytest.raises(RuntimeError, match="contiguous 2D array"):
        index.knn_query(QUERIES, k=7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index: index.add_items(np.ones((2, 7))), "Wrong dimensionality"),
        (lambda index: index.knn_query(np.ones((2, 9))), "Wrong dimensionality"),
        (lambda index: index.add_items(np.ones((1, 2, 8))), "Number of dimensions 3"),
        (lambda index: index.add_items(np.full((1, 8), np.nan)), "row 0 of the vectors is not finite"),
        (lambda index: index.add_items(np.ones((2, 8)), [1]), "input label shape"),
        (lambda index: index.add_items(np.ones((1, 8)), [-1]), "labels must be integers"),
        (lambda index: index.knn_query(QUERIES, k=0), "k is 0"),
        (lambda index: index.init_index(5), "already initiated"),
        (lambda index: hnswlib.Index("l1", 8), "Space name must be one of"),
        (lambda index: hnswlib.Index("l2", 8).knn_query(QUERIES), "not initiated"),
        (lambda index: index.load_index("nowhere"), "nowhere"),
    ],
)
def test_errors(call, message):
    index = built(count=5)
    with pytest.raises(RuntimeError, match=message):
        call(index)
    assert index.element_count == 5


def test_saved_and_loaded(tmp_path):
    index = built(count=300, max_elements=400, allow_replace_deleted=True)
    index.set_ef(50)
    index.mark_deleted(3)
    path = str(tmp_path / "index.bin")
    index.save_index(path)
    loaded = hnswlib.Index("l2", 8)
    loaded.load_index(path)
    assert (loaded.max_elements, loaded.element_count, loaded.M, loaded.ef) == (400, 300, 16, 10)
    loaded.set_ef(50)
    for left, right in zip(loaded.knn_query(QUERIES, 5), index.knn_query(QUERIES, 5), strict=True):
        np.testing.assert_array_equal(left, right)
    loaded.unmark_deleted(3)
    loaded.add_items(VECTORS[300:400])
    assert loaded.knn_query(VECTORS[300], 1)[0].tolist() == [[300]]
    loaded.load_index(path, max_elements=1000, allow_replace_deleted=True)
    assert loaded.max_elements == 1000
    loaded.add_items(VECTORS[500:501], [999], replace_deleted=True)
    assert loaded.element_count == 300
    other = hnswlib.Index("ip", 8)  # vectors stay, distances are those of the space
    other.load_index(path)
    assert other.knn_query(VECTORS[5], 1)[1][0, 0] < 0
    with pytest.raises(RuntimeError, match="holds vectors of 8 numbers, not 9"):
        hnswlib.Index("l2", 9).load_index(path)
    content = (tmp_path / "index.bin").read_bytes()
    for broken in (content[:-7], b"x" + content[1:], content[:500] + b"\xff" + content[501:]):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(RuntimeError, match="corrupted or unsupported"):
            hnswlib.Index("l2", 8).load_index(tmp_path / "broken")


def test_pickles_and_copies():
    empty = pickle.loads(pickle.dumps(hnswlib.Index("ip", 8)))
    empty.init_index(10)
    index = built(count=100, max_elements=150)
    index.mark_deleted(9)
    index.ef = 60
    for copied in (pickle.loads(pickle.dumps(index)), hnswlib.Index(index), hnswlib.Index(index=index)):
        assert (copied.ef, copied.max_elements, copied.element_count) == (60, 150, 100)
        np.testing.assert_array_equal(copied.knn_query(QUERIES, 5)[0], index.knn_query(QUERIES, 5)[0])
        copied.unmark_deleted(9)
        copied.add_items(VECTORS[100:110])
    assert index.element_count == 100
    with pytest.raises(RuntimeError, match="Label not found"):
        index.get_items([9])


# Every distance


@pytest.mark.parametrize("space", ["l2", "ip", "cosine"])
def test_brute_force(space, tmp_path):
    index = hnswlib.BFIndex(space=space, dim=8)
    index.init_index(max_elements=600)
    index.set_num_threads(8)
    index.add_items(VECTORS)
    assert (index.num_threads, index.get_max_elements(), index.get_current_count()) == (8, 600, 600)
    truth, exact = naive(VECTORS, QUERIES, 20, space)
    labels, distances = index.knn_query(QUERIES, k=20)
    np.testing.assert_array_equal(labels, truth)
    np.testing.assert_allclose(distances, exact, rtol=1e-3, atol=1e-4)
    even, _ = index.knn_query(QUERIES, k=3, filter=lambda label: label % 2 == 0)
    assert (even % 2 == 0).all()
    index.save_index(tmp_path / "exact")
    loaded = hnswlib.BFIndex(space, 8)
    loaded.load_index(tmp_path / "exact")
    np.testing.assert_array_equal(loaded.knn_query(QUERIES, k=20)[0], truth)
    assert loaded.get_max_elements() == 600


def test_brute_force_beside_one_that_adds(monkeypatch):
    """Arrays that a query reads are not given back before it is over: whoever adds waits, also for one whose filter asks the index."""
    index = hnswlib.BFIndex("l2", 8)
    index.init_index(max_elements=600)
    index.add_items(VECTORS[:100])
    before = index.knn_query(QUERIES, k=5)
    others, scan = [], brute.scan_many

    def and_others_come(*asked):
        if not others:
            others.append(begun(lambda: index.add_items(VECTORS[100:])))
            others.append(begun(lambda: index.delete_vector(3)))
            wanted(index._lock, 2)
        assert index._storage.count == 100
        return scan(*asked)

    monkeypatch.setattr(brute, "scan_many", and_others_come)
    found = index.knn_query(QUERIES, k=5, filter=lambda label: label < index.get_current_count(), num_threads=1)
    for one in others:
        one.join(WAIT_S)
    for one, other in zip(found, before, strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.undo()
    assert index.get_current_count() == 599
    # A filter may change the index, and what went meanwhile is not returned.
    labels, _ = index.knn_query(VECTORS[5], k=3, filter=lambda label: index.delete_vector(5) or label < 9)
    assert set(labels[0].tolist()) <= {0, 1, 2, 4, 6, 7, 8}


def test_a_pickle_of_brute_force_holds_vectors_and_no_addresses():
    index = hnswlib.BFIndex("ip", 8)
    assert pickle.loads(pickle.dumps(index)).get_current_count() == 0
    index.init_index(max_elements=100)
    index.add_items(VECTORS[:90])
    index.delete_vector(7)
    again = pickle.loads(pickle.dumps(index))
    # Of its own.
    index.add_items(VECTORS[90:100])
    truth, _ = naive(np.delete(VECTORS[:90], 7, 0), QUERIES, 5, "ip", np.delete(np.arange(90), 7))
    np.testing.assert_array_equal(again.knn_query(QUERIES, k=5)[0], truth)
    again.add_items(VECTORS[:2])
    assert (again.get_current_count(), again.get_max_elements()) == (91, 100)
    assert 91 in again.knn_query(VECTORS[1], k=91)[0]


def test_brute_force_changes_and_errors(tmp_path):
    index = hnswlib.BFIndex("l2", 8)
    with pytest.raises(RuntimeError, match="not initiated"):
        index.add_items(VECTORS[:1])
    index.init_index(max_elements=5)
    index.add_items(VECTORS[:5])
    with pytest.raises(RuntimeError, match="exceeds the specified limit"):
        index.add_items(VECTORS[:1], [9])
    index.delete_vector(2)
    index.delete_vector(2)  # nothing happens, as there
    assert index.get_current_count() == 4
    assert 2 not in index.knn_query(VECTORS[2], k=4)[0]
    index.add_items(VECTORS[9], 9)
    index.add_items(VECTORS[10], 9)
    assert index.get_current_count() == 5
    assert index.knn_query(VECTORS[10], k=1)[0].tolist() == [[9]]
    with pytest.raises(RuntimeError, match="k is 6"):
        index.knn_query(VECTORS[0], k=6)
    with pytest.raises(RuntimeError, match="k is 2, and there are 1"):
        index.knn_query(VECTORS[0], k=2, filter=lambda label: label == 9)
    with pytest.raises(RuntimeError, match="already initiated"):
        index.init_index(5)
    with pytest.raises(RuntimeError, match="corrupted or unsupported"):
        index.load_index(tmp_path / "none")
    index.save_index(tmp_path / "exact")
    with pytest.raises(RuntimeError, match="not of 9 numbers"):
        hnswlib.BFIndex("l2", 9).load_index(tmp_path / "exact")


def test_labels_go_on_where_they_were_after_an_error(monkeypatch):
    index = hnswlib.BFIndex("l2", 8)
    index.init_index(max_elements=4)
    index.add_items(VECTORS[:2])
    for labels in ([7, 7, 8, 9], None):
        with pytest.raises(RuntimeError, match="exceeds the specified limit"):
            index.add_items(VECTORS[:4], labels)
    index.delete_vector(1)

    def none(*_):
        raise CapacityError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "_resize", none)
        with pytest.raises(CapacityError):
            index.add_items(VECTORS[:3], [5, 6, 7])
    assert index.get_current_count() == 1
    index.add_items(VECTORS[2:5])
    assert index.knn_query(VECTORS[[0, 2, 3, 4]], k=1)[0][:, 0].tolist() == [0, 2, 3, 4]
    assert index.get_current_count() == 4


@pytest.mark.parametrize(
    ("vectors", "labels", "most"),
    [
        (VECTORS[:4], np.array([0, 1, 1, 2]), 10),
        (VECTORS[:4], np.array([0, 1, 2, -3]), 10),
        (VECTORS[:4], np.array([0, 1, 2, 2**64 - 1], np.uint64), 10),
        (VECTORS[:4] * np.float32(np.nan), np.arange(4), 10),
        (VECTORS[:4] * np.float32(1e19), np.arange(4), 10),
        (VECTORS[:4], np.arange(4), 3),
    ],
)
def test_files_of_brute_force_that_nothing_writes(tmp_path, vectors, labels, most):
    write_arrays(tmp_path / "x", brute.KIND, {"vectors": vectors, "labels": labels}, {"max_elements": most})
    index = hnswlib.BFIndex("l2", 8)
    index.init_index(9)
    index.add_items(VECTORS[:2])
    with pytest.raises(RuntimeError, match="corrupted or unsupported"):
        index.load_index(tmp_path / "x")
    assert index.get_current_count() == 2


def test_zero_vectors_are_taken_in_cosine_space_as_there():
    index = hnswlib.Index("cosine", 2)
    index.init_index(4)
    index.add_items([[0, 0], [1, 0], [0, 2]])
    labels, distances = index.knn_query([1, 0], k=3)
    assert labels[0, 0] == 1
    assert distances.tolist() == [[0, 1, 1]]


# Several threads


@pytest.mark.parametrize("how", ["loaded", "made", "copied"])
def test_several_threads_add_at_once_and_no_label_is_given_twice(tmp_path, how):
    vectors = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    index = hnswlib.Index("l2", 8)
    index.init_index(2000, M=6, ef_construction=30)
    index.add_items(vectors[:100])
    if how == "loaded":
        index.save_index(tmp_path / "index")
        index = hnswlib.Index("l2", 8)
        index.load_index(tmp_path / "index", max_elements=2000)
    elif how == "copied":
        index = pickle.loads(pickle.dumps(index))
    errors, begin = [], threading.Barrier(4)

    def work(number):
        try:
            begin.wait(60)
            for turn in range(10):
                first = 100 + 120 * number + 10 * turn
                index.add_items(vectors[first : first + 10], num_threads=1 + turn % 2)
                index.knn_query(vectors[:5], 3, num_threads=1)
                if number == 0:
                    index.mark_deleted(turn)
                    index.unmark_deleted(turn)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert index.element_count == 500
    assert sorted(index.get_ids_list()) == list(range(500))
    found = index.get_items(np.arange(100, 500))
    first = 100 + 120 * np.arange(4)[:, None] + np.arange(100)
    # All of them, in whatever order.
    np.testing.assert_array_equal(found[np.lexsort(found.T)], (given := vectors[first.ravel()])[np.lexsort(given.T)])


def test_an_interrupted_add_gives_no_label_twice(monkeypatch):
    from anabranch.graph.hnsw.linking import Linker

    vectors = np.random.default_rng(0).normal(size=(2600, 8)).astype(np.float32)
    index = hnswlib.Index("l2", 8)
    index.init_index(9000, M=6, ef_construction=30)
    own, calls = Linker._link_batch, []

    def interrupted(self, batch_B, workers):
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        calls.append(1)
        own(self, batch_B, workers)

    monkeypatch.setattr(Linker, "_link_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.add_items(vectors)
    monkeypatch.undo()
    kept = index.element_count
    assert 1024 < kept < 2600
    index.add_items(vectors[:5])
    assert index.element_count == kept + 5
    assert index.get_ids_list()[-5:] == list(range(2600, 2605))


@pytest.mark.parametrize("way", ["file", "pickle", "copy", "old file", "old pickle"])
def test_an_index_whose_elements_took_the_places_of_deleted_ones_is_read_again(tmp_path, way):
    """New labels beyond the largest were not noted: what was saved was told to be corrupted."""
    vectors = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    index = hnswlib.Index(space="l2", dim=8)
    index.init_index(max_elements=100, M=4, ef_construction=10, allow_replace_deleted=True)
    index.add_items(vectors, np.arange(100))
    index.mark_deleted(5)
    index.add_items(vectors[:1] + 9, [2000], replace_deleted=True)
    if way.startswith("old"):
        # As earlier releases noted it.
        index._index._changes.next_id = 100
    if way.endswith("file"):
        index.save_index(tmp_path / "i")
        again = hnswlib.Index(space="l2", dim=8)
        again.load_index(tmp_path / "i")
    else:
        again = pickle.loads(pickle.dumps(index)) if way.endswith("pickle") else hnswlib.Index(index)
    assert again.knn_query(vectors[:1] + 9, 1)[0].tolist() == [[2000]]
    assert again._index._changes.next_id == 2001


def test_vacant_places_of_a_file_are_no_deleted_elements(tmp_path):
    """They were taken for elements called -1, whose places new ones took, on levels below zero: a raw error halfway."""
    vectors = np.random.default_rng(0).standard_normal((330, 8)).astype(np.float32)
    index = HNSW(8, "l2", 4, 10, compact_at=None, workers=1)
    index.add(vectors[:300])
    index.remove(range(40))
    index.add(vectors[:1], [1000])
    state = index.__getstate__()
    assert len(index._storage.vacant_S)
    meta = {"hnsw": state["meta"], "max_elements": 400}
    write_arrays(tmp_path / "i", "hnswlib_compat index", state["arrays"], meta, VERSION)
    again = hnswlib.Index(space="l2", dim=8)
    again.load_index(tmp_path / "i", allow_replace_deleted=True)
    assert min(again.get_ids_list()) >= 0
    with pytest.raises(RuntimeError, match="Label not found"):
        again.unmark_deleted(-1)
    again.add_items(vectors[300:] + 5, np.arange(2000, 2030), replace_deleted=True)
    assert again.knn_query(vectors[300:] + 5, 1)[0].ravel().tolist() == list(range(2000, 2030))
    again.save_index(tmp_path / "j")
    again.load_index(tmp_path / "j")
    assert again.knn_query(vectors[300:] + 5, 1)[0].ravel().tolist() == list(range(2000, 2030))
