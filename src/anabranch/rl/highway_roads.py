"""Roads of HighwayEnv that find a place on their lanes all at once: the same numbers to the bit, in a fraction of the time.

After every move of a car HighwayEnv asks each lane of the map, one after the other, how far the car is from it, and afterwards asks
the same lanes again for the same cars, to know who drives in front of whom. Nearly all of a step's time goes there. Here one pass over
arrays answers for all lanes, and what it found is kept until the car has moved on. Products and angles are made by the same routines of
NumPy in the same order, so an episode is the one that HighwayEnv would have made; a test holds that on its maps.
"""
# Shapes: L lanes of a map, K of one kind, 2 the axes of the plane

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from highway_env.road.lane import AbstractLane, CircularLane, SineLane, StraightLane
from highway_env.road.regulation import RegulatedRoad
from highway_env.road.road import Road, RoadNetwork
from highway_env.vehicle.objects import Landmark

from anabranch.rl.highway_sight import hasten_sight

__all__ = ["hasten"]

# Places that a map keeps; cars on a map are fewer, and of each only the newest place is asked for.
_MOST_KEPT = 512


def hasten(env: Any) -> None:
    """Let an environment of HighwayEnv do the same more quickly, from its next reset on.

    Roads, lanes and observations of other classes than HighwayEnv's own stay as they are.
    """
    kind: Any = type(env)
    if not hasattr(env, "is_quick"):
        env.__class__ = _quick(kind)


@cache
def _quick(kind: Any) -> Any:
    """A class of environments whose roads are quick before the first car drives there."""

    class Quick(kind):
        is_quick = True

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "road":
                _hasten_road(value)
            elif name == "observation_type":
                hasten_sight(value)
            super().__setattr__(name, value)

    Quick.__name__, Quick.__qualname__ = kind.__name__, kind.__qualname__
    return Quick


def _hasten_road(road: Any) -> None:
    if type(road) in _ROADS and type(road.network) is RoadNetwork:
        road.__class__, road.network.__class__ = _ROADS[type(road)], _QuickNetwork


class _Neighbours(Road):
    """Mixed into HighwayEnv's roads."""

    def neighbour_vehicles(self, vehicle: Any, lane_index: Any = None) -> tuple[Any, Any]:
        """Who drives in front on a lane, and who behind; see HighwayEnv."""
        lane_index = lane_index or vehicle.lane_index
        lane = self.network.get_lane(lane_index) if lane_index else None
        if getattr(self, "neighbour_vehicles_connected_lanes", False) or not isinstance(lane, _Quick):
            return super().neighbour_vehicles(vehicle, lane_index)
        locate = lane.local_coordinates
        place = locate(vehicle.position)[0]
        # A metre beside it, and a car's length before and behind it, are on it still.
        beside, before, behind = lane.width / 2 + 1, -lane.VEHICLE_LENGTH, lane.length + lane.VEHICLE_LENGTH
        front = rear = None
        front_place, rear_place = np.inf, -np.inf
        for other in (*self.vehicles, *self.objects):
            if other is vehicle or isinstance(other, Landmark):
                continue
            along, across = locate(other.position)
            if abs(across) > beside or not before <= along < behind:
                continue
            # Of two in front at one place it is the later one, of two behind the earlier one.
            if place <= along <= front_place:
                front, front_place = other, along
            if rear_place < along < place:
                rear, rear_place = other, along
        return front, rear


class _QuickRoad(_Neighbours):
    pass


class _QuickRegulatedRoad(_Neighbours, RegulatedRoad):
    pass


_ROADS: dict[type, type] = {Road: _QuickRoad, RegulatedRoad: _QuickRegulatedRoad}


class _QuickNetwork(RoadNetwork):
    """See the module. Where a lane is added, what was found is forgotten."""

    table: _Table | None = None

    def add_lane(self, _from: str, _to: str, lane: AbstractLane) -> None:
        """See HighwayEnv."""
        self.table = None
        super().add_lane(_from, _to, lane)

    def get_closest_lane_index(self, position: np.ndarray, heading: float | None = None) -> tuple[str, str, int]:
        """See HighwayEnv."""
        if not _is_place(position):
            return super().get_closest_lane_index(position, heading)
        if self.table is None:
            self.table = _Table(self)
        return self.table.closest(position, heading)


class _Quick(AbstractLane):
    """What is mixed into HighwayEnv's lanes: they look up what their map has found."""

    table: _Table | None = None
    slot: int = 0

    def local_coordinates(self, position: np.ndarray) -> tuple[float, float]:
        """Metres along and across; see HighwayEnv."""
        if self.table is not None and _is_place(position):
            found = self.table.kept.get(position.tobytes())
            if found is not None:
                return found[0][self.slot], found[1][self.slot]
        return super().local_coordinates(position)


class _QuickStraight(_Quick, StraightLane):
    pass


class _QuickSine(_Quick, SineLane):
    pass


class _QuickCircular(_Quick, CircularLane):
    pass


