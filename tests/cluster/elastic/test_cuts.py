"""Cuts of ordered things."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.elastic.cuts import bounds, covers, piece_of, recut
from anabranch.errors import InputError


def test_a_cut_by_hand():
    assert bounds(10, 3) == (0, 4, 7, 10)
    assert bounds(10, 3, turn=2) == (0, 3, 6, 10)
    assert bounds(2, 4) == (0, 1, 2, 2, 2)
    assert piece_of(bounds(10, 3), 1) == range(4, 7)
    assert recut(bounds(10, 3), bounds(10, 2)) == [(0, 0, 0, 4), (1, 0, 4, 5), (1, 1, 5, 7), (2, 1, 7, 10)]


@given(st.integers(0, 300), st.integers(1, 20), st.integers(0, 40))
def test_parts_differ_by_at_most_one(count, owners, turn):
    sizes = [end - first for first, end in pairwise(bounds(count, owners, turn))]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 60), st.integers(1, 12))
def test_turns_give_nobody_more(count, owners):
    totals, turn = [0] * owners, 0
    for _ in range(owners):
        for owner, (first, end) in enumerate(pairwise(bounds(count, owners, turn))):
            totals[owner] += end - first
        turn += count % owners
    assert len(set(totals)) == 1


@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 12), st.integers(0, 12), st.integers(0, 12))
def test_what_travels_is_everything_once(count, old, new, old_turn, new_turn):
    before, after = bounds(count, old, old_turn), bounds(count, new, new_turn)
    pieces = recut(before, after)
    assert [n for _, _, first, end in pieces for n in range(first, end)] == list(range(count))
    assert len(pieces) <= old + new - 1
    for source, target, first, end in pieces:
        assert set(range(first, end)) <= set(piece_of(before, source)) & set(piece_of(after, target))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bounds(-1, 2), "count is -1"),
        (lambda: bounds(1, 0), "owners is 0"),
        (lambda: recut((0, 3), (0, 4)), "both must cut the same"),
        (lambda: recut((0, 4, 3), (0, 3)), "in order"),
    ],
)
def test_what_is_no_cut_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()


@given(st.sets(st.integers(0, 12)), st.integers(0, 12), st.integers(1, 6))
def test_ranges_hold_what_is_in_one_of_them(held, first, count):
    ranges = [(one, one + 1) for one in held]
    assert covers(ranges, first, first + count) == (set(range(first, first + count)) <= held)
