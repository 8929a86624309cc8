"""Ctrl-C while an index is changed, or while somebody waits for it: nobody is kept out, and nothing is half there."""

import signal
import threading
import time

import numpy as np
import pytest

from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.linking import Linker
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.interrupts import Interrupts
from hnsw_checks import check_graph, drawn, graph_bytes

VECTORS = drawn(2600, 8, 3)


def interrupted(order):
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        order.append(interrupts.has_come)
    order.append("not reached")


def test_an_interrupt_comes_when_the_work_is_done():
    order = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(order)
    assert order == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def checked(told):
    with Interrupts() as interrupts:
        interrupts.check()
        signal.raise_signal(signal.SIGINT)
        interrupts.check()
        told.append("not reached")


def test_an_interrupt_is_told_once_where_work_may_end():
    told = []
    with pytest.raises(KeyboardInterrupt):
        checked(told)
    assert told == []


def test_whoever_had_it_before_gets_it(monkeypatch):
    got = []
    before = signal.signal(signal.SIGINT, lambda number, frame: got.append(number))
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGINT)
            assert got == []
        assert got == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_of_ones_own_is_called_at_the_end_and_the_work_goes_on():
    told = []
    before = signal.signal(signal.SIGINT, lambda number, frame: told.append(number))
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            interrupts.check()
            with Interrupts():
                signal.raise_signal(signal.SIGINT)
            assert told == []
        assert told == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_may_use_the_index_that_was_changed(tmp_path):
    index = HNSW(8, M=6, ef_construction=30, num_threads=1)
    index.add(VECTORS[:1200])
    before = signal.signal(signal.SIGINT, lambda number, frame: index.save(tmp_path / "i.anb"))
    own = Linker.take_out

    def interrupted(self, slot_S, workers):
        signal.raise_signal(signal.SIGINT)
        own(self, slot_S, workers)

    try:
        Linker.take_out = interrupted
        index.update(np.arange(10), VECTORS[1200:1210])
    finally:
        Linker.take_out = own
        signal.signal(signal.SIGINT, before)
    np.testing.assert_array_equal(HNSW.load(tmp_path / "i.anb").vectors(np.arange(10)), VECTORS[1200:1210])


def test_nothing_is_held_back_in_other_threads():
    seen = []

    def work():
        with Interrupts() as interrupts:
            seen.append(interrupts.has_come)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize("kind", ["read", "write"])
