"""All within a radius: never one outside, none missing where every distance is measured, few where a walk is made."""

import time
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from anabranch.errors import CapacityError, DataError, InputError
from anabranch.graph.hnsw import HNSW, ShardedHNSW, Within, ranges
from anabranch.graph.serve import Limits, Sources, create_app
from anabranch.graph.workers import Workers
from hnsw_checks import drawn, naive

VECTORS = drawn(3000, 8)


def rows(found):
    """As lists of (id, distance)."""
    return [
        list(zip(found.ids[begin:end].tolist(), found.distances[begin:end].tolist(), strict=True))
        for begin, end in zip(found.indptr[:-1], found.indptr[1:], strict=True)
    ]


def truth(held, queries, radius, ids=None, metric="l2"):
    """By every distance: whole numbers are given, so that distances are exact."""
    id_QN, distance_QN = naive(held, queries, len(held), metric, ids)
    radius_Q = np.broadcast_to(radius, len(queries))
    return [
        [(int(id), float(far)) for id, far in zip(id_N, far_N, strict=True) if far <= limit]
        for id_N, far_N, limit in zip(id_QN, distance_QN, radius_Q, strict=True)
    ]


@cache
def walked():
    made = HNSW(8, M=12, ef_construction=100, workers=1)
    made.add(VECTORS)
    made.repair()
    return made


@pytest.fixture
def index():
    return walked()


def whole(count, dim, seed, most=6):
    return np.random.default_rng(seed).integers(-most, most + 1, (count, dim)).astype(np.float32)


def test_worked_by_hand():
    index = HNSW(1, workers=1)
    index.add([[0], [1], [2], [5], [-1]], ids=[10, 11, 12, 15, 9])
    found = index.range_search([[0.0], [9.0], [4.0]], [4.0, 1.0, 4.0])
    # Squared: 0, 1 (twice, by id), 4; none; 1, 4.
    assert found.indptr.tolist() == [0, 4, 4, 6]
    assert rows(found) == [[(10, 0.0), (9, 1.0), (11, 1.0), (12, 4.0)], [], [(15, 1.0), (12, 4.0)]]
    assert (found.indptr.dtype, found.ids.dtype, found.distances.dtype) == (np.int64, np.int64, np.float32)
    indptr, ids, _ = index.range_search([0.0], np.inf)
    assert (indptr.tolist(), sorted(ids.tolist())) == ([0, 5], [9, 10, 11, 12, 15])
    assert index.range_search([[0.0]], -1)[1].size == 0


