"""LaneWorld's picture from above: what lies where in it, against what the world says of each place."""

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")

from anabranch.rl import ActorCritic, LaneWorld, Sumo  # noqa: E402
from anabranch.rl.environment import flat  # noqa: E402
from anabranch.rl.laneworld import Settings  # noqa: E402
from anabranch.rl.laneworld.geometry import resampled  # noqa: E402
from anabranch.rl.laneworld.lane_graph import CYCLE_S, LIGHT, STOP_SIGN  # noqa: E402
from anabranch.rl.laneworld.observe import BESIDE_PICTURE, look  # noqa: E402
from anabranch.rl.laneworld.raster import SIDE  # noqa: E402
from anabranch.rl.laneworld.roads import RoadMap  # noqa: E402
from anabranch.rl.laneworld.state import AWAY, START_M  # noqa: E402

SMALL = {"maps": 1, "routes": 6, "traffic": 3, "walkers": 1, "longest_m": 400.0, "raster": True}
ROW, COLUMN = SIDE - 14, SIDE // 2


@pytest.fixture(scope="module")
def world():
    return LaneWorld.Config(world=Settings(**SMALL)).build().make(2, seed=0)


def seen(world, *things):
    """The first world's picture with these others: metres ahead, to the left, heading against ours, speed, whether it walks."""
    world.reset()
    found = np.zeros((2, 4, 7))
    found[..., :2], found[..., 4:6] = AWAY, 1.0
    x, y, heading, _ = world.state.pose_W4[0]
    for place, (ahead, left, turn, speed, walks) in enumerate(things):
        at = x + ahead * np.cos(heading) - left * np.sin(heading), y + ahead * np.sin(heading) + left * np.cos(heading)
        found[0, place] = *at, heading + turn, speed, *((0.6, 0.6) if walks else (4.5, 1.9)), walks
    return world.seen(found)["picture"][0]


def test_cars_and_walkers_lie_where_they_are(world):
    picture = seen(world, (12.0, 0.0, 0.0, 6.0, 0), (8.0, 5.0, 0.0, 0.0, 1))
    rows, columns = np.nonzero(picture[4])
    # 4.5 m by 1.9 m around 12 m ahead; in a second 6 m farther.
    assert (rows.min(), rows.max()) == (ROW - 14, ROW - 9)
    assert (columns.min(), columns.max()) == (COLUMN - 1, COLUMN)
    later, _ = np.nonzero(picture[5])
    assert (later.min(), later.max()) == (ROW - 20, ROW - 15)
    # Somebody to the left is to the left.
    rows, columns = np.nonzero(picture[6])
    assert set(rows) <= {ROW - 8, ROW - 7}
    assert set(columns) <= {COLUMN - 6, COLUMN - 5}
    assert set(np.unique(picture[4:7])) == {0.0, 1.0}
    behind = seen(world, (-10.0, -3.0, np.pi / 2, 0.0, 0))[4]
    rows, columns = np.nonzero(behind)
    # Across: 1.9 m along our heading, 4.5 m beside it.
    assert rows.max() - rows.min() <= 2
    assert columns.max() - columns.min() >= 4
    assert rows.min() > ROW


def test_the_road_is_where_lanes_are(world):
    """Every third pixel each way against the nearest point of any lane of the map."""
    pictures = world.reset()[0]["picture"]
    library = world.library
    # The map anew, by its seed: all of its lanes, whether somebody drives there or not.
    segments = RoadMap(np.random.default_rng([0, 0])).segments
    points = np.concatenate([resampled(segment.point_P2)[0] for segment in segments])
    for row in range(2):
        x, y, heading, _ = world.state.pose_W4[row]
        some = np.arange(0, SIDE, 3)
        along, across = np.meshgrid(ROW - some + 0.5, COLUMN - some - 0.5, indexing="ij")
        places = np.stack(
            [
                x + along * np.cos(heading) - across * np.sin(heading),
                y + along * np.sin(heading) + across * np.cos(heading),
            ],
            -1,
        ).reshape(-1, 2)
        near = np.array([np.min(np.hypot(*(points - place).T)) for place in places]).reshape(along.shape)
        assert pictures[row, 0, ::3, ::3][near < 1.2].all()
        assert not pictures[row, 0, ::3, ::3][near > 2.9].any()
        assert not (pictures[row, 1] > pictures[row, 0]).any()
        # The way lies ahead, from where the car is; its limit is that of the library.
        assert pictures[row, 2, ROW, COLUMN]
        assert not pictures[row, 2, ROW + 3 :].any()
        limit = library.at(world.scene.route_W[row : row + 1], np.array([START_M]))[0, 3]
        assert pictures[row, 3, ROW, COLUMN] == pytest.approx(limit / 14, abs=1e-6)