def test_an_interrupt_while_a_lock_is_waited_for_keeps_nobody_out(kind):
    lock, inside, leave = ReadWriteLock(), threading.Event(), threading.Event()

    def hold():
        with lock.write():
            inside.set()
            leave.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(20)
    timer = threading.Timer(0.1, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt), getattr(lock, kind)():
        pass
    leave.set()
    holder.join()
    done = []

    def both():
        with lock.read():
            done.append("read")
        with lock.write():
            done.append("write")

    thread = threading.Thread(target=both, daemon=True)
    thread.start()
    thread.join(20)
    assert done == ["read", "write"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_an_interrupted_add_keeps_what_is_linked_and_forgets_the_rest(monkeypatch, threads, at):
    index, calls = HNSW(8, M=6, ef_construction=30, num_threads=threads), []
    own = Linker._link_batch

    def interrupted(self, batch_B, workers):
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        calls.append(len(batch_B))
        own(self, batch_B, workers)

    monkeypatch.setattr(Linker, "_link_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.add(VECTORS)
    monkeypatch.undo()
    kept = 1024 + sum(calls)
    assert 1024 < kept < len(VECTORS)
    assert len(index) == kept
    assert index.stats()["unreachable"] == 0
    check_graph(index)
    assert kept not in index
    assert index.add(VECTORS[kept:]).tolist() == list(range(kept, len(VECTORS)))
    check_graph(index)
    assert (index.search(VECTORS, 1, 60)[0][:, 0] == np.arange(len(VECTORS))).mean() > 0.98
    # The levels are those of an index that was never interrupted.
    whole = HNSW(8, M=6, ef_construction=30)
    whole.add(VECTORS)
    assert graph_bytes(index)["level"] == graph_bytes(whole)["level"]


def test_no_memory_in_the_middle_of_a_batch_leaves_no_link_to_what_is_forgotten(monkeypatch):
    index, calls = HNSW(8, M=6, ef_construction=30, num_threads=1), []
    own = Linker._link_back

    def fails(self, base_S, level, workers):
        own(self, base_S, level, workers)
        calls.append(level)
        if len(calls) == 5:
            raise MemoryError

    monkeypatch.setattr(Linker, "_link_back", fails)
    with pytest.raises(MemoryError):
        index.add(VECTORS)
    monkeypatch.undo()
    assert 1024 < len(index) < len(VECTORS)
    check_graph(index)
    index.add(VECTORS[len(index) :])
    check_graph(index)
    assert len(index) == len(VECTORS)


def test_an_interrupted_update_comes_to_its_end(monkeypatch):
    index = HNSW(8, M=6, ef_construction=30, num_threads=1)
    index.add(VECTORS[:1500])
    own = Linker.take_out

    def interrupted(self, slot_S, workers):
        signal.raise_signal(signal.SIGINT)
        own(self, slot_S, workers)

    monkeypatch.setattr(Linker, "take_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.update(np.arange(100), VECTORS[1500:1600])
    monkeypatch.undo()
    check_graph(index)
    np.testing.assert_array_equal(index.vectors(np.arange(100)), VECTORS[1500:1600])
    assert (index.search(VECTORS[1500:1600], 1, 60)[0][:, 0] == np.arange(100)).mean() > 0.95


@pytest.mark.parametrize("at", ["take_out", "put_encoded", "link"])
def test_an_update_that_raises_leaves_all_in_the_graph(monkeypatch, at):
    """Also where all elements were moved: then there was no entry point, and the next search read before the first row."""
    index = HNSW(8, M=6, ef_construction=30, num_threads=1)
    index.add(VECTORS[:300])
    owner = index._storage if at == "put_encoded" else index._linker
    own, calls = getattr(owner, at), []

    def fails(*arguments):
        calls.append(at)
        if len(calls) == 1:
            if at == "take_out":
                own(*arguments)
            raise MemoryError
        return own(*arguments)

    monkeypatch.setattr(owner, at, fails)
    with pytest.raises(MemoryError):
        index.update(np.arange(300), VECTORS[300:600])
    monkeypatch.undo()
    check_graph(index)
    assert len(index) == 300
    assert index.stats()["unreachable"] == 0
    found, _ = index.search(index.vectors(np.arange(300)), 1, 60)
    assert (found[:, 0] == np.arange(300)).mean() > 0.95


def test_an_index_that_could_not_be_linked_again_finds_nothing_and_can_be_repaired(monkeypatch):
    index = HNSW(8, M=6, ef_construction=30, num_threads=1)
    index.add(VECTORS[:200])

    def fails(*arguments):
        raise MemoryError

    monkeypatch.setattr(index._linker, "link", fails)
    with pytest.raises(MemoryError):
        index.update(np.arange(200), VECTORS[200:400])
    monkeypatch.undo()
    assert index.search(VECTORS[0], 3)[0].tolist() == [[-1, -1, -1]]
    assert index.search(VECTORS[:2], 1)[0].tolist() == [[-1], [-1]]
    assert index.stats()["unreachable"] == 200
    assert index.repair() == 200
    check_graph(index)
    assert (index.search(VECTORS[200:400], 1, 60)[0][:, 0] == np.arange(200)).mean() > 0.95


def test_a_reader_beside_an_interrupted_add_remembers_nothing_that_is_gone(monkeypatch):
    index = HNSW(8, M=6, ef_construction=30, num_threads=1)
    index.add(VECTORS[:1100])
    own, calls = Linker._link_batch, []

    def looked_at(self, batch_B, workers):
        calls.append(len(batch_B))
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        own(self, batch_B, workers)

    undo = Linker.undo

    def undone(self, slot_S, workers):
        undo(self, slot_S, workers)
        # As a reader does that is let in.
        index._slots.forget()
        index._slots.find(np.array([0]))

    monkeypatch.setattr(Linker, "_link_batch", looked_at)
    monkeypatch.setattr(Linker, "undo", undone)
    with pytest.raises(KeyboardInterrupt):
        index.add(VECTORS[1100:], ids=np.arange(5000, 6500))
    monkeypatch.undo()
    assert len(index) == len(index.ids) == 1100 + sum(calls)
    assert 6499 not in index
    index.add(VECTORS[-1:], ids=[6499])
    check_graph(index)


def test_interrupts_in_a_loop_of_searches_leave_the_lock_whole():
    """At whatever moment they come."""
    index = HNSW(8, M=6, ef_construction=30, num_threads=1)
    index.add(VECTORS[:300])
    for turn in range(60):
        runs = threading.Event()

        def interrupt(runs=runs, turn=turn):
            runs.wait(20)
            time.sleep(0.0005 + 0.00003 * turn)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            search_for_ever(index, runs)
        thread.join()
        assert (index._lock._readers, index._lock._due, index._lock._queue) == (0, 0, [])
        assert index._lock._changed.acquire(timeout=5)
        index._lock._changed.release()


def search_for_ever(index, runs):
    while True:
        index.search(VECTORS[0], 3)
        runs.set()
