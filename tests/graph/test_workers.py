import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import anabranch.graph
from anabranch import machine
from anabranch.errors import InputError
from anabranch.graph.disk import DiskIndex, build, from_hnsw
from anabranch.graph.hnsw import HNSW, ShardedHNSW
from anabranch.graph.live import LiveIndex, open_index, open_named
from anabranch.graph.workers import PIECES, Workers, as_done, asked_workers, in_order, num_workers


def test_by_default_as_many_as_can_run(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 7)
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    assert num_workers(None) == num_workers() == 7
    assert num_workers(3) == 3
    for said, number in (("2", 2), ("9", 7), ("0", 7), ("many", 7), ("", 7)):
        monkeypatch.setenv("NUMBA_NUM_THREADS", said)
        assert num_workers(None) == number
    assert num_workers(3) == 3


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_stand_in_the_order_of_the_tasks(workers):
    def work(task):
        time.sleep(0.01 * (task % 3 == 0))
        return task * task

    begun = []
    tasks = (begun.append(task) or task for task in range(20))
    results = in_order(work, tasks, workers)
    assert next(results) == 0
    assert len(begun) <= 2 * workers + 1
    assert list(results) == [task * task for task in range(1, 20)]
    assert list(in_order(work, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_as_they_are_done(workers):
    hold = threading.Event()

    def work(task):
        if task == 0 and workers > 1:
            hold.wait(60)
        return task * task

    found = {}
    for number, result in as_done(work, ((10 + task, task) for task in range(9)), workers):
        found[number] = result
        if len(found) == 8:
            hold.set()
    assert found == {10 + task: task * task for task in range(9)}
    assert workers == 1 or next(reversed(found)) == 10


@pytest.mark.parametrize("run", [in_order, lambda w, t, n: as_done(w, enumerate(t), n)])
@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_ends_it(run, workers):
    def work(task):
        if task == 2:
            raise ValueError("no")
        return task

    with pytest.raises(ValueError, match="no"):
        list(run(work, range(50), workers))
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor") and thread.is_alive()
    ]


@pytest.mark.parametrize("count", [1, 3])
def test_threads_fill_places_of_their_own(count):
    found = [0] * 10
    with Workers(count) as workers:
        workers.each(lambda place, value: found.__setitem__(place, value), [(place, place + 1) for place in range(10)])
        with pytest.raises(IndexError):
            workers.each(lambda place: found[place], [(0,), (99,)])
        assert workers.map(lambda value: value * value, range(5)) == [0, 1, 4, 9, 16]
        assert workers.map(abs, []) == []
        assert workers.begin(lambda a, b: (a, b), 1, 2).result() == (1, 2)
    assert found == list(range(1, 11))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("total", "least"), [(0, 1), (1, 1), (7, 3), (100, 1), (100, 60), (5, 0)])
def test_pieces_cover_all_of_it(count, total, least):
    pieces = []
    with Workers(count) as workers:
        workers.run(lambda begin, end: pieces.append((begin, end)), total, least)
    assert sorted(place for begin, end in pieces for place in range(begin, end)) == list(range(total))
    assert len(pieces) < 2 or min(end - begin for begin, end in pieces) >= least
    assert len(pieces) <= (1 if count == 1 else count * PIECES)


def test_all_are_over_when_an_error_goes_on():
    gate, over = threading.Event(), []

    def work(number):
        if number == 0:
            gate.set()
            raise ValueError("no")
        gate.wait(60)
        time.sleep(0.02)
        over.append(number)

    with Workers(4) as workers:
        with pytest.raises(ValueError, match="no"):
            workers.each(work, [(number,) for number in range(4)])
        assert sorted(over) == [1, 2, 3]


