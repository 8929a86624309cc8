import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.graph.hnsw import HNSW, brute_force, layout
from hnsw_checks import check_graph, drawn, graph_bytes, lists, naive, recall

METRICS = ("l2", "ip", "cosine")
PRECISIONS = ("f32", "f16", "i8")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 sums of 16 terms of about 10


# By hand


def test_points_on_a_line():
    index = HNSW(1, M=4)
    assert index.add([[0.0], [1.0], [3.0], [7.0]]).tolist() == [0, 1, 2, 3]
    ids, distances = index.search([[2.5]], k=3)
    assert ids.tolist() == [[2, 1, 0]]  # (3 - 2.5)^2 = 0.25, (1 - 2.5)^2 = 2.25, 2.5^2 = 6.25
    assert distances.tolist() == [[0.25, 2.25, 6.25]]
    assert (ids.dtype, distances.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("l2", [[0.0, 2.0, 5.0]]),  # (3,4): 0; (2,3): 1 + 1; (1,3): 4 + 1
        ("ip", [[1 - 25.0, 1 - 18.0, 1 - 15.0]]),
        ("cosine", [[0.0, 1 - 18 / (5 * math.sqrt(13)), 1 - 15 / (5 * math.sqrt(10))]]),
    ],
)
def test_distances_by_hand(metric, expected):
    index = HNSW(2, metric=metric)
    index.add([[3, 4], [2, 3], [1, 3]])
    ids, distances = index.search([3, 4], k=3)
    assert ids.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(distances, expected, rtol=1e-6, atol=1e-6)


def test_heuristic_by_hand():
    """Around 0 on a line lie 1, 2 and -3. The heuristic takes 1, not 2 (1 from 1, 2 from 0), then -3; simple takes the nearest two.

    Three elements make M = 2 and 2 M = 4 links, so that only the forward links of the last one are selected.
    """
    points = [[1.0], [2.0], [-3.0], [0.0]]
    found = {}
    for name, options in {
        "diverse": {},
        "simple": {"heuristic": "simple"},
        "kept": {"keep_pruned": True},
    }.items():
        index = HNSW(1, M=2, flat=True, **options)
        index.add(points)
        found[name] = lists(index, 0)[3]
    assert found == {"diverse": [0, 2], "simple": [0, 1], "kept": [0, 2]}


def test_pruned_candidates_fill_up():
    """All lie on one side: the heuristic takes the nearest alone; keep_pruned fills up with the next."""
    points = [[1.0], [2.0], [3.0], [0.0]]
    for keep_pruned, expected in ((False, [0]), (True, [0, 1])):
        index = HNSW(1, M=2, flat=True, keep_pruned=keep_pruned)
        index.add(points)
        assert lists(index, 0)[3] == expected


# Against every distance


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 3, 16, 17, 80])
def test_holds_all_and_finds_all(metric, dim):
    """With ef >= N on a connected graph a search is exact, order included."""
    vectors, queries = drawn(200, dim, 1), drawn(20, dim, 2)
    index = HNSW(dim, metric, M=8)
    index.add(vectors)
    index.repair()
    ids, distances = index.search(queries, k=200, ef=200)
    truth, exact = naive(vectors, queries, 200, metric)
    np.testing.assert_allclose(distances, exact, rtol=2e-4, atol=2e-4)
    if dim > 1 or metric == "l2":  # one-dimensional cosines are all 0 or 2, and order is that of ids
        assert recall(ids, truth) == 1.0
    assert (np.diff(distances, axis=1) >= 0).all()
    same = np.diff(distances, axis=1) == 0
    assert (np.diff(ids, axis=1)[same] > 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_same_as_brute_force(metric):
    vectors, queries = drawn(300, 24, 3), drawn(10, 24, 4)
    index = HNSW(24, metric, M=8)
    index.add(vectors)
    ids, distances = index.search(queries, k=10, ef=300)
    exact_ids, exact = brute_force(vectors, queries, 10, metric)
    assert ids.tolist() == exact_ids.tolist()
    np.testing.assert_allclose(distances, exact, **CLOSE)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_recall_and_recomputed_distances(metric, dtype):
    vectors, queries = drawn(2500, 32, 5), drawn(100, 32, 6)
    index = HNSW(32, metric, dtype=dtype)
    index.add(vectors)
    check_graph(index)
    ids, distances = index.search(queries, k=10)
    truth, _ = naive(vectors, queries, 10, metric)
    assert recall(ids, truth) > 0.97
    for row in range(0, 100, 10):
        again = naive(vectors[ids[row]], queries[row : row + 1], 10, metric)[1][0]
        np.testing.assert_allclose(distances[row], again, rtol=1e-3, atol=1e-4)  # measured again in float32


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 2e-3), ("i8", 3e-2)])
def test_short_rows_alone_round(dtype, bound):
    vectors, queries = drawn(500, 32, 5) + 100, drawn(20, 32, 6) + 100  # far from the origin: rows are centred
    index = HNSW(32, dtype=dtype, rerank=False)
    index.add(vectors)
    assert not index.rerank
    ids, distances = index.search(queries, k=5)
    truth, exact = naive(vectors, queries, 5)
    assert recall(ids, truth) > 0.9
    np.testing.assert_allclose(distances, exact, rtol=10 * bound, atol=bound * exact.max())
    assert np.abs(index.vectors([3, 4]) - vectors[3:5]).max() < bound * np.abs(vectors - vectors.mean(0)).max()


