"""Codes: kernels against numpy, what a walk over them finds after measuring again, learning, files and changes."""

import pickle
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError, DataError, InputError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.guarded import CHECKED
from anabranch.graph.hnsw import HNSW, ShardedHNSW, brute_force, coded
from anabranch.graph.hnsw.checks import MAX_LENGTH
from anabranch.graph.hnsw.coded import PQ, Int4
from anabranch.graph.hnsw.measuring import distance
from anabranch.graph.hnsw.raw import kernel
from anabranch.graph.hnsw.storage import KIND, VERSIONS
from anabranch.graph.live import LiveIndex, open_index
from hnsw_checks import check_graph, drawn, graph_bytes, naive, recall

KINDS = ("pq", "int4")
VECTORS = drawn(2000, 24, 5)


@kernel
def measured(kind, query, scale, norm, row, aux, slot, width):
    return distance(kind, query, scale, norm, row, aux, slot, width)


def made(quantization, rows=VECTORS, metric="l2", **options):
    index = HNSW(rows.shape[1], metric, M=10, ef_construction=60, quantization=quantization, workers=1, **options)
    index.add(rows)
    return index


def by_kernel(coder, queries, rows, aux):
    query_Q, query_aux = coder.encode_queries(queries)
    return np.array(
        [
            [
                measured(coder.kind, query.ctypes.data, *beside, row.ctypes.data, aux.ctypes.data, place, coder.width)
                for place, row in enumerate(rows)
            ]
            for query, beside in zip(query_Q, query_aux, strict=True)
        ]
    )


# Kernels


@given(st.integers(1, 150), st.integers(0, 2**32 - 1), st.sampled_from(["l2", "ip"]))
@settings(max_examples=30, deadline=None)
def test_half_bytes_are_measured_as_numpy_does(dim, seed, metric):
    vectors, queries = drawn(5, dim, seed), drawn(3, dim, seed + 1)
    coder = Int4(dim, metric).trained(vectors, 0, 1)
    rows, aux = coder.encode(vectors)
    assert rows.shape == (5, coder.stride)
    found = by_kernel(coder, queries, rows, aux)
    held, asked = vectors - coder.centre_D, queries - coder.centre_D
    held_codes, asked_codes = (
        np.rint(x / np.abs(x).max(1, keepdims=True) * most) for x, most in ((held, 7), (asked, 127))
    )
    product = asked_codes @ held_codes.T * (np.abs(asked).max(1)[:, None] / 127) * (np.abs(held).max(1) / 7)
    # Between what codes stand for, so that errors do not grow with how far both lie off.
    square_Q, square_N = (
        ((codes * np.abs(x).max(1, keepdims=True) / most) ** 2).sum(1)
        for codes, x, most in ((asked_codes, asked, 127), (held_codes, held, 7))
    )
    wanted = 1 - product if metric == "ip" else square_Q[:, None] + square_N - 2 * product
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1), st.sampled_from(["l2", "ip"]))
@settings(max_examples=20, deadline=None)
def test_codes_are_looked_up_as_numpy_does(dim, share, seed, metric):
    parts = 1 + int(share * (dim - 1))
    vectors, queries = drawn(40, dim, seed), drawn(3, dim, seed + 1)
    coder = PQ(dim, metric, parts).trained(vectors, seed, 1)
    rows, aux = coder.encode(vectors)
    found = by_kernel(coder, queries, rows, aux)
    held = coder.codes.decode(rows[:, :parts])
    wanted = 1 - queries @ held.T if metric == "ip" else ((queries[:, None] - held[None]) ** 2).sum(2)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


# Searches


def digits():
    from sklearn.datasets import load_digits

    return load_digits().data.astype(np.float32)


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_few_digits_are_missed(quantization, metric):
    """Real data: 1,797 pictures of 64 numbers, in 16 or 32 bytes; distances are those of the vectors themselves."""
    held = digits()
    index = made(quantization, held, metric)
    truth, distances = brute_force(held, held[:300], 10, metric)
    ids, found = index.search(held[:300], 10, ef=100)
    assert recall(ids, truth) > (0.95 if metric != "ip" else 0.85)
    where = ids == truth
    np.testing.assert_allclose(found[where], distances[where], rtol=1e-4, atol=1e-3)
    # Wider walks measure more again, and miss less.
    assert recall(index.search(held[:300], 10, ef=400)[0], truth) > 0.98
    assert index.stats()["code_bytes"] == (16 if quantization == "pq" else 40)


