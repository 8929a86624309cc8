"""Other cars and walkers: the intelligent driver model, what stands in a car's way, and who crosses the road when.

a = a_max (1 - (v / v0)^4 - (s* / gap)^2)        s* = s0 + max(0, v T + v dv / (2 sqrt(a_max b)))
(Treiber, Hennecke, Helbing 2000, arXiv cond-mat/0002177); v0 the pace of the road, T = 1.5 s, s0 = 2 m, a_max = 1.5, b = 2 m/s^2
"""
# Shapes: W worlds, K cars of traffic in each, O things that may be in the way (the ego car, cars, walkers), A looks ahead

from __future__ import annotations

import numpy as np

from anabranch.rl.laneworld.lane_graph import GIVE_WAY, LIGHT, STOP_SIGN, light_state
from anabranch.rl.laneworld.library import NOWHERE, Library

__all__ = ["gaps_ahead", "idm", "stop_ahead"]

_HEADWAY_S, _STANDSTILL_M, _ACCELERATION, _BRAKING, _EXPONENT = 1.5, 2.0, 1.5, 2.0, 4
# Nobody brakes harder, in m/s^2.
_HARDEST = 8.0
# Metres along a car's path where it looks for others, and how near to such a place somebody is in the way.
LOOKS_M = np.arange(3.0, 40.0, 3.6, dtype=np.float32)
IN_THE_WAY_M = 2.1
# From the middle of a car; what is farther off cannot be near any place that it looks at.
_SEEN_M = float(LOOKS_M[-1]) + IN_THE_WAY_M + 4.0
# Metres around the place that must be free where one gives way, and from which a car that has priority counts.
_CONFLICT_M = 14.0
# Yellow holds whoever can still stop so hard, in m/s^2.
_COMFORTABLE = 3.0


def idm(speed: np.ndarray, pace: np.ndarray, gap: np.ndarray, leader_speed: np.ndarray) -> np.ndarray:
    """Acceleration in m/s^2 of cars at ``speed``, whose roads have a ``pace``, ``gap`` metres behind something that moves on.

    `NOWHERE` as a gap is a free road. No car brakes harder than 8 m/s^2.
    """
    wanted = _STANDSTILL_M + np.maximum(
        0.0, speed * _HEADWAY_S + speed * (speed - leader_speed) / (2 * np.sqrt(_ACCELERATION * _BRAKING))
    )
    free = 1 - (speed / np.maximum(pace, 0.1)) ** _EXPONENT
    found = _ACCELERATION * (free - (wanted / np.maximum(gap, 0.1)) ** 2)
    return np.clip(found, -_HARDEST, _ACCELERATION)


