"""Maps of roads by a grammar, and routes on them.

    map       -> a grid of nodes, each moved a little; roads between neighbours, some left out, so that every node has two at least
    node      -> two roads: a bend        three: T-junction | lights | roundabout        four: lights | roundabout
    road      -> a lane each way, 3.5 m wide, at 30, 40 or 50 km/h, on the right        now and then with a second lane that merges
    junction  -> a line for every way through it: straight, arc, straight; around the ring of a roundabout

A map is a graph of `Segment`s. A route is a shortest path in it, laid out as a `Path`: one point a metre, with all that a driver must know
there. Stems of T-junctions have stop signs; who enters a roundabout, or merges, gives way.
"""
# Shapes: P points of a path, J stops of a path

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

import numpy as np

from anabranch.errors import ConfigError
from anabranch.rl.laneworld.geometry import arc, connect, resampled, straight

__all__ = ["GIVE_WAY", "LIGHT", "STOP_SIGN", "Path", "RoadMap", "Segment", "light_state"]

LANE_WIDTH = 3.5
# What there is at the end of a segment: nothing, a light, a stop sign, a road that goes first.
LIGHT, STOP_SIGN, GIVE_WAY = 1, 2, 3
# Seconds of green, yellow and red. Roads that cross have theirs half a cycle later.
GREEN_S, YELLOW_S, RED_S = 8.0, 2.0, 10.0
CYCLE_S = GREEN_S + YELLOW_S + RED_S
_SPEEDS = (30 / 3.6, 40 / 3.6, 50 / 3.6)
_JUNCTION_SPEED, _TURN_SPEED = 30 / 3.6, 6.0
_SIDE, _SPACING, _MOVED = 4, 105.0, 10.0
_LEFT_OUT = 6
# Beginnings from which no route of the wanted length leads, before it is given up.
_TRIES = 200
_RADIUS = {"bend": 18.0, "T": 14.0, "lights": 14.0, "roundabout": 23.0}
_RING, _ENTRY = 11.0, 0.4
# What can be driven on beside the middle of a lane, left and right: the other lane and half of one's own; within junctions.
_ON_ROAD, _IN_JUNCTION, _IN_RING = (1.5 * LANE_WIDTH, 0.5 * LANE_WIDTH), (6.0, 6.0), (3.0, 3.0)


