"""What is around the car from above, as a picture of 8 channels and 48 x 48 pixels of a metre, the car's heading up (CaRL's kind of view).

    0  road          1  junctions     2  the route ahead             3  its limit, over 14 m/s
    4  cars          5  cars in one second, straight on              6  walkers
    7  the next line of the route, by what it asks: 1 red light or stop sign, 0.6 yellow, 0.3 give way (so does
       who has halted at a sign), 0.1 green

The car stands in the middle of a row 14 m from the lower edge, and is not drawn. Roads are drawn once for a map, at half a metre, and
looked up; all else is put into pixels in every step, for all worlds at once.
"""
# Shapes: W worlds, C channels, H rows, V columns, O others, M maps, G points of a thing that is drawn

from __future__ import annotations

import numpy as np

from anabranch.rl.laneworld.lane_graph import GIVE_WAY, LANE_WIDTH, LIGHT, STOP_SIGN, light_state
from anabranch.rl.laneworld.library import Library

__all__ = ["CHANNELS", "SIDE", "Raster"]

CHANNELS, SIDE = 8, 48
# The row in which the car is, from above.
_ROW = SIDE - 14
_FAST, _ROUTE_M = 14.0, 60
# Half a metre a pixel of a map, and so many metres of nothing around it.
_PER_M, _AROUND_M = 2, 4.0
# Of a lane beside its middle; of a box along and across.
_BESIDE = np.linspace(-0.5, 0.5, 8) * LANE_WIDTH
_BOX = np.stack(np.meshgrid(np.linspace(-0.5, 0.5, 10), np.linspace(-0.5, 0.5, 5)), axis=-1).reshape(-1, 2)
_RED, _YELLOW, _GIVE_WAY, _GREEN = 1.0, 0.6, 0.3, 0.1