def gaps_ahead(
    library: Library,
    path_WK: np.ndarray,
    s_WK: np.ndarray,
    length_WK: np.ndarray,
    others_WO5: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(metres from bumper to bumper to the next thing in the way, its speed along the path); `NOWHERE` and 0 for none.

    Args:
        library: of the paths.
        path_WK, s_WK: where the cars are.
        length_WK: their lengths.
        others_WO5: x, y, heading, speed and length of all that may be in the way. A car is never in its own way: it looks ahead of itself.
    """
    gap_WK = np.full(path_WK.shape, NOWHERE)
    leader_WK = np.zeros(path_WK.shape)
    # Few pairs are near enough at all: these are looked at one by one.
    here_WK5 = library.at(path_WK, s_WK)
    dx_WKO = others_WO5[:, None, :, 0] - here_WK5[..., 0, None]
    dy_WKO = others_WO5[:, None, :, 1] - here_WK5[..., 1, None]
    near_WKO = dx_WKO * dx_WKO + dy_WKO * dy_WKO < _SEEN_M**2
    # Not what is behind, oneself among it.
    cos_WK1, sin_WK1 = np.cos(here_WK5[..., 2, None]), np.sin(here_WK5[..., 2, None])
    near_WKO &= dx_WKO * cos_WK1 + dy_WKO * sin_WK1 > 1.0
    sees_WK = near_WKO.any(-1)
    if not sees_WK.any():
        return gap_WK, leader_WK
    # C cars that have anything near, and N pairs of such a car and another.
    path_C, front_C = path_WK[sees_WK], s_WK[sees_WK] + length_WK[sees_WK] / 2
    ahead_CA = front_C[:, None] + LOOKS_M
    place_CA5 = library.at(np.broadcast_to(path_C[:, None], ahead_CA.shape), ahead_CA)
    # Beyond the end of its path a car looks at nothing.
    is_path_CA = ahead_CA <= library.length_Q[path_C][:, None]
    world_N, car_N, other_N = np.nonzero(near_WKO)
    place_N = (np.cumsum(sees_WK.ravel()) - 1)[world_N * path_WK.shape[1] + car_N]
    other_N5 = others_WO5[world_N, other_N]
    dx_NA = other_N5[:, None, 0] - place_CA5[place_N, :, 0]
    dy_NA = other_N5[:, None, 1] - place_CA5[place_N, :, 1]
    hits_NA = (dx_NA * dx_NA + dy_NA * dy_NA < IN_THE_WAY_M**2) & is_path_CA[place_N]
    first_N = hits_NA.argmax(1)
    is_there_N = hits_NA[np.arange(len(first_N)), first_N]
    gap_N = np.maximum(LOOKS_M[first_N] - other_N5[:, 4] / 2, 0.1)
    turn_N = other_N5[:, 2] - place_CA5[place_N, first_N, 2]
    along_N = np.maximum(other_N5[:, 3] * np.cos(turn_N), 0.0)
    # The nearest last, so that it is what stays.
    order_N = np.argsort(-gap_N, kind="stable")
    order_N = order_N[is_there_N[order_N]]
    gap_WK[world_N[order_N], car_N[order_N]] = gap_N[order_N]
    leader_WK[world_N[order_N], car_N[order_N]] = along_N[order_N]
    return gap_WK, leader_WK


def stop_ahead(
    library: Library,
    path_WK: np.ndarray,
    s_WK: np.ndarray,
    speed_WK: np.ndarray,
    time_W: np.ndarray,
    others_WO5: np.ndarray,
) -> np.ndarray:
    """Metres to a line where a car has to stop now, `NOWHERE` for none: a red light, or a road that goes first and is not free.

    ``others_WO5``: as in `gaps_ahead`, the cars themselves from number 1 on in their order.
    """
    which_WK, ahead_WK = library.next_stop(path_WK, s_WK)
    kind_WK = library.stop_kind_QJ[path_WK, which_WK]
    state_WK, _ = light_state(time_W[:, None], library.stop_offset_QJ[path_WK, which_WK])
    can_stop_WK = speed_WK**2 < 2 * _COMFORTABLE * np.maximum(ahead_WK, 0.0)
    waits_WK = (kind_WK == LIGHT) & ((state_WK == 2) | ((state_WK == 1) & can_stop_WK))
    gives_way_WK = (kind_WK == GIVE_WAY) | (kind_WK == STOP_SIGN)
    # Who is this near decides now.
    gives_way_WK &= ahead_WK < 12.0
    if gives_way_WK.any():
        world_G, car_G = np.nonzero(gives_way_WK)
        conflict_G2 = library.stop_conflict_QJ2[path_WK[world_G, car_G], which_WK[world_G, car_G]]
        others_GO5 = others_WO5[world_G]
        dx_GO = conflict_G2[:, None, 0] - others_GO5[..., 0]
        dy_GO = conflict_G2[:, None, 1] - others_GO5[..., 1]
        distance_GO = np.hypot(dx_GO, dy_GO)
        # Towards it, or in it; who waits at a line of their own is not.
        towards_GO = dx_GO * np.cos(others_GO5[..., 2]) + dy_GO * np.sin(others_GO5[..., 2]) > -2.0
        counts_GO = (distance_GO < _CONFLICT_M) & towards_GO & (others_GO5[..., 3] > 0.5)
        own_G2 = others_GO5[np.arange(len(car_G)), car_G + 1]
        # Not oneself, nor who comes behind on the same road: who goes the same way and is farther off.
        same_way_GO = np.cos(others_GO5[..., 2] - own_G2[:, None, 2]) > 0.8
        own_distance_G = np.hypot(conflict_G2[:, 0] - own_G2[:, 0], conflict_G2[:, 1] - own_G2[:, 1])
        counts_GO &= ~(same_way_GO & (distance_GO >= own_distance_G[:, None] - 0.1))
        counts_GO[np.arange(len(car_G)), car_G + 1] = False
        waits_WK[world_G, car_G] |= counts_GO.any(-1)
    return np.where(waits_WK, ahead_WK, NOWHERE)
