"""Requests under way, sender by sender."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import RateError
from anabranch.gateway.core.in_flight import InFlight


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
