"""What a step of LaneWorld is worth, and whether an episode ends: infractions found exactly, and CaRL's reward made of them."""
# Shapes: W worlds, K cars of traffic, O = K + M of these and walkers, B places on a car

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.rl.laneworld.geometry import boxes_overlap
from anabranch.rl.laneworld.lane_graph import LANE_WIDTH, LIGHT, STOP_SIGN, light_state
from anabranch.rl.laneworld.library import NOWHERE, Library
from anabranch.rl.laneworld.settings import Settings
from anabranch.rl.laneworld.state import CAR, COUNTED, START_M, Scene, State
from anabranch.rl.rewards import (
    PENALTIES,
    comfort_factor,
    driving_score,
    motion,
    roach_reward,
    route_reward,
    speed_factor,
    uncomfortable,
)

__all__ = ["Faults", "Judged", "count_faults", "find_faults", "judged"]

# Metres to the side of the middle of a lane that belong to the route: half a lane, and in junctions, whose lines one may cut, some more.
_HALF_LANE, _HALF_IN_JUNCTION = LANE_WIDTH / 2, 2.6
# Farther to the side than this is another way than the route.
_DEVIATED_M = 10.0
# The end of a route counts as reached from so many metres before it.
_REACHED_M = 1.0
# Speeds below which a car has halted, and stands; metres before a line within which it must have halted at a sign.
_HALTED, _STANDING, _HALT_M = 0.3, 0.1, 8.0
# Times, in seconds, at which a collision that comes is looked for; beside this far from the middle of a lane, for so long, is bad driving.
_TTC_S = (0.2, 0.4, 0.6, 0.8)
_CENTRE_M, _CENTRE_S = 0.5, 3.0
# Places on a car by which it is told how much of it is off the road: 5 along, 3 across.
_ALONG_B, _ACROSS_B = (
    each.ravel() for each in np.meshgrid(np.linspace(-0.5, 0.5, 5) * CAR[0], np.linspace(-0.5, 0.5, 3) * CAR[1])
)
_OFF_ROAD = 0.95


@dataclass(frozen=True)
class Faults:
    """What went wrong in a step, and whether the route is done; bool ``[W]`` each but for the last.

    Attributes:
        vehicle_W, walker_W: ran into a car, or somebody.
        red_light_W, stop_sign_W: went over a red light, or a stop sign without a halt.
        off_road_W: more than 95 % of the car is where nobody drives.
        deviated_W: it has left the route.
        blocked_W, timeout_W: it has stood for too long; the time is over.
        finished_W: at the end of the route.
        outside_W: part of the car is outside of the lanes of the route, which ends nothing.
        ends_by: names of those that end an episode, see `Settings`.
    """

    vehicle_W: np.ndarray
    walker_W: np.ndarray
    red_light_W: np.ndarray
    stop_sign_W: np.ndarray
    off_road_W: np.ndarray
    deviated_W: np.ndarray
    blocked_W: np.ndarray
    timeout_W: np.ndarray
    finished_W: np.ndarray
    outside_W: np.ndarray
    ends_by: tuple[str, ...]

    @property
    def ends_W(self) -> np.ndarray:
        """Whether the episode ends by a fault."""
        return self._any_of(self.ends_by) | self.timeout_W

    @property
    def hinted_W(self) -> np.ndarray:
        """Whether it ends by what CaRL's reward gives a hint at: a collision or a red light."""
        return self._any_of([name for name in ("vehicle", "walker", "red_light") if name in self.ends_by])

    def _any_of(self, names: Sequence[str]) -> np.ndarray:
        found_W = np.zeros_like(self.timeout_W)
        for name in names:
            found_W = found_W | getattr(self, f"{name}_W")
        return found_W

    def outcome(self, length_W: np.ndarray, state: State, dt: float) -> dict[str, np.ndarray]:
        """Measures of the episodes up to here, whose faults are counted in ``state``, ``[W]`` each."""
        completed_W = completion(state.done_m_W, length_W, self.finished_W)
        number = dict(zip(COUNTED, state.fault_WF.T.astype(np.float64), strict=True))
        seconds_W = np.maximum(state.step_W * dt, dt)
        speed_W = state.driven_m_W / seconds_W
        return {
            "route_completion": completed_W,
            "driving_score": driving_score(
                completed_W, {name: number_W for name, number_W in number.items() if name in PENALTIES}
            ),
            **number,
            "deviated": self.deviated_W.astype(np.float64),
            "blocked": self.blocked_W.astype(np.float64),
            "timeout": self.timeout_W.astype(np.float64),
            "finished": (self.finished_W & ~self.ends_W).astype(np.float64),
            "infractions": state.fault_WF.sum(1).astype(np.float64),
            "driven_km": state.driven_m_W / 1000,
            "infractions_per_km": state.fault_WF.sum(1) / np.maximum(state.driven_m_W / 1000, 0.01),
            "comfort": state.cut_W / np.maximum(state.step_W, 1),
            "mean_speed": speed_W,
            "stands_still": ((speed_W < 0.5) & (completed_W < 20)).astype(np.float64),
        }


