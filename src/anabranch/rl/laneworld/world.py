"""`LaneWorldVector`: many worlds of LaneWorld at once, as one vector environment of gymnasium. All of a step is done on arrays.

A step: the ego car moves as a kinematic bicycle; traffic follows its paths by the intelligent driver model; then what was run into, run
over or crossed is found out, the step is worth what the reward says, and worlds whose episode has ended begin the next one.
"""
# Shapes: W worlds, K cars of traffic in each, M walkers, O = 1 + K + M of these and the ego car

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from anabranch.errors import CheckpointError, InputError
from anabranch.rl.environment import CRITIC, OUTCOME, PICTURE, POLICY
from anabranch.rl.laneworld.bicycle import drive
from anabranch.rl.laneworld.judge import Faults, Judged, count_faults, find_faults, judged
from anabranch.rl.laneworld.library import NOWHERE, Library
from anabranch.rl.laneworld.observe import BESIDE_PICTURE, NUM_OBSERVED, NUM_PRIVATE, look
from anabranch.rl.laneworld.raster import CHANNELS, SIDE, Raster
from anabranch.rl.laneworld.settings import Settings
from anabranch.rl.laneworld.state import AWAY, CAR, WALKER, Scene, State, begin, walkers_at
from anabranch.rl.laneworld.traffic import gaps_ahead, idm, stop_ahead

__all__ = ["DT", "LaneWorldVector"]

# Seconds of a step.
DT = 0.1
# A car that has stood for so many steps elsewhere than at a line of its own leaves its place.
_STUCK = 300
# How free the beginning of a path must be where a car comes in: of others, and of the ego car, in metres.
_FREE_M, _FREE_OF_EGO_M = 12.0, 30.0
_BEFORE, _BEHIND = 8, 3


