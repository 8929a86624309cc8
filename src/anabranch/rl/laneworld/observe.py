"""What a driver sees in LaneWorld: 161 numbers about the route and what is near, in the car's own frame, each about 1 in size.

     4   speed, last action (2), limit                           30   15 points of the route ahead (x, y), 3 m apart
   100   the 10 nearest cars and walkers (10 each)                7   next line: metres, light, sign, give way, yellow, red, seconds left
     3   beside the lane's middle, heading against it (sin, cos)  15   5 looks ahead: edges of the road left and right, limit
     2   whether within a junction; seconds of standing

A stop sign at which one has halted is from then on a place to give way: seen otherwise, a driver without memory could not know.
The critic sees 10 more: share of the route that is left, time, how long a moment of danger and each of six kinds of discomfort still
count, and for how long the car has been beside the middle of its lane.
"""
# Shapes: W worlds, O things nearby, N of them the nearest

from __future__ import annotations

import numpy as np

from anabranch.rl.laneworld.lane_graph import GIVE_WAY, LIGHT, STOP_SIGN, light_state
from anabranch.rl.laneworld.library import NOWHERE, Library

__all__ = ["BESIDE_PICTURE", "NUM_OBSERVED", "NUM_PRIVATE", "look"]

NUM_NEAR, NEAR_M = 10, 50.0
ROUTE_M = np.arange(1, 16, dtype=np.float32) * 3.0
LOOKS_M = np.array([0.0, 8.0, 16.0, 28.0, 42.0], np.float32)
_OF_OTHER = 10
NUM_OBSERVED = 4 + 2 * len(ROUTE_M) + NUM_NEAR * _OF_OTHER + 7 + 3 + 3 * len(LOOKS_M) + 2
NUM_PRIVATE = 10
# What a picture does not show: speed, last action, limit, the place in the lane, seconds of standing.
_LANE = NUM_OBSERVED - 2 - 3 * len(LOOKS_M) - 3
BESIDE_PICTURE = np.array([0, 1, 2, 3, _LANE, _LANE + 1, _LANE + 2, NUM_OBSERVED - 1])
# Metres, metres a second: what numbers are divided by.
_FAR, _FAST, _STOP_M = 30.0, 14.0, 50.0


def look(
    library: Library,
    route_W: np.ndarray,
    clock_W: np.ndarray,
    pose_W4: np.ndarray,
    action_W2: np.ndarray,
    s_W: np.ndarray,
    offset_W: np.ndarray,
    turn_W: np.ndarray,
    standing_s_W: np.ndarray,
    halted_W: np.ndarray,
    others_WO7: np.ndarray,
) -> np.ndarray:
    """The numbers of the module, ``[W, NUM_OBSERVED]`` float32.

    Args:
        library, route_W: of the routes.
        clock_W: time of the lights, in seconds.
        pose_W4: x, y, heading and speed of the ego car; action_W2: its last action.
        s_W, offset_W, turn_W: where it is in the frame of its route.
        standing_s_W: for how long it has stood.
        halted_W: at which stop it has come to a halt, see `State`.
        others_WO7: x, y, heading, speed, length, width and whether it walks, of all others.
    """
    num = len(route_W)
    x_W, y_W, heading_W, speed_W = pose_W4.T
    cos_W, sin_W = np.cos(heading_W), np.sin(heading_W)
    here_W5 = library.at(route_W, s_W)
    ahead_WA = s_W[:, None] + ROUTE_M
    route_WA5 = library.at(np.broadcast_to(route_W[:, None], ahead_WA.shape), ahead_WA)
    along_WA, across_WA = _turned(
        route_WA5[..., 0] - x_W[:, None], route_WA5[..., 1] - y_W[:, None], cos_W[:, None], sin_W[:, None]
    )
    look_WL = np.clip(s_W[:, None] + LOOKS_M, 0, library.length_Q[route_W][:, None])
    at_WL = look_WL.astype(np.int64)
    edge_WL2 = library.edge_QP2[route_W[:, None], at_WL]
    limit_WL = library.point_QP5[route_W[:, None], at_WL, 3]
    junction_W = library.junction_QP[route_W, at_WL[:, 0]]
    return np.concatenate(
        [
            np.stack([speed_W / _FAST, action_W2[:, 0], action_W2[:, 1], here_W5[:, 3] / _FAST], axis=1),
            along_WA / _FAR,
            across_WA / _FAR,
            _near(pose_W4, cos_W, sin_W, others_WO7).reshape(num, -1),
            _stop(library, route_W, s_W, clock_W, halted_W),
            np.stack([offset_W / 2, np.sin(turn_W), np.cos(turn_W)], axis=1),
            (edge_WL2[..., 0] - offset_W[:, None]) / 5,
            (edge_WL2[..., 1] + offset_W[:, None]) / 5,
            limit_WL / _FAST,
            np.stack([junction_W, np.minimum(standing_s_W / 30, 2.0)], axis=1),
        ],
        axis=1,
        dtype=np.float32,
        casting="unsafe",
    )