def count_faults(state: State, faults: Faults) -> None:
    """Have ``state`` count what went wrong: once, however long it lasts."""
    now_WF = np.stack([getattr(faults, f"{name}_W") for name in COUNTED], axis=1)
    state.fault_WF += now_WF & ~state.lasts_WF
    state.lasts_WF[:] = now_WF


def completion(done_m_W: np.ndarray, length_W: np.ndarray, finished_W: np.ndarray) -> np.ndarray:
    """How much of a route is done, in percent, from where the car began."""
    share_W = (done_m_W - START_M) / (length_W - START_M)
    return np.where(finished_W, 100.0, 100.0 * np.clip(share_W, 0.0, 1.0))


def find_faults(
    library: Library,
    scene: Scene,
    state: State,
    settings: Settings,
    others_WO7: np.ndarray,
    clock_W: np.ndarray,
    dt: float,
) -> Faults:
    """What went wrong, after all have moved. ``state.halted_W``, ``standing_W`` and ``front_m_W`` move on.

    ``others_WO7``: as of `LaneWorldVector.others`; ``clock_W``: of the lights.
    """
    x_W, y_W, heading_W, speed_W = state.pose_W4.T
    ego = tuple(each[:, None] for each in (x_W, y_W, heading_W))
    hit_WO = boxes_overlap((*ego, *CAR), tuple(others_WO7[..., place] for place in (0, 1, 2, 4, 5)))
    walks_WO: np.ndarray = np.asarray(others_WO7[..., 6] > 0)
    at_W = np.minimum(np.rint(state.s_W), library.length_Q[scene.route_W]).astype(np.int64)
    edge_W2 = library.edge_QP2[scene.route_W, at_W]
    lateral_WB = (
        state.offset_W[:, None] + np.sin(state.turn_W)[:, None] * _ALONG_B + np.cos(state.turn_W)[:, None] * _ACROSS_B
    )
    off_WB = (lateral_WB > edge_W2[:, :1]) | (lateral_WB < -edge_W2[:, 1:])
    half_W = np.where(library.junction_QP[scene.route_W, at_W], _HALF_IN_JUNCTION, _HALF_LANE)
    red_W, sign_W = _crossed(library, scene, state, speed_W, clock_W)
    state.standing_W[:] = np.where(speed_W < _STANDING, state.standing_W + 1, 0)
    return Faults(
        np.any(hit_WO & ~walks_WO, axis=1),
        np.any(hit_WO & walks_WO, axis=1),
        red_W,
        sign_W,
        off_WB.mean(1) > _OFF_ROAD,
        np.abs(state.offset_W) > _DEVIATED_M,
        state.standing_W * dt >= settings.blocked_s,
        state.step_W * dt >= settings.timeout_s,
        state.s_W >= library.length_Q[scene.route_W] - _REACHED_M,
        (np.abs(lateral_WB) > half_W[:, None]).any(1),
        settings.ends_by,
    )


