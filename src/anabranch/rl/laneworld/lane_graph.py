"""`LaneGraph`: lanes that follow each other, and routes on them; what maps are made of, ours (`RoadMap`) or those of others.

A route is a shortest path, laid out as a `Path`: one point a metre, with all that a driver must know there.
"""
# Shapes: P points of a path, J stops of a path

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from anabranch.errors import ConfigError
from anabranch.rl.laneworld.geometry import resampled

__all__ = ["GIVE_WAY", "LIGHT", "STOP_SIGN", "LaneGraph", "Path", "Segment", "light_state"]

LANE_WIDTH = 3.5
# What there is at the end of a segment: nothing, a light, a stop sign, a road that goes first.
LIGHT, STOP_SIGN, GIVE_WAY = 1, 2, 3
# Seconds of green, yellow and red. Roads that cross have theirs half a cycle later.
GREEN_S, YELLOW_S, RED_S = 8.0, 2.0, 10.0
CYCLE_S = GREEN_S + YELLOW_S + RED_S
# Metres a second through junctions, straight on and where one turns.
JUNCTION_SPEED, TURN_SPEED = 30 / 3.6, 6.0
# What can be driven on beside the middle of a lane, left and right: the other lane and half of one's own; within junctions.
ON_ROAD, IN_JUNCTION = (1.5 * LANE_WIDTH, 0.5 * LANE_WIDTH), (6.0, 6.0)
# Beginnings from which no route of the wanted length leads, before it is given up.
_TRIES = 200


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
        edges: how far one can drive to the left and to the right of the middle: two numbers, or ``[P, 2]`` where they differ from point to
            point.
        is_junction: whether it lies within one.
        stop: what there is at its end: 0, `LIGHT`, `STOP_SIGN` or `GIVE_WAY`.
        offset_s: of the light.
        conflict: the place that must be free, of a road that gives way.
        next: segments that follow.
    """

    point_P2: np.ndarray
    limit: float
    pace: float
    edges: tuple[float, float] | np.ndarray = ON_ROAD
    is_junction: bool = False
    stop: int = 0
    offset_s: float = 0.0
    conflict: tuple[float, float] = (0.0, 0.0)
    next: list[int] = field(default_factory=list)

    @property
    def length(self) -> float:
        """In metres."""
        return float(np.hypot(*np.diff(self.point_P2, axis=0).T).sum())

    def edges_at(self, s_X: np.ndarray) -> np.ndarray:
        """``[X, 2]``: how far one can drive to the left and to the right, so many metres from the beginning."""
        along_P = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(self.point_P2, axis=0).T))])
        edge_P2 = np.broadcast_to(np.asarray(self.edges, float), self.point_P2.shape)
        return np.stack([np.interp(s_X, along_P, edge_P2[:, side]) for side in (0, 1)], axis=1)


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


class LaneGraph:
    """A graph of lanes; empty at first.

    Attributes:
        segments: all of them; `Segment.next` counts in this list.
        roads: those where a route may begin and end.
    """

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.roads: list[int] = []

    @cached_property
    def lengths(self) -> list[float]:
        """Of the segments, in metres; asked for when all of them are there."""
        return [segment.length for segment in self.segments]

    def add(self, segment: Segment) -> int:
        """Add one; its number."""
        self.segments.append(segment)
        return len(self.segments) - 1

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

    def ways(self, rng: np.random.Generator, number: int, shortest: float, longest: float) -> list[list[int]]:
        """So many shortest paths between two roads, each from ``shortest`` to ``longest`` metres long: numbers of segments.

        Raises ConfigError if there are hardly any of that length.
        """
        found: list[list[int]] = []
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
                found.append(way[::-1])
        raise ConfigError(
            f"routes are to be {shortest:g} to {longest:g} m long, which hardly any shortest path is; take others, such as 200 to 1000"
        )

    def lanes(self) -> list[tuple[np.ndarray, bool]]:
        """All there are, whether a route goes there or not: points ``[P, 2]`` at half a metre, and whether within a junction."""
        return [(resampled(part.point_P2, 0.5)[0], part.is_junction) for part in self.segments]

    def routes(self, rng: np.random.Generator, number: int, shortest: float, longest: float) -> list[Path]:
        """`ways`, laid out."""
        return [self.path(way) for way in self.ways(rng, number, shortest, longest)]

    def path(self, way: list[int]) -> Path:
        """Segments that follow each other as a `Path`."""
        parts = [self.segments[number] for number in way]
        points = np.concatenate([parts[0].point_P2, *(part.point_P2[1:] for part in parts[1:])])
        ends = np.cumsum([self.lengths[number] for number in way])
        point_P2, _ = resampled(points)
        heading_P = _headings(point_P2)
        # The segment that each point is on.
        on_P = np.minimum(np.searchsorted(ends, np.arange(len(point_P2)), side="right"), len(parts) - 1)
        edge_P2 = np.empty((len(point_P2), 2), np.float32)
        for place, part in enumerate(parts):
            s_X = np.flatnonzero(on_P == place)
            edge_P2[s_X] = part.edges_at(s_X - (ends[place] - part.length))
        stops = [(end, part) for end, part in zip(ends[:-1], parts[:-1], strict=True) if part.stop]

        def each(values: list[float]) -> np.ndarray:
            return np.array(values, np.float32)[on_P]

        return Path(
            point_P2.astype(np.float32),
            heading_P.astype(np.float32),
            each([part.limit for part in parts]),
            each([part.pace for part in parts]),
            edge_P2[:, 0],
            edge_P2[:, 1],
            np.array([part.is_junction for part in parts])[on_P],
            np.array([end for end, _ in stops], np.float32),
            np.array([part.stop for _, part in stops], np.int64),
            np.array([part.offset_s for _, part in stops], np.float32),
            np.array([part.conflict for _, part in stops], np.float32).reshape(-1, 2),
        )


def _headings(point_P2: np.ndarray) -> np.ndarray:
    """At each point that of the line through its neighbours, without jumps."""
    ahead = np.concatenate([point_P2[1:], point_P2[-1:]]) - np.concatenate([point_P2[:1], point_P2[:-1]])
    return np.unwrap(np.arctan2(ahead[:, 1], ahead[:, 0]))
