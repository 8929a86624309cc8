"""Packed bits and how many of them differ: the kernel against numpy, the index against every distance, and every way in and out."""

import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from anabranch.errors import DataError, InputError
from anabranch.graph.hnsw import HNSW, ShardedHNSW, brute_force
from anabranch.graph.hnsw.encoding import BitEncoding, short_stride
from anabranch.graph.hnsw.linking import Linker
from anabranch.graph.hnsw.measuring import distance
from anabranch.graph.hnsw.raw import HAMMING, kernel
from anabranch.graph.live import LiveIndex, live_folder, open_index
from anabranch.graph.serve import Sources, Writes, create_app
from hnsw_checks import check_graph, graph_bytes
from server_process import started


@kernel
def measured(kind, query, row, width):
    return distance(kind, query, np.float32(0.0), np.float32(0.0), row, 0, 0, width)


def rows(count, dim, seed=0, flips=0.1):
    """Packed bits about eight centres, each bit of which is flipped with a probability."""
    generator = np.random.default_rng(seed)
    centre = np.random.default_rng(99).integers(0, 2, (8, dim), np.uint8)
    return np.packbits(centre[generator.integers(0, 8, count)] ^ (generator.random((count, dim)) < flips), axis=1)


def naive(held, queries, k, ids=None):
    """Every distance, sorted by (distance, id)."""
    ids = np.arange(len(held)) if ids is None else np.asarray(ids)
    differ = np.unpackbits(queries[:, None] ^ held[None], axis=2).sum(2, dtype=np.int64)
    order = np.lexsort((np.broadcast_to(ids, differ.shape), differ))[:, :k]
    return ids[order], np.take_along_axis(differ, order, 1)


def made(count=600, dim=64, **options):
    index = HNSW(dim, "hamming", M=8, ef_construction=60, workers=1, **options)
    index.add(rows(count, dim))
    return index


# The kernel