def test_size_of_short_rows():
    vectors = drawn(300, 128, 1)
    size = {}
    for dtype in PRECISIONS:
        index = HNSW(128, dtype=dtype, rerank=False)
        index.add(vectors)
        size[dtype] = index._storage.rows[:300].nbytes / 300
    assert size == {"f32": 512, "f16": 256, "i8": 128}


@pytest.mark.filterwarnings("ignore:row .* of vectors holds a number")
def test_numbers_beyond_half_precision_are_not_infinite():
    index = HNSW(2, "ip", dtype="f16")
    index.add([[1e6, 0], [0, 1.0]])
    ids, distances = index.search([[1.0, 0.0]], k=2)
    assert ids.tolist() == [[0, 1]]
    assert distances.tolist() == [[1 - 1e6, 1.0]]


# Structure


@pytest.mark.parametrize(
    "options", [{}, {"M": 4}, {"flat": True}, {"heuristic": "simple"}, {"extend_candidates": True, "keep_pruned": True}]
)
def test_invariants(options):
    index = HNSW(8, ef_construction=40, **options)
    index.add(drawn(1500, 8))
    index.add(drawn(700, 8, 9))
    check_graph(index)
    if "flat" in options:
        assert index.stats()["levels"] == [2200]


def test_new_elements_take_at_most_m_links_and_lists_hold_twice():
    index = HNSW(4, M=3, ef_construction=30)
    index.add(drawn(600, 4))
    degrees = [len(links) for links in lists(index, 0).values()]
    assert max(degrees) == 6
    last = lists(index, 0)[599]
    assert 1 <= len(last) <= 3


def test_levels_follow_powers_of_m():
    from anabranch.graph.hnsw.storage import draw_levels

    count, M = 200_000, 8
    level_N = draw_levels(np.uint64(7), 0, count, M)
    expected = [count * M**-level * (1 - 1 / M) for level in range(4)]
    seen = [(level_N == level).sum() for level in range(4)]
    chi_square = sum((a - b) ** 2 / b for a, b in zip(seen, expected, strict=True))
    assert chi_square < 23.5  # 4 degrees: p = 1e-4
    assert draw_levels(np.uint64(7), 1000, 50, M).tolist() == level_N[1000:1050].tolist()


def test_stats_count():
    index = HNSW(8, M=4)
    vectors = drawn(500, 8)
    index.add(vectors)
    stats = index.stats()
    degree = np.mean([len(links) for links in lists(index, 0).values()])
    assert stats["mean_degree"][0] == pytest.approx(degree, abs=1e-3)
    assert stats["levels"][0] == stats["count"] == 500
    assert stats["queries"] == 0
    index.search(vectors[:10], k=1, ef=20)
    stats = index.stats()
    assert stats["queries"] == 10
    assert 20 <= stats["distances"] <= 500 + 8 * stats["hops"]
    assert stats["hops"] >= 20


