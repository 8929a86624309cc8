"""A search of one query, which is one call of compiled code: what many at a time say, beside writers and through the gate of the lock."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import DataError, InputError
from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.hnsw.measuring import AT_ONCE, distance, distances, room_for_some
from anabranch.graph.hnsw.raw import address, get_f32, kernel
from anabranch.graph.hnsw.search import PADDING, clear, insert
from hnsw_checks import drawn, naive

WAIT_S = 20
VECTORS, QUERIES = drawn(700, 24, 1), drawn(12, 24, 2)
KINDS = [
    *((metric, dtype, True) for metric in ("l2", "ip", "cosine") for dtype in ("f32", "f16", "i8")),
    ("l2", "i8", False),
    ("cosine", "i8", False),
    ("l2", "f16", False),
]


def made(metric="l2", dtype="f32", rerank=True, vectors=VECTORS):
    index = HNSW(vectors.shape[1], metric=metric, dtype=dtype, rerank=rerank, M=8, ef_construction=60, workers=1)
    index.add(vectors)
    return index


def is_at_rest(index):
    return index._lock.gate.tolist() == [0, 0]


def same(one, many):
    return all(np.array_equal(mine, theirs) for mine, theirs in zip(one, many, strict=True))


@pytest.mark.parametrize(("metric", "dtype", "rerank"), KINDS)
def test_one_query_gives_what_it_gives_among_many(metric, dtype, rerank):
    index = made(metric, dtype, rerank)
    for k, ef in ((1, None), (10, 40), (40, 10), (900, 64)):
        many = index.search(QUERIES, k, ef)
        for row, query in enumerate(QUERIES):
            expected = many[0][row : row + 1], many[1][row : row + 1]
            for given_query in (query, query[None]):
                assert same(index.search(given_query, k, ef), expected)
    assert is_at_rest(index)


def test_bits_too():
    bits = np.random.default_rng(0).integers(0, 256, (500, 16), np.uint8)
    index = HNSW(128, metric="hamming", M=8, ef_construction=60, workers=1)
    index.add(bits)
    many = index.search(bits[:9], 5)
    for row in range(9):
        assert same(index.search(bits[row], 5), (many[0][row : row + 1], many[1][row : row + 1]))


def test_what_is_not_plain_goes_the_long_way_to_the_same_end():
    index = made()
    query = QUERIES[0]
    expected = index.search(query, 5)
    read_only = query.copy()
    read_only.flags.writeable = False
    for other in (query.astype(np.float64), np.repeat(query, 2)[::2], read_only, query.tolist(), query.astype(">f4")):
        assert same(index.search(other, 5), expected)
    assert same(index.search(query, np.int64(5), np.int32(64)), expected)
    assert index.search(query, 5, 2000)[0].shape == (1, 5)
    assert index.search(np.tile(query, (2, 1)), 5)[0].shape == (2, 5)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (np.nan, "not finite"),
        (np.inf, "not finite"),
        (-np.inf, "not finite"),
        (1e19, "longer than"),
        (3e38, "longer than"),
    ],
)
@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
def test_numbers_that_cannot_be_searched_for_are_told(bad, told, dtype):
    index, query = made(dtype=dtype), QUERIES[0].copy()
    query[7] = bad
    with pytest.raises(InputError, match=told):
        index.search(query, 3)
    assert is_at_rest(index)
    assert index.search(QUERIES[0], 3)[0].shape == (1, 3)


def test_a_zero_vector_has_no_direction_and_a_long_one_has():
    index = made("cosine")
    with pytest.raises(InputError, match="zero"):
        index.search(np.zeros(24, np.float32))
    assert index.search(QUERIES[0] * np.float32(1e30))[0].tolist() == index.search(QUERIES[0])[0].tolist()


def test_an_empty_index_and_one_that_was_emptied_have_nothing():
    index = HNSW(24, workers=1)
    for _ in range(2):
        ids, distances_ = index.search(QUERIES[0], 3)
        assert ids.tolist() == [[-1, -1, -1]]
        assert np.isinf(distances_).all()
        index.add(VECTORS[:5])
        assert index.search(QUERIES[0], 7)[0][0, 5:].tolist() == [-1, -1]
        index.remove(index.ids)
        assert index.search(QUERIES[0], 3)[0].tolist() == [[-1, -1, -1]]


def test_what_is_deleted_is_not_returned():
    index = HNSW(24, M=8, ef_construction=60, compact_at=None, workers=1)
    index.add(VECTORS)
    index.remove(np.arange(0, 700, 3))
    for query in QUERIES:
        one, many = index.search(query, 8, 200), index.search(np.stack([query, query]), 8, 200)
        assert same(one, (many[0][:1], many[1][:1]))
        assert (one[0] % 3 > 0).all()
    # Their places are taken again.
    index.add(VECTORS[:300] + 1)
    assert same(index.search(QUERIES[0], 8, 800), naive_of(index, QUERIES[0], 8))


def naive_of(index, query, k):
    """By definition, as float32."""
    ids = index.ids
    found, far = naive(index.vectors(ids), query[None], k, ids=ids)
    order, exact = index.search(np.stack([query, query]), k, 800)
    assert np.array_equal(order[0], found[0])
    np.testing.assert_allclose(exact[0], far[0], rtol=1e-4)
    return order[:1], exact[:1]


def test_a_prepared_filter_holds_also_after_a_change():
    index = made()
    mask = np.arange(5000) % 2 == 0
    prepared = index.prepare_filter(mask)
    for query in QUERIES:
        many = index.search(np.stack([query, query]), 6, 40, mask)
        assert same(index.search(query, 6, 40, prepared), (many[0][:1], many[1][:1]))
    index.add(VECTORS + 5)
    index.remove(np.arange(100))
    for query in QUERIES:
        many = index.search(np.stack([query, query]), 6, 40, mask)
        for _ in range(2):
            assert same(index.search(query, 6, 40, prepared), (many[0][:1], many[1][:1]))
    few = index.prepare_filter([201, 305])
    assert set(index.search(QUERIES[0], 3, filter=few)[0][0].tolist()) == {201, 305, -1}
    assert is_at_rest(index)


def test_its_cost_is_told():
    index = made()
    index.search(QUERIES[:2], 5, 30)
    both = index.stats()
    index.search(QUERIES[0], 5, 30)
    one = index.stats()
    assert (both["queries"], one["queries"]) == (2, 1)
    index.search(QUERIES[1], 5, 30)
    other = index.stats()
    for name in ("hops", "distances"):
        assert one[name] > 0
        assert both[name] == (one[name] + other[name]) / 2


# Beside writers


def test_who_finds_the_gate_shut_waits_for_the_writer():
    index, inside, leave, found = made(), threading.Event(), threading.Event(), []

    def write():
        with index._lock.write():
            inside.set()
            leave.wait(WAIT_S)

    writer = threading.Thread(target=write)
    writer.start()
    inside.wait(WAIT_S)
    assert index._lock.gate[0] == 1
    reader = threading.Thread(target=lambda: found.append(index.search(QUERIES[0], 3)))
    reader.start()
    end = time.monotonic() + WAIT_S
    while not index._lock._queue:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert not found
    leave.set()
    for one in (reader, writer):
        one.join(WAIT_S)
    assert same(found[0], index.search(QUERIES[0], 3))
    assert is_at_rest(index)


def test_a_writer_waits_for_those_inside_and_lets_nobody_in_meanwhile():
    lock, order = ReadWriteLock(), []
    lock.gate[1] = 1

    def write():
        with lock.write():
            order.append("write")
            assert lock.gate[0] == 1
            with lock.open_to_readers():
                order.append(("open", *lock.gate.tolist()))
                lock.gate[1] = 1
                threading.Timer(0.05, leave).start()
            order.append(("shut", *lock.gate.tolist()))

    def leave():
        order.append("left")
        lock.gate[1] = 0

    writer = threading.Thread(target=write)
    writer.start()
    end = time.monotonic() + WAIT_S
    while lock.gate[0] == 0:
        assert time.monotonic() < end
        time.sleep(0.001)
    time.sleep(0.02)
    assert order == []
    leave()
    writer.join(WAIT_S)
    assert order == ["left", "write", ("open", 0, 0), "left", ("shut", 1, 0)]
    assert lock.gate.tolist() == [0, 0]


def test_a_writer_that_is_alone_opens_it_to_nobody():
    lock = ReadWriteLock()
    with lock.write(alone=True), lock.open_to_readers():
        assert lock.gate.tolist() == [1, 0]
    assert lock.gate.tolist() == [0, 0]


def test_in_a_forked_process_nobody_is_inside_and_what_is_half_changed_stays_shut():
    index = made()
    index._lock.gate[1] = 3
    index._lock.after_fork()
    assert is_at_rest(index)
    with index._lock.write():
        index._lock.after_fork()
    assert index._lock.gate.tolist()[0] == 1
    with pytest.raises(DataError, match="forked"):
        index.search(QUERIES[0], 3)


def test_searches_beside_all_kinds_of_changes_return_what_is_or_was_there():
    index = made(vectors=VECTORS[:300])
    prepared = index.prepare_filter(np.arange(10_000) % 2 == 1)
    done, wrong, searches = threading.Event(), [], [0, 0, 0]

    def search(number):
        while not done.is_set():
            given_filter = prepared if number == 1 else None
            ids, far = index.search(QUERIES[searches[number] % 12], 5, 30, given_filter)
            searches[number] += 1
            is_fit = (ids >= -1).all() and (np.diff(far[0]) >= 0).all() and len(set(ids[0].tolist())) == 5
            if not is_fit or (number == 1 and (ids[0] % 2 == 0).any()):
                wrong.append((ids, far))

    threads = [threading.Thread(target=search, args=(number,)) for number in range(3)]
    for one in threads:
        one.start()
    try:
        turn = 0
        while turn < 60 or min(searches) < 20:
            index.add(VECTORS[300 + turn % 300 : 320 + turn % 300])
            index.remove(index.ids[turn % 50 : turn % 50 + 12])
            if turn % 5 == 0:
                index.compact()
            index.update(index.ids[:3], VECTORS[turn % 500 : turn % 500 + 3])
            turn += 1
    finally:
        done.set()
    for one in threads:
        one.join(WAIT_S)
    assert not wrong
    assert is_at_rest(index)


# What its kernels are made of


@kernel
def inserted(pool_d, pool_i, size, room, keys, values):
    """Entries one after the other."""
    clear(pool_d, size)
    for number in range(len(keys)):
        if size < room or keys[number] < pool_d[room - 1]:
            insert(pool_d, pool_i, size, room, keys[number], values[number])
            size = min(size + 1, room)
    return size


@settings(max_examples=150, deadline=None)
@given(
    room=st.integers(1, 70),
    keys=st.lists(st.sampled_from(np.linspace(-2, 2, 41).astype(np.float32).tolist()), max_size=160),
)
def test_a_pool_is_a_sorted_list(room, keys):
    pool_d, pool_i = np.full(room + PADDING, np.inf, np.float32), np.zeros(room + PADDING, np.int32)
    values = np.arange(len(keys), dtype=np.int32)
    size = inserted(pool_d, pool_i, 0, room, np.array(keys, np.float32), values)
    expected = sorted(zip(keys, values.tolist(), strict=True), key=lambda entry: entry[0])[:room]
    assert size == len(expected)
    assert list(zip(pool_d[:size].tolist(), pool_i[:size].tolist(), strict=True)) == expected


@kernel
def measured(kind, query, row_RW, stride, aux_R, slot_S, width, alone, together):
    """Each by itself, and all side by side."""
    near, scale, norm = room_for_some(), np.float32(0.01), np.float32(3.0)
    rows, aux = address(row_RW), address(aux_R)
    for place in range(len(slot_S)):
        slot = np.int64(slot_S[place])
        alone[place] = distance(kind, address(query), scale, norm, rows + slot * stride, aux, slot, width)
    distances(kind, address(query), scale, norm, rows, stride, aux, address(slot_S), width, near)
    for place in range(len(slot_S)):
        together[place] = get_f32(near, place)


@pytest.mark.parametrize("kind", range(6))
def test_rows_that_are_measured_side_by_side_have_the_distance_they_have_alone(kind):
    generator = np.random.default_rng(kind)
    for lines in (1, 2, 3, 4, 5, 9):
        size = (4, 2, 1)[kind // 2]
        width = 64 * lines // size
        rows = generator.integers(0, 256, (9, 64 * lines), np.uint8)
        query = generator.integers(0, 256, 4 * 64 * lines, np.uint8)
        if kind < 4:
            rows = generator.standard_normal((9, width)).astype((np.float32, np.float16)[kind // 2]).view(np.uint8)
            query = generator.standard_normal(width).astype(np.float32).view(np.uint8)
        aux = generator.random((9, 2)).astype(np.float32)
        slots = generator.integers(0, 9, AT_ONCE).astype(np.int32)
        alone, together = np.zeros(AT_ONCE, np.float32), np.ones(AT_ONCE, np.float32)
        measured(kind, query, rows, rows.shape[1], aux, slots, width, alone, together)
        assert alone.tobytes() == together.tobytes()
        if kind < 4:
            one = query.view(np.float32)[:width].astype(np.float64)
            other = rows.view((np.float32, np.float16)[kind // 2])[slots].astype(np.float64)
            exact = ((one - other) ** 2).sum(1) if kind % 2 == 0 else 1 - other @ one
            np.testing.assert_allclose(alone, exact, rtol=1e-4, atol=1e-3)
