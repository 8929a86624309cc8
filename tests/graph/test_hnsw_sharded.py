"""`ShardedHNSW` beside threads: calls are whole or refused, and ids are drawn once."""

import os
import pickle
import signal
import threading

import numpy as np
import pytest

from anabranch.errors import CapacityError, InputError
from anabranch.graph.hnsw import ShardedHNSW, checks


def test_threads_that_add_draw_different_ids():
    """Both drew the same: half of the calls raised, though parts of their vectors were in."""
    index = ShardedHNSW(8, 2, M=4, ef_construction=8, workers=2)
    gate, told, raised = threading.Barrier(2), {}, []

    def work(thread):
        rng = np.random.default_rng(thread)
        for number in range(20):
            vectors = rng.standard_normal((6, 8)).astype(np.float32)
            gate.wait()
            try:
                told[thread, number] = index.add(vectors), vectors
            except InputError as error:
                raised.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised
    given = np.concatenate([ids for ids, _ in told.values()])
    assert sorted(given.tolist()) == list(range(240)) == index.ids.tolist()
    for ids, vectors in told.values():
        for id, vector in zip(ids.tolist(), vectors, strict=True):
            np.testing.assert_array_equal(index.shards[id % 2].vectors([id])[0], vector)


def test_of_two_who_add_the_same_ids_one_is_refused_and_changes_nothing():
    index = ShardedHNSW(4, 2, M=4, ef_construction=8, workers=2)
    gate, raised = threading.Barrier(2), []

    def work(value):
        for number in range(20):
            gate.wait()
            try:
                index.add(np.full((4, 4), value, np.float32), np.arange(4) + 4 * number)
            except InputError as error:
                raised.append(str(error))

    threads = [threading.Thread(target=work, args=(value,)) for value in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(raised) == 20
    assert all("is in the index" in one for one in raised)
    for number in range(20):
        held = {float(index.shards[id % 2].vectors([id])[0][0]) for id in range(4 * number, 4 * number + 4)}
        assert len(held) == 1


def test_it_is_pickled_and_goes_on():
    index = ShardedHNSW(4, 2, M=4, ef_construction=8)
    index.add(np.eye(4, dtype=np.float32))
    again = pickle.loads(pickle.dumps(index))
    assert again.add(np.ones((1, 4), np.float32)).tolist() == [4]
    with pytest.raises(InputError, match="is in the index"):
        again.add(np.ones((1, 4), np.float32), [2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_is_forked_while_a_thread_changes_it_goes_on():
    index = ShardedHNSW(4, 2, M=4, ef_construction=8, workers=1)
    index.add(np.eye(4, dtype=np.float32))
    with index._changing:
        child = os.fork()
        if not child:
            signal.alarm(20)
            index.add(np.ones((1, 4), np.float32))
            os._exit(0 if len(index) == 5 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(index) == 4


def test_results_of_many_elements_are_looked_at_with_what_is_made_of_them(monkeypatch):
    """Each shard looked at its own alone, and eight times as much was taken."""
    index = ShardedHNSW(2, 2, M=4, ef_construction=8)
    vectors = np.random.default_rng(0).standard_normal((400, 2)).astype(np.float32)
    index.add(vectors)
    queries = np.repeat(vectors, 25, 0)
    k = 399
    # Results alone take 48 MB.
    monkeypatch.setattr(checks, "room_bytes", lambda: 100 << 20)
    with pytest.raises(CapacityError, match=r"no memory for k = 399 results of 10,000 queries; ask for fewer"):
        index.search(queries, k)


@pytest.mark.parametrize("k", [39, 40, 41, 1000])
def test_more_neighbours_than_there_are_stand_behind_all_of_them(k):
    index = ShardedHNSW(4, 3, M=4, ef_construction=8)
    vectors = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    index.add(vectors)
    ids, distances = index.search(vectors[:3], k, ef=100)
    exact = ((vectors[:3, None] - vectors) ** 2).sum(2).argsort(1)
    held = min(k, 40)
    assert ids.shape == distances.shape == (3, k)
    np.testing.assert_array_equal(ids[:, :held], exact[:, :held])
    assert (ids[:, held:] == -1).all()
    assert np.isinf(distances[:, held:]).all()
