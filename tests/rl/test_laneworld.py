"""LaneWorld as it is driven in: what is worth what, what ends an episode, and that a place in it is kept to the bit."""

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")

from anabranch.errors import CheckpointError, ConfigError, InputError  # noqa: E402
from anabranch.rl import PPO, LaneWorld, judge  # noqa: E402
from anabranch.rl.laneworld import Settings  # noqa: E402
from anabranch.rl.laneworld.judge import _danger  # noqa: E402
from anabranch.rl.laneworld.lane_graph import GIVE_WAY, LIGHT, STOP_SIGN  # noqa: E402
from anabranch.rl.laneworld.state import START_M  # noqa: E402
from anabranch.rl.rewards import FACTORS, RouteReward  # noqa: E402
from anabranch.testing import check_task  # noqa: E402
from anabranch.train import TaskRunConfig, TrainConfig  # noqa: E402
from rl_roads import PLAIN, SMALL, alone, before_line, drives, put, until_all_end, world  # noqa: E402

# What a route is worth


def test_a_route_without_a_fault_is_worth_a_hundred():
    made = alone(6, reward=PLAIN)
    total, found = until_all_end(made, drives)
    assert total == pytest.approx(np.full(6, 100.0), abs=1e-6)
    for outcome in found:
        assert outcome["route_completion"] == outcome["driving_score"] == 100
        assert outcome["finished"] == 1
        assert outcome["cut"]


def test_terms_give_the_reward_exactly():
    made, rng = world(8), np.random.default_rng(0)
    seen = set()
    for _ in range(150):
        action = drives(made, 12.0) + rng.normal(0, 0.3, (8, 2))
        _, reward, over, _, infos = made.step(action)
        terms = infos["reward_terms"]
        product = np.ones(8)
        for name in FACTORS:
            assert ((terms[name] >= 0) & (terms[name] <= 1)).all()
            seen |= {name for value in terms[name] if value < 1}
            product = product * terms[name]
        assert np.array_equal(reward, terms["progress"] * product + terms["terminal"])
        assert (reward <= terms["progress"]).all()
        assert (terms["progress"] >= 0).all()
        assert (terms["terminal"][~over] == 0).all()
    assert {"outside", "speed", "comfort"} <= seen


def test_an_outcome_counts_what_was_driven():
    made = alone(2)
    _, found = until_all_end(made, drives)
    for outcome in found:
        assert 3 < outcome["mean_speed"] < 7
        assert outcome["infractions_per_km"] == 0
        assert 0.5 <= outcome["comfort"] <= 1


# What ends an episode


def test_running_into_a_car_ends_it_with_the_hint():
    made = world(2, walkers=0)
    # The first car of world 0 stands right before it, and that of world 1 just beside.
    for row, (along, across) in enumerate(((4.6, 0.0), (0.0, 2.6))):
        put(made, row, along, across)
    _, reward, over, cut, infos = made.step(np.zeros((2, 2)))
    assert over.tolist() == [True, False]
    assert not cut.any()
    assert infos["outcome"]["vehicle"][0] == 1
    assert infos["outcome"]["driving_score"][0] == pytest.approx(0.6 * infos["outcome"]["route_completion"][0])
    assert infos["reward_terms"]["terminal"].tolist() == [-1, 0]
    assert reward[0] < 0


def test_running_into_somebody_ends_it():
    made = world(1, traffic=0, walkers=1)
    state, scene = made.state, made.scene
    # Crossing right now, in the middle of the lane before the car: a third of 10.8 m from 3.6 m beside.
    scene.walker_s_WM[0], scene.walker_period_WM[0] = state.s_W[0] + 2.4, 20.0
    scene.walker_phase_WM[0] = -scene.offset_W[0] - 0.1 + 3.6 / 1.4
    _, _, over, _, infos = made.step(np.zeros((1, 2)))
    assert over[0]
    assert infos["outcome"]["walker"][0] == 1


@pytest.mark.parametrize(("time", "ends"), [(1.0, False), (9.0, False), (15.0, True)])
def test_a_red_light_ends_it_and_green_and_yellow_do_not(time, ends):
    made = alone(8)
    rows = before_line(made, LIGHT, 0.3)
    for row in rows:
        route = made.scene.route_W[row]
        offset = made.library.stop_offset_QJ[route, np.flatnonzero(made.library.stop_kind_QJ[route] == LIGHT)[0]]
        made.scene.offset_W[row] = time - offset
    _, _, over, _, infos = made.step(np.zeros((8, 2)))
    assert over[rows].tolist() == [ends] * len(rows)
    if ends:
        assert infos["outcome"]["red_light"][rows].tolist() == [1] * len(rows)


