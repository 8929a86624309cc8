"""CaRL's reward by hand: every factor, what steps add up to, and motion from moments."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.rl.rewards import (
    COMFORT,
    FACTORS,
    RouteReward,
    comfort_factor,
    driving_score,
    motion,
    roach_reward,
    route_reward,
    speed_factor,
    uncomfortable,
)


def test_speed_by_hand():
    # Nothing up to the limit; half of 2.23 m/s above it leaves half; 2.23 and more leave nothing.
    speed = np.array([0.0, 8.0, 8.0 + 1.115, 8.0 + 2.23, 30.0])
    assert speed_factor(speed, np.full(5, 8.0)) == pytest.approx([1, 1, 0.5, 0, 0], abs=1e-9)


def test_comfort_by_hand():
    violated = np.zeros((3, 6), bool)
    violated[1, 2] = True
    violated[2] = True
    # 1 - 0.5 n / 6: 1, 11/12 and, at worst, a half.
    assert comfort_factor(violated) == pytest.approx([1, 11 / 12, 0.5])


def test_limits_of_comfort_are_carls():
    # Along -4.05 to 2.40, across 4.89, jerk 8.37 and 4.13 along, turning 0.95 and 1.93; just inside and just outside of each.
    inside = np.array([[2.39, 4.88, 8.36, 4.12, 0.94, 1.92], [-4.04, -4.88, 0.0, -4.12, -0.94, -1.92]])
    assert not uncomfortable(inside).any()
    outside = np.array([[2.41, 4.90, 8.38, 4.14, 0.96, 1.94], [-4.06, -4.90, 8.38, -4.14, -0.96, -1.94]])
    assert uncomfortable(outside).all()
    assert len(COMFORT) == 6


def test_motion_of_a_parabola_is_exact():
    """Speed 3 + 2t + 0.5 t^2 and heading 0.1 + 0.3 t - 0.2 t^2, at t = 0 as the newest moment."""
    time = (np.arange(9) - 8) * 0.1
    speed, heading = 3 + 2 * time + 0.5 * time**2, 0.1 + 0.3 * time - 0.2 * time**2
    found = motion(speed[None], heading[None], 0.1)[0]
    # Along 2 and its jerk 1; turning 0.3 and -0.4; across 3 * 0.3, and its jerk 2 * 0.3 + 3 * -0.4 = -0.6.
    assert found == pytest.approx([2.0, 0.9, np.hypot(1.0, -0.6), 1.0, 0.3, -0.4], abs=1e-9)
    with pytest.raises(ConfigError, match="needs at least 3"):
        motion(np.zeros((1, 2)), np.zeros((1, 2)), 0.1)


def test_a_step_by_hand():
    factors = {"outside": 1.0, "speed": 0.5, "ttc": 0.5, "comfort": 0.75, "centre": 1.0}
    given_factors = {name: np.array([value]) for name, value in factors.items()}
    # 0.4 % more of the route, at 0.5 * 0.5 * 0.75; then the hint.
    reward, terms = route_reward(np.array([0.4]), given_factors, np.array([-1.0]))
    assert reward[0] == pytest.approx(0.4 * 0.1875 - 1)
    assert terms["progress"][0] == 0.4
    assert terms["terminal"][0] == -1


@given(
    st.lists(st.floats(0, 1), min_size=5, max_size=5),
    st.floats(0, 100),
    st.booleans(),
)
def test_terms_put_together_are_the_reward(factors, progress, ends):
    terminal = np.array([-1.0 if ends else 0.0])
    reward, terms = route_reward(
        np.array([progress]), {name: np.array([value]) for name, value in zip(FACTORS, factors, strict=True)}, terminal
    )
    product = terms["progress"][0]
    for name in FACTORS:
        product = product * terms[name][0]
    assert reward[0] == pytest.approx(product + terms["terminal"][0], abs=1e-9)
    # Infractions cut down and never add: an ended step is worth its progress at most.
    assert reward[0] <= progress


def test_factors_can_be_left_out():
    half = {name: np.array([0.5]) for name in FACTORS}
    for name in FACTORS:
        kept = RouteReward(**{name: False}).factors(half)
        assert kept[name] == 1.0
        assert all(kept[other] == 0.5 for other in FACTORS if other != name)
    with pytest.raises(ConfigError, match="the factor 'ttc' is missing"):
        RouteReward().factors({name: half[name] for name in FACTORS if name != "ttc"})


def test_driving_scores_by_hand():
    # 80 % with a red light; all of it with a walker and a vehicle hit.
    found = driving_score(
        np.array([80.0, 100.0]),
        {"red_light": np.array([1, 0]), "walker": np.array([0, 1]), "vehicle": np.array([0, 1])},
    )
    assert found == pytest.approx([56, 30])
    with pytest.raises(ConfigError, match="infraction 'noise' is not known"):
        driving_score(np.array([1.0]), {"noise": np.array([1])})


def test_the_shaped_reward_by_hand():
    far, false = np.array([1e9]), np.array([False])

    def reward(speed, hazard=far, red=far, offset=0.0, error=0.0, change=0.0, failed=false):
        return roach_reward(
            np.array([speed]), hazard, red, np.array([offset]), np.array([error]), np.array([change]), failed
        )[0]

    assert reward(6.0) == pytest.approx(1)
    assert reward(3.0) == pytest.approx(0.5)
    # A hazard half of 9.5 m away: 3 m/s is wanted. A red light 18 m away or farther changes nothing.
    assert reward(3.0, hazard=np.array([4.75])) == pytest.approx(1)
    assert reward(6.0, red=np.array([18.0])) == pytest.approx(1)
    assert reward(0.0, red=np.array([0.0])) == pytest.approx(1)
    assert reward(6.0, offset=-1.0) == pytest.approx(0.5)
    assert reward(6.0, error=-0.2) == pytest.approx(0.8)
    assert reward(6.0, change=0.02) == pytest.approx(0.9)
    assert reward(6.0, failed=np.array([True])) == pytest.approx(1 - 7)
