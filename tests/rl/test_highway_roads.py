"""HighwayEnv made quick: episodes are those of HighwayEnv to the bit, on its maps; places are looked up and not asked for again."""

import copy

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("highway_env")

import highway_env  # noqa: E402
from highway_env.road.lane import CircularLane, PolyLane, SineLane, StraightLane  # noqa: E402
from highway_env.road.road import Road, RoadNetwork  # noqa: E402
from highway_env.vehicle.behavior import IDMVehicle  # noqa: E402
from highway_env.vehicle.kinematics import Vehicle  # noqa: E402

from anabranch.rl import Highway  # noqa: E402
from anabranch.rl.highway_roads import _hasten_road, hasten  # noqa: E402


def numbers(seen):
    if isinstance(seen, dict | tuple):
        parts = seen.values() if isinstance(seen, dict) else seen
        return np.concatenate([numbers(part) for part in parts])
    return np.asarray(seen, float).ravel()


def played(id, steps, *, quick, config):
    """Everything that is seen and earned; two seeds, so that an environment is begun again."""
    env = gymnasium.make(id, config=config, disable_env_checker=True)
    if quick:
        hasten(env.unwrapped)
    rng, found = np.random.default_rng(7), []
    for seed in (3, 4):
        found.append(numbers(env.reset(seed=seed)[0]))
        for _ in range(steps):
            space = env.action_space
            discrete = isinstance(space, gymnasium.spaces.Discrete)
            action = int(rng.integers(space.n)) if discrete else rng.uniform(-0.3, 0.3, space.shape).astype(np.float32)
            seen, reward, over, cut, _ = env.step(action)
            found += [numbers(seen), np.array([reward, over, cut])]
            if over or cut:
                break
    env.close()
    return np.concatenate(found)


# Newer releases of HighwayEnv have a second version of some.
@pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")
@pytest.mark.parametrize(
    ("id", "steps"),
    [
        # Arcs, sines and straight lanes; roads with priorities, whose cars are copied to look ahead; a reward of powers; the others.
        ("roundabout-v1", 4),
        ("intersection-v2", 1),
        ("racetrack-v1", 4),
        ("merge-v1", 4),
        *(
            pytest.param(id, 6, marks=pytest.mark.slow)
            for id in ("highway-fast-v0", "u-turn-v0", "two-way-v0", "exit-v0", "parking-v0", "lane-keeping-v0")
        ),
    ],
)
def test_an_episode_is_highwayenvs_to_the_bit(id, steps):
    gymnasium.register_envs(highway_env)
    config = {"simulation_frequency": 5, "initial_vehicle_count": 3} if id != "lane-keeping-v0" else {}
    theirs, ours = (played(id, steps, quick=quick, config=config) for quick in (False, True))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    "sees",
    [
        {"vehicles_count": 4, "absolute": True, "features": ["presence", "x", "y", "heading", "cos_d", "lat_off"]},
        {"vehicles_count": 7, "order": "shuffled", "see_behind": True, "observe_intentions": True, "clip": False},
        {"vehicles_count": 1, "normalize": False, "include_obstacles": False},
        {"vehicles_count": 30, "features": ["x", "vx", "sin_h"], "features_range": {"x": [-90, 90], "vx": [-3, 3]}},
    ],
)
def test_what_is_seen_is_highwayenvs_to_the_bit(sees):
    config = {"simulation_frequency": 5, "observation": {"type": "Kinematics", **sees}}
    theirs, ours = (played("roundabout-v1", 3, quick=quick, config=config) for quick in (False, True))
    assert np.array_equal(ours, theirs)


