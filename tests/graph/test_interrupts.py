"""Ctrl-C while an index is changed, or while somebody waits for it: nobody is kept out, and nothing is half there."""

import signal
import threading

import numpy as np
import pytest

from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.linking import Linker
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.interrupts import held_back
from hnsw_checks import check_graph, drawn, graph_bytes

VECTORS = drawn(2600, 8, 3)


def interrupted(order):
    with held_back() as interrupts:
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
    with held_back() as interrupts:
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
        with held_back():
            signal.raise_signal(signal.SIGINT)
            assert got == []
        assert got == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_is_held_back_in_other_threads():
    seen = []

    def work():
        with held_back() as interrupts:
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
