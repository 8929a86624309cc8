"""HighwayEnv under CaRL's reward: progress by lane coordinates, what ends an episode, and places that are found again."""

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("highway_env")

from anabranch.errors import CheckpointError  # noqa: E402
from anabranch.rl import Highway  # noqa: E402
from anabranch.rl.rewards import FACTORS  # noqa: E402

# Few cars and little physics, so that a step is quick.
QUICK = {"config": {"simulation_frequency": 5}}
IDLE, FASTER, SLOWER = 1, 3, 4


def played(env, actions, seed=0):
    env.reset(seed=seed)
    found = []
    for action in actions:
        found.append(env.step(action))
        if found[-1][2] or found[-1][3]:
            break
    return found


@pytest.fixture(scope="module")
def roundabout():
    return Highway.Config(id="roundabout-v1", arguments=QUICK).build().single()


def test_terms_give_the_reward_and_progress_adds_up(roundabout):
    for seed in range(4):
        steps = played(roundabout, [IDLE] * 15, seed)
        total = 0.0
        for _, reward, _, _, info in steps:
            terms = info["reward_terms"]
            product = 1.0
            for name in FACTORS:
                assert 0 <= terms[name] <= 1
                product *= terms[name]
            assert reward == pytest.approx(terms["progress"] * product + terms["terminal"], abs=1e-12)
            assert terms["progress"] >= 0
            total += terms["progress"]
        outcome = steps[-1][4]["outcome"]
        assert outcome["route_completion"] == pytest.approx(total)
        assert outcome["route_completion"] > 5
        assert outcome["arrived"] + outcome["collided"] <= 1


def test_a_collision_has_the_hint_and_costs_the_score():
    env = (
        Highway.Config(id="highway-v0", arguments={"config": {"simulation_frequency": 5, "vehicles_count": 30}})
        .build()
        .single()
    )
    found = next(
        steps[-1] for seed in range(8) if (steps := played(env, [FASTER] * 30, seed))[-1][4]["outcome"]["collided"]
    )
    _, _, terminated, truncated, info = found
    assert terminated
    assert not truncated
    assert info["reward_terms"]["terminal"] == -1
    outcome = info["outcome"]
    assert outcome["driving_score"] == pytest.approx(0.6 * outcome["route_completion"])


def test_an_arrival_is_cut_off_and_worth_no_more():
    """Without others, on the straight: 60 m to be driven."""
    config = {"simulation_frequency": 5, "vehicles_count": 1}
    env = Highway.Config(id="highway-v0", arguments={"config": config}, straight_m=60.0).build().single()
    steps = played(env, [IDLE] * 10)
    _, _, terminated, truncated, info = steps[-1]
    assert not terminated
    assert truncated
    assert info["outcome"]["route_completion"] == 100
    assert sum(info["reward_terms"]["progress"] for *_, info in steps) == pytest.approx(100)
    # 25 m/s, a second a step.
    assert len(steps) == 3


def alone(env, seed, begin_m=0.0, duration=60):
    """Nobody else, and a beginning so many metres farther on."""
    env.reset(seed=seed)
    road = env.unwrapped
    road.config["duration"] = duration
    road.road.vehicles[:] = [road.vehicle]
    lane = road.vehicle.lane
    along = lane.local_coordinates(road.vehicle.position)[0]
    road.vehicle.position = lane.position(along - begin_m, 0.0)
    road.vehicle.on_state_update()
    env._driven = type(env._driven)(road, 400.0)


def to_the_end(env, action):
    found = [env.step(action)]
    while not (found[-1][2] or found[-1][3]):
        found.append(env.step(action))
    return found


