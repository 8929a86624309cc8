"""What LaneWorld is made of: boxes against a naive test of polygons, cars on circles, curves, the driver model, maps and lights."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.rl.laneworld.bicycle import HALF_BASE, STEER, drive
from anabranch.rl.laneworld.geometry import arc, boxes_overlap, connect, resampled, straight
from anabranch.rl.laneworld.lane_graph import CYCLE_S, GIVE_WAY, LIGHT, STOP_SIGN, light_state
from anabranch.rl.laneworld.library import NOWHERE, library_of
from anabranch.rl.laneworld.roads import RoadMap
from anabranch.rl.laneworld.traffic import gaps_ahead, idm, stop_ahead

# Boxes


def corners(x, y, heading, length, width):
    cos, sin = math.cos(heading), math.sin(heading)
    halves = [(a * length / 2, b * width / 2) for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1))]
    return [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in halves]


def side(p, q, r):
    return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])


def crosses(p, q, r, s):
    """Whether two pieces of lines have a point in common."""
    one, two = side(p, q, r), side(p, q, s)
    three, four = side(r, s, p), side(r, s, q)
    return one * two <= 0 and three * four <= 0 and not one == two == 0


def holds(polygon, p):
    edges = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return all(side(a, b, p) >= 0 for a, b in edges)


def naive_overlap(first, second):
    """A corner of one within the other, or sides that cross."""
    one, two = corners(*first), corners(*second)
    if any(holds(one, p) for p in two) or any(holds(two, p) for p in one):
        return True
    sides = [list(zip(each, each[1:] + each[:1], strict=True)) for each in (one, two)]
    return any(crosses(*a, *b) for a in sides[0] for b in sides[1])


BOX = st.tuples(st.floats(-4, 4), st.floats(-4, 4), st.floats(-7, 7), st.floats(0.5, 6), st.floats(0.5, 3))


@settings(max_examples=150)
@given(BOX, BOX)
@example((0, 0, 0, 4, 2), (0, 0, 0.5, 0.5, 0.5))
@example((0, 0, 0, 4, 1), (0, 0, math.pi / 2, 4, 1))
def test_overlap_is_that_of_polygons(first, second):
    found = bool(boxes_overlap(first, second))
    # Boxes that just about touch are left to rounding: they must be told alike a hair larger or smaller.
    grown, shrunk = ((*first[:3], first[3] + each, first[4] + each) for each in (1e-6, -1e-6))
    if naive_overlap(grown, second) == naive_overlap(shrunk, second):
        assert found == naive_overlap(first, second)


def test_overlap_by_hand():
    # Side by side 2 m apart: cars 1.9 m wide miss each other by 10 cm, and touch when one turns by 45 degrees.
    assert not boxes_overlap((0, 0, 0, 4.5, 1.9), (0, 2.0, 0, 4.5, 1.9))
    assert boxes_overlap((0, 0, 0, 4.5, 1.9), (0, 2.0, math.pi / 4, 4.5, 1.9))
    # One after the other, bumper to bumper at 4.5 m.
    x = np.array([4.4, 4.5, 4.6])
    assert boxes_overlap((0, 0, 0, 4.5, 1.9), (x, 0, 0, 4.5, 1.9)).tolist() == [True, True, False]
    # Crosses whose corners all lie outside of the other.
    assert boxes_overlap((0, 0, 0, 8, 1), (0, 0, math.pi / 2, 8, 1))


# Cars


def test_a_car_with_its_wheels_turned_drives_a_circle():
    """Radius 1.4 m / sin(beta): after a whole turn it is where it began."""
    slip = math.atan(0.5 * math.tan(0.6 * STEER))
    radius = HALF_BASE / math.sin(slip)
    speed, steps = 4.0, 4_000
    dt = 2 * math.pi * radius / speed / steps
    pose = np.array([[0.0, 0.0, 0.0, speed]])
    centre = np.array([radius * math.cos(slip + math.pi / 2), radius * math.sin(slip + math.pi / 2)])
    worst = 0.0
    for _ in range(steps):
        pose = drive(pose, np.array([[0.6, 0.0]]), dt)
        worst = max(worst, abs(math.hypot(*(pose[0, :2] - centre)) - radius))
    assert worst < 2e-2
    assert pose[0, :2] == pytest.approx([0, 0], abs=2e-2)
    assert pose[0, 2] == pytest.approx(2 * math.pi, abs=1e-6)


def test_pedals_by_hand():
    pose = np.array([[0.0, 0.0, 0.0, 2.0]] * 4)
    action = np.array([[0.0, 1.0], [0.0, 0.0], [0.0, -0.5], [0.0, -1.0]])
    after = drive(pose, action, 0.5)
    # 3 m/s^2 for half a second; rolling; braking at 3; and at 6, but never backwards.
    assert after[:, 3].tolist() == [3.5, 2.0, 0.5, 0.0]
    assert after[:, 0].tolist() == [1.0] * 4


# Lines


def heading_at(points, place):
    one, two = (points[0], points[1]) if place == 0 else (points[-2], points[-1])
    return math.atan2(two[1] - one[1], two[0] - one[0])


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ((0.0, 0.0, 0.0), (10.0, 10.0, math.pi / 2)),  # a quarter to the left
        ((0.0, 0.0, 0.0), (14.0, -6.0, -math.pi / 2)),  # to the right, with a straight piece before
        ((0.0, 0.0, 0.0), (20.0, 3.0, 0.0)),  # the same heading, to the side
        ((5.0, 5.0, 2.0), (-6.0, 20.0, 2.6)),
    ],
)
def test_curves_begin_and_end_where_they_are_to(begin, end):
    points = connect(begin, end)
    assert points[0] == pytest.approx(begin[:2])
    assert points[-1] == pytest.approx(end[:2], abs=1e-9)
    for place, pose in ((0, begin), (-1, end)):
        assert math.remainder(heading_at(points, place) - pose[2], 2 * math.pi) == pytest.approx(0, abs=0.03)
    assert np.hypot(*np.diff(points, axis=0).T).max() < 0.6


def test_a_quarter_turn_is_an_arc():
    points = connect((0.0, 0.0, 0.0), (10.0, 10.0, math.pi / 2))
    assert np.hypot(points[:, 0], points[:, 1] - 10.0) == pytest.approx(np.full(len(points), 10.0), abs=1e-9)


def test_points_at_equal_distances():
    points, length = resampled(np.concatenate([straight((0, 0), (3, 0)), straight((3, 0), (3, 2.5))]))
    assert length == pytest.approx(5.5)
    assert points.tolist() == pytest.approx(np.array([[0, 0], [1, 0], [2, 0], [3, 0], [3, 1], [3, 2]]))
    round_it, length = resampled(arc((0, 0), 5.0, 0.0, math.pi))
    assert length == pytest.approx(5 * math.pi, rel=1e-3)
    assert len(round_it) == 16


# The driver model


def test_the_driver_model_by_hand():
    free = np.array([NOWHERE])
    # At its pace on a free road nothing changes; from standing it goes at 1.5 m/s^2.
    assert idm(np.array([10.0]), np.array([10.0]), free, np.zeros(1))[0] == pytest.approx(0, abs=1e-9)
    assert idm(np.array([0.0]), np.array([10.0]), free, np.zeros(1))[0] == pytest.approx(1.5)
    # Behind one of the same speed: s* = 2 + 5 * 1.5 = 9.5; at that gap 1.5 (1 - 0.5^4 - 1).
    same = idm(np.array([5.0]), np.array([10.0]), np.array([9.5]), np.array([5.0]))
    assert same[0] == pytest.approx(-1.5 * 0.0625)
    # Something that stands: s* = 2 + 7.5 + 25 / (2 sqrt 3).
    wanted = 9.5 + 25 / (2 * math.sqrt(3))
    stands = idm(np.array([5.0]), np.array([10.0]), np.array([20.0]), np.zeros(1))
    assert stands[0] == pytest.approx(1.5 * (1 - 0.0625 - (wanted / 20) ** 2))
    assert idm(np.array([20.0]), np.array([10.0]), np.array([0.5]), np.zeros(1))[0] == -8


# Maps


@pytest.fixture(scope="module", params=[0, 1, 2])
def road_map(request):
    return RoadMap(np.random.default_rng(request.param))


def test_lanes_of_a_map_hang_together(road_map):
    for segment in road_map.segments:
        assert segment.next or segment.length > 0
        for follower in segment.next:
            other = road_map.segments[follower]
            assert segment.point_P2[-1] == pytest.approx(other.point_P2[0], abs=1e-6)
            turn = heading_at(segment.point_P2, -1) - heading_at(other.point_P2, 0)
            assert math.remainder(turn, 2 * math.pi) == pytest.approx(0, abs=0.12)


def test_every_road_leads_to_every_road(road_map):
    for road in road_map.roads:
        far, _ = road_map.distances(road)
        assert np.isfinite(far[road_map.roads]).all()


def test_the_grammar_makes_every_kind_of_node():
    kinds = {kind for seed in range(6) for kind in RoadMap(np.random.default_rng(seed)).kinds}
    assert kinds == {"bend", "T", "lights", "roundabout"}
    stops = {part.stop for seed in range(6) for part in RoadMap(np.random.default_rng(seed)).segments}
    assert stops == {0, LIGHT, STOP_SIGN, GIVE_WAY}


def test_edges_are_where_the_road_ends(road_map):
    """By the lanes of the whole map: beside any place of a road, as far as the edge there are lanes, and behind it there is none."""
    segments = road_map.segments
    points = np.concatenate([resampled(each.point_P2, 0.5)[0] for each in segments])
    wide = 0
    for number, segment in enumerate(segments):
        # Roads, without the metres beside which junctions begin.
        if segment.is_junction or not (begins := np.flatnonzero(np.arange(len(segment.point_P2)) % 40 == 20)[:-1]).size:
            continue
        along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(segment.point_P2, axis=0).T))])
        for place in begins:
            edges = segment.edges_at(along[place : place + 1])[0]
            (x1, y1), (x2, y2) = segment.point_P2[place - 1], segment.point_P2[place + 1]
            left = np.array([y1 - y2, x2 - x1]) / math.hypot(x2 - x1, y2 - y1)
            for side, edge in ((left, edges[0]), (-left, edges[1])):
                wide += edge > 6.0 or (side is not left and edge > 2.0)
                inside, outside = (segment.point_P2[place] + side * far for far in (edge - 0.2, edge + 1.0))
                # Between two lanes that part there is a little more.
                assert np.hypot(*(points - inside).T).min() < 2.2, (number, place)
                if not _near_junction(segments, outside):
                    assert np.hypot(*(points - outside).T).min() > 1.75, (number, place)
    # Some roads have a second lane, on either side.
    assert wide > 10


def _near_junction(segments, place):
    return any(np.hypot(*(each.point_P2 - place).T).min() < 6.0 for each in segments if each.is_junction)


def test_routes_are_shortest_paths_of_the_wanted_length(road_map):
    """Against Bellman and Ford: relaxing all edges until nothing changes."""
    begin = road_map.roads[0]
    far, _ = road_map.distances(begin)
    naive = np.full(len(road_map.segments), np.inf)
    naive[begin] = road_map.lengths[begin]
    for _ in road_map.segments:
        for here, segment in enumerate(road_map.segments):
            for there in segment.next:
                naive[there] = min(naive[there], naive[here] + road_map.lengths[there])
    assert far == pytest.approx(naive)
    for path in road_map.routes(np.random.default_rng(0), 6, 200.0, 400.0):
        assert 199 <= path.length <= 400
        assert np.hypot(*np.diff(path.point_P2, axis=0).T) == pytest.approx(np.ones(path.length), abs=0.05)
        # No kinks: never more than 17 degrees in a metre.
        assert np.abs(np.diff(path.heading_P)).max() < 0.3
    with pytest.raises(ConfigError, match="routes are to be 4000 to 4100 m long"):
        road_map.routes(np.random.default_rng(0), 1, 4000.0, 4100.0)


def test_a_map_is_the_same_for_the_same_seed():
    one, two = (RoadMap(np.random.default_rng(5)) for _ in range(2))
    assert one.kinds == two.kinds
    assert all(np.array_equal(a.point_P2, b.point_P2) for a, b in zip(one.segments, two.segments, strict=True))


def test_roads_that_cross_never_have_green_together(road_map):
    time = np.arange(0, 2 * CYCLE_S, 0.1)
    for node in range(len(road_map.kinds)):
        offsets = {
            round(part.offset_s % CYCLE_S, 6)
            for part in road_map.segments
            if part.stop == LIGHT and math.dist(part.point_P2[-1], road_map._place[node]) < 16
        }
        if len(offsets) == 2:
            one, two = (light_state(time, np.full(len(time), offset))[0] for offset in offsets)
            # Red for the one from when the other may go until nobody of that comes any more.
            assert not ((one < 2) & (two < 2)).any()


def test_lights_by_hand():
    state, left = light_state(np.array([0.0, 7.5, 8.0, 9.5, 10.0, 19.0, 20.0]), np.zeros(7))
    assert state.tolist() == [0, 0, 1, 1, 2, 2, 0]
    assert left.tolist() == [8.0, 0.5, 2.0, 0.5, 10.0, 1.0, 8.0]


# Others in the way


@pytest.fixture(scope="module")
def library():
    return library_of(0, 1, 4, 8, 200.0, 600.0)


def naive_gap(library, path, s, length, others):
    """The first of the places ahead that somebody is near to, for each of the others; the least of these gaps, and that one's speed."""
    best, speed = NOWHERE, 0.0
    for x, y, heading, other_speed, other_length in others:
        for look in np.arange(3.0, 40.0, 3.6, dtype=np.float32):
            ahead = s + length / 2 + look
            if ahead > library.length_Q[path]:
                break
            px, py, at, _, _ = library.at(np.array([path]), np.array([ahead]))[0]
            if (x - px) ** 2 + (y - py) ** 2 < 2.1**2:
                gap = max(look - other_length / 2, 0.1)
                if gap < best:
                    best, speed = gap, max(other_speed * math.cos(heading - at), 0.0)
                break
    return best, speed


