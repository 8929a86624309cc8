"""Rings by bandwidth: the cheapest tour, against all tours."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.pccl.tours import best_tour, edge_costs, exact_tour, rings_of, tour_cost


def drawn(count, seed):
    cost_NN = np.random.default_rng(seed).random((count, count))
    np.fill_diagonal(cost_NN, 0)
    return cost_NN


def cheapest(cost_NN):
    count = len(cost_NN)
    return min(tour_cost(cost_NN, (0, *rest)) for rest in itertools.permutations(range(1, count)))


@given(count=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_exact_is_the_cheapest_of_all(count, seed):
    cost_NN = drawn(count, seed)
    tour = exact_tour(cost_NN)
    assert sorted(tour) == list(range(count))
    assert tour[0] == 0
    assert tour_cost(cost_NN, tour) == pytest.approx(cheapest(cost_NN))


@pytest.mark.parametrize("seed", range(4))
def test_searching_finds_the_cheapest_of_few(seed):
    """What is for many places, on few, where exhaustion says what there is."""
    cost_NN = drawn(8, seed)
    tour = best_tour(cost_NN, exact_to=0, budget_s=0.3, seed=seed)
    assert sorted(tour) == list(range(8))
    assert tour_cost(cost_NN, tour) <= cheapest(cost_NN) * 1.02


def test_searching_many_places_beats_the_nearest_neighbour_and_keeps_its_budget():
    from anabranch.cluster.pccl.tours import _nearest

    cost_NN = drawn(40, 0)
    tour = best_tour(cost_NN, budget_s=0.3)
    assert sorted(tour) == list(range(40))
    assert tour_cost(cost_NN, tour) < 0.8 * tour_cost(cost_NN, _nearest(cost_NN, 0))
    stopped = best_tour(cost_NN, budget_s=100.0, is_cancelled=lambda: True)
    assert sorted(stopped) == list(range(40))


def test_a_slow_direction_is_left_out():
    """Peers 7, 8, 9: everything is fast but 7 -> 8 and 8 -> 9."""
    matrix = {(a, b): 1000.0 for a in (7, 8, 9) for b in (7, 8, 9) if a != b} | {(7, 8): 1.0, (8, 9): 1.0}
    assert rings_of({0: [7, 8, 9]}, matrix, budget_s=1.0) == {0: [7, 9, 8]}
    # As good as it gets already: the ring stays, and with it its links.
    assert rings_of({0: [9, 8, 7]}, matrix, budget_s=1.0) == {0: [9, 8, 7]}
    assert edge_costs([7, 8], {(7, 8): 100.0}).tolist() == [[0.0, 10.0], [1000.0, 0.0]]
