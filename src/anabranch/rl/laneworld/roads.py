"""Maps of roads by a grammar, and routes on them.

    map       -> a grid of nodes, each moved a little; roads between neighbours, some left out, so that every node has two at least
    node      -> two roads: a bend        three: T-junction | lights | roundabout        four: lights | roundabout
    road      -> a lane each way, 3.5 m wide, at 30, 40 or 50 km/h, on the right        now and then with a second lane that merges
    junction  -> a line for every way through it: straight, arc, straight; around the ring of a roundabout

A map is a graph of `Segment`s, see `LaneGraph`. Stems of T-junctions have stop signs; who enters a roundabout, or merges, gives way.
"""
# Shapes: P points of a line

from __future__ import annotations

import math

import numpy as np

from anabranch.rl.laneworld.geometry import arc, connect, straight
from anabranch.rl.laneworld.lane_graph import (
    CYCLE_S,
    GIVE_WAY,
    IN_JUNCTION,
    JUNCTION_SPEED,
    LANE_WIDTH,
    LIGHT,
    ON_ROAD,
    STOP_SIGN,
    TURN_SPEED,
    LaneGraph,
    Segment,
)

__all__ = ["RoadMap"]

_SPEEDS = (30 / 3.6, 40 / 3.6, 50 / 3.6)
_SIDE, _SPACING, _MOVED = 4, 105.0, 10.0
_LEFT_OUT = 6
_RADIUS = {"bend": 18.0, "T": 14.0, "lights": 14.0, "roundabout": 23.0}
_RING, _ENTRY = 11.0, 0.4
# Of a road with a second lane: where that begins to come over, and where both are one; shares of its length.
_COMES_OVER, _JOINT = 0.35, 0.75
# What can be driven on beside the middle of the lane around the ring, left and right.
_IN_RING = (3.0, 3.0)


class RoadMap(LaneGraph):
    """A map that the grammar gives for a generator.

    Attributes:
        kinds: of each node: ``bend``, ``T``, ``lights`` or ``roundabout``.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.kinds: list[str] = []
        self._place: list[tuple[float, float]] = []
        self._build(rng)

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
        drawn = {
            (node, other): (float(rng.choice(_SPEEDS)), rng.random() < 0.2)
            for node in range(len(neighbours))
            for other in sorted(neighbours[node])
        }
        for (node, other), (limit, merges) in drawn.items():
            is_met = drawn[other, node][1]
            begins[node, other], ends[node, other] = self._road(node, other, limit, merges=merges, is_met=is_met)
        for node, others in enumerate(neighbours):
            self._junction(node, sorted(others), begins, ends, float(offset_s[node]), rng)

    def _road(self, node: int, other: int, limit: float, *, merges: bool, is_met: bool) -> tuple[list[int], int]:
        """The lanes from one node to another: (those that begin there, the one that arrives).

        ``merges``: there is a second one, to the right; ``is_met``: so there is on the other side.
        """
        begin, end = self._ends_of_road(node, other)
        heading = math.atan2(end[1] - begin[1], end[0] - begin[0])
        right = (math.sin(heading), -math.cos(heading))

        def lane(share: float, offset: float) -> tuple[float, float]:
            return (
                begin[0] + share * (end[0] - begin[0]) + offset * right[0],
                begin[1] + share * (end[1] - begin[1]) + offset * right[1],
            )

        def made(points: np.ndarray) -> Segment:
            """With the edges of the whole road: its own second lane to the right, that of the other side to the left."""
            away_P2 = points - np.array(begin)
            share_P = away_P2 @ np.array([-right[1], right[0]]) / math.dist(begin, end)
            offset_P = away_P2 @ np.array(right) - LANE_WIDTH / 2
            to_left_P = ON_ROAD[0] + offset_P + (_second_beside(1 - share_P) if is_met else 0.0)
            to_right_P = ON_ROAD[1] - offset_P + (_second_beside(share_P) if merges else 0.0)
            return Segment(points, limit, limit, edges=np.stack([to_left_P, to_right_P], axis=1))

        middle = LANE_WIDTH / 2
        if not merges:
            whole = self.add(made(straight(lane(0, middle), lane(1, middle))))
            self.roads.append(whole)
            return [whole], whole
        first = self.add(made(straight(lane(0, middle), lane(_JOINT, middle))))
        last = self.add(made(straight(lane(_JOINT, middle), lane(1, middle))))
        outer = made(straight(lane(0, middle + LANE_WIDTH), lane(_COMES_OVER, middle + LANE_WIDTH)))
        outer.stop, outer.conflict = GIVE_WAY, lane(_JOINT, middle)
        second = self.add(outer)
        over = connect((*lane(_COMES_OVER, middle + LANE_WIDTH), heading), (*lane(_JOINT, middle), heading))
        crossing = self.add(made(over))
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
            made = Segment(points, JUNCTION_SPEED, TURN_SPEED, edges=_IN_RING, is_junction=True)
        else:
            turn = abs(math.remainder(end[2] - begin[2], 2 * math.pi))
            pace = TURN_SPEED if turn > 0.6 else JUNCTION_SPEED
            made = Segment(connect(begin, end), JUNCTION_SPEED, pace, edges=IN_JUNCTION, is_junction=kind != "bend")
            if kind == "bend":
                made.edges = self._between(arriving, leaving, len(made.point_P2))
        number = self.add(made)
        self.segments[arriving].next.append(number)
        made.next.append(leaving)

    def _between(self, arriving: int, leaving: int, points: int) -> np.ndarray:
        """Edges ``[P, 2]`` of a bend: more and more those of the road behind it, which may have lanes that begin or end there."""
        before, behind = self.segments[arriving], self.segments[leaving]
        share_P1 = np.linspace(0.0, 1.0, points)[:, None]
        return (1 - share_P1) * before.edges_at(np.array([before.length])) + share_P1 * behind.edges_at(np.zeros(1))

    def _angle(self, node: int, other: int) -> float:
        (x1, y1), (x2, y2) = self._place[node], self._place[other]
        return math.atan2(y2 - y1, x2 - x1)


def _second_beside(share_P: np.ndarray) -> np.ndarray:
    """How far a second lane lies beside the first one at shares of a road, in metres: a whole lane, then less and less."""
    t_P = np.clip((share_P - _COMES_OVER) / (_JOINT - _COMES_OVER), 0.0, 1.0)
    return LANE_WIDTH * (2 * t_P**3 - 3 * t_P**2 + 1)


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