# Determinism


@pytest.mark.parametrize("dtype", ["f32", "i8"])
def test_bytes_are_the_same_for_any_number_of_threads(dtype):
    vectors = drawn(4000, 12)
    built = []
    for workers in (1, 2, 5):
        index = HNSW(12, M=6, ef_construction=40, dtype=dtype, workers=workers)
        index.add(vectors[:3000])
        index.remove(np.arange(0, 300))
        index.compact()
        index.add(vectors[3000:])
        index.update([500, 2000], vectors[:2])
        built.append(graph_bytes(index))
    assert built[0] == built[1] == built[2]
    other = HNSW(12, M=6, ef_construction=40, dtype=dtype, seed=1)
    other.add(vectors)
    assert graph_bytes(other)["level"] != built[0]["level"]


def test_batches_do_not_cost_recall(monkeypatch):
    from anabranch.graph.hnsw import linking

    vectors, queries = drawn(4000, 24, 1), drawn(200, 24, 2)
    truth, _ = naive(vectors, queries, 10)
    found = []
    for singly in (linking.SINGLY, 10_000):
        monkeypatch.setattr(linking, "SINGLY", singly)
        index = HNSW(24, M=8, ef_construction=60)
        index.add(vectors)
        found.append(recall(index.search(queries, 10, 30)[0], truth))
    assert abs(found[0] - found[1]) < 0.01


def test_many_readers_and_a_writer():
    vectors = drawn(3000, 16)
    index = HNSW(16, M=8, ef_construction=40, workers=1)
    index.add(vectors[:1000])
    wrong, done = [], threading.Event()

    def read():
        while not done.is_set():
            ids, distances = index.search(vectors[:20], 1, 32)
            if not np.array_equal(ids[:, 0], np.arange(20)) or distances.max() > 1e-6:
                wrong.append(ids)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for begin in range(1000, 3000, 250):
        index.add(vectors[begin : begin + 250])
        index.remove(np.arange(begin, begin + 100))
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
    check_graph(index)


# Kinds of input and output


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.int32])
def test_arrays_of_other_types_and_orders(kind):
    vectors = (10 * drawn(50, 6)).astype(kind)
    index = HNSW(6)
    index.add(np.asfortranarray(vectors))
    assert index.search(vectors[::2], 1)[0][:, 0].tolist() == list(range(0, 50, 2))