def test_what_is_in_the_way_is_that_of_a_loop(library):
    rng = np.random.default_rng(0)
    worlds, cars, others = 3, 5, 12
    path = rng.choice(library.traffic_MT[0], (worlds, cars))
    s = rng.uniform(0, 100, (worlds, cars))
    # Others on the same roads, so that many are in the way.
    place = library.at(rng.choice(path.ravel(), (worlds, others)), rng.uniform(0, 120, (worlds, others)))
    around = np.concatenate(
        [place[..., :3], rng.uniform(0, 9, (worlds, others, 1)), np.full((worlds, others, 1), 4.5)], -1
    )
    gap, speed = gaps_ahead(library, path, s, np.full((worlds, cars), 4.5), around)
    assert (gap < NOWHERE).sum() > 3
    for world in range(worlds):
        for car in range(cars):
            expected = naive_gap(library, path[world, car], s[world, car], 4.5, around[world])
            assert (gap[world, car], speed[world, car]) == pytest.approx(expected, rel=1e-4)


def test_red_holds_and_green_does_not(library):
    path = next(path for path in range(len(library.length_Q)) if LIGHT in library.stop_kind_QJ[path])
    which = int(np.flatnonzero(library.stop_kind_QJ[path] == LIGHT)[0])
    s, offset = library.stop_s_QJ[path, which] - 10.0, library.stop_offset_QJ[path, which]
    nobody = np.zeros((1, 2, 5))
    nobody[..., :2] = 1e6

    def line(time, speed):
        return stop_ahead(
            library, np.array([[path]]), np.array([[s]]), np.array([[speed]]), np.array([time - offset]), nobody
        )[0, 0]

    assert line(12.0, 5.0) == pytest.approx(10.0, abs=1e-3)
    assert line(2.0, 5.0) == NOWHERE
    # Yellow holds who can stop at 3 m/s^2 within 10 m, up to 7.7 m/s.
    assert line(9.0, 7.0) == pytest.approx(10.0, abs=1e-3)
    assert line(9.0, 8.0) == NOWHERE


def test_who_gives_way_waits_for_who_comes(library):
    path = next(path for path in range(len(library.length_Q)) if GIVE_WAY in library.stop_kind_QJ[path])
    which = int(np.flatnonzero(library.stop_kind_QJ[path] == GIVE_WAY)[0])
    s = library.stop_s_QJ[path, which] - 5.0
    conflict = library.stop_conflict_QJ2[path, which]
    own = library.at(np.array([path]), np.array([s]))[0]
    around = np.zeros((1, 3, 5))
    around[0, 0, :2] = 1e6
    around[0, 1] = [own[0], own[1], own[2], 3.0, 4.5]

    def waits(distance, speed):
        across = own[2] + math.pi / 2
        x, y = conflict[0] - distance * math.cos(across), conflict[1] - distance * math.sin(across)
        around[0, 2] = [x, y, across, speed, 4.5]
        found = stop_ahead(library, np.array([[path]]), np.array([[s]]), np.full((1, 1), 3.0), np.zeros(1), around)
        return found[0, 0] < NOWHERE

    assert waits(8.0, 6.0)
    assert not waits(30.0, 6.0)
    assert not waits(8.0, 0.0)
    assert not waits(-8.0, 6.0)