class LaneWorldVector(VectorEnv):
    """See the module. A `anabranch.rl.environment.World`.

    Args:
        library: of the roads.
        settings: how many share them, and what counts.
        num: W.
        seed: of all episodes.
        first: number of the first world; the others follow.

    Attributes:
        state, scene: where everything is.
        judged: what the last step was worth, and why.
        on_end: called with the number of a world whose episode has ended, before the next one begins.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (gymnasium declares it so)

    def __init__(self, library: Library, settings: Settings, num: int, *, seed: int, first: int = 0) -> None:
        self.library, self.settings, self.num_envs = library, settings, num
        self._seed, self._first = seed, first
        box = gymnasium.spaces.Box
        self._raster = Raster(library) if settings.raster else None
        numbers = NUM_OBSERVED if self._raster is None else len(BESIDE_PICTURE)
        seen: dict[str, gymnasium.Space[Any]] = {
            name: box(-np.inf, np.inf, (size,)) for name, size in ((POLICY, numbers), (CRITIC, NUM_PRIVATE))
        }
        if self._raster is not None:
            seen[PICTURE] = box(0.0, 1.0, (CHANNELS, SIDE, SIDE))
        self.single_observation_space = gymnasium.spaces.Dict(seen)
        self.single_action_space = box(-1.0, 1.0, (2,))
        self.observation_space = batch_space(self.single_observation_space, num)
        self.action_space = batch_space(self.single_action_space, num)
        self.scene, self.state = Scene.empty(num, settings.walkers), State.empty(num, settings.traffic)
        self.judged: Judged | None = None
        self.on_end: Callable[[int], None] | None = None

    # gymnasium's side

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin episode 0 in every world. ``seed`` and ``options`` are not looked at."""
        self.state.episode_W[:] = 0
        for row in range(self.num_envs):
            self._begin(row)
        return self.seen(), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of 0.1 s in every world: ``actions [W, 2]`` are steering and gas or brake, from -1 to 1.

        Beyond that they count as the end of the range. Raises InputError for another shape or NaN, and no world moves.
        """
        action_W2 = self._checked(actions)
        change_W = np.abs(action_W2[:, 0] - self.state.action_W2[:, 0])
        self._drive(action_W2)
        self._move_traffic()
        self.state.step_W += 1
        self._localise()
        others_WO7 = self.others()
        faults = self._faults(others_WO7)
        count_faults(self.state, faults)
        found = judged(
            self.library, self.scene, self.state, self.settings, faults, others_WO7, change_W, self.clock_W, DT
        )
        self.judged = found
        infos: dict[str, Any] = {"reward_terms": found.terms}
        terminated_W, truncated_W = faults.ends_W, faults.finished_W & ~faults.ends_W
        done_W = terminated_W | truncated_W
        seen = self.seen(others_WO7)
        if done_W.any():
            infos |= {"final_obs": {name: array.copy() for name, array in seen.items()}, "_final_obs": done_W}
            infos[OUTCOME] = self._outcome(faults)
            rows = np.flatnonzero(done_W)
            for row in rows:
                if self.on_end is not None:
                    self.on_end(int(row))
                self.state.episode_W[row] += 1
                self._begin(int(row))
            fresh = self.seen(rows=rows)
            for name, array in seen.items():
                array[rows] = fresh[name]
        return seen, found.reward_W, terminated_W, truncated_W, infos

    def _checked(self, actions: Any) -> np.ndarray:
        """float64 ``[W, 2]``, within -1 and 1."""
        action_W2 = np.asarray(actions, np.float64)
        if action_W2.shape != (self.num_envs, 2):
            raise InputError(
                f"actions have shape {list(action_W2.shape)}; {self.num_envs} worlds take [{self.num_envs}, 2]"
            )
        if np.isnan(action_W2).any():
            world = int(np.flatnonzero(np.isnan(action_W2).any(axis=1))[0])
            raise InputError(
                f"the action of world {world} is {action_W2[world].tolist()}; it must be numbers from -1 to 1"
            )
        return np.clip(action_W2, -1.0, 1.0)

    def state_dict(self) -> dict[str, np.ndarray]:
        """All of `State`; the scenes follow from the episodes' numbers."""
        return {name: array.copy() for name, array in self.state.arrays().items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Go to where ``state`` says; the observations of there. Raises CheckpointError if it is of other numbers of worlds or cars."""
        mine = self.state.arrays()
        # A checkpoint of before faults were counted has none of them.
        state = {name: np.zeros_like(mine[name]) for name in ("fault_WF", "lasts_WF")} | dict(state)
        for name, array in mine.items():
            if name not in state or state[name].shape != array.shape:
                held = list(state[name].shape) if name in state else "missing"
                raise CheckpointError(f"{name} of the state is {held}, and {list(array.shape)} is needed here")
        self.state.episode_W[:] = state["episode_W"]
        for row in range(self.num_envs):
            self._begin(row)
        for name, array in mine.items():
            array[:] = state[name]
        return self.seen()

    # What happens in a step

    @property
    def clock_W(self) -> np.ndarray:
        """Of lights and walkers, in seconds."""
        return self.state.step_W * DT + self.scene.offset_W

    def _begin(self, row: int) -> None:
        environment = self._first + row
        begin(self.library, self.scene, self.state, row, self._seed, environment, speed=self.settings.start_speed)

    def _drive(self, action_W2: np.ndarray) -> None:
        state = self.state
        state.pose_W4[:] = drive(state.pose_W4, action_W2, DT)
        state.action_W2[:] = action_W2
        state.driven_m_W += state.pose_W4[:, 3] * DT
        for history_WH, now_W in ((state.speed_WH, state.pose_W4[:, 3]), (state.heading_WH, state.pose_W4[:, 2])):
            history_WH[:, :-1] = history_WH[:, 1:]
            history_WH[:, -1] = now_W

    def _move_traffic(self) -> None:
        if not self.settings.traffic:
            return
        state, library = self.state, self.library
        place_WK5 = library.at(state.path_WK, state.path_s_WK)
        others_WO5 = self._in_the_way(place_WK5)
        length_WK = np.full(state.path_WK.shape, CAR[0])
        gap_WK, leader_WK = gaps_ahead(library, state.path_WK, state.path_s_WK, length_WK, others_WO5)
        line_WK = stop_ahead(
            library, state.path_WK, state.path_s_WK + CAR[0] / 2, state.speed_WK, self.clock_W, others_WO5
        )
        # A line is kept at a metre's distance, as the driver model keeps 2 m from cars.
        is_line_WK = line_WK + 1.0 < gap_WK
        gap_WK = np.where(is_line_WK, line_WK + 1.0, gap_WK)
        leader_WK = np.where(is_line_WK, 0.0, leader_WK)
        pace_WK = np.minimum(
            place_WK5[..., 4], library.at(state.path_WK, state.path_s_WK + 1.5 * state.speed_WK)[..., 4]
        )
        accel_WK = idm(state.speed_WK, pace_WK, gap_WK, leader_WK)
        state.speed_WK[:] = np.where(state.alive_WK, np.maximum(state.speed_WK + accel_WK * DT, 0.0), 0.0)
        state.path_s_WK += state.speed_WK * DT
        stands_WK = (state.speed_WK < 0.1) & ~is_line_WK & state.alive_WK
        state.stuck_WK[:] = np.where(stands_WK, state.stuck_WK + 1, 0)
        over_WK = (state.path_s_WK >= library.length_Q[state.path_WK] - 0.5) | (state.stuck_WK > _STUCK)
        state.alive_WK &= ~over_WK
        if not state.alive_WK.all():
            self._bring_in()

    def _bring_in(self) -> None:
        """Cars that do not take part begin a path of their map, where that is free: one of each world in a step, so none meet there."""
        state = self.state
        row_R = np.flatnonzero(~state.alive_WK.all(1))
        car_R = state.alive_WK[row_R].argmin(1)
        state.turn_WK[row_R, car_R] += 1
        paths = self.library.traffic_MT.shape[1]
        # Another path each time, and all of them in turn.
        pick_R = (car_R * 5 + state.turn_WK[row_R, car_R] * 7 + state.episode_W[row_R]) % paths
        path_R = self.library.traffic_MT[self.scene.map_W[row_R], pick_R]
        begin_R5 = self.library.at(path_R, np.zeros(len(row_R)))
        place_RK5 = self.library.at(state.path_WK[row_R], state.path_s_WK[row_R])
        distance_RK = np.hypot(place_RK5[..., 0] - begin_R5[:, None, 0], place_RK5[..., 1] - begin_R5[:, None, 1])
        is_free_R = (np.where(state.alive_WK[row_R], distance_RK, NOWHERE) > _FREE_M).all(1)
        pose_R4 = state.pose_W4[row_R]
        is_free_R &= np.hypot(pose_R4[:, 0] - begin_R5[:, 0], pose_R4[:, 1] - begin_R5[:, 1]) > _FREE_OF_EGO_M
        row_F, car_F = row_R[is_free_R], car_R[is_free_R]
        state.path_WK[row_F, car_F] = path_R[is_free_R]
        state.path_s_WK[row_F, car_F] = 0.0
        state.speed_WK[row_F, car_F] = 0.5 * begin_R5[is_free_R, 4]
        state.stuck_WK[row_F, car_F] = 0
        state.alive_WK[row_F, car_F] = True

    def _in_the_way(self, place_WK5: np.ndarray) -> np.ndarray:
        """x, y, heading, speed and length of the ego car, traffic and walkers, ``[W, O, 5]``."""
        num, state = self.num_envs, self.state
        found_WO5 = np.empty((num, 1 + self.settings.traffic + self.settings.walkers, 5), np.float32)
        found_WO5[:, 0, :4], found_WO5[:, 0, 4] = state.pose_W4, CAR[0]
        cars = slice(1, 1 + self.settings.traffic)
        found_WO5[:, cars, :2] = np.where(state.alive_WK[..., None], place_WK5[..., :2], AWAY)
        found_WO5[:, cars, 2], found_WO5[:, cars, 3], found_WO5[:, cars, 4] = place_WK5[..., 2], state.speed_WK, CAR[0]
        if self.settings.walkers:
            walkers = slice(1 + self.settings.traffic, None)
            found_WO5[:, walkers, :4] = walkers_at(self.library, self.scene, self.clock_W)
            found_WO5[:, walkers, 4] = WALKER[0]
        return found_WO5

    def others(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """x, y, heading, speed, length, width and whether it walks, of traffic and walkers: ``[W, K + M, 7]``, far off if not there."""
        state, settings = self.state, self.settings
        alive_WK = state.alive_WK[rows]
        place_WK5 = self.library.at(state.path_WK[rows], state.path_s_WK[rows])
        found_WO7 = np.zeros((len(alive_WK), settings.traffic + settings.walkers, 7))
        cars, walkers = slice(0, settings.traffic), slice(settings.traffic, None)
        found_WO7[:, cars, :2] = np.where(alive_WK[..., None], place_WK5[..., :2], AWAY)
        found_WO7[:, cars, 2], found_WO7[:, cars, 3] = place_WK5[..., 2], state.speed_WK[rows]
        found_WO7[:, cars, 4:6] = CAR
        if settings.walkers:
            found_WO7[:, walkers, :4] = walkers_at(self.library, self.scene, self.clock_W[rows], rows)
            found_WO7[:, walkers, 4:6], found_WO7[:, walkers, 6] = WALKER, 1.0
        return found_WO7

    def _localise(self) -> None:
        """Where the ego car is in the frame of its route: the nearest point among those around where it was, and what is between points."""
        state, library, route_W = self.state, self.library, self.scene.route_W
        around_V = np.arange(-_BEHIND, _BEFORE + 1)
        index_WV = np.clip(
            np.rint(state.s_W).astype(np.int64)[:, None] + around_V, 0, library.length_Q[route_W][:, None]
        )
        index_WV = index_WV.astype(np.int64)
        point_WV5 = library.point_QP5[route_W[:, None], index_WV]
        dx_WV = state.pose_W4[:, 0, None] - point_WV5[..., 0]
        dy_WV = state.pose_W4[:, 1, None] - point_WV5[..., 1]
        near_W = (dx_WV**2 + dy_WV**2).argmin(1)
        rows_W = np.arange(self.num_envs)
        x_W, y_W, heading_W = dx_WV[rows_W, near_W], dy_WV[rows_W, near_W], point_WV5[rows_W, near_W, 2]
        cos_W, sin_W = np.cos(heading_W), np.sin(heading_W)
        between_W = np.clip(x_W * cos_W + y_W * sin_W, -0.6, 0.6)
        state.s_W[:] = np.clip(index_WV[rows_W, near_W] + between_W, 0, library.length_Q[route_W])
        state.offset_W[:] = y_W * cos_W - x_W * sin_W
        state.turn_W[:] = np.remainder(state.pose_W4[:, 2] - heading_W + np.pi, 2 * np.pi) - np.pi

    def seen(
        self, others_WO7: np.ndarray | None = None, rows: np.ndarray | slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """What policy and critic see, of ``rows`` of the worlds."""
        state, scene = self.state, self.scene
        others_WO7 = self.others(rows) if others_WO7 is None else others_WO7
        policy_WD = look(
            self.library,
            scene.route_W[rows],
            self.clock_W[rows],
            state.pose_W4[rows],
            state.action_W2[rows],
            state.s_W[rows],
            state.offset_W[rows],
            state.turn_W[rows],
            state.standing_W[rows] * DT,
            state.halted_W[rows],
            others_WO7,
        )
        if self._raster is None:
            return {POLICY: policy_WD, CRITIC: self._private(rows)}
        picture_WCHV = self._raster.picture(
            scene.map_W[rows],
            scene.route_W[rows],
            self.clock_W[rows],
            state.pose_W4[rows],
            state.s_W[rows],
            state.front_m_W[rows],
            state.halted_W[rows],
            others_WO7,
        )
        return {POLICY: policy_WD[:, BESIDE_PICTURE], CRITIC: self._private(rows), PICTURE: picture_WCHV}

    def _private(self, rows: np.ndarray | slice) -> np.ndarray:
        """What only the critic sees: share of the route that is left, time, and what still counts against the driver."""
        state, window = self.state, self.settings.reward.window
        left_W = 1 - state.done_m_W[rows] / self.library.length_Q[self.scene.route_W[rows]]
        time_W = state.step_W[rows] * DT / self.settings.timeout_s
        told = [left_W, time_W, state.ttc_W[rows] / window, np.minimum(state.beside_W[rows] * DT / 3, 2.0)]
        return np.concatenate(
            [np.stack(told, axis=1), state.comfort_WC[rows] / window], axis=1, dtype=np.float32, casting="unsafe"
        )

    def _faults(self, others_WO7: np.ndarray) -> Faults:
        """What went wrong in this step."""
        return find_faults(self.library, self.scene, self.state, self.settings, others_WO7, self.clock_W, DT)

    def _outcome(self, faults: Faults) -> dict[str, np.ndarray]:
        """Numbers about the episodes as they are now, good for those that end."""
        return faults.outcome(self.library.length_Q[self.scene.route_W], self.state, DT)
