"""Contiguous partitions: by hand, against all partitions, with caps, groups that stay together, and what is refused."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster import partition
from anabranch.cluster.partitions import check_balance
from anabranch.errors import InputError


def test_by_hand():
    found = partition([1, 2, 3, 4], 2)
    # 1 + 2 + 3 and 4; 1 + 2 and 3 + 4 would have a part of 7.
    assert (found.bounds, found.costs, found.balance, found.bottleneck) == ((3,), (6.0, 4.0), (3, 1), 6.0)
    assert found.parts == (range(0, 3), range(3, 4))
    assert [found.part_of(layer) for layer in range(4)] == [0, 0, 0, 1]


def test_ties_go_to_the_smallest_bounds():
    # 1 | 1 1 1, 1 1 | 1 1 and so on have the same largest part only where that is 2; of three parts with one of 2 the first two are 1.
    assert partition([1, 1, 1, 1], 3).bounds == (1, 2)
    assert partition([5, 1, 1, 1], 3).bounds == (1, 2)


def test_a_boundary_costs_and_may_be_avoided():
    # Ending behind the second layer would cost 10 more.
    assert partition([2, 2, 2, 2], 2, boundary_L=[0, 10, 0, 99]).bounds == (1,)


def test_variance_is_another_objective():
    cost_L = [3, 3, 3, 4, 1, 1]
    assert partition(cost_L, 3).bottleneck == 6
    best = min(
        sum(sum(cost_L[a:b]) ** 2 for a, b in itertools.pairwise((0, *cut, 6)))
        for cut in itertools.combinations(range(1, 6), 2)
    )
    assert sum(cost**2 for cost in partition(cost_L, 3, objective="variance").costs) == best


numbers = st.integers(0, 9).map(float)


@given(st.data())
def test_no_partition_is_better(data):
    cost_L = data.draw(st.lists(numbers, min_size=1, max_size=8))
    length = len(cost_L)
    parts = data.draw(st.integers(1, length))
    boundary_L = data.draw(st.lists(numbers, min_size=length, max_size=length))
    memory_L = data.draw(st.lists(numbers, min_size=length, max_size=length))
    cap = data.draw(st.integers(0, 40))
    group = range(*sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length)))))

    def largest(cut):
        ends = (*cut, length)
        costs = []
        for start, end in zip((0, *cut), ends, strict=True):
            if sum(memory_L[start:end]) > cap or (end < length and end - 1 in group and end in group):
                return None
            costs.append(sum(cost_L[start:end]) + (boundary_L[end - 1] if end < length else 0))
        return max(costs)

    every = {cut: largest(cut) for cut in itertools.combinations(range(1, length), parts - 1)}
    possible = {cut: cost for cut, cost in every.items() if cost is not None}
    options = {"boundary_L": boundary_L, "memory_L": memory_L, "cap": cap, "uncut": [group]}
    if not possible:
        with pytest.raises(InputError):
            partition(cost_L, parts, **options)
        return
    found = partition(cost_L, parts, **options)
    assert found.bottleneck == min(possible.values())
    assert found.bounds == min(cut for cut, cost in possible.items() if cost == found.bottleneck)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1, 2], 3), {}, "2 layers cannot be 3 parts that are not empty; use 1 to 2"),
        (([1, 2], 0), {}, "use 1 to 2"),
        (([], 1), {}, "cost_L has shape"),
        (([1, np.nan], 1), {}, "cost_L of layer 1 is nan"),
        (([1, -1], 1), {}, "layer 1 is -1.0"),
        (([1, 1], 1), {"boundary_L": [1]}, "boundary_L has shape"),
        (([1, 9, 1], 2), {"memory_L": [1, 9, 1], "cap": 8}, "layer 1 takes 9, and a part holds 8"),
        (([1, 1, 1], 2), {"memory_L": [5, 5, 5], "cap": 8}, "do not hold them"),
        (([1, 1, 1], 3), {"uncut": [range(0, 2)]}, "use at most 2"),
        (([1, 1, 1], 2), {"uncut": [range(2, 9)]}, "uncut has"),
        (([1, 1, 1], 2), {"uncut": [range(0, 2)], "memory_L": [5, 5, 1], "cap": 8}, "layers 0 to 1 stay together"),
    ],
)
def test_what_cannot_be_is_named(arguments, options, message):
    with pytest.raises(InputError, match=message):
        partition(*arguments, **options)


def test_a_balance_must_fit():
    assert check_balance([2, 1], 3).parts == (range(0, 2), range(2, 3))
    with pytest.raises(InputError, match=r"balance is \[2, 2\], which sums to 4, and the model has 3 layers"):
        check_balance([2, 2], 3)
    with pytest.raises(InputError, match=r"has the entry 0 and sums to 3"):
        check_balance([3, 0], 3)
