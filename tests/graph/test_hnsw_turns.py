"""Searches of many queries make room for writers: by a schedule that is set, each query is answered by one state of the index."""

import threading
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.graph.hnsw import HNSW, ShardedHNSW, changing, ranges, searching
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.hnsw.searching import in_pieces
from anabranch.graph.workers import Workers
from hnsw_checks import WAIT_S, drawn, thread, waits, wanted

VECTORS = drawn(1500, 16, 3)
QUERIES = drawn(12, 16, 4)
MASK = np.arange(600) % 2 == 0
SOME = np.arange(0, 600, 30)

# Queries that are answered before the writer comes.
BEFORE = 3


def made(count=600, **options):
    index = HNSW(16, M=8, ef_construction=40, workers=1, **options)
    index.add(VECTORS[:count])
    return index


def shards():
    index = ShardedHNSW(16, 2, M=8, ef_construction=40, workers=1)
    index.add(VECTORS[:600])
    return index


def bits():
    index = HNSW(64, "hamming", M=8, ef_construction=40, workers=1)
    index.add(np.random.default_rng(0).integers(0, 256, (600, 8), np.uint8))
    return index


# All arrays move to where there is more room, and elements come that are nearer.
def grow(index):
    vectors = QUERIES if index.metric == "l2" else index.vectors(np.arange(12)) ^ np.uint8(1)
    index.add(np.repeat(vectors, 10, 0), ids=1000 + 2 * np.arange(120))


def drop(index):
    index.remove(np.arange(0, 600, 8))


def asked(index):
    return index.vectors(np.arange(12)) if index.metric == "hamming" else QUERIES


CASES = {
    "search": (made, grow, lambda index: index.search(asked(index), 5, 24)),
    "mask": (made, grow, lambda index: index.search(asked(index), 5, 140, filter=MASK)),
    "few": (made, drop, lambda index: index.search(asked(index), 5, 24, filter=SOME)),
    "deleted": (made, drop, lambda index: index.search(asked(index), 5, 24)),
    "i8": (lambda: made(dtype="i8"), grow, lambda index: index.search(asked(index), 5, 24)),
    "f16": (lambda: made(dtype="f16", rerank=False), grow, lambda index: index.search(asked(index), 5, 24)),
    "int4": (
        lambda: made(1100, quantization="int4"),
        drop,
        lambda index: index.search(QUERIES, 5),
    ),
    "hamming": (bits, grow, lambda index: index.search(asked(index), 5, 24)),
    "shards": (shards, grow, lambda index: index.search(QUERIES, 5, 24)),
    "range": (made, grow, lambda index: index.range_search(QUERIES, 1e-3, 16)),
    "wide range": (made, grow, lambda index: index.range_search(QUERIES, 25.0, 4)),
    "range of a mask": (made, drop, lambda index: index.range_search(QUERIES, 25.0, 8, filter=MASK)),
    "exact range": (made, grow, lambda index: index.range_search(QUERIES, 25.0, exact=True)),
    "exact range of a mask": (made, grow, lambda index: index.range_search(QUERIES, 25.0, filter=MASK, exact=True)),
}


def answers(found):
    """Of each query: ids and distances."""
    if isinstance(found, ranges.Within):
        ends = found.indptr.tolist()
        return [(found.ids[a:b].tolist(), found.distances[a:b].tolist()) for a, b in pairwise(ends)]
    return list(zip(found[0].tolist(), found[1].tolist(), strict=True))


class Schedule:
    """Stands in for kernels: when the first queries are answered a writer comes, then a reader; later ones wait until both have gone."""

    def __init__(self, monkeypatch, index, change):
        self.calls, self.late, self.threads = 0, [], []
        self.written, self.read = threading.Event(), threading.Event()
        self._index, self._change = index, change
        self._lock = (index.shards[0] if isinstance(index, ShardedHNSW) else index)._lock
        for module, name in ((searching, "search_many"), (searching, "scan_many"), (ranges, "measure_slots")):
            monkeypatch.setattr(module, name, self.around(getattr(module, name)))
        # While a writer looks at what rows are rounded about, or for what cannot be reached, it lets readers in, too: not here.
        monkeypatch.setattr(ReadWriteLock, "open_to_readers", lambda lock: nullcontext())
        monkeypatch.setattr(ReadWriteLock, "make_room", lambda lock: None)
        monkeypatch.setattr(changing, "LOOKS", 1)
        # One query is a piece.
        monkeypatch.setattr(searching, "WALKED", 1)
        monkeypatch.setattr(searching, "SCANNED", 1)

    def around(self, kernel):
        def called(*arguments):
            kernel(*arguments)
            self.calls += 1
            if self.calls == BEFORE:
                self.threads.append(thread(self.write))
                wanted(self._lock, 1)
                self.threads.append(thread(self.look))
                waits(self._lock, 1)
            elif self.calls == BEFORE + 1:
                self.late.append((self.written.wait(WAIT_S), self.read.wait(WAIT_S)))

        return called

    def write(self):
        self._change(self._index)
        self.written.set()

    def look(self):
        with self._lock.read():
            self.read.set()


@pytest.mark.parametrize("name", CASES)
def test_a_writer_and_other_readers_come_in_before_a_long_search_ends(name, monkeypatch):
    make, change, search = CASES[name]
    index = make()
    before = answers(search(index))
    with monkeypatch.context() as patched:
        schedule = Schedule(patched, index, change)
        found = answers(search(index))
        for one in schedule.threads:
            one.join(WAIT_S)
        assert schedule.late == [(True, True)]
    try:
        after = answers(search(index))
    except InputError:
        # A mask that was long enough when the search began. What came later is not let through.
        assert "mask" in name
        after = before
    assert all(one in (old, new) for one, old, new in zip(found, before, after, strict=True))
    if name in ("wide range", "range of a mask"):
        # Those that were not done walk again, in the later state.
        assert found != before
        return
    assert found[:BEFORE] == before[:BEFORE]
    assert found[BEFORE:] == after[BEFORE:]
    assert (before == after) == (change is grow and "mask" in name)


def test_an_index_that_was_emptied_meanwhile_answers_the_rest_with_nothing(monkeypatch):
    index = made()
    whole = index.search(QUERIES, 5, 24)
    Schedule(monkeypatch, index, lambda index: index.remove(np.arange(600)))
    ids, distances = index.search(QUERIES, 5, 24)
    np.testing.assert_array_equal(ids[:BEFORE], whole[0][:BEFORE])
    assert (ids[BEFORE:] == -1).all()
    assert np.isinf(distances[BEFORE:]).all()


class Wanted:
    """A lock that a writer waits for after so many looks."""

    def __init__(self, after):
        self.looks, self.after = 0, after

    @property
    def is_wanted(self):
        self.looks += 1
        return self.looks >= self.after


@given(
    total=st.integers(1, 60),
    most=st.integers(1, 20),
    threads=st.integers(1, 3),
    after=st.integers(1, 40),
)
def test_turns_cover_all_of_it_once_and_each_is_a_piece_at_least(total, most, threads, after):
    seen = []
    with Workers(threads) as workers:
        done = 0
        while done < total:
            count, found = in_pieces(lambda a, b: (a, b), total - done, most, workers, Wanted(after))
            assert count > 0
            assert sorted(found)[-1][1] == count
            seen += [place + done for a, b in found for place in range(a, b)]
            assert all(0 < b - a <= most for a, b in found)
            if threads == 1:
                assert len(found) == min(after, -(-(total - done) // most))
            done += count
    assert sorted(seen) == list(range(total))
