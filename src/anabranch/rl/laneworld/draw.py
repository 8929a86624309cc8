"""A picture of a world of LaneWorld, from above, around the ego car; drawn by pillow, without a display."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from anabranch.extras import require
from anabranch.rl.laneworld.lane_graph import CYCLE_S, LANE_WIDTH, LIGHT, light_state
from anabranch.rl.laneworld.state import AWAY, CAR

__all__ = ["picture"]

_SIDE, _PER_M = 400, 4.0
_GROUND, _ROAD, _ROUTE = (86, 120, 84), (92, 92, 96), (196, 186, 120)
_EGO, _CAR, _WALKER, _TEXT = (230, 74, 60), (80, 140, 220), (250, 220, 80), (250, 250, 250)
_LIGHTS = ((70, 220, 90), (250, 210, 60), (240, 60, 50))


def picture(world: Any, row: int = 0) -> np.ndarray:
    """``[400, 400, 3]`` of one world, the ego car in the middle and its heading up; 100 m of it are to be seen.

    Args:
        world: a `LaneWorldVector`.
        row: which of its worlds.

    Raises MissingExtraError without pillow.
    """
    require("images", by="a picture of LaneWorld")
    from PIL import Image, ImageDraw

    library, scene, state = world.library, world.scene, world.state
    image = Image.new("RGB", (_SIDE, _SIDE), _GROUND)
    drawn = ImageDraw.Draw(image)
    pose = state.pose_W4[row]
    wide = round(LANE_WIDTH * _PER_M)
    for point_P2, _ in library.lanes_M[scene.map_W[row]]:
        _line(drawn, pose, point_P2, wide, _ROAD)
    route = int(scene.route_W[row])
    ahead = _of_path(library, route)[int(state.s_W[row]) :]
    _line(drawn, pose, ahead, 3, _ROUTE)
    _stops(drawn, pose, library, route, float(world.clock_W[row]))
    for x, y, heading, _, length, width, walks in world.others(np.array([row]))[0]:
        if abs(x) < AWAY / 2:
            _box(drawn, pose, (x, y, heading), (length, width), _WALKER if walks else _CAR)
    _box(drawn, pose, (pose[0], pose[1], pose[2]), CAR, _EGO)
    limit = library.at(np.array([route]), state.s_W[row : row + 1])[0, 3]
    text = f"{pose[3] * 3.6:.0f} of {limit * 3.6:.0f} km/h   {state.s_W[row]:.0f} of {library.length_Q[route]:.0f} m"
    drawn.text((8, 6), text, fill=_TEXT)
    return np.asarray(image)


def _of_path(library: Any, path: int) -> np.ndarray:
    return library.point_QP5[path, : int(library.length_Q[path]) + 1, :2]


def _pixels(pose: np.ndarray, point_P2: np.ndarray) -> np.ndarray:
    """Points of the world in the picture: the car's heading is up."""
    dx, dy = point_P2[:, 0] - pose[0], point_P2[:, 1] - pose[1]
    cos, sin = math.cos(pose[2]), math.sin(pose[2])
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    return np.stack([_SIDE / 2 - across * _PER_M, _SIDE * 0.65 - along * _PER_M], axis=1)


def _line(drawn: Any, pose: np.ndarray, point_P2: np.ndarray, width: int, colour: tuple[int, int, int]) -> None:
    pixels = _pixels(pose, point_P2)
    is_near = np.all(np.abs(pixels - _SIDE / 2) < _SIDE, axis=1)
    # A path may leave the picture and come back.
    for part in np.split(np.arange(len(pixels)), np.flatnonzero(np.diff(is_near)) + 1):
        if len(part) > 1 and is_near[part[0]]:
            drawn.line([tuple(pixel) for pixel in pixels[part]], fill=colour, width=width, joint="curve")


def _box(
    drawn: Any,
    pose: np.ndarray,
    at: tuple[float, float, float],
    size: tuple[float, float],
    colour: tuple[int, int, int],
) -> None:
    x, y, heading = at
    cos, sin = math.cos(heading), math.sin(heading)
    corners = [(a * size[0] / 2, b * size[1] / 2) for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))]
    points = np.array([(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in corners])
    drawn.polygon([tuple(pixel) for pixel in _pixels(pose, points)], fill=colour)


def _stops(drawn: Any, pose: np.ndarray, library: Any, route: int, clock: float) -> None:
    """Lines of the route: lights by their colour, signs in white."""
    for stop_s, kind, offset in zip(
        library.stop_s_QJ[route], library.stop_kind_QJ[route], library.stop_offset_QJ[route], strict=True
    ):
        if kind == 0:
            continue
        x, y, heading = library.at(np.array([route]), np.array([stop_s]))[0, :3]
        state, _ = light_state(np.array(clock % CYCLE_S), np.array(offset))
        colour = _LIGHTS[int(state)] if kind == LIGHT else _TEXT
        _box(drawn, pose, (float(x), float(y), float(heading)), (0.8, LANE_WIDTH), colour)