@pytest.mark.parametrize("halts", [True, False])
def test_a_stop_sign_asks_for_a_halt(halts):
    made = alone(16, maps=4)
    rows = before_line(made, STOP_SIGN, 0.3)
    if halts:
        made.state.pose_W4[rows, 3] = 0.0
        made.step(np.zeros((16, 2)))
        made.state.pose_W4[rows, 3] = 5.0
    over = made.step(np.zeros((16, 2)))[2]
    assert over[rows].tolist() == [not halts] * len(rows)


def test_a_road_that_goes_first_only_asks():
    made = alone(16, maps=4)
    rows = before_line(made, GIVE_WAY, 0.3)
    assert not made.step(np.zeros((16, 2)))[2][rows].any()


def test_leaving_the_road_ends_it():
    made = alone(1)
    total, found = until_all_end(made, lambda _: np.array([[-1.0, 0.3]]))
    assert found[0]["off_road"] == 1
    assert found[0]["route_completion"] < 20
    assert total[0] < 20


def test_standing_for_too_long_ends_it():
    made = alone(1, start_speed=0.0, blocked_s=2.0)
    ends = [made.step(np.array([[0.0, -1.0]]))[2][0] for _ in range(20)]
    assert ends == [False] * 19 + [True]


def test_an_episode_is_over_when_its_time_is():
    made = alone(1, timeout_s=1.5)
    ends = [made.step(drives(made, 2.0))[2][0] for _ in range(15)]
    assert ends == [False] * 14 + [True]


# Soft factors


def test_windows_count_for_exactly_so_many_steps():
    made = alone(1, reward=RouteReward(window=5))
    # Braking hard is uncomfortable; before and long after that everything is well.
    made.state.pose_W4[0, 3] = 5.0
    made.step(np.zeros((1, 2)))
    made.state.ttc_W[0] = 5
    made.state.comfort_WC[0, 1] = 5
    ttc, comfort = [], []
    for _ in range(7):
        terms = made.step(drives(made, 5.0))[4]["reward_terms"]
        ttc.append(terms["ttc"][0])
        comfort.append(made.state.comfort_WC[0, 1] > 0)
    assert ttc == [0.5] * 4 + [1.0] * 3
    assert comfort == [True] * 4 + [False] * 3


def test_a_collision_that_comes_counts_half():
    made = world(3, walkers=0)
    # 4 m before the ego car, bumper to bumper: at 6 m/s it is there in 0.67 s, at 4 m/s in a second.
    for row, speed in enumerate((6.0, 4.0, 0.05)):
        put(made, row, 8.5, 0.0)
        made.state.pose_W4[row, 3] = speed
    terms = made.step(np.zeros((3, 2)))[4]["reward_terms"]
    assert terms["ttc"].tolist() == [0.5, 1.0, 1.0]


def test_driving_beside_the_middle_and_outside_of_lanes():
    made = alone(1, shortest_m=300.0)
    state = made.state
    heading = state.pose_W4[0, 2]
    # 0.7 m to the left: within the lane (0.95 + 0.7 < 1.75), and beside its middle.
    state.pose_W4[0, :2] += 0.7 * np.array([-np.sin(heading), np.cos(heading)])
    state.pose_W4[0, 3] = 1.0
    values = []
    for _ in range(33):
        terms = made.step(np.zeros((1, 2)))[4]["reward_terms"]
        values.append(terms["centre"][0])
        assert terms["outside"][0] == 1
    # For 3 s that is nothing.
    assert values == [1.0] * 30 + [0.5] * 3
    state.pose_W4[0, :2] += 0.2 * np.array([-np.sin(heading), np.cos(heading)])
    assert made.step(np.zeros((1, 2)))[4]["reward_terms"]["outside"][0] == 0


def test_driving_too_fast_is_worth_less():
    made = alone(1)
    limit = made.library.at(made.scene.route_W, made.state.s_W)[0, 3]
    made.state.pose_W4[0, 3] = limit + 1.115
    assert made.step(np.zeros((1, 2)))[4]["reward_terms"]["speed"][0] == pytest.approx(0.5, abs=1e-6)


def test_the_shaped_reward_takes_the_place():
    made = alone(2, shaped=True)
    _, reward, _, _, infos = made.step(drives(made, 6.0))
    assert np.array_equal(reward, infos["reward_terms"]["shaped"])
    assert (reward > 0.5).all()


