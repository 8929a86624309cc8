"""Two futures as one, and one after another."""

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest

from anabranch.serving.engine.futures import after, both


def test_one_or_none_is_itself():
    one = Future()
    assert both(None, None) is None
    assert both(one, None) is both(None, one) is one


def test_it_gives_what_both_give():
    first, second = Future(), Future()
    made = both(first, second)
    second.set_result(2)
    assert not made.done()
    first.set_result(1)
    assert made.result(60) == (1, 2)


def test_it_raises_what_comes_first():
    first, second = Future(), Future()
    made = both(first, second)
    second.set_exception(ValueError("second"))
    with pytest.raises(ValueError, match="second"):
        made.result(60)
    first.set_exception(ValueError("first"))
    with pytest.raises(ValueError, match="second"):
        made.result(60)


def test_to_cancel_it_cancels_both():
    first, second = Future(), Future()
    assert both(first, second).cancel()
    assert first.cancelled()
    assert second.cancelled()


def test_one_that_is_cancelled_cancels_the_other():
    first, second = Future(), Future()
    made = both(first, second)
    first.cancel()
    with pytest.raises(CancelledError):
        made.result(60)
    assert second.cancelled()


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as made:
        yield made


def test_work_that_follows(executor):
    first, done = Future(), []
    made = after(first, executor, lambda: done.append(1) or "made")
    assert not made.done()
    assert done == []
    first.set_result(None)
    assert made.result(60) == "made"
    assert after(None, executor, lambda: 7).result(60) == 7


def test_work_does_not_follow_what_failed(executor):
    first, done = Future(), []
    made = after(first, executor, lambda: done.append(1))
    first.set_exception(ValueError("first"))
    with pytest.raises(ValueError, match="first"):
        made.result(60)

    def fails():
        raise KeyError("work")

    with pytest.raises(KeyError, match="work"):
        after(None, executor, fails).result(60)
    assert done == []


def test_to_cancel_it_cancels_what_it_waits_for(executor):
    first, gate, done = Future(), threading.Event(), []
    made = after(first, executor, lambda: done.append(1))
    assert made.cancel()
    assert first.cancelled()
    # Work that waits for its turn is not begun.
    executor.submit(gate.wait, 5)
    waiting = after(None, executor, lambda: done.append(2))
    assert waiting.cancel()
    gate.set()
    executor.submit(int).result(60)
    cancelled = Future()
    follows = after(cancelled, executor, lambda: done.append(3))
    cancelled.cancel()
    assert follows.cancelled()
    assert done == []


def test_of_an_executor_that_was_shut_down_nothing_follows():
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(CancelledError):
        after(None, executor, lambda: 1).result(60)