@pytest.mark.parametrize(("second", "value"), [(1.0, 0.1), (8.5, 0.6), (12.0, 1.0)])
def test_the_next_line_says_what_it_asks(world, second, value):
    world.reset()
    library, route = world.library, world.scene.route_W
    found = [
        (way, place)
        for way in library.route_MR[0]
        for place, kind in enumerate(library.stop_kind_QJ[way])
        if kind == LIGHT
    ]
    way, place = found[0]
    route[0], line = way, library.stop_s_QJ[way, place]
    world.state.s_W[0], world.state.front_m_W[0] = line - 20, line - 10
    world.state.pose_W4[0, :3] = library.at(np.array([way]), np.array([line - 20]))[0, :3]
    world.scene.offset_W[0] = second - library.stop_offset_QJ[way, place] + CYCLE_S
    channel = world.seen()["picture"][0, 7]
    assert set(np.unique(channel[channel > 0])) == {np.float32(value)}
    assert 3 <= (channel > 0).sum() <= 8
    library.stop_kind_QJ[way, place], kept = STOP_SIGN, library.stop_kind_QJ[way, place]
    assert world.seen()["picture"][0, 7].max() == 1.0
    # Who has halted there gives way.
    world.state.halted_W[0] = place + 1
    assert world.seen()["picture"][0, 7].max() == np.float32(0.3)
    world.state.halted_W[0] = 0
    library.stop_kind_QJ[way, place] = kept


def test_every_lane_of_a_map_is_drawn(world):
    """Raster and replay: no road that edges and the judge know of is left out because no sampled path goes there."""
    pytest.importorskip("PIL")
    world.reset()
    segments = RoadMap(np.random.default_rng([0, 0])).segments
    points = np.concatenate([resampled(segment.point_P2, 4.0)[0] for segment in segments])
    column, row = world._raster._cell(points[:, 0], points[:, 1])
    drawn = world._raster._drawn_MXY2[0, ..., 0]
    # A cell may be missed by half a metre.
    assert (drawn[column, row] | drawn[column + 1, row] | drawn[column, row + 1]).all()
    environment = LaneWorld.Config(world=Settings(**SMALL)).build()
    for segment in segments[::7]:
        (x1, y1), (x2, y2) = segment.point_P2[:2]
        world.state.pose_W4[0] = x1, y1, np.arctan2(y2 - y1, x2 - x1), 0.0
        # Right before the ego car, which is drawn over its middle: no ground.
        assert environment.frame(world)[260 - 11, 200].tolist() != [86, 120, 84]


def test_numbers_beside_it_are_those_of_the_vector_and_rows_are_those_of_all(world):
    observed, _ = world.reset()
    assert world.observation_space.contains(observed)
    state, scene = world.state, world.scene
    whole = look(
        world.library,
        scene.route_W,
        world.clock_W,
        state.pose_W4,
        state.action_W2,
        state.s_W,
        state.offset_W,
        state.turn_W,
        state.standing_W * 0.1,
        state.halted_W,
        world.others(),
    )
    assert len(BESIDE_PICTURE) == 8
    assert observed["policy"][0, 4:7] == pytest.approx([0.0, 0.0, 1.0], abs=0.05)
    assert np.array_equal(observed["policy"], whole[:, BESIDE_PICTURE])
    second = world.seen(rows=np.array([1]))
    for name, array in second.items():
        assert np.array_equal(array, observed[name][1:]), name


def test_a_policy_sees_it_and_the_referee_shows_as_much(world):
    environment = LaneWorld.Config(world=Settings(**SMALL)).build()
    layout = environment.layout
    assert (layout.picture, layout.num_observed - layout.num_pictured, layout.num_private) == ((8, 48, 48), 8, 10)
    assert Sumo.Config(world=Settings(**SMALL)).build().layout == layout
    import torch

    model = ActorCritic(layout, hidden=(16,))
    acts, value = model(torch.from_numpy(flat(world.reset()[0])))
    assert acts.shape == (2, 4)
    assert value.shape == (2,)
