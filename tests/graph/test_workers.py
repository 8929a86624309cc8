import threading
import time

import pytest

from anabranch import machine
from anabranch.graph.workers import as_done, in_order, num_workers, threads


def test_by_default_as_many_as_can_run(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 7)
    assert num_workers(None) == 7
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
            hold.wait(10)
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
    with threads(count) as pool:
        pool.each(lambda place, value: found.__setitem__(place, value), [(place, place + 1) for place in range(10)])
        with pytest.raises(IndexError):
            pool.each(lambda place: found[place], [(0,), (99,)])
    assert found == list(range(1, 11))
