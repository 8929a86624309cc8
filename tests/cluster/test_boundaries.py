"""Bounds of least cost, whatever the cost is."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.boundaries import descent, quickest


@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 12), min_size=4, max_size=8, unique=True),
    st.randoms(use_true_random=False),
)
def test_of_few_it_is_the_least_of_all(parts, ends, draw):
    ends = sorted(ends)
    costs = {bounds: draw.randrange(6) for bounds in combinations(ends, parts - 1)}
    found = quickest(parts, ends, costs.__getitem__, [], most=len(costs))
    # Of equal ones the first.
    assert found == min(costs, key=lambda bounds: (costs[bounds], bounds))


@pytest.mark.parametrize("parts", [2, 4, 7])
def test_of_many_moves_lead_to_even_parts(parts):
    """From a start with all layers in the last part, by what the largest part costs and then by squares."""
    length, asked = 6 * parts, []

    def cost(bounds):
        asked.append(bounds)
        sizes = [end - start for start, end in zip((0, *bounds), (*bounds, length), strict=True)]
        return max(sizes), sum(size**2 for size in sizes)

    ends, start = list(range(1, length)), tuple(range(1, parts))
    # Fewer than there are in all, so that they are not simply all asked.
    assert quickest(parts, ends, cost, [start], most=0) == start
    assert len(asked) <= 1
    most = {2: 10, 4: 1500, 7: 30_000}[parts]
    found = quickest(parts, ends, cost, [start], most=most)
    assert found == tuple(range(6, length, 6))
    # None is asked for twice.
    assert len(set(asked)) >= len(asked) - 1


def test_the_best_of_several_starts_counts():
    """Two valleys: one start is in each, and calls are bounded."""
    ends, asked = list(range(1, 100)), []

    def cost(bounds):
        asked.append(bounds)
        return min(abs(bounds[0] - 10) + 5, abs(bounds[0] - 80))

    # The first to be followed is the one that is better where it begins.
    assert quickest(2, ends, cost, [(12,), (90,)], most=30) == (80,)
    assert len(asked) <= 30
    assert quickest(2, ends, cost, [(12,)], most=30) == (10,)


def test_layers_that_stay_together_stay():
    """Bounds are of the ends that are allowed."""
    ends = [2, 3, 7]
    for most in (0, 100):
        found = quickest(3, ends, lambda bounds: -bounds[0], [(2, 3)], most=most)
        assert set(found) <= set(ends)
    assert found == (3, 7)


@given(st.integers(1, 4), st.integers(0, 40), st.randoms(use_true_random=False))
def test_a_bound_from_below_saves_calls(parts, most, draw):
    """Of drawn costs and bounds below them, from several starts."""
    ends = list(range(1, 9))
    costs = {bounds: (draw.randrange(20), draw.randrange(3)) for bounds in combinations(ends, parts - 1)}
    bounds_of = {bounds: (draw.randint(0, cost[0]), 0) for bounds, cost in costs.items()}
    starts, asked = draw.sample(sorted(costs), min(3, len(costs))), []

    def cost(bounds):
        asked.append(bounds)
        return costs[bounds]

    def looked_up(table):
        return lambda many: np.array([table[tuple(row)] for row in many.tolist()], float).reshape(len(many), -1)

    found = quickest(parts, ends, cost, starts, most, looked_up(bounds_of))
    assert found in asked
    assert len(asked) == len(set(asked)) <= max(most, len(starts))
    # A start that was not asked for is no better.
    assert costs[found] <= min(costs[start] for start in starts)
    if len(asked) < most:
        assert all(costs[found] <= costs[there] for there in moves(found, ends))
    # Where they say all, one call is enough.
    asked.clear()
    least = min(costs, key=lambda one: (costs[one], one))
    assert costs[quickest(parts, ends, cost, starts, 10**6, looked_up(costs))] == costs[least]
    assert {costs[there] for there in asked} == {costs[least]}


def moves(bounds, ends):
    """Neighbouring boundaries together, a place up or down."""
    for first, last in combinations(range(len(bounds) + 1), 2):
        for step in (1, -1):
            moved = (*bounds[:first], *(bound + step for bound in bounds[first:last]), *bounds[last:])
            if set(moved) <= set(ends) and all(a < b for a, b in pairwise(moved)):
                yield moved


@given(st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_descent_takes_the_best_move_each_time(parts, draw):
    ends = list(range(1, 9))
    table = {bounds: (draw.randrange(5), draw.randrange(5)) for bounds in combinations(ends, parts - 1)}
    start = draw.choice(sorted(table))

    def least(many):
        return np.array([table[tuple(row)] for row in many.tolist()], float).reshape(len(many), 2)

    path = descent(start, ends, least, 10**6)
    for here, there in pairwise(path):
        assert there in set(moves(here, ends))
        assert table[there] == min(table[other] for other in moves(here, ends)) < table[here]
    assert all(table[path[-1]] <= table[other] for other in moves(path[-1], ends))
    assert descent(start, ends, least, 1) == path[:2]
    assert descent(start, ends, least, 0) == [start]
