"""Ctrl-C while an index is changed, or while somebody waits for it: nobody is kept out, and nothing is half there."""

import os
import select
import signal
import threading
import time
import warnings

import numpy as np
import pytest

from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.linking import Linker
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.interrupts import Interrupts
from hnsw_checks import check_graph, drawn, graph_bytes
from waiting import until

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
    index = HNSW(8, M=6, ef_construction=30, workers=1)
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
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(60)

    def interrupt():
        until(lambda: lock._queue or lock._writers)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        wait_in(lock, kind, threading.Thread(target=interrupt))
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
    thread.join(60)
    assert done == ["read", "write"]


def wait_in(lock, kind, interrupting):
    interrupting.start()
    with getattr(lock, kind)():
        pass


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_an_interrupted_add_keeps_what_is_linked_and_forgets_the_rest(monkeypatch, threads, at):
    index, calls = HNSW(8, M=6, ef_construction=30, workers=threads), []
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
    index, calls = HNSW(8, M=6, ef_construction=30, workers=1), []
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
    index = HNSW(8, M=6, ef_construction=30, workers=1)
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
    index = HNSW(8, M=6, ef_construction=30, workers=1)
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
    index = HNSW(8, M=6, ef_construction=30, workers=1)
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
    index = HNSW(8, M=6, ef_construction=30, workers=1)
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
    index = HNSW(8, M=6, ef_construction=30, workers=1)
    index.add(VECTORS[:300])
    for turn in range(60):
        runs = threading.Event()

        def interrupt(runs=runs, turn=turn):
            runs.wait(60)
            time.sleep(0.0005 + 0.00003 * turn)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            search_for_ever(index, runs)
        thread.join()
        assert (index._lock._readers, index._lock._due, index._lock._queue) == (0, 0, [])
        assert index._lock._changed.acquire(timeout=60)
        index._lock._changed.release()


def search_for_ever(index, runs):
    while True:
        index.search(VECTORS[0], 3)
        runs.set()


# Signals of other kinds, whose handlers raise


class _AlarmError(Exception):
    pass


def alarm(number, frame):
    raise _AlarmError


@pytest.fixture
def alarms():
    """Of a program that ends what takes too long by an exception."""
    before = {number: signal.signal(number, alarm) for number in (signal.SIGALRM, signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("at", ["_mend", "take_out"])
@pytest.mark.parametrize("sent", [signal.SIGALRM, signal.SIGUSR1, signal.SIGTERM])
def test_a_handler_that_raises_does_not_break_compacting(monkeypatch, alarms, at, sent):
    index = HNSW(8, M=6, ef_construction=30, workers=1, compact_at=None)
    index.add(VECTORS[:600])
    index.remove(np.arange(0, 600, 2))
    own = getattr(Linker, at)

    def interrupted(self, *arguments):
        signal.raise_signal(sent)
        own(self, *arguments)
        signal.raise_signal(sent)

    monkeypatch.setattr(Linker, at, interrupted)
    with pytest.raises(_AlarmError):
        index.compact()
    monkeypatch.undo()
    assert (len(index), index._storage.count) == (300, 300)
    check_graph(index)
    assert index.stats()["unreachable"] == 0
    ids = np.arange(1, 600, 2)
    assert (index.search(VECTORS[ids], 1, 60)[0][:, 0] == ids).mean() > 0.97
    index.add(VECTORS[600:700])
    check_graph(index)


def test_alarms_at_any_moment_leave_an_index_whole(alarms):
    """Every few milliseconds, while an index is changed in all ways: the lock is free afterwards, and the graph is sound."""
    index = HNSW(8, M=6, ef_construction=30, workers=1, compact_at=None)
    index.add(VECTORS[:400])
    raised, changes = (
        0,
        (
            lambda turn: index.remove(index.ids[:40]),
            lambda turn: index.add(VECTORS[400 + turn : 460 + turn]),
            lambda turn: index.compact(),
            lambda turn: index.update(index.ids[:20], VECTORS[turn : 20 + turn]),
            lambda turn: index.search(VECTORS[:50], 3),
            lambda turn: index.repair(),
        ),
    )
    for turn in range(60):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0002 + 0.0001 * (turn % 13))
            changes[turn % len(changes)](turn)
        except _AlarmError:
            raised += 1
        finally:
            while True:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    break
                except _AlarmError:
                    raised += 1
        assert signal.getsignal(signal.SIGALRM) is alarm
        assert (index._lock._readers, index._lock._is_owned, index._lock._writers) == (0, False, [])
        check_graph(index)
        assert len(index) == len(index.ids) == index.contains(index.ids).sum()
    assert raised > 5


def raised_within(*numbers):
    with Interrupts() as interrupts:
        for number in numbers:
            signal.raise_signal(number)
        assert interrupts.is_due


def test_all_that_came_is_told_also_where_one_raises(alarms):
    told = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: told.append(number))
    try:
        with pytest.raises(_AlarmError):
            raised_within(signal.SIGALRM, signal.SIGHUP, signal.SIGALRM)
        assert told == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGALRM) is alarm


