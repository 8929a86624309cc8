"""Vectors and ids at the ends of what there is: an error that names the row, or the right answer; never a signal, never a wrong one."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError, InputError
from anabranch.graph import hnswlib_compat
from anabranch.graph.disk import build
from anabranch.graph.hnsw import HNSW, ShardedHNSW, brute_force, checks
from anabranch.graph.hnsw.checks import MAX_LENGTH
from anabranch.graph.hnsw.raw import kernel
from anabranch.graph.hnsw.search import PADDING, insert
from hnsw_checks import check_graph, naive

DTYPES = ("f32", "f16", "i8")
LARGEST = float(np.finfo(np.float32).max)


@kernel
def put(distances, slots, size, room, key, value):
    return insert(distances, slots, size, room, key, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("value", [1.01e18, 3e19, 3.4e38])
def test_vectors_whose_squares_overflow_are_refused_by_row(dtype, metric, value):
    index = HNSW(4, metric, dtype=dtype)
    vectors = np.zeros((20, 4), np.float32)
    vectors[7, 2] = -value
    with pytest.raises(InputError, match=r"row 7 of vectors is longer than 1e\+18"):
        index.add(vectors)
    assert len(index) == 0
    index.add(np.eye(4))
    with pytest.raises(InputError, match=r"row 0 of queries is longer than 1e\+18"):
        index.search(vectors[7])
    with pytest.raises(InputError, match=r"row 7 of vectors is longer"):
        ShardedHNSW(4, 2, metric).add(vectors)
    with pytest.raises(InputError, match="row 7 of vectors is longer"):
        brute_force(vectors, np.eye(4), 1, metric)
    other = hnswlib_compat.Index("l2", 4)
    other.init_index(20)
    with pytest.raises(RuntimeError, match="row 7 of the vectors is longer"):
        other.add_items(vectors)


def test_vectors_whose_squares_vanish_are_told_of_by_row():
    """Every distance among them is 0, and any answer as good as another."""
    vectors = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    index = HNSW(4)
    with pytest.warns(UserWarning, match="row 7 of vectors is shorter than 1e-18, and not zero"):
        index.add(np.concatenate([vectors[:7], vectors[7:] * np.float32(1e-30)]))
    with pytest.warns(UserWarning, match="row 1 of vectors is shorter"):
        index.update([3, 4], [[0, 0, 0, 0], [1e-40, 0, 0, 0]])
    assert index.search([0, 0, 0, 0], 1)[1].tolist() == [[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.add(np.concatenate([np.zeros((2, 4)), vectors * 1e-17]))
        HNSW(4, "cosine").add(vectors * np.float32(1e-30))
        HNSW(32, "hamming").add(np.zeros((2, 4), np.uint8))


def test_directions_may_be_of_any_length():
    index = HNSW(3, "cosine")
    index.add(np.array([[3e38, 0, 0], [0, 1e-38, 0], [1e20, 1e20, 0]], np.float32))
    assert index.search(np.array([[1, 1, 0], [1e38, 1e-38, 0]], np.float32), 1)[0][:, 0].tolist() == [2, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.filterwarnings("ignore:row .* of vectors holds a number")
def test_the_longest_there_may_be_are_found(dtype, metric):
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((300, 16))
    vectors *= 0.999 * MAX_LENGTH / np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float32)
    index = HNSW(16, metric, M=4, ef_construction=20, dtype=dtype)
    index.add(vectors)
    check_graph(index)
    ids, distances = index.search(vectors, 5, 300)
    assert np.isfinite(distances).all()
    if dtype != "f16":
        assert (ids[:, 0] == np.arange(300)).mean() > 0.99


def test_inner_products_of_vectors_that_are_all_short_are_told():
    """1 - inner product has 24 bits for its 1, and few are left for what is far below."""
    vectors = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    index = HNSW(4, "ip")
    with pytest.warns(
        UserWarning, match=r"row \d+ of vectors is shorter than 0.001, and the longest: 1 - inner product"
    ):
        index.add(vectors * np.float32(1e-5))
    with pytest.warns(UserWarning, match="row 0 of vectors is shorter than 0.001"):
        index.add(vectors[:1] * np.float32(1e-5))
    with pytest.warns(UserWarning, match="row 1 of vectors is shorter than 0.001"):
        index.update([3, 4], [[0, 0, 0, 0], [1e-30, 0, 0, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Among longer ones such are as good as zero.
        index.add(np.concatenate([vectors, vectors * np.float32(1e-5), np.zeros((2, 4))]))
        index.add(np.zeros((3, 4)))
        index.add(np.empty((0, 4)))


def test_numbers_that_16_bits_do_not_hold_are_told():
    vectors = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    for metric in ("l2", "ip"):
        with pytest.warns(
            UserWarning,
            match=r"row \d+ of vectors holds a number that lies \S+ from the centre, and 16 bits reach 65504",
        ):
            HNSW(4, metric, dtype="f16").add(vectors * np.float32(1e6))
    index = HNSW(4, dtype="f16")
    with pytest.warns(UserWarning, match=r"all others hold numbers below 6.1e-05 alone, of which 16 bits keep little"):
        index.add(vectors * np.float32(1e-6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.add(np.concatenate([vectors, np.zeros((2, 4))]))
        index.add(np.zeros((2, 4)))
        for dtype in ("f32", "i8"):
            HNSW(4, dtype=dtype).add(vectors * np.float32(1e6))
        # A centre is taken off first.
        far = HNSW(4, dtype="f16")
        far.add(vectors + np.float32(1e6))
        far.add(vectors[:1] + np.float32(1e6))
        HNSW(4, "cosine", dtype="f16").add(vectors * np.float32(1e6))
    with pytest.warns(UserWarning, match="row 1 of vectors holds a number that lies"):
        far.update([0, 1], np.array([[1e6] * 4, [0] * 4], np.float32))
    with pytest.warns(UserWarning, match="row 0 of vectors holds a number that lies"):
        far.add(np.zeros((1, 4), np.float32))


def test_shards_have_no_ids_after_the_largest():
    index = ShardedHNSW(4, 2)
    vectors = np.eye(4, dtype=np.float32)
    index.add(vectors[:1], [2**63 - 2])
    assert index.add(vectors[:1]).tolist() == [2**63 - 1]
    with pytest.raises(InputError, match="there are no 2 ids after the largest, 9223372036854775807"):
        index.add(vectors[:2])


@pytest.mark.filterwarnings("ignore:row .* is shorter than", "ignore:row .* of vectors")
@given(
    st.lists(st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=3, max_size=3), min_size=1, max_size=40),
    st.sampled_from(DTYPES),
    st.sampled_from(["l2", "ip"]),
)
@settings(max_examples=60, deadline=None)
def test_any_finite_vectors_are_found_or_refused(rows, dtype, metric):
    vectors = np.array(rows, np.float32)
    index = HNSW(3, metric, M=3, ef_construction=6, dtype=dtype, workers=1)
    if (np.linalg.norm(vectors.astype(np.float64), axis=1) > MAX_LENGTH).any():
        with pytest.raises(InputError, match="longer"):
            index.add(vectors)
        return
    index.add(vectors)
    check_graph(index)
    ids, distances = index.search(vectors, len(rows), max(64, len(rows)))
    assert (np.sort(ids, 1) == np.arange(len(rows))).all()
    assert np.isfinite(distances).all()
    if dtype == "f32":
        np.testing.assert_allclose(
            np.sort(distances, 1), naive(vectors, vectors, len(rows), metric)[1], rtol=1e-4, atol=1e-30
        )


@pytest.mark.parametrize("key", [np.inf, -np.inf, np.nan, 0.0, 2.5, 9.0])
@pytest.mark.parametrize("size", [0, 1, 4, 5])
def test_any_key_has_a_place_in_a_pool(key, size):
    """Also infinity, behind which there is padding of infinity, as far as whole vectors go."""
    room = 5
    distances = np.full(room + PADDING + 16, np.inf, np.float32)
    slots = np.full(room + PADDING + 16, -7, np.int32)
    distances[:size], slots[:size] = np.arange(size), np.arange(size)
    place = put(distances, slots, size, room, np.float32(key), 99)
    assert 0 <= place <= min(size, room - 1)
    assert slots[place] == 99
    assert (slots[room + PADDING :] == -7).all()
    assert np.isinf(distances[room + PADDING :]).all()


def test_ids_run_out_with_an_error():
    index = HNSW(2)
    index.add(np.eye(2), ids=[5, 2**63 - 1])
    with pytest.raises(
        InputError, match=r"the largest id so far is 9223372036854775807, which leaves 0 for 2 vectors; give ids"
    ):
        index.add(np.eye(2))
    assert index.add(np.empty((0, 2))).tolist() == []
    assert index.add(np.eye(2), ids=[6, 7]).tolist() == [6, 7]
    near = HNSW(2)
    near.add(np.eye(2)[:1], ids=[2**63 - 3])
    assert near.add(np.eye(2)).tolist() == [2**63 - 2, 2**63 - 1]
    assert sorted(near.search(np.eye(2)[0], 3)[0][0].tolist()) == [2**63 - 3, 2**63 - 2, 2**63 - 1]


def test_a_mask_ends_behind_the_largest_id_that_is_live():
    index = HNSW(2, compact_at=None)
    index.add(np.array([[0, 0], [1, 0], [2, 0], [3, 0]]), ids=[0, 1, 2, 50])
    with pytest.raises(InputError, match="the largest id is 50"):
        index.search([[3, 0]], 2, filter=np.array([True, True, False]))
    index.remove([50])
    ids, _ = index.search([[3, 0]], 3, filter=np.array([True, True, False]))
    assert ids.tolist() == [[1, 0, -1]]
    index.remove([0, 1, 2])
    assert index.search([[3, 0]], 1, filter=np.array([], bool))[0].tolist() == [[-1]]


@pytest.mark.parametrize(
    "ask", ["search", "search many", "nearest_within", "brute_force", "disk", "shards", "shards, within"]
)
def test_more_results_than_memory_holds_are_refused_before_they_are_written(tmp_path, monkeypatch, ask):
    """A system that promises more memory than it has ended the process as they were: 26 GB for k = 2^31 of 40 elements."""
    vectors = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    index = HNSW(8, M=4, ef_construction=10)
    index.add(vectors)
    shards = ShardedHNSW(8, 2, M=4, ef_construction=10)
    shards.add(vectors)
    on_disk = build(vectors, tmp_path / "d.anb", memory=32 << 20)
    monkeypatch.setattr(checks, "room_bytes", lambda: 100 << 20)
    one = vectors[:1]
    calls = {
        "search": lambda k: index.search(vectors[0], k),
        "search many": lambda k: index.search(vectors[:4], k // 4),
        "nearest_within": lambda k: index.nearest_within(one, 1.0, k),
        "brute_force": lambda k: brute_force(vectors, one, k),
        "disk": lambda k: on_disk.search(one, k),
        "shards": lambda k: shards.search(one, k),
        "shards, within": lambda k: shards.nearest_within(one, 1e9, k),
    }
    for k in (2**31, 10_000_000):
        with pytest.raises(CapacityError, match=r"no memory for .* queries; ask for fewer"):
            calls[ask](k)
    ids = calls[ask](8_000_000)[0]
    assert (np.asarray(ids) >= 0).any()