def network():
    made = RoadNetwork()
    made.add_lane("a", "b", StraightLane([0, 0], [40, 3]))
    made.add_lane("a", "b", StraightLane([0, 0], [40, 3]))
    made.add_lane("b", "c", SineLane([40, 3], [80, 9], amplitude=2.0, pulsation=0.3, phase=0.4))
    made.add_lane("c", "d", CircularLane([80.0, 20.0], 11.0, -1.5, 1.2))
    made.add_lane("d", "a", CircularLane([60.0, 20.0], 14.0, 1.2, -2.5, clockwise=False))
    made.add_lane(
        "d", "e", PolyLane([(0.0, 30.0), (10.0, 33.0), (25.0, 31.0)], [(0, 32), (25, 33)], [(0, 28), (25, 29)])
    )
    return made


def test_places_are_those_of_each_lane_and_the_nearest_is_the_first():
    plain, road = network(), Road(network())
    _hasten_road(road)
    quick = road.network
    rng = np.random.default_rng(1)
    # More places than are kept.
    for _ in range(600):
        position, heading = rng.uniform(-30, 110, 2), rng.uniform(-9, 9)
        assert quick.get_closest_lane_index(position, heading) == plain.get_closest_lane_index(position, heading)
        for one, other in zip(quick.lanes_list(), plain.lanes_list(), strict=True):
            found, asked = one.local_coordinates(position), other.local_coordinates(position)
            assert found == asked
            # A power of a number of Python is not rounded as one of NumPy's.
            assert [type(value) for value in found] == [type(value) for value in asked]
    assert quick.get_closest_lane_index(np.array([10.0, 1.0])) == ("a", "b", 0)
    # Whole numbers, lists, places that nobody has stood at: asked of HighwayEnv.
    for position in (np.array([10, 1]), [10.0, 1.0], np.array([11.0, 2.0])):
        assert quick.lanes_list()[0].local_coordinates(np.asarray(position)) == plain.lanes_list()[0].local_coordinates(
            np.asarray(position)
        )


def test_a_lane_that_is_added_is_found_and_a_copy_finds_its_own():
    road = Road(network())
    _hasten_road(road)
    far = np.array([500.0, 500.0])
    assert road.network.get_closest_lane_index(far) != ("x", "y", 0)
    copied = copy.deepcopy(road.network)
    road.network.add_lane("x", "y", StraightLane([490.0, 500.0], [510.0, 500.0]))
    assert road.network.get_closest_lane_index(far) == ("x", "y", 0)
    assert copied.get_closest_lane_index(far) != ("x", "y", 0)


def test_who_drives_in_front_and_behind_is_highwayenvs():
    plain, quick = (Road(network(), np_random=np.random.RandomState(0)) for _ in range(2))
    _hasten_road(quick)
    rng = np.random.default_rng(5)
    for road in (plain, quick):
        rng = np.random.default_rng(5)
        lane = road.network.get_lane(("a", "b", 0))
        road.vehicles = [
            IDMVehicle(road, lane.position(rng.uniform(-8, 48), rng.uniform(-3, 3)), speed=5.0) for _ in range(12)
        ]
        # Two at one place.
        road.vehicles.append(Vehicle(road, road.vehicles[3].position.copy()))
    for index in (("a", "b", 1), ("b", "c", 0), ("c", "d", 0), None):
        for one, other in zip(quick.vehicles, plain.vehicles, strict=True):
            found = [
                vehicle and road.vehicles.index(vehicle)
                for road, own in ((quick, one), (plain, other))
                for vehicle in road.neighbour_vehicles(own, index)
            ]
            assert found[:2] == found[2:]


def test_it_is_quick_unless_it_is_said_otherwise():
    """And what is another's own stays as it is."""
    for quick in (True, False):
        env = Highway.Config(quick=quick).build().single()
        env.reset(seed=0)
        assert (type(env.unwrapped.road) is Road) == (not quick)
        assert "Roundabout" in type(env.unwrapped).__name__

    kind = type(env.unwrapped)
    for _ in range(2):
        hasten(env.unwrapped)
    assert type(env.unwrapped).__mro__[1] is kind

    class Mine(Road):
        pass

    road = Mine(network())
    _hasten_road(road)
    assert type(road) is Mine
    assert type(road.network) is RoadNetwork
