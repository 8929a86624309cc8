"""Two futures as one."""

from concurrent.futures import CancelledError, Future

import pytest

from anabranch.serving.engine.futures import both


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
    assert made.result(1) == (1, 2)


def test_it_raises_what_comes_first():
    first, second = Future(), Future()
    made = both(first, second)
    second.set_exception(ValueError("second"))
    with pytest.raises(ValueError, match="second"):
        made.result(1)
    first.set_exception(ValueError("first"))
    with pytest.raises(ValueError, match="second"):
        made.result(1)


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
        made.result(1)
    assert second.cancelled()
