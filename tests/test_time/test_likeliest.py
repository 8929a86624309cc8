"""A search for three parameters: of a parabola, along a ridge that no axis follows, and up to a bound."""

import numpy as np
import pytest

from anabranch.test_time.likeliest import likeliest

BOUND = np.array([[-4.0, 4.0], [-4.0, 4.0], [-4.0, 4.0]])
START = np.array([[0.0, 0.0, 0.0], [3.0, -3.0, 3.0]])
STEP = np.array([0.5, 0.5, 0.5])


def test_the_top_of_a_parabola_is_found():
    top = np.array([1.23, -0.71, 2.05])
    found = likeliest(lambda at: -((at - top) ** 2).sum(1), START, BOUND, step_3=STEP)
    assert found == pytest.approx(top, abs=1e-3)


@pytest.mark.parametrize("scale", [(1e-2, 1.0, 30.0), (1e-3, 1.0, 1e3), (1e-2, 30.0, 1e4)])
def test_a_ridge_is_followed_that_no_neighbour_lies_on(scale):
    """The narrower ones by the parabola alone: all neighbours are lower than the middle, from the start on."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    top = np.array([1.0, -2.0, 1.5])
    found = likeliest(lambda at: -(((at - top) @ turn) ** 2 * scale).sum(1), START, BOUND, step_3=STEP)
    assert found == pytest.approx(top, abs=0.02)


def test_it_begins_at_the_likeliest_start_and_keeps_to_the_bounds():
    asked = []

    def two_tops(at):
        asked.append(at)
        return np.maximum(-((at - 3) ** 2).sum(1), 1 - ((at - [3.0, -3.0, 9.0]) ** 2).sum(1) + 30)

    found = likeliest(two_tops, START, BOUND, step_3=STEP)
    assert found == pytest.approx([3.0, -3.0, 4.0], abs=1e-3)
    assert np.abs(np.concatenate(asked)).max() <= 4
