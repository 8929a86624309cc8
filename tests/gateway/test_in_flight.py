"""Requests under way, sender by sender."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import RateError
from anabranch.gateway.in_flight import InFlight


def test_one_sender_is_held_back_and_another_is_not():
    held = InFlight()
    held.enter("a", 2)
    held.enter("a", 2)
    with pytest.raises(RateError, match="2 requests"):
        held.enter("a", 2)
    held.enter("b", 1)
    held.enter("c", None)
    held.leave("a")
    # Who was refused is not counted.
    held.enter("a", 2)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=40))
def test_counts_are_those_of_a_dictionary(steps):
    held, counts = InFlight(), {"a": 0, "b": 0}
    for whose, enters in steps:
        if enters and counts[whose] < 3:
            held.enter(whose, 3)
            counts[whose] += 1
        elif enters:
            with pytest.raises(RateError):
                held.enter(whose, 3)
        elif counts[whose]:
            held.leave(whose)
            counts[whose] -= 1
    for whose, count in counts.items():
        for _ in range(count):
            held.leave(whose)
    # Nothing is kept of senders who have nothing under way.
    assert held._counts == {}


def test_however_many_one_has_another_finds_a_place():
    """A key without a limit of its own took all 1,024 places, and every other was told 429."""
    held = InFlight(lambda: (16, 0.75))
    for _ in range(12):
        held.enter("a", None)
    with pytest.raises(RateError, match="12 of the 16") as refused:
        held.enter("a", None)
    assert (refused.value.limit, refused.value.retry_after_s) == ("max_in_flight", 1.0)
    for _ in range(3):
        held.enter("b", None)
    with pytest.raises(RateError, match="3 of the 16"):
        held.look("b", None)
    held.enter("c", None)
    # What others take is not hers: she has more than her part, and gets no more until it is less.
    held.leave("a")
    with pytest.raises(RateError, match="11 of the 16"):
        held.enter("a", None)


def test_a_gateway_that_has_seen_no_key_shares_nothing_out():
    held = InFlight(lambda: (4, 0.5))
    for _ in range(4):
        held.enter("", None)
    held.look("a", None)
    with pytest.raises(RateError, match="4 of the 4"):
        held.enter("", None)


@given(st.lists(st.sampled_from("abcd"), max_size=60), st.integers(4, 20), st.sampled_from([0.25, 0.5, 0.75]))
def test_whoever_has_none_always_enters(senders, places, share):
    held = InFlight(lambda: (places, share))
    refused = {}
    for whose in senders:
        try:
            held.enter(whose, None)
        except RateError:
            refused[whose] = True
    # Of four who take all they may, nobody was refused the first.
    assert all(held._counts.get(whose) for whose in refused)
    # And whoever is refused has as much as the part says.
    for whose in refused:
        assert held._counts[whose] + 1 > share * (places - sum(held._counts.values()) + held._counts[whose])
