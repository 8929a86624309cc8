"""Rows of Super-NaturalInstructions that a seed has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.adapters.adapt import Row
from anabranch.studies import superni


@pytest.fixture(autouse=True, scope="module")
def made():
    """Tasks of as many rows as their names say, in the place of the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(superni, "rows_of", lambda task, split: [Row(task, str(n), "yes") for n in range(int(task[1:]))])
        yield


def numbers(task, count, seed):
    return [int(row.prompt) for row in superni.rows_for_seed(task, "test", count, seed)]


@given(total=st.integers(1, 40), count=st.integers(1, 12), seed=st.integers(0, 9))
def test_a_seed_has_as_many_rows_as_it_asks_for_each_once_and_the_same_ones_again(total, count, seed):
    found = numbers(f"t{total}", count, seed)
    assert len(found) == len(set(found)) == min(count, total)
    assert found == numbers(f"t{total}", count, seed)


@given(total=st.integers(1, 40), count=st.integers(1, 12))
def test_seeds_have_rows_apart_until_all_are_had(total, count):
    seeds = -(-total // count)
    drawn = [set(numbers(f"t{total}", count, seed)) for seed in range(seeds)]
    assert set.union(*drawn) == set(range(total))
    assert sum(map(len, drawn[: total // count])) == total // count * min(count, total)
    assert len(set.union(*drawn[: total // count], set())) == total // count * min(count, total)


def test_behind_the_end_another_order_begins():
    """Or seeds that come later would judge the very rows of earlier ones again, together."""
    halves = [frozenset(numbers("t16", 8, seed)) for seed in range(6)]
    assert len(set(halves)) == 6


def test_rows_are_in_an_order_of_their_own_task():
    """Not those that come first in the file."""
    assert numbers("t20", 20, 0) != list(range(20))
    assert numbers("t20", 20, 0) != numbers("u20", 20, 0)