def test_no_module_has_threads_of_another_kind():
    """One default number, one way to run kernels side by side. A server's and a log's threads wait for other things."""
    package = Path(anabranch.graph.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        text = file.read_text()
        if re.search(r"ThreadPoolExecutor|usable_cores\(|machine\.affinity\(", text):
            found.add(str(file.relative_to(package)))
    assert found == {"workers.py", "serve/gate.py", "serve/swap.py"}


def test_the_former_name_counts_where_workers_is_not_given():
    assert asked_workers(None, {}, "f") is None
    assert asked_workers(2, {}, "f") == asked_workers(None, {"num_threads": 2}, "f") == 2
    assert asked_workers(2, {"num_threads": None}, "f") == 2
    with pytest.raises(InputError, match="workers is 2, and num_threads, its former name, 3; give one of them"):
        asked_workers(2, {"num_threads": 3}, "f")
    with pytest.raises(TypeError, match=r"^f\(\) got an unexpected keyword argument 'threads'$"):
        asked_workers(2, {"threads": 3}, "f")


ROWS = np.eye(8, dtype=np.float32)


def filled(tmp_path):
    index = HNSW(8, M=4, workers=1)
    index.add(ROWS)
    index.save(tmp_path / "index.anb")
    build(ROWS, tmp_path / "disk.anb", M=4, workers=1).close()
    return index


CALLS = {
    "HNSW": lambda index, place, how: HNSW(8, **how),
    "add": lambda index, place, how: index.add(ROWS, **how),
    "update": lambda index, place, how: index.update([0], ROWS[:1], **how),
    "compact": lambda index, place, how: index.compact(**how),
    "search": lambda index, place, how: index.search(ROWS, 1, **how),
    "search, one": lambda index, place, how: index.search(ROWS[0], 1, **how),
    "range_search": lambda index, place, how: index.range_search(ROWS, 1.0, **how),
    "train": lambda index, place, how: trained().train(ROWS, **how),
    "load": lambda index, place, how: HNSW.load(place / "index.anb", **how),
    "ShardedHNSW": lambda index, place, how: ShardedHNSW(8, **how),
    "build": lambda index, place, how: build(ROWS, place / "new.anb", M=4, **how).close(),
    "from_hnsw": lambda index, place, how: from_hnsw(index, place / "new.anb", **how).close(),
    "DiskIndex": lambda index, place, how: DiskIndex(place / "disk.anb", **how).close(),
    "DiskIndex.search": lambda index, place, how: DiskIndex(place / "disk.anb").search(ROWS, 1, **how),
    "open_index": lambda index, place, how: open_index(place / "index.anb", **how),
    "open_named": lambda index, place, how: open_named(place / "index.anb", **how),
    "LiveIndex.open": lambda index, place, how: LiveIndex.open(place / "index.anb", **how).close(),
}


def trained():
    index = HNSW(8, quantization="int4", workers=1)
    index.add(ROWS)
    return index


@pytest.mark.parametrize("call", CALLS)
def test_indexes_take_the_former_name(tmp_path, call):
    index = filled(tmp_path)
    with pytest.raises(InputError, match="workers is 1, and num_threads, its former name, 2"):
        CALLS[call](index, tmp_path, {"workers": 1, "num_threads": 2})
    with pytest.raises(TypeError, match="unexpected keyword argument 'threads'"):
        CALLS[call](index, tmp_path, {"threads": 1})
    CALLS[call](index, tmp_path, {"num_threads": 1})


def test_the_former_name_is_the_number_that_counts(tmp_path):
    index = filled(tmp_path)
    for made in (HNSW(8, num_threads=3), ShardedHNSW(8, num_threads=3)):
        assert made.workers == made.num_threads == 3
        made.num_threads = None
        assert made.workers is None
        made.num_threads = 2
        assert made.workers == 2
        with pytest.raises(InputError, match="num_threads is 0; it must be an integer of at least 1"):
            made.num_threads = 0
    assert HNSW.load(tmp_path / "index.anb", num_threads=3).workers == 3
    assert LiveIndex.open(tmp_path / "index.anb", num_threads=3).index.workers == 3
    with DiskIndex(tmp_path / "disk.anb", num_threads=3) as held:
        assert held.workers == 3
    with pytest.raises(InputError, match="workers is 0; it must be an integer of at least 1"):
        index.search(ROWS[:2], 1, num_threads=0)
    # Pickles of before.
    state = index.__getstate__()
    state["num_threads"] = state.pop("workers")
    again = HNSW.__new__(HNSW)
    again.__setstate__(state)
    assert (again.workers, len(again)) == (1, 8)