@pytest.mark.parametrize("action", [IDLE, FASTER])
def test_who_drives_the_whole_route_has_arrived_wherever_decisions_fall(roundabout, action):
    """A decision is as long as the last lane of the route, so its end is passed between two of them."""
    for begin_m in range(0, 17, 2):
        alone(roundabout, 0, begin_m)
        steps = to_the_end(roundabout, action)
        _, _, terminated, truncated, info = steps[-1]
        assert info["outcome"]["arrived"], begin_m
        assert info["outcome"]["route_completion"] == 100
        assert truncated
        assert not terminated
        assert sum(info["reward_terms"]["progress"] for *_, info in steps) == pytest.approx(100)
        # 80 to 96 m and some more where a car swings out, at 8 m/s and, after two decisions, at 16.
        assert len(steps) <= (16 if action == IDLE else 9)


def test_who_leaves_the_route_has_not_arrived(roundabout):
    """Around the ring once more, past the way out."""
    alone(roundabout, 0)
    road = roundabout.unwrapped
    road.vehicle.route = [("ser", "ses", 0), ("ses", "se", 0), *[("se", "ex", 0), ("ex", "ee", 0), ("ee", "nx", 0)]]
    road.vehicle.route += [("nx", "ne", 0), ("ne", "wx", 0), ("wx", "we", 0), ("we", "sx", 0), ("sx", "sxs", 0)]
    for _ in range(14):
        *_, over, cut, info = roundabout.step(FASTER)
        assert not over
        assert not cut
    assert info["reward_terms"]["progress"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_an_arrival_at_the_intersection_pays_for_its_own_metres_alone(seed):
    """HighwayEnv says who has arrived: 25 m into a lane of 100 m, where the route ends."""
    config = {"simulation_frequency": 5, "initial_vehicle_count": 0, "spawn_probability": 0.0}
    env = Highway.Config(id="intersection-v2", arguments={"config": config}).build().single()
    alone(env, seed)
    steps = to_the_end(env, 2)
    progress = [info["reward_terms"]["progress"] for *_, info in steps]
    assert steps[-1][3]
    assert steps[-1][4]["outcome"]["arrived"]
    assert sum(progress) == pytest.approx(100)
    # 9 m/s all the way.
    assert progress[-1] <= 1.2 * max(progress[:-1])


@pytest.mark.parametrize(("name", "action"), [("intersection-v2", 2), ("roundabout-v1", FASTER)])
def test_an_arrival_ends_an_episode_by_whichever_reward(name, action):
    """For good where it does so in HighwayEnv and its reward is learned from; what is told of it is the same."""
    config = {"simulation_frequency": 5, "initial_vehicle_count": 0, "spawn_probability": 0.0}
    arguments = {"config": config if name.startswith("inter") else QUICK["config"]}
    plain = gymnasium.make(name, **arguments)
    plain.reset(seed=0)
    plain.unwrapped.road.vehicles[:] = [plain.unwrapped.vehicle]
    theirs = to_the_end(plain, action)
    found = {}
    for own in (True, False):
        env = Highway.Config(id=name, arguments=arguments, own_reward=own).build().single()
        alone(env, 0, duration=plain.unwrapped.config["duration"])
        found[own] = to_the_end(env, action)
    assert len(found[True]) == len(found[False]) <= len(theirs)
    assert [step[1] for step in found[True]] == [step[1] for step in theirs[: len(found[True])]]
    for_good = len(found[True]) == len(theirs) and theirs[-1][2]
    assert for_good == name.startswith("intersection")
    assert found[True][-1][2:4] == (for_good, not for_good)
    assert found[False][-1][2:4] == (False, True)
    assert found[True][-1][4]["outcome"] == found[False][-1][4]["outcome"]
    assert found[True][-1][4]["outcome"]["arrived"]


# Of HighwayEnv: an older name, and what it tells of steps in one dict.
@pytest.mark.filterwarnings("ignore:.*WARN")
def test_an_arrival_on_the_racetrack_ends_the_episode_by_either_reward():
    for own in (True, False):
        env = Highway.Config(id="racetrack-v1", arguments=QUICK, own_reward=own, straight_m=5.0).build().single()
        env.reset(seed=0)
        env.unwrapped.road.vehicles[:] = [env.unwrapped.vehicle]
        steps = to_the_end(env, np.zeros(env.action_space.shape, np.float32))
        assert steps[-1][2:4] == (False, True)
        assert steps[-1][4]["outcome"]["arrived"]
        # Within a second or two: who goes on without steering leaves the road only later.
        assert len(steps) < 10


# Of HighwayEnv: an older name, and what it tells of steps in one dict.
@pytest.mark.filterwarnings("ignore:.*WARN")
def test_where_there_is_no_route_an_arrival_pays_for_what_is_left():
    """Continuous control of the intersection: HighwayEnv says who has arrived, long before 400 m."""
    config = {"simulation_frequency": 5, "initial_vehicle_count": 0, "spawn_probability": 0.0}
    env = Highway.Config(id="intersection-v1", arguments={"config": config}).build().single()
    env.reset(seed=1)
    env.unwrapped.road.vehicles[:] = [env.unwrapped.vehicle]
    progress = [step[4]["reward_terms"]["progress"] for step in to_the_end(env, np.zeros(2, np.float32))]
    assert sum(progress) == pytest.approx(100)
    assert progress[-1] > 10 * max(progress[:-1])


def test_highwayenvs_own_reward_is_told_beside(roundabout):
    own = Highway.Config(id="roundabout-v1", arguments=QUICK, own_reward=True).build().single()
    plain = gymnasium.make("roundabout-v1", **QUICK)
    plain.reset(seed=3)
    mine, theirs = played(own, [SLOWER] * 4, 3), [plain.step(SLOWER) for _ in range(4)]
    assert [step[1] for step in mine] == [pytest.approx(step[1]) for step in theirs]
    both = played(roundabout, [IDLE] * 15, 3)[-1][4]["outcome"]["own_return"]
    again = played(own, [IDLE] * 15, 3)
    assert both == pytest.approx(sum(step[1] for step in again))


def test_a_place_is_found_again():
    environment = Highway.Config(id="roundabout-v1", arguments=QUICK).build()
    assert environment.layout.actions.choices == 5
    world, other = environment.make(2, seed=1), environment.make(2, seed=1)
    rng = np.random.default_rng(0)
    world.reset()
    for _ in range(7):
        seen = world.step(rng.integers(0, 5, 2))[0]
    assert np.array_equal(other.load_state_dict(world.state_dict()), seen)
    for _ in range(5):
        action = rng.integers(0, 5, 2)
        mine, theirs = world.step(action), other.step(action)
        assert np.array_equal(mine[0], theirs[0])
        assert np.array_equal(mine[1], theirs[1])


def test_a_run_of_before_is_told_of_changed_rules_where_its_episode_ends_otherwise():
    """Who arrived between two decisions went on once. What does not end otherwise goes on, whichever rules it began by."""
    world = Highway.Config(id="roundabout-v1", arguments=QUICK).build().make(1, seed=0)
    world.reset()
    done = []
    for _ in range(200):
        place = world.state_dict()
        *_, infos = world.step(np.array([FASTER]))
        done.append(FASTER)
        if "outcome" in infos:
            if infos["outcome"]["arrived"][0]:
                break
            done = []
    assert place["rules"].tolist() == [1]
    assert np.array_equal(world.load_state_dict({**place, "rules": np.zeros(1, int)}), world.load_state_dict(place))
    del place["rules"]
    world.load_state_dict(place)
    place |= {"length": np.array([len(done) + 1]), "action": np.full((1, len(done) + 1, 1), FASTER)}
    with pytest.raises(
        CheckpointError, match=r"earlier version of anabranch, and since then an arrival ends .*; begin a"
    ):
        world.load_state_dict(place)
    # By the same rules it can only be the environment.
    with pytest.raises(CheckpointError, match="it is another one than before"):
        world.load_state_dict({**place, "rules": np.ones(1, int)})