def _crossed(
    library: Library, scene: Scene, state: State, speed_W: np.ndarray, clock_W: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(over a red light, over a stop sign without a halt) in this step."""
    route_W = scene.route_W
    which_W, ahead_W = library.next_stop(route_W, state.front_m_W)
    halts_W = (speed_W < _HALTED) & (ahead_W < _HALT_M)
    state.halted_W[:] = np.where(halts_W, which_W + 1, state.halted_W)
    front_W = np.maximum(state.front_m_W, state.s_W + CAR[0] / 2)
    # A line that the front has just reached is behind it from now on.
    crossed_W = front_W > state.front_m_W + ahead_W
    state.front_m_W[:] = front_W
    kind_W = library.stop_kind_QJ[route_W, which_W]
    light_W, _ = light_state(clock_W, library.stop_offset_QJ[route_W, which_W])
    red_W = crossed_W & (kind_W == LIGHT) & (light_W == 2)
    return red_W, crossed_W & (kind_W == STOP_SIGN) & (state.halted_W != which_W + 1)


@dataclass(frozen=True)
class Judged:
    """What a step was worth: ``reward_W``, and the ``terms`` that it is made of (see `route_reward`)."""

    reward_W: np.ndarray
    terms: dict[str, np.ndarray]


def judged(
    library: Library,
    scene: Scene,
    state: State,
    settings: Settings,
    faults: Faults,
    others_WO7: np.ndarray,
    change_W: np.ndarray,
    clock_W: np.ndarray,
    dt: float,
) -> Judged:
    """The worth of a step. ``done_m_W``, the windows and the sums of ``state`` move on.

    ``change_W``: of the steering. The reward of a route that is finished without a fault adds up to 100.
    """
    length_W = library.length_Q[scene.route_W]
    reward, window = settings.reward, settings.reward.window
    before_W = completion(state.done_m_W, length_W, np.zeros_like(faults.finished_W))
    state.done_m_W[:] = np.maximum(state.done_m_W, state.s_W)
    progress_W = completion(state.done_m_W, length_W, faults.finished_W) - before_W
    speed_W = state.pose_W4[:, 3]
    limit_W = library.at(scene.route_W, state.s_W)[:, 3]
    state.ttc_W[:] = np.where(_danger(state, others_WO7), window, np.maximum(state.ttc_W - 1, 0))
    bad_WC = uncomfortable(motion(state.speed_WH, state.heading_WH, dt))
    state.comfort_WC[:] = np.where(bad_WC, window, np.maximum(state.comfort_WC - 1, 0))
    at_W = np.minimum(np.rint(state.s_W), length_W).astype(np.int64)
    beside_W = (np.abs(state.offset_W) > _CENTRE_M) & ~library.junction_QP[scene.route_W, at_W]
    state.beside_W[:] = np.where(beside_W, state.beside_W + 1, 0)
    comfort_W = comfort_factor(state.comfort_WC > 0)
    state.cut_W += comfort_W
    factors = reward.factors(
        {
            "outside": np.where(faults.outside_W, 0.0, 1.0),
            "speed": speed_factor(speed_W, limit_W),
            "ttc": np.where(state.ttc_W > 0, 0.5, 1.0),
            "comfort": comfort_W,
            "centre": np.where(state.beside_W * dt > _CENTRE_S, 0.5, 1.0),
        }
    )
    terminal_W = np.where(faults.hinted_W, reward.hint, 0.0)
    found_W, terms = route_reward(progress_W, factors, terminal_W)
    if settings.shaped:
        found_W = _shaped(library, scene, state, faults, others_WO7, change_W, clock_W)
        terms = {"shaped": found_W}
    return Judged(found_W, terms)


def _danger(state: State, others_WO7: np.ndarray) -> np.ndarray:
    """Whether the ego car and another, if both went straight on at the same speed, would overlap within less than a second."""
    x_W, y_W, heading_W, speed_W = state.pose_W4.T
    moves_W = speed_W > 0.1
    dx_WO, dy_WO = others_WO7[..., 0] - x_W[:, None], others_WO7[..., 1] - y_W[:, None]
    # Only pairs that can meet at all: few of all that there are.
    reach_WO = _TTC_S[-1] * (speed_W[:, None] + np.abs(others_WO7[..., 3]))
    reach_WO += (np.hypot(*CAR) + np.hypot(others_WO7[..., 4], others_WO7[..., 5])) / 2
    world_N, other_N = np.nonzero((dx_WO**2 + dy_WO**2 <= reach_WO**2) & moves_W[:, None])
    if not len(world_N):
        return np.zeros(len(x_W), bool)
    near_N7 = others_WO7[world_N, other_N]
    soon_S1 = np.array(_TTC_S)[:, None]
    ego_speed_N, ego_heading_N = speed_W[world_N], heading_W[world_N]
    ego = (
        x_W[world_N] + soon_S1 * ego_speed_N * np.cos(ego_heading_N),
        y_W[world_N] + soon_S1 * ego_speed_N * np.sin(ego_heading_N),
        ego_heading_N,
        *CAR,
    )
    other = (
        near_N7[:, 0] + soon_S1 * near_N7[:, 3] * np.cos(near_N7[:, 2]),
        near_N7[:, 1] + soon_S1 * near_N7[:, 3] * np.sin(near_N7[:, 2]),
        near_N7[:, 2],
        near_N7[:, 4],
        near_N7[:, 5],
    )
    meets_N = boxes_overlap(ego, other).any(0)
    found_W = np.zeros(len(x_W), bool)
    found_W[world_N[meets_N]] = True
    return found_W


def _shaped(
    library: Library,
    scene: Scene,
    state: State,
    faults: Faults,
    others_WO7: np.ndarray,
    change_W: np.ndarray,
    clock_W: np.ndarray,
) -> np.ndarray:
    """Roach's reward. What is in the way is what is within two metres of the lane that the car drives along."""
    x_W, y_W, heading_W, speed_W = state.pose_W4.T
    dx_WO, dy_WO = others_WO7[..., 0] - x_W[:, None], others_WO7[..., 1] - y_W[:, None]
    cos_W1, sin_W1 = np.cos(heading_W)[:, None], np.sin(heading_W)[:, None]
    along_WO, across_WO = dx_WO * cos_W1 + dy_WO * sin_W1, dy_WO * cos_W1 - dx_WO * sin_W1
    gap_WO = along_WO - (CAR[0] + others_WO7[..., 4]) / 2
    in_way_WO = (along_WO > 0) & (np.abs(across_WO) < 2.0)
    hazard_W = np.where(in_way_WO, np.maximum(gap_WO, 0.0), NOWHERE).min(1, initial=NOWHERE)
    which_W, ahead_W = library.next_stop(scene.route_W, state.front_m_W)
    light_W, _ = light_state(clock_W, library.stop_offset_QJ[scene.route_W, which_W])
    stops_W = (library.stop_kind_QJ[scene.route_W, which_W] == LIGHT) & (light_W == 2)
    red_W = np.where(stops_W, ahead_W, NOWHERE)
    return roach_reward(speed_W, hazard_W, red_W, state.offset_W, state.turn_W, change_W, faults.ends_W)
