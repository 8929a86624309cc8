"""The lock of an index: nobody starves, nobody sees what is half there, searches go on beside a writer."""

import threading

import numpy as np
import pytest

from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.lock import ReadWriteLock
from hnsw_checks import WAIT_S, check_graph, drawn, graph_bytes, thread, waits, wanted


def test_readers_who_wait_go_before_the_next_writer():
    lock, order = ReadWriteLock(), []

    def read():
        with lock.read():
            order.append("read")

    def write():
        with lock.write():
            order.append("write")

    with lock.write():
        readers = [thread(read), thread(read)]
        waits(lock, 2)
        writer = thread(write)
        wanted(lock, 1)
    for one in (*readers, writer):
        one.join(WAIT_S)
    assert order == ["read", "read", "write"]


def test_a_writer_who_waits_goes_before_readers_that_come_later():
    lock, order = ReadWriteLock(), []

    def read():
        with lock.read():
            order.append("read")

    def write():
        with lock.write():
            order.append("write")

    with lock.read():
        writer = thread(write)
        wanted(lock, 1)
        reader = thread(read)
        waits(lock, 1)
    writer.join(WAIT_S)
    reader.join(WAIT_S)
    assert order == ["write", "read"]


@pytest.mark.parametrize("how", ["open_to_readers", "make_room"])
def test_a_writer_lets_readers_in_and_no_other_writer(how):
    lock, order = ReadWriteLock(), []

    def read(name, **options):
        with lock.read(**options):
            order.append(name)

    def write():
        with lock.write():
            order.append("other writer")

    with lock.write():
        whole = thread(lambda: read("whole", whole=True))
        reader = thread(lambda: read("part"))
        waits(lock, 2)
        writer = thread(write)
        wanted(lock, 1)
        if how == "make_room":
            lock.make_room()
        else:
            with lock.open_to_readers():
                reader.join(WAIT_S)
                # Comes while it is open.
                thread(lambda: read("late")).join(WAIT_S)
        order.append("first writer")
    for one in (whole, reader, writer):
        one.join(WAIT_S)
    late = ["late"] if how == "open_to_readers" else []
    assert order == ["part", *late, "first writer", "whole", "other writer"]


def test_a_writer_that_is_alone_lets_nobody_in():
    lock, order = ReadWriteLock(), []

    def read():
        with lock.read():
            order.append("read")

    with lock.write(alone=True):
        reader = thread(read)
        waits(lock, 1)
        lock.make_room()
        with lock.open_to_readers():
            order.append("write")
    reader.join(WAIT_S)
    assert order == ["write", "read"]


def test_many_of_both_all_come_to_their_end():
    """Each has its share, nobody is beside a writer that is alone, and no writer beside another."""
    lock, inside, wrong = ReadWriteLock(), {"readers": 0, "alone": 0, "writers": 0}, []
    guard = threading.Lock()

    def count(name, by):
        with guard:
            inside[name] += by
            if inside["alone"] and (inside["readers"] or inside["writers"] > 1):
                wrong.append(dict(inside))

    def read(whole):
        for _ in range(120):
            with lock.read(whole=whole):
                count("readers", 1)
                count("readers", -1)

    def write():
        for number in range(120):
            with lock.write(alone=number % 3 == 0):
                count("writers", 1)
                count("alone", 1)
                count("alone", -1)
                if number % 3:
                    with lock.open_to_readers():
                        pass
                    lock.make_room()
                count("alone", 1)
                count("alone", -1)
                count("writers", -1)

    threads = [
        thread(write),
        thread(write),
        *(thread(lambda whole=whole: read(whole)) for whole in (False, False, True)),
    ]
    for one in threads:
        one.join(60)
    assert not any(one.is_alive() for one in threads)
    assert not wrong
    assert (lock._readers, lock._due, lock._queue, lock._is_owned) == (0, 0, [], False)


def test_searches_go_on_beside_a_writer_that_never_rests():
    vectors = drawn(3000, 16, 5)
    index = HNSW(16, M=8, ef_construction=60, workers=1)
    index.add(vectors[:1500])
    done, searches, wrong = threading.Event(), [0], []

    def search():
        while not done.is_set():
            ids, _ = index.search(vectors[:1], 1, 64)
            searches[0] += 1
            if ids[0, 0] != 0:
                wrong.append(ids)

    searcher = thread(search)
    try:
        for number in range(1500, 3000):
            index.add(vectors[number])
    finally:
        done.set()
    searcher.join(WAIT_S)
    assert not wrong
    # One for every few elements at the least; with a lock that prefers writers it was one in all.
    assert searches[0] > 150
    check_graph(index)


def test_searches_go_on_beside_a_large_add_and_change_no_byte():
    vectors = drawn(6000, 16, 6)
    alone, beside = (HNSW(16, M=8, ef_construction=60, workers=1) for _ in range(2))
    for index in (alone, beside):
        index.add(vectors[:1500])
    alone.add(vectors[1500:])
    done, counts = threading.Event(), []

    def search():
        while not done.is_set():
            beside.search(vectors[:4], 3)
            counts.append(len(beside))

    searcher = thread(search)
    beside.add(vectors[1500:])
    done.set()
    searcher.join(WAIT_S)
    assert graph_bytes(alone) == graph_bytes(beside)
    assert len(counts) > 10


def test_what_is_saved_beside_a_large_add_is_whole(tmp_path):
    vectors = drawn(5000, 16, 7)
    index = HNSW(16, M=8, ef_construction=60, workers=1)
    index.add(vectors[:1500])
    done, found = threading.Event(), []

    def save():
        while not done.is_set():
            index.save(tmp_path / "i.anb")
            saved = HNSW.load(tmp_path / "i.anb")
            found.append((len(saved), saved.stats()["unreachable"]))

    saver = thread(save)
    index.add(vectors[1500:])
    done.set()
    saver.join(WAIT_S)
    assert found
    assert {count for count, _ in found} <= {1500, 5000}
    assert {lost for _, lost in found} <= {0, index.stats()["unreachable"]}
    assert np.array_equal(index.ids, np.arange(5000))