class Raster:
    """Draws what is around cars on the roads of a library."""

    def __init__(self, library: Library) -> None:
        self._library = library
        points = np.concatenate([point_P2 for lanes in library.lanes_M for point_P2, _ in lanes])
        self._origin_2 = points.min(0) - _AROUND_M
        size_2 = np.ceil((points.max(0) + _AROUND_M - self._origin_2) * _PER_M).astype(np.int64) + 1
        # Road, and whether it lies within a junction.
        self._drawn_MXY2 = np.zeros((len(library.lanes_M), *size_2, 2), bool)
        for number, lanes in enumerate(library.lanes_M):
            for point_P2, is_junction in lanes:
                self._draw(number, point_P2, is_junction)

    def _draw(self, number: int, point_G2: np.ndarray, is_junction: bool) -> None:
        along_G2 = np.gradient(point_G2, axis=0)
        heading_G = np.arctan2(along_G2[:, 1], along_G2[:, 0])
        column_GB, row_GB = self._cell(*_beside(np.column_stack([point_G2, heading_G])))
        self._drawn_MXY2[number, column_GB, row_GB, 0] = True
        if is_junction:
            self._drawn_MXY2[number, column_GB, row_GB, 1] = True

    def _cell(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of a map, the nearest one that there is."""
        last_x, last_y = (size - 1 for size in self._drawn_MXY2.shape[1:3])
        return (
            np.clip(((x - self._origin_2[0]) * _PER_M).astype(np.int64), 0, last_x),
            np.clip(((y - self._origin_2[1]) * _PER_M).astype(np.int64), 0, last_y),
        )

    def picture(
        self,
        map_W: np.ndarray,
        route_W: np.ndarray,
        clock_W: np.ndarray,
        pose_W4: np.ndarray,
        s_W: np.ndarray,
        front_m_W: np.ndarray,
        halted_W: np.ndarray,
        others_WO7: np.ndarray,
    ) -> np.ndarray:
        """``[W, C, H, V]`` float32, from 0 to 1.

        Args:
            map_W, route_W: of the library.
            clock_W: time of the lights, in seconds.
            pose_W4: x, y, heading and speed of the cars.
            s_W, front_m_W: where they and their fronts are along their routes.
            halted_W: at which stops they have come to a halt, see `State`.
            others_WO7: x, y, heading, speed, length, width and whether it walks, of all others.
        """
        library = self._library
        picture_WCHV = np.zeros((len(map_W), CHANNELS, SIDE, SIDE), np.float32)
        picture_WCHV[:, :2] = self._roads(map_W, pose_W4)
        ahead_WG = s_W[:, None] + np.arange(_ROUTE_M)
        is_there_WG = ahead_WG <= library.length_Q[route_W][:, None]
        at_WG5 = library.at(np.broadcast_to(route_W[:, None], ahead_WG.shape), ahead_WG)
        x_WGB, y_WGB = _beside(at_WG5)
        there_WGB = np.broadcast_to(is_there_WG[..., None], x_WGB.shape)
        _put(picture_WCHV, 2, pose_W4, x_WGB, y_WGB, there_WGB, np.ones(x_WGB.shape))
        limit_WGB = np.broadcast_to(np.minimum(at_WG5[..., 3:4] / _FAST, 1.0), x_WGB.shape)
        _put(picture_WCHV, 3, pose_W4, x_WGB, y_WGB, there_WGB, limit_WGB)
        if others_WO7.shape[1]:
            walks_WO = others_WO7[..., 6] > 0
            for channel, seconds, is_told_WO in ((4, 0.0, ~walks_WO), (5, 1.0, ~walks_WO), (6, 0.0, walks_WO)):
                x_WOG, y_WOG = _boxes(others_WO7, seconds)
                told_WOG = np.broadcast_to(is_told_WO[..., None], x_WOG.shape)
                _put(picture_WCHV, channel, pose_W4, x_WOG, y_WOG, told_WOG, np.ones(x_WOG.shape))
        self._line(picture_WCHV, route_W, clock_W, pose_W4, front_m_W, halted_W)
        return picture_WCHV

    def _roads(self, map_W: np.ndarray, pose_W4: np.ndarray) -> np.ndarray:
        """Road and junctions ``[W, 2, H, V]``: each pixel's place is looked up in the map."""
        along_H1 = (_ROW - np.arange(SIDE))[:, None] + 0.5
        across_V = SIDE / 2 - np.arange(SIDE) - 0.5
        cos_W, sin_W = (each[:, None, None] for each in (np.cos(pose_W4[:, 2]), np.sin(pose_W4[:, 2])))
        x_WHV = pose_W4[:, 0, None, None] + along_H1 * cos_W - across_V * sin_W
        y_WHV = pose_W4[:, 1, None, None] + along_H1 * sin_W + across_V * cos_W
        column_WHV, row_WHV = self._cell(x_WHV, y_WHV)
        found_WHV2 = self._drawn_MXY2[map_W[:, None, None], column_WHV, row_WHV]
        return np.moveaxis(found_WHV2, -1, 1)

    def _line(
        self,
        picture_WCHV: np.ndarray,
        route_W: np.ndarray,
        clock_W: np.ndarray,
        pose_W4: np.ndarray,
        front_m_W: np.ndarray,
        halted_W: np.ndarray,
    ) -> None:
        library = self._library
        which_W, ahead_W = library.next_stop(route_W, front_m_W)
        kind_W, offset_W = library.asked(route_W, which_W, halted_W), library.stop_offset_QJ[route_W, which_W]
        light_W, _ = light_state(clock_W, offset_W)
        shown_W = np.array([_GREEN, _YELLOW, _RED])[light_W]
        value_W = np.select([kind_W == LIGHT, kind_W == STOP_SIGN, kind_W == GIVE_WAY], [shown_W, _RED, _GIVE_WAY], 0.0)
        there_W = (ahead_W < _ROUTE_M) & (kind_W > 0)
        at_W5 = library.at(route_W, np.where(there_W, front_m_W + ahead_W, 0.0))
        x_WB, y_WB = _beside(at_W5)
        there_WB = np.broadcast_to(there_W[:, None], x_WB.shape)
        _put(picture_WCHV, 7, pose_W4, x_WB, y_WB, there_WB, np.broadcast_to(value_W[:, None], x_WB.shape))


def _beside(at_X5: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places from the right edge of a lane to its left one, at points of it: ``[X, B]``."""
    x_X, y_X, heading_X = at_X5[..., 0, None], at_X5[..., 1, None], at_X5[..., 2, None]
    return x_X - _BESIDE * np.sin(heading_X), y_X + _BESIDE * np.cos(heading_X)


def _boxes(others_WO7: np.ndarray, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Places on boxes so many seconds later, ``[W, O, G]``."""
    x_WO1, y_WO1, heading_WO1, speed_WO1, length_WO1, width_WO1 = np.moveaxis(others_WO7[..., :6, None], 2, 0)
    cos_WO1, sin_WO1 = np.cos(heading_WO1), np.sin(heading_WO1)
    along_WOG = speed_WO1 * seconds + _BOX[:, 0] * length_WO1
    across_WOG = _BOX[:, 1] * width_WO1
    return (
        x_WO1 + along_WOG * cos_WO1 - across_WOG * sin_WO1,
        y_WO1 + along_WOG * sin_WO1 + across_WOG * cos_WO1,
    )


def _put(
    picture_WCHV: np.ndarray,
    channel: int,
    pose_W4: np.ndarray,
    x_WX: np.ndarray,
    y_WX: np.ndarray,
    is_there_WX: np.ndarray,
    value_WX: np.ndarray,
) -> None:
    """Put values into the pixels that places lie in, of those that lie in the picture."""
    num = len(pose_W4)
    x_WG, y_WG, is_there_WG, value_WG = (each.reshape(num, -1) for each in (x_WX, y_WX, is_there_WX, value_WX))
    dx_WG, dy_WG = x_WG - pose_W4[:, 0, None], y_WG - pose_W4[:, 1, None]
    cos_W1, sin_W1 = np.cos(pose_W4[:, 2, None]), np.sin(pose_W4[:, 2, None])
    row_WG = np.floor(_ROW + 1 - (dx_WG * cos_W1 + dy_WG * sin_W1))
    column_WG = np.floor(SIDE / 2 - (dy_WG * cos_W1 - dx_WG * sin_W1))
    is_seen_WG = is_there_WG & (row_WG >= 0) & (row_WG < SIDE) & (column_WG >= 0) & (column_WG < SIDE)
    world_N, place_N = np.nonzero(is_seen_WG)
    row_N, column_N = row_WG[world_N, place_N].astype(np.int64), column_WG[world_N, place_N].astype(np.int64)
    picture_WCHV[world_N, channel, row_N, column_N] = value_WG[world_N, place_N]