def _turned(dx: np.ndarray, dy: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Along and to the left of a heading."""
    return dx * cos + dy * sin, dy * cos - dx * sin


def _near(pose_W4: np.ndarray, cos_W: np.ndarray, sin_W: np.ndarray, others_WO7: np.ndarray) -> np.ndarray:
    """The nearest others ``[W, N, 10]``: whether there is one, place, heading (cos, sin), velocity against ours, size, whether it walks."""
    num, there = others_WO7.shape[:2]
    found_WNF = np.zeros((num, NUM_NEAR, _OF_OTHER))
    if not there:
        return found_WNF
    dx_WO, dy_WO = others_WO7[..., 0] - pose_W4[:, None, 0], others_WO7[..., 1] - pose_W4[:, None, 1]
    square_WO = dx_WO**2 + dy_WO**2
    taken = min(NUM_NEAR, there)
    # Few numbers: sorting all of them is quicker than picking some.
    order_WN = np.argsort(square_WO, axis=1, kind="stable")[:, :taken]
    rows_W1 = np.arange(num)[:, None]
    near_WN7 = others_WO7[rows_W1, order_WN]
    is_near_WN = square_WO[rows_W1, order_WN] < NEAR_M**2
    cos_W1, sin_W1 = cos_W[:, None], sin_W[:, None]
    along_WN, across_WN = _turned(dx_WO[rows_W1, order_WN], dy_WO[rows_W1, order_WN], cos_W1, sin_W1)
    turn_WN = near_WN7[..., 2] - pose_W4[:, None, 2]
    speed_WN = near_WN7[..., 3]
    told = [
        np.ones_like(along_WN),
        along_WN / _FAR,
        across_WN / _FAR,
        np.cos(turn_WN),
        np.sin(turn_WN),
        (speed_WN * np.cos(turn_WN) - pose_W4[:, None, 3]) / _FAST,
        speed_WN * np.sin(turn_WN) / _FAST,
        near_WN7[..., 4] / 5,
        near_WN7[..., 5] / 2,
        near_WN7[..., 6],
    ]
    found_WNF[:, :taken] = np.stack(told, axis=-1) * is_near_WN[..., None]
    return found_WNF


def _stop(
    library: Library, route_W: np.ndarray, s_W: np.ndarray, clock_W: np.ndarray, halted_W: np.ndarray
) -> np.ndarray:
    """``[W, 7]``: how near the next stop is (1 at the line, 0 from 50 m), what it asks for, and what the light shows for how long."""
    which_W, ahead_W = library.next_stop(route_W, s_W)
    seen_W = ahead_W < min(_STOP_M, NOWHERE)
    kind_W = np.where(seen_W, library.asked(route_W, which_W, halted_W), 0)
    state_W, left_W = light_state(clock_W, library.stop_offset_QJ[route_W, which_W])
    light_W = kind_W == LIGHT
    return np.stack(
        [
            np.where(seen_W, 1 - ahead_W / _STOP_M, 0.0),
            light_W,
            kind_W == STOP_SIGN,
            kind_W == GIVE_WAY,
            light_W & (state_W == 1),
            light_W & (state_W == 2),
            light_W * left_W / 10,
        ],
        axis=1,
    )
