import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.routers.referee import aiq, cost_save, hull, pareto_distance, routerbench_aiq
from anabranch.routers.referee.curve import Scale

FOUR = [(0.1, 0.5), (0.3, 0.7), (0.5, 0.6), (0.9, 0.8)]
numbers = st.floats(0, 1).map(lambda value: round(value, 4))
curves = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12)


def slow_hull_value(points, cost):
    """The best quality at no more than ``cost``, mixing any two points: straight from the definition."""
    best = max((quality for at, quality in points if at <= cost), default=-np.inf)
    for first in points:
        for second in points:
            if first[0] <= cost < second[0]:
                share = (cost - first[0]) / (second[0] - first[0])
                best = max(best, first[1] + share * (second[1] - first[1]))
    return best


def test_the_hull_drops_what_costs_more_for_less():
    np.testing.assert_allclose(hull(FOUR), [(0.1, 0.5), (0.3, 0.7), (0.9, 0.8)])


def test_area_over_the_declared_range_and_as_routerbench_reckons_it():
    assert aiq(FOUR, 0.1, 0.9) == pytest.approx(0.7125)
    assert routerbench_aiq(FOUR) == pytest.approx(0.57 / 0.9) == pytest.approx(0.6333, abs=5e-5)


@pytest.mark.parametrize(
    ("points", "expected", "area"),
    [
        ([(0.2, 0.6)], [(0.2, 0.6)], 0.6),  # one setting: the flat line of its quality
        ([(0.0, 0.4), (1.0, 0.8)], [(0.0, 0.4), (1.0, 0.8)], 0.6),
        ([(0.0, 0.4), (0.5, 0.6), (1.0, 0.8)], [(0.0, 0.4), (1.0, 0.8)], 0.6),  # on a line
        ([(0.0, 0.8), (1.0, 0.4)], [(0.0, 0.8)], 0.8),  # dearer and worse
        ([(0.5, 0.4), (0.5, 0.6)], [(0.5, 0.6)], 0.6),  # one cost, two qualities
        ([(0.0, 0.5), (1.0, 0.5)], [(0.0, 0.5)], 0.5),  # one quality, two costs
        ([(1.0, 0.8), (0.0, 0.0), (0.25, 0.6)], [(0.0, 0.0), (0.25, 0.6), (1.0, 0.8)], 0.6),
    ],
)
def test_hand_computed_curves(points, expected, area):
    np.testing.assert_allclose(hull(points), expected)
    assert aiq(points, 0, 1) == pytest.approx(area)


def test_a_range_beyond_the_curve_is_flat_and_one_inside_it_is_cut():
    points = [(0.4, 0.5), (0.6, 0.7)]
    assert aiq(points, 0, 1) == pytest.approx(0.4 * 0.5 + 0.2 * 0.6 + 0.4 * 0.7)
    assert aiq(points, 0.45, 0.55) == pytest.approx(0.6)
    assert aiq(points, 0.5, 0.5) == pytest.approx(0.6)


def test_routerbench_starts_at_the_first_point_and_divides_by_the_largest_cost():
    points = [(0.4, 0.5), (0.6, 0.7)]
    assert routerbench_aiq(points, 1.0) == pytest.approx(0.2 * 0.6 + 0.4 * 0.7)
    assert routerbench_aiq([(0.0, 0.3)]) == pytest.approx(0.3)
    assert routerbench_aiq([(0.5, 0.3)]) == 0.0  # theirs: a single point covers no cost


@given(curves, numbers)
def test_the_hull_is_what_mixing_two_settings_can_reach(points, cost):
    line = hull(points)
    if cost >= line[0, 0]:
        assert np.interp(cost, *line.T) == pytest.approx(slow_hull_value(points, cost), abs=1e-9)


@given(curves)
def test_the_hull_rises_ever_more_slowly_and_needs_no_order(points):
    line = hull(points)
    step = np.diff(line, axis=0)
    assert (step > 0).all()
    assert (np.diff(step[:, 1] / step[:, 0]) < 1e-9).all()
    np.testing.assert_array_equal(hull(points[::-1]), line)


@given(curves, curves)
def test_more_settings_never_make_the_area_smaller(points, more):
    # with the same first point: the flat part before it is an extension, not a setting
    points = [(0.0, 0.0), *points]
    assert aiq(points + more, 0, 1) >= aiq(points, 0, 1) - 1e-12


@pytest.mark.parametrize("points", [[], [(0.1, np.nan)], [(np.inf, 0.5)], [0.1, 0.2], [(1, 2, 3)]])
def test_what_is_no_curve_is_refused(points):
    with pytest.raises(InputError, match="curve needs"):
        hull(points)


@pytest.mark.parametrize("bounds", [(1, 0), (np.nan, 1), (0, np.inf)])
def test_what_is_no_range_is_refused(bounds):
    with pytest.raises(InputError, match="range"):
        aiq(FOUR, *bounds)


def test_cost_saved_without_loss():
    assert cost_save(FOUR, 0.7, 0.6) == pytest.approx(0.5)
    assert cost_save(FOUR, 0.8, 0.6) == pytest.approx(-0.5)
    assert cost_save(FOUR, 0.81, 0.6) is None


def test_distance_to_a_frontier():
    line, unit = hull([(0.0, 0.0), (1.0, 1.0)]), Scale((0, 1), (0, 1))
    assert pareto_distance((0.5, 0.5), line, unit) == 0
    assert pareto_distance((0.2, 0.9), line, unit) == 0
    assert pareto_distance((1.0, 0.0), line, unit) == pytest.approx(0.5**0.5)
    assert pareto_distance((2.0, 0.7), line, unit) == pytest.approx(0.3)  # dearer than all: straight up
    assert pareto_distance((4.0, 0.0), hull([(0, 0), (4, 2)]), Scale((0, 4), (0, 2))) == pytest.approx(0.5**0.5)