class _Table:
    """The lanes of a map as arrays, one kind behind the other, and the places that were found on them."""

    def __init__(self, network: RoadNetwork) -> None:
        self.indexes = [
            (start, end, number)
            for start, roads in network.graph.items()
            for end, lanes in roads.items()
            for number in range(len(lanes))
        ]
        lanes: list[Any] = [network.get_lane(index) for index in self.indexes]
        self.kinds: list[Any] = []
        order: list[int] = []
        for kind in (_Straight, _Winding, _Circular):
            own = [number for number, lane in enumerate(lanes) if type(lane) in (kind.plain, kind.quick)]
            if own:
                self.kinds.append(kind([lanes[number] for number in own]))
                for number in own:
                    lanes[number].__class__ = kind.quick
                    lanes[number].table, lanes[number].slot = self, len(order)
                    order.append(number)
        # What a lane of another class makes of a place is its own affair, and it is asked.
        self.others = [lane for lane in lanes if not isinstance(lane, _Quick)]
        order += [number for number, lane in enumerate(lanes) if not isinstance(lane, _Quick)]
        self.length_L = np.array([lanes[number].length for number in order], float)
        # Where each lane stands here, in the order of the map: of two that are as near it is the first.
        self.slot_L = np.argsort(order)
        self.num_python = [sum(len(kind.lanes) for kind in self.kinds if kind.python[part]) for part in (0, 1)]
        self.kept: dict[bytes, tuple[list[float], list[float]]] = {}

    def __deepcopy__(self, memo: Any) -> _Table:
        # HighwayEnv copies cars with their whole road to look ahead, dozens of times a step; the copy's lanes lie where these do.
        return self

    def closest(self, position_2: np.ndarray, heading: float | None) -> tuple[str, str, int]:
        """Of the nearest lane; its distance is |across| + what lies before its start or behind its end + |angle to it|."""
        found = [kind.locate(position_2) for kind in self.kinds]
        if self.others:
            found.append(_asked(self.others, position_2))
        along_L, across_L, angle_L = (np.concatenate(each) for each in zip(*found, strict=True))
        if len(self.kept) >= _MOST_KEPT:
            self.kept.clear()
        self.kept[position_2.tobytes()] = (
            _numbers(along_L, self.num_python[0]),
            _numbers(across_L, self.num_python[1]),
        )
        distance_L = np.abs(across_L) + np.maximum(along_L - self.length_L, 0) + np.maximum(0 - along_L, 0)
        if heading is not None:
            distance_L += np.abs(_wrapped(heading - angle_L))
        return self.indexes[int(distance_L[self.slot_L].argmin())]


class _Straight:
    """Straight lanes."""

    plain: type = StraightLane
    quick: type = _QuickStraight
    # Whether HighwayEnv gives a number of Python, along and across. Elsewhere it is NumPy's, whose powers are not rounded alike.
    python = (True, True)

    def __init__(self, lanes: Sequence[Any]) -> None:
        self.lanes = lanes
        self.start_K2 = np.array([lane.start for lane in lanes], float)
        # Along and across.
        self.axis_K22 = np.array([[lane.direction, lane.direction_lateral] for lane in lanes], float)
        self.heading_K = np.array([lane.heading for lane in lanes], float)

    def locate(self, position_2: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Metres along, across, and the heading there."""
        away_K2 = position_2 - self.start_K2
        # Products of two vectors each, by the routine that `np.dot` calls for them; sums of products round otherwise.
        place_K2 = (away_K2[:, None, None, :] @ self.axis_K22[:, :, :, None])[:, :, 0, 0]
        return place_K2[:, 0], place_K2[:, 1], self.heading_K


class _Winding(_Straight):
    """Lanes along a sine."""

    plain: type = SineLane
    quick: type = _QuickSine
    python = (True, False)

    def __init__(self, lanes: Sequence[Any]) -> None:
        super().__init__(lanes)
        self.amplitude_K, self.pulsation_K, self.phase_K = (
            np.array([getattr(lane, name) for lane in lanes], float) for name in ("amplitude", "pulsation", "phase")
        )

    def locate(self, position_2: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `_Straight`."""
        along_K, across_K, heading_K = super().locate(position_2)
        angle_K = self.pulsation_K * along_K + self.phase_K
        turned_K = np.arctan(self.amplitude_K * self.pulsation_K * np.cos(angle_K))
        return along_K, across_K - self.amplitude_K * np.sin(angle_K), heading_K + turned_K


class _Circular:
    """Arcs."""

    plain: type = CircularLane
    quick: type = _QuickCircular
    python = (False, False)

    def __init__(self, lanes: Sequence[Any]) -> None:
        self.lanes = lanes
        self.center_K2 = np.array([lane.center for lane in lanes], float)
        self.radius_K, self.phase_K, self.direction_K = (
            np.array([getattr(lane, name) for lane in lanes], float) for name in ("radius", "start_phase", "direction")
        )
        self.quarter_K = np.pi / 2 * self.direction_K

    def locate(self, position_2: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `_Straight`."""
        away_K2 = position_2 - self.center_K2
        phase_K, direction_K, radius_K = self.phase_K, self.direction_K, self.radius_K
        turned_K = phase_K + _wrapped(np.arctan2(away_K2[:, 1], away_K2[:, 0]) - phase_K)
        distance_K = np.sqrt((away_K2[:, None, :] @ away_K2[:, :, None])[:, 0, 0])
        along_K = direction_K * (turned_K - phase_K) * radius_K
        heading_K = direction_K * along_K / radius_K + phase_K + self.quarter_K
        return along_K, direction_K * (radius_K - distance_K), heading_K


def _asked(lanes: Sequence[Any], position_2: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    places = [lane.local_coordinates(position_2) for lane in lanes]
    headings = [lane.heading_at(along) for lane, (along, _) in zip(lanes, places, strict=True)]
    along_K, across_K = np.array(places, float).T
    return along_K, across_K, np.array(headings, float)


def _numbers(value_L: np.ndarray, num_python: int) -> list[float]:
    """The first ones as Python's, the others as NumPy's."""
    return [*value_L[:num_python].tolist(), *value_L[num_python:]]


def _is_place(position: Any) -> bool:
    return type(position) is np.ndarray and position.dtype == np.float64


def _wrapped(angle: Any) -> Any:
    """From -pi to pi, as HighwayEnv rounds it."""
    return ((angle + np.pi) % (2 * np.pi)) - np.pi
