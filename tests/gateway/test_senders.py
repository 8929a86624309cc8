"""Whose fault it is that requests fail: exact cases, and that no single sender shuts a deployment that serves another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch.senders import KEPT, REFUSED, TIMED_OUT, Senders


def test_a_failure_is_held_against_the_deployment_where_nobody_else_is_served():
    senders = Senders(30.0)
    assert senders.failed("a", 0.0)
    senders.answered("a", 1.0)
    assert senders.failed("a", 2.0)


def test_a_failure_is_the_senders_own_while_others_are_served_and_none_of_them_fails():
    senders = Senders(30.0)
    senders.answered("b", 0.0)
    assert [senders.failed("a", now) for now in (1.0, 2.0, 29.9)] == [False] * 3
    assert senders.failed("a", 30.0)  # nobody was served in the window
    senders.answered("b", 31.0)
    assert not senders.failed("a", 32.0)
    assert senders.failed("b", 33.0)
    assert senders.failed("a", 34.0)


def test_refusals_in_a_row_count_by_sender_and_an_answer_ends_the_row():
    senders = Senders(30.0)
    assert [senders.refused(name) for name in "aaaabb"] == [False] * 6
    senders.answered("c", 0.0)
    assert [senders.refused(name) for name in "abab"] == [False] * 4
    assert senders.refused("c")
    assert REFUSED == 3
    assert not senders.refused("c")  # the row begins anew


@given(st.lists(st.tuples(st.sampled_from("xyn"), st.booleans(), st.floats(0, 20)), max_size=80))
def test_while_one_is_served_another_alone_changes_nothing(steps):
    senders, now = Senders(30.0), 0.0
    senders.answered("n", now)
    for name, is_refused, wait in steps:
        now += wait
        senders.answered("n", now)
        if name == "x":
            assert not (senders.refused("x") if is_refused else senders.failed("x", now))


def test_what_takes_too_long_is_outweighed_by_an_answer_to_anybody_else_who_has_not_failed_since():
    """Two keys of one owner are no two witnesses."""
    senders = Senders(30.0)
    senders.answered("good", 0.0)
    assert [senders.timed_out(name, now) for name, now in (("x", 1.0), ("y", 2.0), ("x", 29.0))] == [False] * 3
    assert senders.timed_out("y", 30.0)  # nobody was served in the window
    senders.answered("good", 31.0)
    senders.answered("y", 31.0)
    assert not senders.timed_out("x", 32.0)
    assert not senders.timed_out("good", 33.0)  # y was served
    assert senders.timed_out("y", 34.0)  # of those who ask, nobody is


def test_many_senders_whose_requests_take_too_long_are_not_one():
    senders = Senders(30.0, timed_out=3)
    senders.answered("good", 0.0)
    assert [senders.timed_out(name, 1.0) for name in "xyxyz"] == [False] * 4 + [True]
    senders.answered("z", 2.0)  # it is served again
    assert not senders.timed_out("x", 3.0)
    assert Senders(30.0)._timed_out == TIMED_OUT == 8


@given(st.lists(st.tuples(st.sampled_from("wxyz"), st.floats(0, 9)), max_size=60))
def test_while_one_is_served_a_few_others_whose_requests_take_too_long_change_nothing(steps):
    senders, now = Senders(30.0), 0.0
    for name, wait in steps:
        senders.answered("n", now)
        now += wait
        assert not senders.timed_out(name, now)


def test_doubt_is_cast_by_two_senders_or_by_one_beside_whom_nobody_is_served():
    senders = Senders(30.0)
    assert senders.doubted("a", 0.0)
    senders.answered("b", 1.0)
    assert [senders.doubted("a", now) for now in (2.0, 3.0)] == [False, False]
    assert senders.doubted("b", 4.0)
    senders.answered("c", 5.0)
    assert not senders.doubted("a", 6.0)


def test_what_is_remembered_is_bounded():
    senders = Senders(30.0)
    for number in range(3 * KEPT):
        senders.answered(str(number), 0.0)
        senders.failed(str(number), 0.0)
    assert (len(senders._answered), len(senders._failed)) == (KEPT, KEPT)


@pytest.mark.parametrize("seen", ["answered", "failed"])
def test_whoever_was_seen_last_is_remembered_longest(seen):
    senders = Senders(30.0)
    for number in range(KEPT):
        getattr(senders, seen)(str(number), 0.0)
    getattr(senders, seen)("0", 1.0)
    getattr(senders, seen)("new", 1.0)
    held = getattr(senders, f"_{seen}")
    assert "0" in held
    assert "1" not in held
