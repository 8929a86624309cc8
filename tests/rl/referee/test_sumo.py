"""SUMO as referee: who drives well in LaneWorld's eyes does so in SUMO's, and what goes wrong SUMO says. Skipped where it is not there."""

import importlib
import sys

import numpy as np
import pytest

from anabranch.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from anabranch.rl import LaneWorld, Sumo, judge, training
from anabranch.rl.laneworld import Settings
from anabranch.rl.laneworld.judge import Faults
from anabranch.rl.laneworld.lane_graph import LIGHT, light_state
from anabranch.train import Trainer

pytest.importorskip("gymnasium")

SMALL = Settings(routes=4, traffic=12, shortest_m=150.0, longest_m=350.0)


def test_without_sumo_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sumo", None)
    with pytest.raises(
        MissingExtraError, match=r"the referee SUMO needs sumo( and traci)?; pip install .anabranch\[sumo\]"
    ):
        Sumo.Config().build().make(1, seed=0)


def test_a_policy_sees_as_much_as_in_laneworld():
    """Also without SUMO: what an agent is does not hang on who judges it."""
    assert Sumo.Config(world=SMALL).build().layout == LaneWorld.Config(world=SMALL).build().layout


def test_nobody_learns_there(tmp_path):
    """Said at once, also without SUMO."""
    made = training("laneworld", samples=64)
    made = made.replace(task=made.task.replace(environment=Sumo.Config(world=SMALL)))
    with pytest.raises(ConfigError, match=r"task\.environment is Sumo, which judges and is not learned in"):
        Trainer(made, tmp_path / "run")


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("sumo")
    pytest.importorskip("traci")
    made = Sumo.Config(world=SMALL, trips_per_second=0.4, warm_up_s=10.0, side=3).build().make(1, seed=3)
    yield made
    made.close()


def drives(world, *, halts=True, pace=6.0):
    """Along the route by pure pursuit, behind who drives ahead; where it ``halts``, not over red lights nor into others."""
    state, library, route = world.state, world.library, world.scene.route_W
    x, y, heading, speed = state.pose_W4.T
    ahead = library.at(route, state.s_W + np.maximum(4.0, 0.7 * speed))
    dx, dy = ahead[:, 0] - x, ahead[:, 1] - y
    across = dy * np.cos(heading) - dx * np.sin(heading)
    wheel = np.arctan(2.8 * 2 * across / (dx**2 + dy**2))
    which, line = library.next_stop(route, state.front_m_W)
    light, _ = light_state(world.clock_W, library.stop_offset_QJ[route, which])
    room = np.where((library.stop_kind_QJ[route, which] == LIGHT) & (light > 0), line - 1.0, 99.0)
    others = world.others()
    dx, dy = others[..., 0] - x[:, None], others[..., 1] - y[:, None]
    along = dx * np.cos(heading)[:, None] + dy * np.sin(heading)[:, None]
    beside = dy * np.cos(heading)[:, None] - dx * np.sin(heading)[:, None]
    gap = np.where((along > 0) & (np.abs(beside) < 1.9), along - 4.5 - 2.0, 99.0).min(1)
    wanted = np.minimum(pace, np.sqrt(4 * np.maximum(np.minimum(room, gap), 0))) if halts else np.full_like(speed, pace)
    return np.stack([np.clip(wheel / np.radians(35), -1, 1), np.clip(wanted - speed, -1, 1)], axis=1)


def outcome(world, act, steps=1500):
    for _ in range(steps):
        *_, over, cut, infos = world.step(act(world))
        if over[0] or cut[0]:
            return {name: float(values[0]) for name, values in infos["outcome"].items()}, over[0]
    raise AssertionError("an episode does not end")