@pytest.mark.parametrize("quantization", KINDS)
def test_how_many_are_measured_again_is_said(quantization):
    truth = brute_force(VECTORS, VECTORS[:200], 10)[0]
    shares = [
        recall(made(quantization, rerank=rerank).search(VECTORS[:200], 10, ef=80)[0], truth)
        for rerank in (False, 12, 40, True)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.9 < shares[3]
    index = made(quantization, rerank=False)
    assert index.rerank is False
    # Distances are then those of codes, and not of the vectors.
    assert (index.search(VECTORS[:50], 1)[1] > 0).any()
    assert made(quantization, rerank=12).rerank == 12


@pytest.mark.parametrize("quantization", KINDS)
def test_all_within_a_radius_are_measured_again(quantization):
    """However few of a search are."""
    index = made(quantization, rerank=3)
    exact, found = (index.range_search(VECTORS[:30], 28.0, ef=64, exact=exact) for exact in (True, False))
    assert np.diff(exact.indptr).max() > 12
    assert len(found.ids) > 0.95 * len(exact.ids)
    for begin, end, first, last in zip(
        found.indptr[:-1], found.indptr[1:], exact.indptr[:-1], exact.indptr[1:], strict=True
    ):
        far = dict(zip(exact.ids[first:last].tolist(), exact.distances[first:last].tolist(), strict=True))
        assert [far[id] for id in found.ids[begin:end].tolist()] == found.distances[begin:end].tolist()


@pytest.mark.parametrize("quantization", KINDS)
def test_too_few_vectors_are_searched_themselves(quantization):
    index = made(quantization, VECTORS[:1000])
    plain = made(None, VECTORS[:1000])
    assert index.stats()["code_bytes"] == 0
    assert index.size_bytes == plain.size_bytes
    for one, other in zip(index.search(VECTORS[:50], 5), plain.search(VECTORS[:50], 5), strict=True):
        assert one.tolist() == other.tolist()
    assert index.search(VECTORS[0], 1)[0].tolist() == [[0]]
    index.add(VECTORS[1000:1023])
    assert index.stats()["code_bytes"] == 0
    index.add(VECTORS[1023:1024])
    assert index.stats()["code_bytes"] > 0
    assert index.search(VECTORS[0], 1)[0].tolist() == [[0]]


@pytest.mark.parametrize("quantization", KINDS)
def test_the_graph_is_that_of_the_vectors(quantization):
    index, plain = made(quantization), made(None)
    held, other = graph_bytes(index), graph_bytes(plain)
    assert {name: held[name] for name in other} == other
    check_graph(index)


@pytest.mark.parametrize("quantization", KINDS)
def test_what_it_costs_is_told(quantization):
    index, plain = made(quantization), made(None)
    each = 8 if quantization == "pq" else 32 + 8
    assert index.stats()["code_bytes"] == each
    beside = index.size_bytes - plain.size_bytes - each * 2000
    assert 0 < beside <= 24 * 256 * 4
    assert index.growth_bytes(1) - plain.growth_bytes(1) == each * 3000


@pytest.mark.parametrize("quantization", KINDS)
def test_filters_ranges_and_shards(quantization):
    index = made(quantization)
    even = np.arange(2000) % 2 == 0
    truth = naive(VECTORS[::2], VECTORS[:50], 5, "l2", np.arange(0, 2000, 2))[0]
    assert recall(index.search(VECTORS[:50], 5, ef=200, filter=even)[0], truth) > 0.95
    few = index.search(VECTORS[:5], 3, filter=[7, 8, 9])
    wanted = naive(VECTORS[[7, 8, 9]], VECTORS[:5], 3, "l2", [7, 8, 9])
    assert few[0].tolist() == wanted[0].tolist()  # measured by the vectors themselves
    np.testing.assert_allclose(few[1], wanted[1], rtol=1e-5)
    exact = index.range_search(VECTORS[:30], 28.0, exact=True)
    found = index.range_search(VECTORS[:30], 28.0, ef=64)
    np.testing.assert_array_equal(exact.indptr, made(None).range_search(VECTORS[:30], 28.0, exact=True).indptr)
    assert len(found.ids) > 0.95 * len(exact.ids)
    shards = ShardedHNSW(24, 2, M=10, ef_construction=60, quantization=quantization)
    shards.add(np.concatenate([VECTORS, VECTORS + 0.1]))
    assert shards.shards[1].stats()["code_bytes"] > 0
    assert (shards.search(VECTORS[:100], 1, ef=100)[0][:, 0] == np.arange(100)).mean() > 0.95


def test_wide_walks_and_many_queries(monkeypatch):
    """More than one piece of tables; two heaps in place of a pool."""
    index = made("pq")
    ids, distances = index.search(VECTORS[:300], 4, ef=100)
    monkeypatch.setattr("anabranch.graph.hnsw.searching.TABLES", 20_000)
    for one, other in zip(index.search(VECTORS[:300], 4, ef=100, workers=2), (ids, distances), strict=True):
        assert one.tolist() == other.tolist()
    truth = naive(VECTORS, VECTORS[:20], 4)[0]
    assert recall(index.search(VECTORS[:20], 4, ef=1500)[0], truth) == 1.0


# Learning


@pytest.mark.parametrize("quantization", KINDS)
def test_codes_are_learned_again_when_there_are_far_more(quantization, monkeypatch):
    monkeypatch.setattr(coded, "FIRST", 100)
    monkeypatch.setattr(coded, "MORE", 3)
    index = made(quantization, VECTORS[:99])
    held, learned = index._storage, []
    for begin in range(99, 1100, 50):
        index.add(VECTORS[begin : begin + 50])
        learned.append(held.coded.trained_on)
    assert [*dict.fromkeys(learned)] == [149, 449]
    index.add(VECTORS[:500])
    assert held.coded.trained_on == 1649


@pytest.mark.filterwarnings("ignore:.*were learned from")
@pytest.mark.parametrize("quantization", KINDS)
def test_train_learns_what_the_vectors_have_become(quantization, monkeypatch):
    # `add` would see it, too.
    monkeypatch.setattr(coded.Coded, "is_worn", lambda self, sample, *, strays: False)
    index = made(quantization, rerank=False)
    index.add(VECTORS + 50, ids=np.arange(5000, 7000))
    before = recall(
        index.search(VECTORS[:100] + 50, 10, 100)[0], brute_force(VECTORS + 50, VECTORS[:100] + 50, 10)[0] + 5000
    )
    index.train()
    after = recall(
        index.search(VECTORS[:100] + 50, 10, 100)[0], brute_force(VECTORS + 50, VECTORS[:100] + 50, 10)[0] + 5000
    )
    assert after > before if quantization == "pq" else after >= 0.5 * before
    index.train(VECTORS[:300] + 50)
    assert index._storage.coded.trained_on == 4000


def test_what_cannot_be_learned_is_told(monkeypatch):
    with pytest.raises(InputError, match="made without quantization"):
        made(None).train()
    index = HNSW(24, quantization="pq")
    with pytest.raises(InputError, match="no vectors to learn codes from"):
        index.train()
    with pytest.raises(InputError, match="row 1 of vectors is not finite"):
        index.train(np.array([[0.0] * 24, [np.nan] * 24]))
    index.train(VECTORS[:5])
    index.add(VECTORS[:3])
    assert index.search(VECTORS[:3], 1)[0].tolist() == [[0], [1], [2]]

    def none(*arguments):
        raise MemoryError

    held = made("pq")
    before = held.search(VECTORS[:20], 5)
    monkeypatch.setattr(coded.Coded, "learned", none)
    with pytest.raises(CapacityError, match="no memory for codes of 2,000 elements"):
        held.train()
    assert held.search(VECTORS[:20], 5)[0].tolist() == before[0].tolist()


def test_any_number_of_threads_learns_the_same():
    built = [HNSW(24, M=6, ef_construction=30, quantization="pq", workers=count) for count in (1, 3)]
    for index in built:
        index.add(VECTORS)
    assert graph_bytes(built[0]) == graph_bytes(built[1])


def test_searches_go_on_while_codes_are_learned(monkeypatch):
    index = made("pq")
    entered, leave, own = threading.Event(), threading.Event(), coded.Coded.learned

    def slow(*arguments):
        entered.set()
        assert leave.wait(60)
        return own(*arguments)

    monkeypatch.setattr(coded.Coded, "learned", slow)
    thread = threading.Thread(target=index.train)
    thread.start()
    assert entered.wait(60)
    assert index.search(VECTORS[:3], 1)[0].tolist() == [[0], [1], [2]]
    leave.set()
    thread.join()
    assert index.search(VECTORS[:3], 1)[0].tolist() == [[0], [1], [2]]


# Changes


@pytest.mark.parametrize("quantization", KINDS)
def test_codes_go_along_with_changes(quantization):
    index = made(quantization)

    def check():
        held = index._storage
        live = np.flatnonzero(index._slots.live())
        rows, aux = held.coded.encode(held.decode(live))
        np.testing.assert_array_equal(held.coded.rows[live], rows)
        if quantization == "int4":
            np.testing.assert_array_equal(held.coded.aux[live], aux)

    check()
    index.update(np.arange(10), VECTORS[100:110] + 1)
    check()
    index.remove(np.arange(20, 60))
    index.add(VECTORS[20:40] + 2, ids=np.arange(9000, 9020))  # into their places
    check()
    index.remove(np.arange(100, 800))
    check()
    index.compact()
    assert index._storage.coded.rows.shape[0] == len(index)
    check()
    index.add(VECTORS + 3)
    check()
    index.remove(index.ids)
    assert len(index) == 0
    assert index.search(VECTORS[:2], 1)[0].tolist() == [[-1], [-1]]
    index.add(VECTORS[:30])
    check()
    assert index.search(VECTORS[:30], 1)[1].max() == 0


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("fails_at", [1, 2])
def test_no_memory_for_codes_leaves_the_index_as_it_was(quantization, monkeypatch, fails_at):
    index = made(quantization)
    before, own, calls = graph_bytes(index), type(index._storage.coded.coder).encode, []

    def encode(self, vectors):
        calls.append(len(vectors))
        if len(calls) >= fails_at:
            raise MemoryError
        return own(self, vectors)

    monkeypatch.setattr(type(index._storage.coded.coder), "encode", encode)
    for _ in range(1, fails_at):
        index.add(VECTORS[:10] + 9)
    with pytest.raises(CapacityError, match="no memory for codes of 10 elements"):
        index.add(VECTORS[:10] + 9)
    monkeypatch.undo()
    assert len(index) == 2000 + 10 * (fails_at - 1)
    check_graph(index)
    if fails_at == 1:
        assert graph_bytes(index) == before


@pytest.mark.parametrize("quantization", KINDS)
def test_the_longest_vectors_and_those_at_one_place(quantization):
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((1200, 16))
    rows *= 0.999 * MAX_LENGTH / np.linalg.norm(rows, axis=1, keepdims=True)
    index = made(quantization, rows.astype(np.float32))
    ids, distances = index.search(rows[:100], 3, ef=200)
    assert np.isfinite(distances).all()
    assert (ids[:, 0] == np.arange(100)).mean() > 0.9
    with pytest.raises(InputError, match="row 0 of vectors is longer"):
        index.add(rows[:1] * 2)
    with pytest.raises(InputError, match="row 0 of vectors is not finite"):
        index.add(np.full((1, 16), np.inf))
    same = made(quantization, np.ones((1100, 8), np.float32))
    found, far = same.search(np.ones((2, 8)), 5, ef=64)
    assert (far == 0).all()
    assert (found >= 0).all()
    same.add(np.zeros((1, 8)), ids=[2**63 - 1], repair=True)
    assert same.search(np.zeros((1, 8)), 1, ef=1101)[0].tolist() == [[2**63 - 1]]


# Files


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_holds_codes(tmp_path, quantization, mmap):
    index = made(quantization, rerank=30)
    index.save(tmp_path / "i.anb")
    again = HNSW.load(tmp_path / "i.anb", mmap=mmap)
    assert (again.quantization, again.rerank, again._storage.coded.trained_on) == (quantization, 30, 2000)
    for one, other in zip(index.search(VECTORS[:60], 5), again.search(VECTORS[:60], 5), strict=True):
        assert one.tolist() == other.tolist()
    stats = again.stats()
    # Vectors and links stay on the disk, codes do not.
    held = again._storage
    # In the checked build nothing is mapped.
    is_mapped = mmap and not CHECKED
    assert stats["mapped_bytes"] == is_mapped * (held.rows.nbytes + held.links.nbytes + held.upper.nbytes)
    assert not isinstance(again._storage.coded.rows, np.memmap)
    again.add(VECTORS[:5] + 1)
    assert again.stats()["mapped_bytes"] == 0
    assert again.search(VECTORS[:5] + 1, 1)[1].max() == 0
    same = pickle.loads(pickle.dumps(index))
    assert graph_bytes(same) == graph_bytes(index)


def test_a_file_of_few_vectors_has_no_codes(tmp_path):
    made("pq", VECTORS[:20], code_bytes=5).save(tmp_path / "i.anb")
    again = HNSW.load(tmp_path / "i.anb")
    assert (again.code_bytes, again.stats()["code_bytes"]) == (5, 0)
    again.add(VECTORS)
    assert again.stats()["code_bytes"] == 8


def test_an_index_without_codes_is_written_as_before(tmp_path):
    made(None).save(tmp_path / "i.anb")
    options = read_arrays(tmp_path / "i.anb", KIND, versions=VERSIONS).meta["options"]
    assert not {"quantization", "code_bytes"} & {*options}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda arrays, meta: arrays.pop("code_centres"), "it holds the arrays"),
        (lambda arrays, meta: arrays.update(codes=arrays["codes"][:-1]), "'codes' is uint8"),
        (lambda arrays, meta: arrays["code_centres"].__setitem__((0, 0, 0), np.nan), "not finite"),
        (lambda arrays, meta: meta.pop("trained_on"), "does not describe an index"),
        (lambda arrays, meta: meta["options"].update(quantization="pq9"), "does not describe an index"),
        (lambda arrays, meta: meta["options"].update(quantization="int4", code_bytes=None), "it holds the arrays"),
        (lambda arrays, meta: meta["options"].update(code_bytes=3), "'codes' is uint8|'code_centres' is float32"),
    ],
)
def test_files_whose_codes_do_not_fit_are_damaged(tmp_path, change, says):
    made("pq", VECTORS[:1100]).save(tmp_path / "i.anb")
    found = read_arrays(tmp_path / "i.anb", KIND, versions=VERSIONS)
    arrays = {name: np.array(array) for name, array in found.arrays.items()}
    change(arrays, found.meta)
    write_arrays(tmp_path / "i.anb", KIND, arrays, found.meta)
    for mmap in (False, True):
        with pytest.raises(DataError, match=says):
            HNSW.load(tmp_path / "i.anb", mmap=mmap)


