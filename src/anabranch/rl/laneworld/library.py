"""`Library`: routes of several maps as arrays, so that thousands of cars can look up where they are at once."""
# Shapes: Q paths, P points of the longest one, J stops of one, X any number of cars

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from anabranch.rl.laneworld.lane_graph import GIVE_WAY, STOP_SIGN, Path
from anabranch.rl.laneworld.roads import RoadMap

__all__ = ["Library", "library_of"]

# Where a path has no further stop.
NOWHERE = 1e9
# Paths of traffic are shorter than routes, so that cars come and go.
_TRAFFIC_M = (120.0, 450.0)
# Beside the middle of a lane, who stands there is in the way; cells a metre by which that is looked up.
_IN_WAY_M, _PER_M = 2.5, 2


class Library:
    """Paths as arrays; see `Path` for what is kept of each.

    Args:
        routes: for each map, where an ego car may have to go.
        traffic: for each map, where others go.
        lanes: for each map, all its lanes, see `LaneGraph.lanes`.

    Attributes:
        route_MR, traffic_MT: numbers of the paths of each map.
        length_Q: metres.
        lanes_M: as given.
    """

    def __init__(
        self,
        routes: Sequence[Sequence[Path]],
        traffic: Sequence[Sequence[Path]],
        lanes: Sequence[Sequence[tuple[np.ndarray, bool]]],
    ) -> None:
        self.lanes_M = lanes
        self._in_lane: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        paths = [path for of_map in (*routes, *traffic) for path in of_map]
        number = sum(map(len, routes))
        self.route_MR = np.arange(number).reshape(len(routes), -1)
        self.traffic_MT = np.arange(number, len(paths)).reshape(len(traffic), -1)
        self.length_Q = np.array([path.length for path in paths], np.float32)
        most = max(len(path.point_P2) for path in paths)
        # One row of five numbers a point, so that a look-up touches one place: x, y, heading, limit, pace.
        self.point_QP5 = np.stack(
            [
                _filled(
                    np.concatenate(
                        [path.point_P2, path.heading_P[:, None], path.limit_P[:, None], path.pace_P[:, None]], axis=1
                    ),
                    most,
                )
                for path in paths
            ]
        )
        self.edge_QP2 = np.stack([_filled(np.stack([path.left_P, path.right_P], axis=1), most) for path in paths])
        self.junction_QP = np.stack([_filled(path.junction_P, most) for path in paths])
        stops = max(1, *(len(path.stop_s_J) for path in paths))
        self.stop_s_QJ = np.stack([_padded(path.stop_s_J, stops, NOWHERE) for path in paths])
        self.stop_kind_QJ = np.stack([_padded(path.stop_kind_J, stops, 0) for path in paths])
        self.stop_offset_QJ = np.stack([_padded(path.stop_offset_J, stops, 0) for path in paths])
        self.stop_conflict_QJ2 = np.stack([_padded(path.stop_conflict_J2, stops, 0) for path in paths])

    def at(self, path_X: np.ndarray, s_X: np.ndarray) -> np.ndarray:
        """x, y, heading, limit and pace ``[X, 5]`` at ``s_X`` metres along paths; before and behind a path those of its ends."""
        s_X = np.clip(s_X, 0, self.length_Q[path_X])
        low_X = s_X.astype(np.int64)
        share_X1 = (s_X - low_X)[..., None].astype(np.float32)
        low_X5 = self.point_QP5[path_X, low_X]
        high_X5 = self.point_QP5[path_X, np.minimum(low_X + 1, self.point_QP5.shape[1] - 1)]
        found_X5 = low_X5 + share_X1 * (high_X5 - low_X5)
        # What is said of a place holds up to the next point.
        found_X5[..., 3:] = low_X5[..., 3:]
        return found_X5

    def next_stop(self, path_X: np.ndarray, s_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which of a path's stops comes next, metres to it; `NOWHERE` or more for none)."""
        ahead_XJ = self.stop_s_QJ[path_X] - s_X[..., None]
        ahead_XJ = np.where(ahead_XJ < 0, np.float32(2 * NOWHERE), ahead_XJ)
        next_X = ahead_XJ.argmin(-1)
        return next_X, np.take_along_axis(ahead_XJ, next_X[..., None], -1)[..., 0]

    def is_in_lane(self, number: int, x_X: np.ndarray, y_X: np.ndarray) -> np.ndarray:
        """Whether places on a map are in the way of who drives along one of its lanes: 2.5 m beside its middle, to half a metre."""
        if number not in self._in_lane:
            self._in_lane[number] = _grid(np.concatenate([point_P2 for point_P2, _ in self.lanes_M[number]]))
        origin_2, is_in_XY = self._in_lane[number]
        column_X, row_X = (
            np.clip(np.floor((each - least) * _PER_M).astype(np.int64), 0, size - 1)
            for each, least, size in zip((x_X, y_X), origin_2, is_in_XY.shape, strict=True)
        )
        return is_in_XY[column_X, row_X]

    def asked(self, path_X: np.ndarray, which_X: np.ndarray, halted_X: np.ndarray) -> np.ndarray:
        """What a driver must do at a stop: its kind, and where one has halted at a stop sign (``halted_X``, see `State`) give way."""
        kind_X = self.stop_kind_QJ[path_X, which_X]
        return np.where((kind_X == STOP_SIGN) & (halted_X == which_X + 1), GIVE_WAY, kind_X)


@lru_cache(maxsize=4)
def library_of(seed: int, maps: int, routes: int, traffic: int, shortest: float, longest: float) -> Library:
    """A library of so many maps, with so many routes and paths of traffic each. The same for the same arguments, and made once."""
    of_routes, of_traffic, lanes = [], [], []
    for number in range(maps):
        rng = np.random.default_rng([seed, number])
        road_map = RoadMap(rng)
        of_routes.append(road_map.routes(rng, routes, shortest, longest))
        of_traffic.append(road_map.routes(rng, traffic, *_TRAFFIC_M))
        lanes.append(road_map.lanes())
    return Library(of_routes, of_traffic, lanes)


def _grid(point_P2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where it begins, which cells of half a metre lie so near to a point)."""
    origin_2 = point_P2.min(0) - 2 * _IN_WAY_M
    cell_P2 = np.floor((point_P2 - origin_2) * _PER_M).astype(np.int64)
    reach = int(_IN_WAY_M * _PER_M) + 1
    is_in_XY = np.zeros(cell_P2.max(0) + 3 * reach, bool)
    for column in range(-reach, reach + 1):
        for row in range(-reach, reach + 1):
            if np.hypot(column, row) <= _IN_WAY_M * _PER_M:
                is_in_XY[cell_P2[:, 0] + column, cell_P2[:, 1] + row] = True
    return origin_2, is_in_XY


def _filled(array_PX: np.ndarray, length: int) -> np.ndarray:
    """With its last row repeated up to ``length``."""
    rest = length - len(array_PX)
    return np.concatenate([array_PX, np.repeat(array_PX[-1:], rest, axis=0)]) if rest else array_PX


def _padded(array_JX: np.ndarray, length: int, value: float) -> np.ndarray:
    rest = [(0, length - len(array_JX)), *[(0, 0)] * (array_JX.ndim - 1)]
    return np.pad(array_JX, rest, constant_values=value)