# gymnasium's side, and what is kept


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([[0.0, 0.0]] * 3 + [[float("nan"), 0.5]], r"the action of world 3 is \[nan, 0.5\]"),
        ([[0.0, 0.0]] * 3, r"actions have shape \[3, 2\]; 4 worlds take \[4, 2\]"),
        ([0.0, 0.0], r"shape \[2\]"),
    ],
)
def test_actions_that_are_none_move_no_world(actions, message):
    driven = alone()
    before = driven.state_dict()
    with pytest.raises(InputError, match=message):
        driven.step(actions)
    for name, array in driven.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_actions_beyond_the_range_count_as_its_end():
    far, near = alone(), alone()
    far.step([[np.inf, -7.0]] * 4)
    near.step([[1.0, -1.0]] * 4)
    for name, array in near.state_dict().items():
        np.testing.assert_array_equal(far.state_dict()[name], array)


def test_what_is_seen_is_in_the_space():
    made, rng = world(6), np.random.default_rng(1)
    finals = 0
    for _ in range(120):
        seen, _, over, cut, infos = made.step(rng.uniform(-1, 1, (6, 2)))
        assert made.observation_space.contains(seen)
        assert all(np.isfinite(array).all() for array in seen.values())
        if (over | cut).any():
            finals += 1
            assert np.array_equal(infos["_final_obs"], over | cut)
            row = int(np.flatnonzero(over | cut)[0])
            assert not np.array_equal(infos["final_obs"]["policy"][row], seen["policy"][row])
            assert made.state.step_W[row] == 0
            assert made.state.s_W[row] == START_M
    assert finals
    assert np.abs(seen["policy"]).max() < 10


def test_the_nearest_others_are_seen_first():
    made = world(1, walkers=0)
    put(made, 0, 12.0, 0.0)
    policy = made.seen()["policy"][0]
    near = policy[34:134].reshape(10, 10)
    assert near[0, 0] == 1
    assert near[0, 1] * 30 == pytest.approx(12.0, abs=0.3)
    assert near[0, 2] * 30 == pytest.approx(0.0, abs=0.5)
    assert not near[1:].any()


def test_a_place_is_kept_to_the_bit():
    """Also where episodes have ended since: the other begins with nothing but the arrays."""
    rng = np.random.default_rng(2)
    actions = rng.uniform(-1, 1, (160, 5, 2)) + np.array([0.0, 0.3])
    made = world(5)
    for action in actions[:80]:
        seen = made.step(action)[0]
    assert made.state.episode_W.sum() > 0
    other = world(5)
    found = other.load_state_dict(made.state_dict())
    assert all(np.array_equal(found[name], seen[name]) for name in seen)
    for action in actions[80:]:
        mine, theirs = made.step(action), other.step(action)
        assert all(np.array_equal(mine[0][name], theirs[0][name]) for name in seen)
        for one, two in zip(mine[1:4], theirs[1:4], strict=True):
            assert np.array_equal(one, two)
    with pytest.raises(CheckpointError, match=r"episode_W of the state is \[5\], and \[4\] is needed"):
        world(4).load_state_dict(made.state_dict())


def test_a_part_of_the_worlds_is_as_in_all_of_them():
    whole, part = world(5), world(2, first=3)
    rng = np.random.default_rng(3)
    for _ in range(60):
        action = rng.uniform(-1, 1, (5, 2)) * [0.3, 1.0]
        mine, theirs = whole.step(action), part.step(action[3:])
        for name in ("policy", "critic"):
            assert mine[0][name][3:] == pytest.approx(theirs[0][name], abs=1e-6)
        assert mine[1][3:] == pytest.approx(theirs[1], abs=1e-9)


def test_traffic_keeps_off_each_other_and_moves():
    """Nobody drives into the car before: where cars overlap it is at crossings without lights, and seldom."""
    made = world(4, traffic=12, walkers=0, blocked_s=1000.0)
    overlaps = looked = 0
    moved = []
    for step in range(400):
        # The ego car stands out of the way.
        made.state.pose_W4[:, :2] = 5e5
        made.state.s_W[:] = made.state.done_m_W[:] = START_M
        made._move_traffic()
        made.state.step_W += 1
        if step % 20 == 0:
            others = made.others()
            near = np.hypot(
                others[:, :, None, 0] - others[:, None, :, 0], others[:, :, None, 1] - others[:, None, :, 1]
            )
            alive = made.state.alive_WK[:, :, None] & made.state.alive_WK[:, None, :]
            overlaps += int(((near < 1.9) & alive).sum() - made.state.alive_WK.sum()) // 2
            looked += int(made.state.alive_WK.sum())
            moved.append(made.state.speed_WK[made.state.alive_WK].mean())
    assert looked > 600
    assert overlaps / looked < 0.02
    assert np.mean(moved) > 3
    assert made.state.turn_WK.sum() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shortest_m": 500.0, "longest_m": 520.0}, "let there be 50 m between both"),
        ({"traffic": -1}, "traffic"),
        ({"start_speed": float("nan")}, "start_speed"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**fields)