def test_tensors_come_back_as_tensors():
    vectors = torch.from_numpy(drawn(100, 6)).requires_grad_()
    index = HNSW(6)
    index.add(vectors)
    ids, distances = index.search(vectors[:5], 3)
    assert isinstance(ids, torch.Tensor)
    assert (ids.dtype, distances.dtype) == (torch.int64, torch.float32)
    assert ids[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert isinstance(index.search(vectors[:5].detach().numpy(), 3)[0], np.ndarray)
    ids, _ = index.search(vectors[:5].bfloat16(), 1, filter=torch.arange(100) < 50)
    assert ids.shape == (5, 1)


def test_own_ids_and_automatic_ones():
    index = HNSW(2)
    assert index.add([[0, 0], [1, 0]], ids=[70, 5]).tolist() == [70, 5]
    assert index.add([[5, 5]]).tolist() == [71]
    assert index.search([[1, 0]], 3)[0].tolist() == [[5, 70, 71]]
    assert index.ids.tolist() == [70, 5, 71]
    assert 70 in index
    assert 6 not in index
    assert index.vectors([5, 70]).tolist() == [[1, 0], [0, 0]]


def test_ties_go_by_id():
    index = HNSW(2)
    index.add(np.zeros((40, 2)), ids=np.arange(100, 60, -1), repair=True)
    ids, distances = index.search([[0, 0]], 40, 40)
    assert ids.tolist() == [list(range(61, 101))]
    assert not distances.any()


# Too few, filters


def test_fewer_than_k_are_padded():
    index = HNSW(3)
    ids, distances = index.search(np.ones((2, 3)), 4)
    assert ids.tolist() == [[-1] * 4] * 2
    assert np.isinf(distances).all()
    index.add(np.eye(3))
    ids, distances = index.search([[1, 0, 0]], 5)
    assert ids.tolist() == [[0, 1, 2, -1, -1]]
    assert distances.tolist() == [[0, 2, 2, np.inf, np.inf]]
    assert index.search(np.empty((0, 3)), 5)[0].shape == (0, 5)
    assert index.add(np.empty((0, 3))).shape == (0,)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("share", [0.5, 0.05, 0.004, 0.0])
def test_filters_find_what_they_let_through(dtype, share):
    """0.5 and 0.05 walk (more than 2 ef match), the others scan."""
    vectors, queries = drawn(3000, 16, 1), drawn(40, 16, 2)
    index = HNSW(16, dtype=dtype)
    index.add(vectors)
    mask = np.random.default_rng(0).random(3000) < share
    allowed = np.flatnonzero(mask)
    ids, distances = index.search(queries, 10, 40, filter=mask)
    same, _ = index.search(queries, 10, 40, filter=allowed)
    assert ids.tolist() == same.tolist()
    assert set(ids[ids >= 0].tolist()) <= set(allowed.tolist())
    held = min(10, len(allowed))
    assert ((ids >= 0).sum(1) == held).all()
    assert np.isinf(distances[:, held:]).all()
    if held:
        truth, exact = naive(vectors[allowed], queries, held, ids=allowed)
        assert recall(ids, truth) > 0.97
        if len(allowed) <= 80:
            assert ids[:, :held].tolist() == truth.tolist()
            np.testing.assert_allclose(distances[:, :held], exact, **CLOSE)


def test_filter_by_own_ids_and_unknown_ones():
    index = HNSW(2)
    index.add(np.eye(2), ids=[4, 9])
    assert index.search([1, 0], 2, filter=[9, 1000])[0].tolist() == [[9, -1]]
    assert index.search([1, 0], 2, filter=[])[0].tolist() == [[-1, -1]]
    mask = np.arange(10) == 4
    assert index.search([1, 0], 2, filter=mask)[0].tolist() == [[4, -1]]


def test_wide_searches_use_heaps_and_find_the_same():
    vectors, queries = drawn(2500, 8, 1), drawn(10, 8, 2)
    index = HNSW(8)
    index.add(vectors)
    index.repair()
    ids, distances = index.search(queries, 1200, 2500)
    truth, exact = naive(vectors, queries, 1200)
    assert recall(ids, truth) == 1.0
    np.testing.assert_allclose(distances, exact, **CLOSE)
    assert index.search(queries, 5, 10**12)[0].tolist() == truth[:, :5].tolist()


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 8), st.sampled_from(METRICS), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_small_indexes_are_exact(count, k, dim, metric, seed):
    """Any few vectors, repeated ones too: what is found is what is nearest."""
    generator = np.random.default_rng(seed)
    vectors = generator.integers(-3, 4, (count, dim)).astype(np.float32)
    vectors[(vectors == 0).all(1)] = 1
    index = HNSW(dim, metric, M=4, seed=seed)
    index.add(vectors)
    index.repair()
    check_graph(index)
    ids, distances = index.search(vectors[:5], k, 64)
    exact = naive(vectors, vectors[:5], k, metric)[1]
    held = min(k, count)
    np.testing.assert_allclose(distances[:, :held], exact, rtol=1e-5, atol=1e-5)
    assert (ids[:, held:] == -1).all()
    assert all(len(set(row)) == held for row in ids[:, :held].tolist())


# Errors


NAN = np.array([[1.0, 2.0], [3.0, np.nan]])


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((2, 3)), r"vectors have the shape \[2, 3\]; the index takes rows of 2 numbers"),
        (np.ones(3), r"shape \[1, 3\]"),
        (np.ones((1, 1, 2)), r"shape \[1, 1, 2\]"),
        (NAN, "row 1 of vectors is not finite"),
        ([[1.0, np.inf]], "row 0 of vectors is not finite"),
        ([[1.0, 1e300]], "row 0 of vectors is not finite"),
        ([["a", "b"]], "vectors must be numbers"),
        ([[1, 2], [3]], "vectors must be an array of numbers"),
        ([[1j, 2]], "vectors must be numbers"),
    ],
)
def test_bad_vectors(vectors, message):
    index = HNSW(2)
    index.add(np.eye(2))
    with pytest.raises(InputError, match=message):
        index.add(vectors)
    with pytest.raises(InputError, match=message.replace("vectors", "queries")):
        index.search(vectors)
    assert len(index) == 2
    check_graph(index)


