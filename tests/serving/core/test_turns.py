"""Threads that serve sources in turn."""

import threading
from concurrent.futures import CancelledError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.serving.core.client import BusyError
from anabranch.serving.core.turns import Turns


@pytest.fixture
def make():
    made = []

    def turns(threads=1, at_once=None, most_waiting=100):
        made.append(Turns("test", "things wait", threads=threads, at_once=at_once, most_waiting=most_waiting))
        return made[-1]

    yield turns
    for each in made:
        each.close()


def held(turns, source="first"):
    """A thread of ``turns`` that is busy until the event is set."""
    began, may_go = threading.Event(), threading.Event()
    future = turns.submit(source, lambda: began.set() or may_go.wait(60))
    began.wait(60)
    return may_go, future


def test_what_a_function_gives_or_raises_is_told(make):
    turns = make()
    assert turns.submit("a", int, "7").result(60) == 7
    with pytest.raises(ValueError, match="invalid literal"):
        turns.submit("a", int, "x").result(60)
    assert turns.submit("a", dict, b=1).result(60) == {"b": 1}


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_sources_take_turns_each_in_its_order(sources):
    turns = Turns("test", "things wait", threads=1, most_waiting=100)
    may_go, _ = held(turns)
    order = []
    futures = [turns.submit(source, order.append, (source, number)) for number, source in enumerate(sources)]
    may_go.set()
    for future in futures:
        future.result(60)
    turns.close()
    waiting = {}
    for number, source in enumerate(sources):
        waiting.setdefault(source, []).append((source, number))
    expected = []
    while waiting:
        for source in list(waiting):
            expected.append(waiting[source].pop(0))
            if not waiting[source]:
                del waiting[source]
    assert order == expected


def test_who_comes_while_another_is_served_is_next(make):
    turns, order = make(), []
    may_go, _ = held(turns, "a")
    futures = [turns.submit(source, order.append, source) for source in ("a", "a", "b", None)]
    may_go.set()
    for future in futures:
        future.result(60)
    assert order == ["b", None, "a", "a"]


def test_any_number_may_wait_where_that_is_said(make):
    turns = make(most_waiting=None)
    may_go, _ = held(turns)
    futures = [turns.submit("a", int) for _ in range(500)]
    may_go.set()
    assert [future.result(60) for future in futures] == [0] * 500


def test_a_source_has_no_more_threads_than_it_may(make):
    turns = make(threads=3, at_once=2)
    gates = [held(turns, "a")[0], held(turns, "a")[0]]
    third = turns.submit("a", int)
    assert turns.submit("b", int).result(60) == 0
    assert not third.running()
    assert not third.done()
    gates[0].set()
    assert third.result(60) == 0
    gates[1].set()


def test_what_is_cancelled_never_runs_and_makes_room(make):
    turns = make(most_waiting=2)
    may_go, _ = held(turns)
    ran = []
    first, second = turns.submit("a", ran.append, 1), turns.submit("a", ran.append, 2)
    with pytest.raises(BusyError, match="2 things wait; ask again"):
        turns.submit("a", ran.append, 3)
    turns.submit("b", ran.append, 4)
    assert first.cancel()
    third = turns.submit("a", ran.append, 5)
    may_go.set()
    third.result(60)
    assert ran == [2, 4, 5]
    assert second.done()
    assert not turns._waiting


def test_what_waits_at_the_end_is_cancelled(make):
    turns = make()
    may_go, running = held(turns)
    waiting = turns.submit("a", int)
    turns.close()
    with pytest.raises(CancelledError):
        waiting.result(60)
    may_go.set()
    assert running.result(60)


def test_nothing_comes_to_one_that_is_closed(make):
    turns = make()
    turns.close()
    with pytest.raises(BusyError, match="closed: no more things wait"):
        turns.submit("a", int)