def test_a_policy_learns_there_and_is_resumed_to_the_bit():
    config = PPO.Config(
        environment=LaneWorld.Config(world=Settings(**SMALL)),
        num_envs=4,
        rollout_steps=16,
        epochs=2,
        hidden=(8,),
        eval_episodes=2,
    )
    run = TaskRunConfig(task=config, train=TrainConfig(batch_size=32))
    assert config.environment.build().layout.num_private == 10
    check_task(
        run.replace(task=config.replace(environment=LaneWorld.Config(world=Settings(**SMALL, timeout_s=5.0)))),
        ranks=False,
    )


def test_measures_of_an_evaluation():
    environment = LaneWorld.Config(world=Settings(**SMALL, timeout_s=4.0)).build()
    torch.manual_seed(0)
    model = PPO.Config(environment=environment.config, hidden=(8,)).build().network()
    measures = judge(model, environment, episodes=5).measures()
    assert {"route_completion", "driving_score", "infractions_per_km", "comfort", "stands_still"} <= set(measures)
    assert 0 <= measures["driving_score"] <= measures["route_completion"] <= 100


def test_whether_one_has_halted_at_a_sign_can_be_seen():
    """Two worlds alike but for that: one step on, one has a fault. A policy without memory must be able to tell them apart."""
    first, second = alone(16, maps=4), alone(16, maps=4)
    row = before_line(first, STOP_SIGN, 0.3)[0]
    before_line(second, STOP_SIGN, 0.3)
    which, _ = first.library.next_stop(first.scene.route_W[[row]], first.state.front_m_W[[row]])
    second.state.halted_W[row] = which[0] + 1
    told, halted = (made.seen()["policy"][row] for made in (first, second))
    assert np.flatnonzero(told != halted).size == 2
    assert first.step(np.zeros((16, 2)))[2][row]
    assert not second.step(np.zeros((16, 2)))[2][row]


def test_nobody_waits_in_a_lane():
    """Walkers wait beside the road, on the far side too, wherever there are other lanes."""
    made = world(64, maps=8, routes=16, traffic=20, walkers=4, longest_m=1000.0)
    library, scene, waits = made.library, made.scene, 0
    for row in range(64):
        lanes = np.concatenate([point for point, _ in library.lanes_M[scene.map_W[row]]])
        for s in scene.walker_s_WM[row][scene.walker_s_WM[row] >= 0]:
            x, y, heading = library.at(scene.route_W[[row]], np.array([s]))[0, :3]
            for across in (-3.6, 7.2):
                place = np.array([x - across * np.sin(heading), y + across * np.cos(heading)])
                # Traffic halts for who is within 2.1 m of its path.
                assert np.hypot(*(lanes - place).T).min() > 2.1
                waits += 1
    # Whose first place will not do has another: most are there.
    assert waits > 0.7 * 2 * 64 * 4


def test_a_danger_is_one_however_fast_it_is():
    """50 m behind a car that stands, at 60 m/s: within a second both overlap."""
    made = alone(1)
    state = made.state
    state.pose_W4[0, 3] = 60.0
    x, y, heading, _ = state.pose_W4[0]
    others = np.zeros((1, 1, 7))
    for metres, expected in ((50.0, True), (56.0, False)):
        others[0, 0] = x + metres * np.cos(heading), y + metres * np.sin(heading), heading, 0.0, 4.5, 1.9, 0.0
        assert _danger(state, others)[0] == expected


def test_a_picture_shows_the_car_in_the_middle():
    pytest.importorskip("PIL")
    made = world(2)
    picture = LaneWorld.Config(world=Settings(**SMALL)).build().frame(made)
    assert picture.shape == (400, 400, 3)
    assert picture.dtype == np.uint8
    assert picture[260, 200].tolist() == [230, 74, 60]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 4