@given(
    st.integers(1, 80),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
    st.integers(-2, 60),
    st.booleans(),
    st.sampled_from(["l2", "ip"]),
    st.sampled_from(["f32", "i8"]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_distance_is_measured_where_it_is_asked_for_or_little(
    count, dim, seed, radius, is_exact, metric, dtype, is_filtered
):
    held, queries = whole(count, dim, seed), whole(5, dim, seed + 1)
    index = HNSW(dim, metric, M=3, ef_construction=6, dtype=dtype, workers=1)
    index.add(held)
    kept = np.arange(count) % 3 > 0 if is_filtered else None
    found = index.range_search(queries, radius, filter=kept, exact=is_exact)
    chosen = np.arange(count) if kept is None else np.flatnonzero(kept)
    assert rows(found) == truth(held[chosen], queries, radius, chosen, metric)


@given(
    st.integers(1, 80),
    st.integers(0, 2**32 - 1),
    st.integers(-2, 60),
    st.booleans(),
    st.integers(1, 90),
    st.sampled_from(["f32", "i8"]),
    st.integers(1, 3),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_nearest_within_and_how_many_are_those_of_all(count, seed, radius, is_exact, k, dtype, shards, is_filtered):
    """Whole numbers, so that many are at one distance: those of the smallest ids are kept."""
    held, queries = whole(count, 2, seed), whole(5, 2, seed + 1)
    index = HNSW(2, M=3, ef_construction=6, dtype=dtype, workers=1) if shards == 1 else ShardedHNSW(2, shards)
    index.add(held, np.random.default_rng(seed).permutation(1000)[:count])
    kept = index.ids[::2] if is_filtered else None
    asked = queries, np.arange(5) + radius
    every = rows(index.range_search(*asked, filter=kept, exact=is_exact))
    ids, distances, number = index.nearest_within(*asked, k, filter=kept, exact=is_exact)
    assert (ids.shape, distances.shape, number.tolist()) == ((5, k), (5, k), list(map(len, every)))
    for id_K, distance_K, one in zip(ids.tolist(), distances.tolist(), every, strict=True):
        wanted = one[:k] + [(-1, np.inf)] * (k - len(one))
        assert list(zip(id_K, distance_K, strict=True)) == wanted


def test_of_walks_no_more_is_kept_than_is_asked_for(index):
    queries, radius_Q = VECTORS[:20], np.full(20, 9, np.float32)
    with Workers(1) as workers:
        found, number_Q = index._ranges.many(queries, radius_Q, 16, None, False, workers, index._lock, most=3)
        every, _ = index._ranges.many(queries, radius_Q, 16, None, False, workers, index._lock)
    assert number_Q.tolist() == [len(ids) for ids, _ in every]
    assert number_Q.max() > 3
    for (ids, distances), (all_ids, all_distances) in zip(found, every, strict=True):
        assert (ids.tolist(), distances.tolist()) == (all_ids[:3].tolist(), all_distances[:3].tolist())
        # A copy, which holds nothing else.
        assert ids.base is None


@given(st.integers(0, 2**32 - 1), st.floats(0, 60), st.integers(1, 64), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_walk_finds_none_outside_and_misses_few(seed, radius, ef, is_filtered):
    generator = np.random.default_rng(seed)
    index = walked()
    queries = VECTORS[generator.integers(0, 3000, 10)] + generator.normal(0, 0.3, (10, 8)).astype(np.float32)
    kept = np.arange(3000) % 2 == 0 if is_filtered else None
    found = index.range_search(queries, radius, ef, kept)
    exact = index.range_search(queries, radius, filter=kept, exact=True)
    for one, all_there in zip(rows(found), rows(exact), strict=True):
        assert set(one) <= set(all_there)
        assert one == sorted(one, key=lambda pair: (pair[1], pair[0]))
    if len(exact.ids) and ef >= 16:
        assert len(found.ids) / len(exact.ids) > 0.9


def test_a_walk_holds_more_until_half_of_it_is_outside(index, monkeypatch):
    queries = VECTORS[:50]
    widths, own = [], index._searcher.many

    def many(query_QD, ef, *rest):
        widths.append((ef, len(query_QD)))
        return own(query_QD, ef, *rest)

    monkeypatch.setattr(index._searcher, "many", many)
    within = np.diff(index.range_search(queries, 12.0, exact=True).indptr)
    assert widths == []
    found = index.range_search(queries, 12.0, ef=16)
    assert [width for width, _ in widths] == [16, 32, 64, 128][: len(widths)]
    # Those that are done do not walk again.
    for width, count in widths[1:]:
        assert count <= (2 * within > width // 2).sum()
    assert len(found.ids) / within.sum() > 0.98
    widths.clear()
    monkeypatch.setattr(ranges, "HELD", 16 * 20)
    again = index.range_search(queries, 12.0, ef=16)
    assert [count for width, count in widths if width == 16] == [20, 20, 10]
    assert rows(again) == rows(found)


def test_what_a_search_costs_is_told(index):
    index.range_search(VECTORS[:4], 1.0, ef=20)
    walked = index.stats()
    index.range_search(VECTORS[:4], 1.0, exact=True)
    measured = index.stats()
    assert walked["queries"] == measured["queries"] == 4
    assert 0 < walked["distances"] < measured["distances"] == 3000
    assert walked["hops"] > measured["hops"] == 0


@pytest.mark.parametrize("dtype", ["f16", "i8"])
def test_short_rows_are_measured_again(dtype):
    index = HNSW(8, M=12, ef_construction=60, dtype=dtype, workers=1)
    index.add(VECTORS)
    for exact in (False, True):
        found = index.range_search(VECTORS[:30], 5.0, exact=exact)
        full = truth(VECTORS, VECTORS[:30], 5.0)
        for one, all_there in zip(rows(found), full, strict=True):
            far = dict(all_there)
            assert {id for id, _ in one} <= far.keys() | {id for id, value in one if abs(value - 5) < 1e-4}
            for id, value in one:
                if id in far:
                    assert value == pytest.approx(far[id], rel=1e-4, abs=1e-4)
        assert len(found.ids) > 0.95 * sum(map(len, full))


def test_deleted_elements_are_not_within(index):
    made = HNSW(8, M=8, ef_construction=40, compact_at=None, workers=1)
    made.add(VECTORS[:2500])
    made.remove(np.arange(0, 2500, 2))
    for exact in (False, True):
        found = made.range_search(VECTORS[:40], 6.0, exact=exact)
        assert (found.ids % 2 == 1).all()
    made.remove(np.arange(1, 2500, 2))
    assert made.range_search(VECTORS[:3], 100.0).indptr.tolist() == [0, 0, 0, 0]
    assert made.range_search(VECTORS[:0], 100.0).indptr.tolist() == [0]
    assert HNSW(8).range_search(VECTORS[:2], 9.0).indptr.tolist() == [0, 0, 0]


def test_elements_that_nothing_leads_to_are_measured(monkeypatch):
    index = HNSW(8, M=6, ef_construction=20, workers=1)
    index.add(VECTORS[:2000])

    def fails(*arguments):
        raise MemoryError

    monkeypatch.setattr(index._linker, "link", fails)
    with pytest.raises(MemoryError):
        index.update(np.arange(2000), VECTORS[:2000])
    assert index.search(VECTORS[:1], 1)[0].tolist() == [[-1]]
    assert rows(index.range_search(VECTORS[:2], 0)) == [[(0, 0.0)], [(1, 0.0)]]


def test_many_at_one_place_are_all_found():
    index = HNSW(4, M=4, ef_construction=16, workers=1)
    index.add(np.zeros((2500, 4), np.float32), repair=True)
    index.add(np.ones((5, 4), np.float32), ids=[2**63 - 1, 2**62, 9000, 9001, 9002])
    found = index.range_search(np.zeros((1, 4)), 0.0)
    assert found.ids.tolist() == list(range(2500))
    found = index.range_search(np.ones(4), 0, exact=True)
    assert found.ids.tolist() == [9000, 9001, 9002, 2**62, 2**63 - 1]


def test_bits_shards_and_tensors():
    held = np.random.default_rng(0).integers(0, 256, (400, 3), np.uint8)
    index, shards = HNSW(24, "hamming", workers=1), ShardedHNSW(24, 3, "hamming")
    index.add(held)
    shards.add(held)
    differ = np.unpackbits(held[:10, None] ^ held[None], axis=2).sum(2)
    wanted = [
        sorted(
            ((int(id), float(differ[row, id])) for id in np.flatnonzero(differ[row] <= 7)),
            key=lambda one: (one[1], one[0]),
        )
        for row in range(10)
    ]
    assert rows(index.range_search(held[:10], 7)) == rows(shards.range_search(held[:10], 7)) == wanted
    found = index.range_search(torch.from_numpy(held[:10]), 7)
    assert isinstance(found, Within)
    assert all(isinstance(part, torch.Tensor) for part in found)
    assert found.indptr.tolist() == np.cumsum([0, *map(len, wanted)]).tolist()


@pytest.mark.parametrize(
    ("radius", "says"),
    [
        (np.nan, "is nan"),
        ([1.0, np.nan], r"radius\[1\] is nan"),
        ([1.0, 2.0, 3.0], r"the shape \[3\] of float64; it must be one number, or one for each of the 2 queries"),
        ("far", "must be numbers"),
        (None, "must be numbers"),
        (True, "of bool"),
    ],
)
def test_a_radius_that_is_none_is_refused(index, radius, says):
    with pytest.raises(InputError, match=says):
        index.range_search(VECTORS[:2], radius)


def test_wrong_queries_and_widths_are_refused(index):
    with pytest.raises(InputError, match="row 1 of queries is not finite"):
        index.range_search(np.array([[0.0] * 8, [np.nan] * 8]), 1.0)
    with pytest.raises(InputError, match="longer than"):
        index.range_search(np.full((1, 8), 1e19), 1.0)
    with pytest.raises(InputError, match="ef is 0"):
        index.range_search(VECTORS[:1], 1.0, 0)
    with pytest.raises(InputError, match="the largest id is 2999"):
        index.range_search(VECTORS[:1], 1.0, filter=np.ones(5, bool))
    assert len(index.range_search(VECTORS[:1], 1e300).ids) == 3000


def test_no_memory_is_told(index, monkeypatch):
    def none(rows):
        raise MemoryError

    monkeypatch.setattr(Within, "of", none)
    with pytest.raises(CapacityError, match="no memory for all within the radius of 2 queries"):
        index.range_search(VECTORS[:2], 1.0)
    with pytest.raises(CapacityError, match="results of 2 queries; ask for fewer"):
        index.nearest_within(VECTORS[:2], 1.0, 2**60)


@pytest.mark.parametrize("exact", [False, True])
def test_numbers_that_are_none_are_damage(exact):
    made = HNSW(8, M=8, ef_construction=40, workers=1)
    made.add(VECTORS[:2500])
    made._storage.rows.view(np.float32)[:2500, 0] = np.nan
    with pytest.raises(DataError, match="holds numbers that nobody gave it"):
        made.range_search(VECTORS[:2], 1.0, exact=exact)


# Over HTTP


@pytest.fixture
def client(tmp_path):
    made = HNSW(8, M=8, ef_construction=40, workers=1)
    made.add(VECTORS[:200])
    made.save(tmp_path / "i.anb")
    with TestClient(create_app(Sources([tmp_path / "i.anb"]), Limits(k=12))) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.01)
        yield client


def test_http_tells_the_nearest_within_and_how_many_there_are(client):
    made = HNSW(8, M=8, ef_construction=40, workers=1)
    made.add(VECTORS[:200])
    wanted = rows(made.range_search(VECTORS[:3], 20.0))
    assert max(map(len, wanted)) > 12
    body = {"vectors": VECTORS[:3].tolist(), "radius": 20}
    for more in ({}, {"exact": True}, {"k": 4}):
        found = client.post("/search", json={**body, **more}).json()["results"]
        for one, all_there in zip(found, wanted, strict=True):
            most = more.get("k", 12)
            assert one["within"] == len(all_there)
            assert list(zip(one["ids"], one["distances"], strict=True)) == all_there[:most]
    by_id = client.post(
        "/search", json={"ids": [0], "radius": 20, "filter": {"ids": [0, 1, 2], "exclude": True}}
    ).json()
    assert by_id["results"][0]["ids"] == [id for id, _ in wanted[0] if id > 2][:12]
    assert by_id["results"][0]["within"] == len([id for id, _ in wanted[0] if id > 2])
    itself = client.post("/search", json={"ids": [0], "radius": 20, "k": 3}).json()["results"][0]
    assert (itself["ids"], itself["within"]) == ([id for id, _ in wanted[0] if id][:3], len(wanted[0]) - 1)
    nothing = client.post("/search", json={"vectors": VECTORS[:1].tolist(), "radius": -1}).json()["results"]
    assert nothing == [{"ids": [], "distances": [], "within": 0}]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"radius": "far"}, "radius"),
        ({"radius": True}, "radius"),
        ({"radius": 1e39}, "radius"),
        ({"radius": 10**400}, "radius"),
        ({"radius": 1, "exact": 1}, "exact"),
        ({"exact": True}, "exact"),
        ({"radius": 1, "k": 13}, "k"),
    ],
)
def test_http_refuses_what_is_no_radius(client, more, field):
    answer = client.post("/search", json={"vectors": VECTORS[:1].tolist(), **more})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)


