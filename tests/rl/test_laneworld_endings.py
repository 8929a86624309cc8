"""Which faults end an episode of LaneWorld can be said; those that do not are counted, each once however long it lasts."""

import numpy as np
import pytest

pytest.importorskip("gymnasium")

from anabranch.errors import ConfigError
from anabranch.rl.laneworld import Settings
from anabranch.rl.laneworld.lane_graph import LIGHT, STOP_SIGN
from anabranch.rl.laneworld.settings import ENDINGS
from rl_roads import alone, before_line, put, world

STANDS = np.zeros((1, 2))


def _without(name):
    return tuple(one for one in ENDINGS if one != name)


def _vehicle(**settings):
    made = world(1, walkers=0, **settings)
    put(made, 0, 4.6, 0.0)
    return made, 0


def _walker(**settings):
    made = world(1, traffic=0, walkers=1, **settings)
    made.scene.walker_s_WM[0], made.scene.walker_period_WM[0] = made.state.s_W[0] + 2.4, 20.0
    made.scene.walker_phase_WM[0] = -made.scene.offset_W[0] - 0.1 + 3.6 / 1.4
    return made, 0


def _red_light(**settings):
    made = alone(8, **settings)
    row = before_line(made, LIGHT, 0.3)[0]
    route = made.scene.route_W[row]
    line = np.flatnonzero(made.library.stop_kind_QJ[route] == LIGHT)[0]
    # Five seconds before green.
    made.scene.offset_W[row] = 15.0 - made.library.stop_offset_QJ[route, line]
    return made, row


def _stop_sign(**settings):
    made = alone(16, maps=4, **settings)
    return made, before_line(made, STOP_SIGN, 0.3)[0]


def _beside(metres, **settings):
    made = alone(1, **settings)
    pose = made.state.pose_W4[0]
    pose[:2] += metres * np.array([-np.sin(pose[2]), np.cos(pose[2])])
    return made, 0


def _off_road(**settings):
    # Farther to the left than the other lane, and nearer than what counts as another way.
    return _beside(8.0, **settings)


def _deviated(**settings):
    return _beside(12.0, **settings)


def _blocked(**settings):
    made = alone(1, blocked_s=0.1, **settings)
    made.state.pose_W4[0, 3] = 0.0
    return made, 0


FAULTS = {
    "vehicle": _vehicle,
    "walker": _walker,
    "red_light": _red_light,
    "stop_sign": _stop_sign,
    "off_road": _off_road,
    "deviated": _deviated,
    "blocked": _blocked,
}


def test_every_ending_is_tried():
    assert set(FAULTS) == set(ENDINGS)


@pytest.mark.parametrize("name", ENDINGS)
def test_each_fault_ends_an_episode_where_it_is_said_to(name):
    """By it alone it ends; by all others it does not, unless it is two faults at once (who is 12 m beside is off the road too)."""
    made, row = FAULTS[name](ends_by=(name,))
    assert made.step(np.zeros((made.num_envs, 2)))[2][row]
    rest = ("off_road",) if name == "deviated" else ()
    made, row = FAULTS[name](ends_by=tuple(one for one in _without(name) if one not in rest))
    _, reward, over, cut, infos = made.step(np.zeros((made.num_envs, 2)))
    assert not over[row]
    assert not cut[row]
    # No hint without an end.
    assert infos["reward_terms"]["terminal"][row] == 0
    assert reward[row] >= 0


def test_what_lasts_is_counted_once_and_what_happens_again_twice():
    made, _ = _vehicle(ends_by=(), timeout_s=0.8)
    found = {}
    for step in range(8):
        # Into the car for three steps, out of it for two, and into it again.
        state = made.state
        state.path_s_WK[0, 0] = state.s_W[0] + (50.0 if step in (3, 4) else 3.0)
        _, _, over, _, infos = made.step(STANDS)
        found = infos.get("outcome", found)
        assert over[0] == (step == 7)
    assert found["vehicle"][0] == 2
    assert found["driving_score"][0] == pytest.approx(0.6**2 * found["route_completion"][0])
    assert found["infractions_per_km"][0] > 0
    # The next episode begins without.
    assert not made.state.fault_WF.any()
    assert not made.state.lasts_WF.any()


def test_counts_are_part_of_a_place_and_older_places_have_none():
    made, _ = _vehicle(ends_by=())
    made.step(STANDS)
    state = made.state_dict()
    assert state["fault_WF"].sum() == 1
    other = world(1, walkers=0, ends_by=())
    other.load_state_dict(state)
    assert np.array_equal(other.state.fault_WF, state["fault_WF"])
    other.load_state_dict({name: array for name, array in state.items() if name not in ("fault_WF", "lasts_WF")})
    assert not other.state.fault_WF.any()


def test_an_ending_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="ends_by has 'rain'; an episode can end by vehicle, walker"):
        Settings(ends_by=("vehicle", "rain"))