def test_a_handler_is_called_while_a_lock_is_waited_for_and_may_use_it(alarms):
    lock, inside, leave, seen = ReadWriteLock(), threading.Event(), threading.Event(), []

    def hold():
        with lock.read():
            inside.set()
            leave.wait(60)

    def used(number, frame):
        with lock.read():
            seen.append(number)
        leave.set()

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(60)
    signal.signal(signal.SIGUSR1, used)
    timer = threading.Timer(0.05, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1))
    timer.start()
    with lock.write():
        assert seen == [signal.SIGUSR1]
    holder.join()


def test_what_is_held_back_outside_may_end_what_is_inside():
    for passes in (True, False):
        done = []

        def work(passes=passes, done=done):
            with Interrupts(passes=passes):
                signal.raise_signal(signal.SIGINT)
                with Interrupts() as inner:
                    inner.check()
                    done.append(1)

        with pytest.raises(KeyboardInterrupt):
            work()
        assert len(done) == (not passes)


# Processes that are forked


def in_a_fork(work):
    """What ``work`` writes in a child; it must come to its end."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Other threads are there, which is what is tried.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            os.write(writer, str(work()).encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], 20)
    found = os.read(reader, 1000).decode() if ready else "it hangs"
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    return found


def test_a_fork_beside_searches_searches_and_changes():
    index, over = HNSW(8, M=6, ef_construction=30, workers=1), threading.Event()
    index.add(VECTORS[:300])

    def search():
        while not over.is_set():
            index.search(VECTORS[:20], 3, workers=2)

    thread = threading.Thread(target=search)
    thread.start()

    def work():
        index.add(VECTORS[300:310])
        index.compact()
        return index.search(VECTORS[305], 1)[0].tolist()

    try:
        assert [in_a_fork(work) for _ in range(5)] == ["[[305]]"] * 5
        with index._lock.read(), index._lock._changed:
            # At the worst moment.
            assert in_a_fork(work) == "[[305]]"
    finally:
        over.set()
        thread.join()
    assert len(index) == 300


def test_a_fork_in_the_middle_of_a_change_is_told_so():
    index, inside, leave = HNSW(8, M=6, ef_construction=30, workers=1), threading.Event(), threading.Event()
    index.add(VECTORS[:300])

    def change():
        with index._lock.write():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=change)
    thread.start()
    inside.wait(60)
    try:
        for work in (lambda: index.search(VECTORS[0], 1), lambda: index.remove([1]), lambda: index.stats()):
            assert in_a_fork(work).startswith(
                "DataError: this process was forked while another thread changed the index"
            )
    finally:
        leave.set()
        thread.join()
    assert index.search(VECTORS[0], 1)[0].tolist() == [[0]]


@pytest.mark.parametrize("is_last", [False, True])
def test_a_fork_beside_one_that_comes_alone(is_last, monkeypatch):
    """Nothing is half changed before its last step, so a child has the index as it was."""
    index, inside, leave = HNSW(8, M=6, ef_construction=30, workers=1), threading.Event(), threading.Event()
    index.add(VECTORS[:299])
    # Now there is room for the next.
    index.add(VECTORS[299])
    name = "take" if is_last else "prepare"
    whole = getattr(Linker, name)

    def wait(self, *asked):
        found = whole(self, *asked)
        inside.set()
        leave.wait(60)
        return found

    def work():
        monkeypatch.undo()
        added = index.add(VECTORS[300:302]).tolist() + index.add(VECTORS[302]).tolist()
        return added, index.search(VECTORS[301], 1)[0].tolist(), len(index.ids), index.stats()["unreachable"]

    monkeypatch.setattr(Linker, name, wait)
    thread = threading.Thread(target=lambda: index.add(VECTORS[310]))
    thread.start()
    inside.wait(60)
    try:
        found = in_a_fork(work)
    finally:
        leave.set()
        thread.join()
    if is_last:
        assert found.startswith("DataError: this process was forked while another thread changed the index")
    else:
        assert found == "([300, 301, 302], [[301]], 303, 0)"
    assert len(index) == 301


def test_a_fork_beside_one_that_writes_a_file_has_the_index():
    index = HNSW(8, M=6, ef_construction=30, workers=1)
    index.add(VECTORS[:300])
    with index._lock.still():
        assert in_a_fork(lambda: index.add(VECTORS[300]).tolist()) == "[300]"