def test_http_tells_damage(client):
    held = client.app.state.serving.loaded().vectors.index._storage
    held.rows.view(np.float32)[:, 0] = np.inf
    answer = client.post("/search", json={"vectors": VECTORS[:1].tolist(), "radius": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "damaged_index")


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "pq", "rerank": False},
        {"quantization": "int4", "rerank": False},
        {"quantization": "int4", "rerank": 2},
        {"dtype": "i8", "rerank": False},
    ],
    ids=str,
)
def test_a_walk_and_a_scan_mean_the_same_by_within(options):
    """Codes without measuring again told their own distances on walks alone, some of them below zero."""
    vectors = drawn(2000, 24, 5)
    index = HNSW(24, M=10, ef_construction=60, workers=1, **options)
    index.add(vectors)
    walked, scanned = (index.range_search(vectors[:30], 20.0, ef=32, exact=exact) for exact in (False, True))
    for number in range(30):
        (ids, far), (all_ids, all_far) = (
            (found.ids[begin:end].tolist(), found.distances[begin:end].tolist())
            for found in (walked, scanned)
            for begin, end in [found.indptr[number : number + 2]]
        )
        known = dict(zip(all_ids, all_far, strict=True))
        assert [known[id] for id in ids] == far == sorted(far)
        assert min(all_far) >= 0
        if "quantization" in options:
            assert far[0] == 0
            np.testing.assert_allclose(all_far, ((vectors[all_ids] - vectors[number]) ** 2).sum(1), rtol=1e-4)
    assert len(walked.ids) > 0.8 * len(scanned.ids)


@pytest.mark.parametrize("options", [{"quantization": "int4"}, {"dtype": "i8"}], ids=str)
def test_no_squared_distance_is_below_zero(options):
    vectors = drawn(1500, 24, 5)
    index = HNSW(24, M=10, ef_construction=60, workers=1, rerank=False, **options)
    index.add(vectors)
    few = np.arange(20)
    for ids, far in (
        index.search(vectors[:300], 5),
        index.search(vectors[:20], 5, filter=few),
        *(index.search(row, 5) for row in vectors[:50]),
    ):
        assert far.min() >= 0
        order = np.lexsort((ids, far), axis=1)
        assert (order == np.arange(ids.shape[1])).all()