def test_who_drives_by_the_rules_arrives_and_lights_are_as_they_are_seen(world):
    world.reset()
    told, asked = world._simulations[0]._told, []

    def act(made):
        which, line = made.library.next_stop(made.scene.route_W, made.state.front_m_W)
        if made._simulations[0]._is_here and line[0] < 60:
            link = told.vehicle.getNextTLS("ego")[:1]
            light, left = light_state(made.clock_W, made.library.stop_offset_QJ[made.scene.route_W, which])
            # Not in the moment in which it changes.
            if link and 0.15 < left[0] < (8, 2, 10)[int(light[0])] - 0.15:
                asked.append((link[0][3].lower(), "gyr"[int(light[0])]))
        return drives(made)

    found, over = outcome(world, act)
    assert not over
    assert found["finished"] == 1
    assert found["route_completion"] == found["driving_score"] == 100
    assert found["vehicle"] == found["red_light"] == found["own_vehicle"] == found["own_red_light"] == 0
    assert len(asked) > 20
    assert all(theirs == ours for theirs, ours in asked)


def test_who_never_halts_is_told_by_sumo_and_by_laneworld(world):
    """Several beginnings: each ends by a light or a car, and by light both say the same."""
    ends = [outcome(world, lambda made: drives(made, halts=False))[0] for _ in range(4)]
    failed = [found for found in ends if not found["finished"]]
    assert failed
    for found in failed:
        assert found["red_light"] + found["vehicle"] >= 1
        assert found["driving_score"] < found["route_completion"] or found["route_completion"] == 0
        if found["red_light"]:
            assert found["own_red_light"]


def test_a_car_that_leaves_the_road_is_off_it(world):
    world.reset()
    found, over = outcome(world, lambda made: np.array([[1.0, 0.5]]))
    assert over
    assert found["off_road"] == 1


def test_episodes_follow_from_the_seed(world):
    world.reset()
    first = [world.step(drives(world))[0]["policy"].copy() for _ in range(60)]
    world.reset()
    again = [world.step(drives(world))[0]["policy"].copy() for _ in range(60)]
    assert np.array_equal(np.stack(first), np.stack(again))


def test_nothing_is_trained_there(world):
    with pytest.raises(CheckpointError, match="train in laneworld"):
        world.load_state_dict(world.state_dict())


def test_an_end_of_sumo_is_told():
    pytest.importorskip("sumo")
    made = Sumo.Config(world=SMALL, warm_up_s=0.0, side=3).build().make(1, seed=1)
    try:
        made.reset()
        made._simulations[0]._process.kill()
        made._simulations[0]._process.wait()
        with pytest.raises(DataError, match="SUMO has ended: Connection closed"):
            made.step(np.zeros((1, 2)))
        made._simulations[0].close()
        made._simulations[0]._lights.write_text("<additional><tlLogic/></additional>")
        with pytest.raises(DataError, match="SUMO has ended: Error: "):
            made.reset()
    finally:
        made.close()


def test_what_laneworld_would_have_said_is_counted_as_sumos_word_is(monkeypatch):
    """Each fault once however long it lasts, and not only where it is there in the last step; also without SUMO."""
    world = importlib.import_module("anabranch.rl.referee.world")
    made = world.SumoWorld.__new__(world.SumoWorld)
    made.verdicts = [world.Verdict()]
    made._own = {name: np.zeros(1, np.int64) for name in ("own_vehicle", "own_red_light")}
    made._own_lasts = {name: np.zeros(1, bool) for name in made._own}
    none = np.zeros(1, bool)
    for hit in (True, True, False, True, False):
        found = Faults(np.array([hit]), *[none] * 9, ())
        monkeypatch.setattr(world.LaneWorldVector, "_faults", lambda self, others, found=found: found)
        made._faults(np.zeros((1, 0, 7)))
    assert made._own["own_vehicle"].tolist() == [2]
    assert made._own["own_red_light"].tolist() == [0]


@pytest.mark.slow
def test_a_policy_is_judged(world):
    """An untrained one, as ``anabranch rl eval --referee sumo`` does it."""
    task = training("laneworld", samples=64).task.build()
    referee = Sumo.Config(world=SMALL, warm_up_s=5.0, side=3).build()
    found = judge(task.network(), referee, episodes=3, beside=2)
    assert len(found.return_E) == 3
    assert {"route_completion", "own_vehicle", "sumo_arrived"} <= set(found.outcomes)