@pytest.mark.parametrize("quantization", KINDS)
def test_a_live_index_has_codes(tmp_path, quantization):
    path = tmp_path / "i.anb"
    made(quantization, VECTORS[:1100]).save(path)
    with LiveIndex.open(path, workers=1) as live:
        live.upsert(range(2000, 2050), VECTORS[1100:1150])
        live.delete([4])
        assert live.index.search(VECTORS[1100:1110], 1)[0][:, 0].tolist() == list(range(2000, 2010))
    again = open_index(path)
    assert again.stats()["code_bytes"] > 0
    assert again.search(VECTORS[1100:1110], 1)[0][:, 0].tolist() == list(range(2000, 2010))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantization": "pq8"}, "quantization is 'pq8'; it must be one of pq, int4, or None"),
        ({"quantization": "pq", "dtype": "i8"}, "dtype is 'i8'; with quantization='pq' codes are searched"),
        ({"quantization": "pq", "metric": "hamming"}, "dtype is 'b1'"),
        (
            {"quantization": "pq", "code_bytes": 17},
            "code_bytes is 17; it must be an integer from 1 to the dimension, 16",
        ),
        ({"quantization": "pq", "code_bytes": 0}, "code_bytes is 0"),
        ({"quantization": "pq", "code_bytes": True}, "code_bytes is True"),
        ({"quantization": "int4", "code_bytes": 8}, "code_bytes is 8; it is for quantization='pq'"),
        ({"code_bytes": 8}, "there are no codes"),
        ({"quantization": "pq", "rerank": 0}, "rerank is 0; it must be an integer of at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, says):
    with pytest.raises(InputError) as told:
        HNSW(16, **options)
    assert says in str(told.value)


def test_lists_that_two_elements_have_in_common_are_damage(tmp_path):
    """A level that is one too high made compaction end in a traceback."""
    made("pq", VECTORS[:1100]).save(tmp_path / "i.anb")
    found = read_arrays(tmp_path / "i.anb", KIND, versions=VERSIONS)
    arrays = {name: np.array(array) for name, array in found.arrays.items()}
    # Its list is then the first one of the next that has any.
    ground = np.flatnonzero((arrays["level"] == 0) & (arrays["first"] < len(arrays["upper"])))
    arrays["level"][ground[0]] = 1
    write_arrays(tmp_path / "i.anb", KIND, arrays, found.meta)
    with pytest.raises(DataError, match="its links or levels do not fit together"):
        HNSW.load(tmp_path / "i.anb")