def test_zero_vectors_have_no_direction():
    index = HNSW(2, "cosine")
    with pytest.raises(InputError, match="row 1 of vectors is zero"):
        index.add([[1, 0], [0, 0]])
    index.add([[1e-30, 0], [0, 1e30]])
    with pytest.raises(InputError, match="row 0 of queries is zero"):
        index.search([[0, 0]])
    assert index.search([[1e-38, 0]], 1)[1].tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 1], r"ids\[1\] is 1, which stands there before"),
        ([0, 5], r"ids\[0\] is 0, which is in the index"),
        ([7, -1], r"ids\[1\] is -1"),
        ([7], r"ids have the shape \[1\]; they must be one for each of the 2 vectors"),
        ([7.0, 8.0], "ids must be integers"),
        (np.array([7, 2**63], np.uint64), r"ids\[1\] is 9223372036854775808"),
    ],
)
def test_bad_ids(ids, message):
    index = HNSW(2)
    index.add([[0, 0]], ids=[0])
    with pytest.raises(InputError, match=message):
        index.add(np.eye(2), ids=ids)
    assert index.ids.tolist() == [0]


@pytest.mark.parametrize(
    ("name", "value"), [("k", 0), ("k", -1), ("k", 1.5), ("k", True), ("ef", 0), ("ef", -7), ("workers", 0)]
)
def test_bad_counts_of_searches(name, value):
    index = HNSW(2)
    index.add(np.eye(2))
    with pytest.raises(InputError, match=f"{name} is {value}"):
        index.search(np.eye(2), **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 2**16 + 1}, "dim 65537"),
        ({"metric": "jaccard"}, "metric is 'jaccard'"),
        ({"dtype": "f64"}, "dtype is 'f64'"),
        ({"M": 1}, "M is 1"),
        ({"M": 2000}, "M is 2000"),
        ({"ef_construction": 0}, "ef_construction is 0"),
        ({"heuristic": "best"}, "heuristic is 'best'"),
        ({"compact_at": 1.0}, "compact_at is 1.0"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        HNSW(**{"dim": 2, **options})


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        (np.ones(1, bool), "filter is a mask of 1 entries and the largest id is 1"),
        (np.ones((2, 2), bool), r"filter has the shape \[2, 2\]"),
        ([0.5], "filter is of float64"),
        ("ab", "filter must be numbers"),
    ],
)
def test_bad_filters(filter, message):
    index = HNSW(2)
    index.add(np.eye(2))
    with pytest.raises(InputError, match=message):
        index.search(np.eye(2), filter=filter)


def test_ef_construction_is_at_least_m():
    assert HNSW(2, M=32, ef_construction=8).ef_construction == 32
    assert HNSW(2)._storage.graph[layout.CAP0] == 32


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("dim", [5, 16])
def test_one_query_is_answered_as_one_of_many(metric, dtype, dim):
    vectors, queries = drawn(700, dim, 11), drawn(30, dim, 12)
    index = HNSW(dim, metric, M=6, ef_construction=40, dtype=dtype)
    index.add(vectors)

    def check():
        ids, distances = index.search(queries, 7, 20)
        for row, query in enumerate(queries):
            for one in (query, query[None], query.tolist(), np.asfortranarray(queries)[row]):
                found_ids, found_distances = index.search(one, 7, 20)
                np.testing.assert_array_equal(found_ids, ids[row : row + 1])
                np.testing.assert_array_equal(found_distances, distances[row : row + 1])

    check()
    index.remove(np.arange(0, 60))
    check()
    assert index.search(queries[0], 7)[0].shape == (1, 7)
    assert HNSW(dim, metric, dtype=dtype).search(queries[0], 3)[0].tolist() == [[-1, -1, -1]]
    index.search(queries[:1], 7, 20)
    assert index.stats()["queries"] == 1
    assert index.stats()["distances"] > 7