@pytest.mark.parametrize("dim", [8, 64, 72, 128, 256, 264, 512, 520, 1024, 1544, 4096, 65536])
def test_the_kernel_counts_bits_that_differ(dim):
    encoding = BitEncoding(dim)
    pair = np.random.default_rng(dim).integers(0, 256, (2, dim // 8), np.uint8)
    (left, right), _, _ = encoding.encode(pair)
    found = measured(HAMMING, left.ctypes.data, right.ctypes.data, encoding.width)
    assert found == np.unpackbits(pair[0] ^ pair[1]).sum()
    np.testing.assert_array_equal(encoding.decode(np.stack([left, right]), None), pair)
    assert measured(HAMMING, left.ctypes.data, left.ctypes.data, encoding.width) == 0


def test_short_rows_do_not_cross_lines():
    strides = {size: short_stride(size) for size in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128)}
    assert strides == {1: 8, 8: 8, 9: 16, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 65: 128, 128: 128}
    # 32 bytes of bits, 128 of links on level 0, and what an element takes anyway.
    index = HNSW(256, "hamming", M=16, ef_construction=20, flat=True)
    index.add(rows(500, 256))
    assert index.size_bytes / 500 < 32 + 128 + 40


# The index


@pytest.mark.parametrize("dim", [8, 64, 136, 1024])
def test_all_that_can_be_reached_is_found_in_the_order_of_distance_and_id(dim):
    index = made(300, dim)
    check_graph(index)
    assert (index.dtype, index.dim, index.row_size, index.rerank) == ("b1", dim, dim // 8, False)
    queries = rows(20, dim, 1, 0.2)
    index.repair()
    ids, distances = index.search(queries, 12, ef=300)
    truth, differ = naive(rows(300, dim), queries, 12)
    assert ids.tolist() == truth.tolist()
    assert distances.tolist() == differ.tolist()
    assert distances.dtype == np.float32
    one, far = index.search(queries[0], 12, ef=300)
    assert (one.tolist(), far.tolist()) == (truth[:1].tolist(), differ[:1].tolist())


def test_few_are_missed_with_a_short_walk():
    index = HNSW(256, "hamming", M=16, ef_construction=100, workers=1)
    held, queries = rows(3000, 256, flips=0.25), rows(100, 256, 1, 0.25)
    index.add(held)
    found, distances = index.search(queries, 10, ef=64)
    _, differ = naive(held, queries, 10)
    # By distance: many are equally far.
    assert (np.sort(distances, 1) <= differ[:, -1:]).mean() > 0.95
    assert (found >= 0).all()


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_bits_with_many_at_one_place(count, width, seed, is_sparse):
    generator = np.random.default_rng(seed)
    held = generator.integers(0, 2 if is_sparse else 256, (count, width), np.uint8)
    index = HNSW(8 * width, "hamming", M=3, ef_construction=6, workers=1)
    index.add(held, repair=True)
    check_graph(index)
    ids, distances = index.search(held, count, count)
    truth, differ = naive(held, held, count)
    assert distances.tolist() == differ.tolist()
    assert ids.tolist() == truth.tolist()


def test_truth_values_whole_numbers_lists_and_tensors_are_taken():
    packed = rows(40, 16)
    truth = made(0, 16)
    truth.add(packed)
    for same in (
        np.unpackbits(packed, axis=1).astype(bool),
        packed.astype(np.int64),
        packed.tolist(),
        torch.from_numpy(packed),
    ):
        index = made(0, 16)
        index.add(same)
        assert graph_bytes(index) == graph_bytes(truth)
    ids, distances = truth.search(torch.from_numpy(packed[:3]), 2)
    assert isinstance(ids, torch.Tensor)
    assert distances[:, 0].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(truth.vectors([3, 1]), packed[[3, 1]])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (np.zeros((3, 4), np.float32), "are float32; with the metric 'hamming' they are bytes"),
        (np.full((3, 4), np.nan), "are float64"),
        (np.zeros((3, 5), np.uint8), "the shape [3, 5] of uint8; the index takes rows of 4 bytes, which are 32 bits"),
        (np.zeros((3, 31), bool), "or of 32 truth values"),
        (np.array([[0, 1, 2, 3], [0, 1, 256, 3]]), "row 1 of vectors holds a number that is no byte"),
        (np.array([[-1, 0, 0, 0]]), "row 0 of vectors holds a number that is no byte"),
        (np.zeros((1, 2, 4), np.uint8), "the shape [1, 2, 4]"),
    ],
)
def test_what_are_no_bits_is_refused(given, says):
    index = HNSW(32, "hamming")
    with pytest.raises(InputError) as told:
        index.add(given)
    assert says in str(told.value)
    assert len(index) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"dim": 12, "metric": "hamming"},
            "dim is 12; with the metric 'hamming' it is a number of bits in whole bytes",
        ),
        ({"dim": 16, "metric": "hamming", "dtype": "i8"}, "metric is 'hamming' and dtype 'i8'"),
        ({"dim": 16, "metric": "l2", "dtype": "b1"}, "metric is 'l2' and dtype 'b1'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, says):
    with pytest.raises(InputError) as told:
        HNSW(**options)
    assert says in str(told.value)


def test_none_and_one_and_the_largest_id():
    index = made(0, 64)
    none = np.zeros((0, 8), np.uint8)
    assert index.add(none).tolist() == []
    assert index.search(none)[0].shape == (0, 10)
    assert index.search(np.zeros((2, 8), np.uint8), 1)[0].tolist() == [[-1], [-1]]
    index.add(rows(2, 64), ids=[2**63 - 1, 0])
    ids, distances = index.search(rows(2, 64)[:1], 3)
    assert ids[0, [0, 2]].tolist() == [2**63 - 1, -1]
    assert distances[0, 2] == np.inf
    with pytest.raises(InputError, match="leaves 0 for 1 vectors"):
        index.add(rows(1, 64))


def test_filters_changes_and_compaction():
    index, held = made(600, 64), rows(600, 64)
    even = np.arange(600) % 2 == 0
    for filter in (even, np.flatnonzero(even), index.prepare_filter(even)):
        ids, _ = index.search(held[:20], 5, ef=600, filter=filter)
        assert ids.tolist() == naive(held[::2], held[:20], 5, np.arange(0, 600, 2))[0].tolist()
    few, _ = index.search(held[:5], 3, filter=[7, 8])
    assert few.tolist() == naive(held[[7, 8]], held[:5], 3, [7, 8])[0].tolist() or (few[:, 2] == -1).all()
    index.update([3], held[500:501])
    assert index.search(held[500], 2, ef=100)[0].tolist() == [[3, 500]]
    index.remove(np.arange(100, 300))
    assert index.compact() == 0  # a third was deleted, so it was done already
    index.add(held[100:120], ids=np.arange(1000, 1020))
    check_graph(index)
    assert (index.search(held[100:120], 1, ef=100)[1] == 0).all()


def test_any_number_of_threads_gives_the_same_bytes():
    held = rows(2500, 128)
    built = []
    for threads in (1, 3):
        index = HNSW(128, "hamming", M=6, ef_construction=30, workers=threads)
        index.add(held)
        built.append(graph_bytes(index))
    assert built[0] == built[1]


def test_an_interrupted_add_leaves_what_is_linked(monkeypatch):
    held, own, calls = rows(3000, 64, flips=0.5), Linker._link_batch, []
    index = HNSW(64, "hamming", M=8, ef_construction=40, workers=1)

    def interrupted(self, *arguments):
        own(self, *arguments)
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Linker, "_link_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.add(held)
    monkeypatch.undo()
    check_graph(index)
    count = len(index)
    assert 1024 < count < 1200
    assert index.ids.tolist() == list(range(count))
    index.add(held[count:])
    check_graph(index)
    assert index.ids.tolist() == list(range(3000))
    assert (index.search(held[::30], 1, ef=200)[1] == 0).mean() > 0.98


# Twins


@pytest.mark.parametrize("dim", [8, 128])
def test_brute_force_is_every_distance(monkeypatch, dim):
    monkeypatch.setattr("anabranch.graph.hnsw.exact.PIECE", 1 << 12)
    held, queries = rows(300, dim), rows(40, dim, 1)
    ids, distances = brute_force(held, queries, 9, "hamming")
    truth, differ = naive(held, queries, 9)
    assert (ids.tolist(), distances.tolist()) == (truth.tolist(), differ.tolist())
    named, _ = brute_force(
        held, np.unpackbits(queries, axis=1).astype(bool), 400, "hamming", ids=np.arange(300)[::-1] * 3
    )
    assert named[:, :300].tolist() == naive(held, queries, 300, np.arange(300)[::-1] * 3)[0].tolist()
    assert (named[:, 300:] == -1).all()
    of_bools, _ = brute_force(np.unpackbits(held, axis=1).astype(bool), queries, 9, "hamming")
    assert of_bools.tolist() == ids.tolist()


def test_shards_find_what_one_index_finds():
    held = rows(400, 64)
    index = ShardedHNSW(64, 3, "hamming", M=8, ef_construction=60)
    index.add(held)
    ids, distances = index.search(held[:30], 6, ef=400)
    truth, differ = naive(held, held[:30], 6)
    assert (ids.tolist(), distances.tolist()) == (truth.tolist(), differ.tolist())


# Files


@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_holds_it(tmp_path, mmap):
    index = made(500, 136)
    index.save(tmp_path / "i.anb")
    again = HNSW.load(tmp_path / "i.anb", mmap=mmap)
    assert (again.metric, again.dtype, again.dim) == ("hamming", "b1", 136)
    queries = rows(30, 136, 1)
    for one, other in zip(index.search(queries, 5), again.search(queries, 5), strict=True):
        assert one.tolist() == other.tolist()
    again.add(rows(5, 136, 2))
    assert len(again) == 505


def test_a_file_of_other_rows_is_refused(tmp_path):
    from anabranch.graph.array_file import read_arrays, write_arrays
    from anabranch.graph.hnsw.storage import KIND, VERSIONS

    made(50, 64).save(tmp_path / "i.anb")
    found = read_arrays(tmp_path / "i.anb", KIND, versions=VERSIONS)
    found.meta["options"]["dim"] = 128
    write_arrays(tmp_path / "i.anb", KIND, found.arrays, found.meta)
    with pytest.raises(DataError, match="'rows' is uint8"):
        HNSW.load(tmp_path / "i.anb")


def test_a_live_index_keeps_bits_through_its_log_and_snapshots(tmp_path):
    path, held = tmp_path / "i.anb", rows(80, 72)
    made(40, 72).save(path)
    with LiveIndex.open(path, workers=1, snapshot_bytes=2000) as live:
        live.upsert(range(40, 80), held[40:])
        live.upsert([3], held[70:71])
        live.delete([5])
        with pytest.raises(InputError, match="float32"):
            live.upsert([9], np.zeros((1, 9), np.float32))
        assert live.log_bytes < 8 * 80 + 9 * 80 + 2048
    again = open_index(path)
    assert sorted(again.ids.tolist()) == [id for id in range(80) if id != 5]
    np.testing.assert_array_equal(again.vectors([3, 79]), held[[70, 79]])
    with LiveIndex.open(path, workers=1) as live:
        live.delete([79])
    assert len(open_index(path)) == 78


def test_a_log_of_other_rows_is_none_of_this_index(tmp_path):
    path = tmp_path / "i.anb"
    made(40, 64).save(path)
    with LiveIndex.open(path, workers=1) as live:
        live.delete([1])
    base = live.base
    other = HNSW(8, "l2", workers=1)
    other.add(np.eye(8))
    other.save(tmp_path / "o.anb")
    with LiveIndex.open(tmp_path / "o.anb", workers=1) as live:
        live.delete([1])
    log = live_folder(path) / "log-00000001"
    log.write_bytes((live_folder(tmp_path / "o.anb") / "log-00000001").read_bytes())
    assert base
    with pytest.raises(DataError, match="is not one of this index"):
        open_index(path)


# Front doors


@pytest.fixture
def client(tmp_path):
    made(60, 32).save(tmp_path / "i.anb")
    app = create_app(Sources([tmp_path / "i.anb"], writes=Writes()))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        while client.get("/readyz").status_code != 200:
            pass
        yield client


def test_http_takes_bytes(client):
    held = rows(60, 32)
    answer = client.post("/search", json={"vectors": held[:3].tolist(), "k": 4, "ef": 60})
    truth, differ = naive(held, held[:3], 4)
    assert [row["ids"] for row in answer.json()["results"]] == truth.tolist()
    assert [row["distances"] for row in answer.json()["results"]] == differ.tolist()
    assert client.post("/upsert", json={"ids": [900], "vectors": [[1, 2, 3, 255]]}).json()["new"] == 1
    found = client.post("/search", json={"vectors": [[1, 2, 3, 255]], "k": 1}).json()["results"][0]
    assert found == {"ids": [900], "distances": [0.0]}
    assert client.post("/search", json={"ids": [900], "k": 1}).json()["results"][0]["ids"] != [900]
    assert client.get("/v1/info").json()["search"]["metric"] == "hamming"


@pytest.mark.parametrize(
    ("vectors", "field"),
    [
        ([[1, 2, 3]], "vectors"),
        ([[0, 0, 0, 0], [0, 256, 0, 0]], "vectors[1][1]"),
        ([[0, 0.5, 0, 0]], "vectors[0][1]"),
        ([[-1, 0, 0, 0]], "vectors[0][0]"),
    ],
)
@pytest.mark.parametrize("path", ["/search", "/upsert"])
def test_http_refuses_what_are_no_bytes(client, vectors, field, path):
    more = {"ids": list(range(len(vectors)))} if path == "/upsert" else {}
    answer = client.post(path, json={"vectors": vectors, **more})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)


def test_a_server_begins_an_empty_index_of_bits(tmp_path):
    import httpx

    path = tmp_path / "new.anb"
    with started("graph", "serve", str(path), "--dim", "32", "--metric", "hamming") as server:
        assert httpx.post(f"{server.url}/upsert", json={"ids": [4], "vectors": [[7, 7, 7, 7]]}).status_code == 200
        found = httpx.post(f"{server.url}/search", json={"vectors": [[7, 7, 7, 6]], "k": 1}).json()["results"]
        assert found == [{"ids": [4], "distances": [1.0]}]
    assert open_index(path).vectors([4]).tolist() == [[7, 7, 7, 7]]