def light_state(time_s: np.ndarray, offset_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(0 green, 1 yellow, 2 red; seconds until it changes) of lights whose cycle began ``offset_s`` before time 0."""
    within = np.mod(time_s + offset_s, CYCLE_S)
    state = (within >= GREEN_S).astype(np.int64) + (within >= GREEN_S + YELLOW_S)
    ends = np.array([GREEN_S, GREEN_S + YELLOW_S, CYCLE_S])
    return state, ends[state] - within


@dataclass
class Segment:
    """A lane of a road, or a way through a junction.

    Attributes:
        point_P2: its middle, at small distances.
        limit: metres a second.
        pace: at which traffic drives there, at most.
        edges: how far one can drive to the left and to the right of the middle.
        is_junction: whether it lies within one.
        stop: what there is at its end: 0, `LIGHT`, `STOP_SIGN` or `GIVE_WAY`.
        offset_s: of the light.
        conflict: the place that must be free, of a road that gives way.
        next: segments that follow.
    """

    point_P2: np.ndarray
    limit: float
    pace: float
    edges: tuple[float, float] = _ON_ROAD
    is_junction: bool = False
    stop: int = 0
    offset_s: float = 0.0
    conflict: tuple[float, float] = (0.0, 0.0)
    next: list[int] = field(default_factory=list)

    @property
    def length(self) -> float:
        """In metres."""
        return float(np.hypot(*np.diff(self.point_P2, axis=0).T).sum())


@dataclass(frozen=True)
class Path:
    """A route, a point a metre.

    Attributes:
        point_P2: the middle of the lane.
        heading_P: there, without jumps of a whole turn.
        limit_P, pace_P: see `Segment`.
        left_P, right_P: how far one can drive to either side.
        junction_P: whether it is within a junction.
        stop_s_J, stop_kind_J, stop_offset_J, stop_conflict_J2: where there is something at the end of a segment, and what, see `Segment`.
    """

    point_P2: np.ndarray
    heading_P: np.ndarray
    limit_P: np.ndarray
    pace_P: np.ndarray
    left_P: np.ndarray
    right_P: np.ndarray
    junction_P: np.ndarray
    stop_s_J: np.ndarray
    stop_kind_J: np.ndarray
    stop_offset_J: np.ndarray
    stop_conflict_J2: np.ndarray

    @property
    def length(self) -> int:
        """In metres; there is a point at 0 and one at the end."""
        return len(self.point_P2) - 1


class RoadMap:
    """A map that the grammar gives for a generator.

    Attributes:
        segments: all of them; `Segment.next` counts in this list.
        roads: those where a route may begin and end: first parts of lanes.
        kinds: of each node: ``bend``, ``T``, ``lights`` or ``roundabout``.
        lengths: of the segments, in metres.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.segments: list[Segment] = []
        self.roads: list[int] = []
        self.kinds: list[str] = []
        self._place: list[tuple[float, float]] = []
        self._build(rng)
        self.lengths = [segment.length for segment in self.segments]

    # The grammar

    def _build(self, rng: np.random.Generator) -> None:
        moved = rng.uniform(-_MOVED, _MOVED, (_SIDE * _SIDE, 2))
        self._place = [
            (_SPACING * (number % _SIDE) + moved[number, 0], _SPACING * (number // _SIDE) + moved[number, 1])
            for number in range(_SIDE * _SIDE)
        ]
        neighbours = _neighbours(rng)
        self.kinds = [_kind(len(neighbours[node]), rng) for node in range(len(neighbours))]
        offset_s = rng.uniform(0, CYCLE_S, len(neighbours))
        # Of each road, by (from, to): lanes that begin there, and the one that ends.
        begins: dict[tuple[int, int], list[int]] = {}
        ends: dict[tuple[int, int], int] = {}
        for node in range(len(neighbours)):
            for other in sorted(neighbours[node]):
                limit = float(rng.choice(_SPEEDS))
                merges = rng.random() < 0.2
                begins[node, other], ends[node, other] = self._road(node, other, limit, merges=merges)
        for node, others in enumerate(neighbours):
            self._junction(node, sorted(others), begins, ends, float(offset_s[node]), rng)

    def _road(self, node: int, other: int, limit: float, *, merges: bool) -> tuple[list[int], int]:
        """The lanes from one node to another: (those that begin there, the one that arrives)."""
        begin, end = self._ends_of_road(node, other)
        heading = math.atan2(end[1] - begin[1], end[0] - begin[0])
        right = (math.sin(heading), -math.cos(heading))

        def lane(share: float, offset: float) -> tuple[float, float]:
            return (
                begin[0] + share * (end[0] - begin[0]) + offset * right[0],
                begin[1] + share * (end[1] - begin[1]) + offset * right[1],
            )

        middle, joint = LANE_WIDTH / 2, 0.75
        if not merges:
            whole = self._add(Segment(straight(lane(0, middle), lane(1, middle)), limit, limit))
            self.roads.append(whole)
            return [whole], whole
        first = self._add(Segment(straight(lane(0, middle), lane(joint, middle)), limit, limit))
        last = self._add(Segment(straight(lane(joint, middle), lane(1, middle)), limit, limit))
        outer = straight(lane(0, middle + LANE_WIDTH), lane(0.35, middle + LANE_WIDTH))
        second = self._add(Segment(outer, limit, limit, stop=GIVE_WAY, conflict=lane(joint, middle)))
        over = connect((*lane(0.35, middle + LANE_WIDTH), heading), (*lane(joint, middle), heading))
        crossing = self._add(Segment(over, limit, limit, edges=(2 * LANE_WIDTH, LANE_WIDTH)))
        self.segments[first].next.append(last)
        self.segments[second].next.append(crossing)
        self.segments[crossing].next.append(last)
        self.roads.append(first)
        return [first, second], last

    def _ends_of_road(self, node: int, other: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Where its middle leaves the junctions at both ends."""
        (x1, y1), (x2, y2) = self._place[node], self._place[other]
        length = math.dist((x1, y1), (x2, y2))
        near, far = (_RADIUS[self.kinds[each]] / length for each in (node, other))
        return (x1 + near * (x2 - x1), y1 + near * (y2 - y1)), (x2 - far * (x2 - x1), y2 - far * (y2 - y1))

    def _junction(
        self,
        node: int,
        others: list[int],
        begins: dict[tuple[int, int], list[int]],
        ends: dict[tuple[int, int], int],
        offset_s: float,
        rng: np.random.Generator,
    ) -> None:
        kind, centre = self.kinds[node], self._place[node]
        angles = {other: self._angle(node, other) for other in others}
        stem = _stem(angles) if kind == "T" else None
        for other in others:
            arriving = self.segments[ends[other, node]]
            if kind == "lights":
                arriving.stop = LIGHT
                # Roads that run along x have green when those along y have red.
                along_x = abs(math.cos(angles[other])) > math.sqrt(0.5)
                arriving.offset_s = offset_s + (0.0 if along_x else CYCLE_S / 2)
            elif kind == "roundabout":
                arriving.stop = GIVE_WAY
                arriving.conflict = _on_ring(centre, angles[other] + _ENTRY)
            elif other == stem:
                arriving.stop, arriving.conflict = STOP_SIGN, centre
        for come in others:
            for go in others:
                if go != come:
                    for lane in begins[node, go]:
                        self._way(kind, centre, ends[come, node], lane, angles[come], angles[go])

    def _way(self, kind: str, centre: tuple[float, float], arriving: int, leaving: int, come: float, go: float) -> None:
        """The line through a junction from one lane to another."""
        begin, end = _pose(self.segments[arriving].point_P2, -1), _pose(self.segments[leaving].point_P2, 0)
        if kind == "roundabout":
            enter, leave = come + _ENTRY, go - _ENTRY
            leave += 2 * math.pi * math.ceil((enter - leave) / (2 * math.pi))
            points = np.concatenate(
                [
                    _cubic_to_ring(begin, (*_on_ring(centre, enter), enter + math.pi / 2)),
                    arc(centre, _RING, enter, leave)[1:],
                    _cubic_to_ring((*_on_ring(centre, leave), leave + math.pi / 2), end)[1:],
                ]
            )
            made = Segment(points, _JUNCTION_SPEED, _TURN_SPEED, edges=_IN_RING, is_junction=True)
        else:
            turn = abs(math.remainder(end[2] - begin[2], 2 * math.pi))
            pace = _TURN_SPEED if turn > 0.6 else _JUNCTION_SPEED
            edges = _ON_ROAD if kind == "bend" else _IN_JUNCTION
            made = Segment(connect(begin, end), _JUNCTION_SPEED, pace, edges=edges, is_junction=kind != "bend")
        number = self._add(made)
        self.segments[arriving].next.append(number)
        made.next.append(leaving)

    def _angle(self, node: int, other: int) -> float:
        (x1, y1), (x2, y2) = self._place[node], self._place[other]
        return math.atan2(y2 - y1, x2 - x1)

    def _add(self, segment: Segment) -> int:
        self.segments.append(segment)
        return len(self.segments) - 1

    # Routes

    def distances(self, begin: int) -> tuple[np.ndarray, np.ndarray]:
        """(metres from the beginning of a segment to the end of each, the segment before it on the way): Dijkstra's algorithm."""
        lengths = self.lengths
        far = np.full(len(self.segments), np.inf)
        before = np.full(len(self.segments), -1)
        far[begin] = lengths[begin]
        queue = [(far[begin], begin)]
        while queue:
            distance, here = heapq.heappop(queue)
            if distance > far[here]:
                continue
            for there in self.segments[here].next:
                if distance + lengths[there] < far[there]:
                    far[there], before[there] = distance + lengths[there], here
                    heapq.heappush(queue, (far[there], there))
        return far, before

    def routes(self, rng: np.random.Generator, number: int, shortest: float, longest: float) -> list[Path]:
        """So many shortest paths between two roads, each from ``shortest`` to ``longest`` metres long.

        Raises ConfigError if there are hardly any of that length.
        """
        found: list[Path] = []
        for _ in range(_TRIES + number):
            if len(found) == number:
                return found
            far, before = self.distances(int(rng.choice(self.roads)))
            fitting = [road for road in self.roads if shortest <= far[road] <= longest]
            # Several from one place: the search is what takes time.
            for road in rng.permutation(fitting)[: min(3, number - len(found))] if fitting else ():
                way = [int(road)]
                while before[way[-1]] >= 0:
                    way.append(int(before[way[-1]]))
                found.append(self.path(way[::-1]))
        raise ConfigError(
            f"routes are to be {shortest:g} to {longest:g} m long, which hardly any shortest path is; take others, such as 200 to 1000"
        )

    def path(self, way: list[int]) -> Path:
        """Segments that follow each other as a `Path`."""
        parts = [self.segments[number] for number in way]
        points = np.concatenate([parts[0].point_P2, *(part.point_P2[1:] for part in parts[1:])])
        ends = np.cumsum([self.lengths[number] for number in way])
        point_P2, _ = resampled(points)
        heading_P = _headings(point_P2)
        # The segment that each point is on.
        on_P = np.minimum(np.searchsorted(ends, np.arange(len(point_P2)), side="right"), len(parts) - 1)
        stops = [(end, part) for end, part in zip(ends[:-1], parts[:-1], strict=True) if part.stop]

        def each(values: list[float]) -> np.ndarray:
            return np.array(values, np.float32)[on_P]

        return Path(
            point_P2.astype(np.float32),
            heading_P.astype(np.float32),
            each([part.limit for part in parts]),
            each([part.pace for part in parts]),
            each([part.edges[0] for part in parts]),
            each([part.edges[1] for part in parts]),
            np.array([part.is_junction for part in parts])[on_P],
            np.array([end for end, _ in stops], np.float32),
            np.array([part.stop for _, part in stops], np.int64),
            np.array([part.offset_s for _, part in stops], np.float32),
            np.array([part.conflict for _, part in stops], np.float32).reshape(-1, 2),
        )


def _neighbours(rng: np.random.Generator) -> list[set[int]]:
    """Which nodes have a road between them: all that stand side by side, but for a few; nothing becomes a dead end or is cut off."""
    number = _SIDE * _SIDE
    pairs = [(node, node + 1) for node in range(number) if node % _SIDE < _SIDE - 1]
    pairs += [(node, node + _SIDE) for node in range(number - _SIDE)]
    found: list[set[int]] = [set() for _ in range(number)]
    for one, two in pairs:
        found[one].add(two)
        found[two].add(one)
    for place in rng.permutation(len(pairs))[:_LEFT_OUT]:
        one, two = pairs[place]
        if len(found[one]) > 2 and len(found[two]) > 2:
            found[one].remove(two)
            found[two].remove(one)
            if not _is_connected(found):
                found[one].add(two)
                found[two].add(one)
    return found


def _is_connected(neighbours: list[set[int]]) -> bool:
    seen, rest = {0}, [0]
    while rest:
        new = neighbours[rest.pop()] - seen
        seen |= new
        rest += new
    return len(seen) == len(neighbours)


def _kind(roads: int, rng: np.random.Generator) -> str:
    drawn = rng.random()
    if roads == 2:
        return "bend"
    if roads == 3:
        return "T" if drawn < 0.5 else "lights" if drawn < 0.75 else "roundabout"
    return "lights" if drawn < 0.7 else "roundabout"


def _stem(angles: dict[int, float]) -> int:
    """The road of three that has no other opposite of it."""

    def opposite(one: int) -> float:
        return min(
            abs(math.pi - abs(math.remainder(angles[one] - angles[two], 2 * math.pi))) for two in angles if two != one
        )

    return max(angles, key=opposite)


def _on_ring(centre: tuple[float, float], angle: float) -> tuple[float, float]:
    return centre[0] + _RING * math.cos(angle), centre[1] + _RING * math.sin(angle)


def _cubic_to_ring(begin: tuple[float, ...], end: tuple[float, ...]) -> np.ndarray:
    return connect((begin[0], begin[1], begin[2]), (end[0], end[1], end[2]))


def _pose(point_P2: np.ndarray, place: int) -> tuple[float, float, float]:
    """Of the first (0) or the last (-1) point of a line."""
    (x1, y1), (x2, y2) = (point_P2[0], point_P2[1]) if place == 0 else (point_P2[-2], point_P2[-1])
    x, y = point_P2[place]
    return float(x), float(y), math.atan2(y2 - y1, x2 - x1)


def _headings(point_P2: np.ndarray) -> np.ndarray:
    """At each point that of the line through its neighbours, without jumps."""
    ahead = np.concatenate([point_P2[1:], point_P2[-1:]]) - np.concatenate([point_P2[:1], point_P2[:-1]])
    return np.unwrap(np.arctan2(ahead[:, 1], ahead[:, 0]))
