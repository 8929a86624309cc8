"""CaRL's reward for drivers: progress along the route, cut down by soft factors, and ended by what must not happen (arXiv 2504.17838).

    r_t = (RC_t - RC_(t-1)) * p_1 * p_2 * ... + T_t

RC is how much of the route is done, in percent, so a route that is finished without a fault is worth 100 whatever happened on the way.
All functions are pure: arrays in, arrays out, of any shape.
"""
# Shapes: N cars, H the last moments of each, C limits of comfort

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError

__all__ = [
    "COMFORT",
    "FACTORS",
    "PENALTIES",
    "RouteReward",
    "comfort_factor",
    "driving_score",
    "motion",
    "roach_reward",
    "route_reward",
    "speed_factor",
    "uncomfortable",
]

FACTORS = ("outside", "speed", "ttc", "comfort", "centre")
# Least and greatest: acceleration along and across, all jerk and that along, rate and acceleration of turning; SI units, CaRL's numbers.
COMFORT = {
    "longitudinal_acceleration": (-4.05, 2.40),
    "lateral_acceleration": (-4.89, 4.89),
    "jerk": (0.0, 8.37),
    "longitudinal_jerk": (-4.13, 4.13),
    "yaw_rate": (-0.95, 0.95),
    "yaw_acceleration": (-1.93, 1.93),
}
# What an infraction leaves of a driving score (CARLA's leaderboard, as recalled in the paper's terms).
PENALTIES = {"walker": 0.5, "vehicle": 0.6, "static": 0.65, "red_light": 0.7, "stop_sign": 0.8}
# Metres a second above the limit at which nothing is left of a step's progress.
_TOO_FAST = 2.23


@configclass
class RouteReward(Config):
    """Which parts of the reward count.

    Attributes:
        outside: a step with any part of the car outside of the lanes of its route is worth nothing.
        speed: driving above the limit cuts progress down.
        ttc: after a moment in which a collision was less than a second away, progress counts half.
        comfort: limits of comfort that were passed cut progress down, by half at most.
        centre: driving long beside the middle of the lane counts half.
        window: steps for which a moment of ``ttc`` or ``comfort`` counts.
        hint: added where an episode ends by a collision or a red light; 0 or less.
    """

    outside: bool = True
    speed: bool = True
    ttc: bool = True
    comfort: bool = True
    centre: bool = True
    window: int = Field(default=500, ge=1)
    hint: float = Field(default=-1.0, le=0)

    def factors(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Those of ``given`` that count; the others are 1. Raises ConfigError if one of `FACTORS` is missing."""
        missing = [name for name in FACTORS if name not in given]
        if missing:
            raise ConfigError(f"the factor {missing[0]!r} is missing; give all of {', '.join(FACTORS)}")
        return {name: given[name] if getattr(self, name) else np.ones_like(given[name]) for name in FACTORS}


def route_reward(
    progress: np.ndarray, factors: Mapping[str, np.ndarray], terminal: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(reward, its terms): ``progress`` times all ``factors``, plus ``terminal``.

    Args:
        progress: how much more of the route is done, in percent of it.
        factors: each from 0 to 1.
        terminal: 0, or what is added at an end.

    The terms are ``progress``, ``terminal`` and the factors by name: the product of the factors, times progress, plus terminal, is the
    reward to the bit.
    """
    product = np.ones_like(progress)
    for factor in factors.values():
        product = product * factor
    return progress * product + terminal, {"progress": progress, "terminal": terminal, **factors}


def speed_factor(speed: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """1 up to the limit, and 0 from 2.23 m/s (5 miles an hour) above it."""
    return np.clip(1 - np.maximum(speed - limit, 0.0) / _TOO_FAST, 0.0, 1.0)


def comfort_factor(violated: np.ndarray) -> np.ndarray:
    """1 - 0.5 n / 6, where ``violated [..., 6]`` says which limits were passed lately."""
    return 1 - 0.5 * violated.sum(-1) / len(COMFORT)


def motion(speed_NH: np.ndarray, heading_NH: np.ndarray, dt: float) -> np.ndarray:
    """What comfort is about, now: the six numbers of `COMFORT`, ``[N, 6]``.

    By Savitzky and Golay: a parabola is fitted to the last H moments, the newest last, and its slope and bend at the newest are taken.
    Headings must be without jumps. Raises ConfigError for less than three moments.
    """
    slope_H, bend_H = _derivatives(speed_NH.shape[1])
    along, along_jerk = speed_NH @ slope_H / dt, speed_NH @ bend_H / dt**2
    rate, turning = heading_NH @ slope_H / dt, heading_NH @ bend_H / dt**2
    speed = speed_NH[:, -1]
    # Across: v times the rate of turning, and how that changes.
    across, across_jerk = speed * rate, along * rate + speed * turning
    return np.stack([along, across, np.hypot(along_jerk, across_jerk), along_jerk, rate, turning], axis=1)


@lru_cache
def _derivatives(moments: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the last ``moments`` numbers that give the first and the second derivative at the last, in units of steps."""
    if moments < 3:
        raise ConfigError(f"motion is known of {moments} moments; a parabola needs at least 3")
    time_H = np.arange(moments) - (moments - 1.0)
    weights_3H = np.linalg.pinv(np.stack([np.ones(moments), time_H, time_H**2], axis=1))
    return weights_3H[1], 2 * weights_3H[2]


def uncomfortable(motion_N6: np.ndarray) -> np.ndarray:
    """Which limits of `COMFORT` are passed, ``[N, 6]``."""
    least, most = np.array(list(COMFORT.values())).T
    return (motion_N6 < least) | (motion_N6 > most)


def driving_score(completed: np.ndarray, infractions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Percent of the route, times what each infraction leaves of it: CARLA's measure.

    ``infractions``: how many of each kind of `PENALTIES`. Raises ConfigError for another kind.
    """
    score = np.asarray(completed, np.float64)
    for name, number in infractions.items():
        if name not in PENALTIES:
            raise ConfigError(f"infraction {name!r} is not known; use {', '.join(PENALTIES)}")
        score = score * PENALTIES[name] ** np.asarray(number, np.float64)
    return score


def roach_reward(
    speed: np.ndarray,
    hazard_m: np.ndarray,
    red_m: np.ndarray,
    offset_m: np.ndarray,
    heading_error: np.ndarray,
    steer_change: np.ndarray,
    failed: np.ndarray,
) -> np.ndarray:
    """The shaped reward that CaRL is compared with (Zhang et al., Roach, ICCV 2021); its coefficients are as recalled by CaRL's authors.

    Args:
        speed: in m/s.
        hazard_m, red_m: metres to the next thing in the way, and to a red light; large where there is none.
        offset_m: from the middle of the lane.
        heading_error: in radians.
        steer_change: of the action since the step before.
        failed: whether the episode ends here by a fault.
    """
    fastest = 6.0
    wanted = fastest * np.minimum(np.clip(hazard_m / 9.5, 0, 1), np.clip(red_m / 18.0, 0, 1))
    of_speed = 1 - np.abs(speed - wanted) / fastest
    jerky = np.where(np.abs(steer_change) > 0.01, -0.1, 0.0)
    return of_speed - 0.5 * np.abs(offset_m) - np.abs(heading_error) + jerky - failed * (1 + speed)
