"""What is known of every world of LaneWorld: `Scene`, fixed for an episode, and `State`, which moves on with every step."""
# Shapes: W worlds, K cars of traffic in each, M walkers, H last moments, C limits of comfort, F faults that are counted

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from anabranch.rl.environment import episode_seed
from anabranch.rl.laneworld.library import Library
from anabranch.rl.rewards import COMFORT

__all__ = ["CAR", "COUNTED", "MOMENTS", "START_M", "WALKER", "Scene", "State", "begin", "walkers_at"]

# Length and width, in metres.
CAR, WALKER = (4.5, 1.9), (0.6, 0.6)
# Moments that accelerations and jerks are worked out from.
MOMENTS = 9
START_M = 4.0
# Faults that an episode counts.
COUNTED = ("walker", "vehicle", "red_light", "stop_sign", "off_road")
# Where what does not take part stands.
AWAY = 1e6
_WALK_SPEED = 1.4
# From beside one's own lane over the road to beside the other.
_WALK_FROM, _WALK_OVER = -3.6, 10.8


@dataclass
class Scene:
    """What an episode is set in, a function of its seed.

    Attributes:
        route_W: the path to be driven.
        map_W: of the library's maps.
        offset_W: seconds that lights are ahead.
        walker_s_WM: where along the route walkers cross; negative for a walker that is not there.
        walker_period_WM, walker_phase_WM: every so many seconds each crosses, and when at first.
    """

    route_W: np.ndarray
    map_W: np.ndarray
    offset_W: np.ndarray
    walker_s_WM: np.ndarray
    walker_period_WM: np.ndarray
    walker_phase_WM: np.ndarray

    @classmethod
    def empty(cls, worlds: int, walkers: int) -> Scene:
        """Room for so many."""
        route_W, map_W, offset_W = np.zeros(worlds, np.int64), np.zeros(worlds, np.int64), np.zeros(worlds, np.float32)
        of_walkers = [np.zeros((worlds, walkers), np.float32) for _ in range(3)]
        return cls(route_W, map_W, offset_W, of_walkers[0], of_walkers[1], of_walkers[2])


@dataclass
class State:
    """Where everything is.

    Attributes:
        episode_W, step_W: number of the episode, and of its steps so far.
        pose_W4: x, y, heading and speed of the ego car, exact (float64).
        action_W2: its last action.
        s_W, offset_W, turn_W: metres along the route, to the left of it, and its heading against it.
        done_m_W: the farthest it has been along the route.
        front_m_W: the same of its front, by which lines are crossed.
        halted_W: at which of the route's stops, counted from 1, it has come to a halt; 0 for none.
        standing_W: steps since it last moved.
        beside_W: steps since it was in the middle of its lane.
        ttc_W, comfort_WC: steps for which a moment of danger, or of each kind of discomfort, still counts.
        speed_WH, heading_WH: its last moments, the newest last.
        driven_m_W: metres driven.
        cut_W: sum of what comfort left of each step.
        fault_WF, lasts_WF: how often each of `COUNTED` has happened, and whether it does now: what lasts counts once.
        path_WK, path_s_WK, speed_WK: of the traffic: its paths, where it is on them, how fast.
        alive_WK: whether a car takes part.
        stuck_WK: steps for which it has stood.
        turn_WK: how often its place was filled.
    """

    episode_W: np.ndarray
    step_W: np.ndarray
    pose_W4: np.ndarray
    action_W2: np.ndarray
    s_W: np.ndarray
    offset_W: np.ndarray
    turn_W: np.ndarray
    done_m_W: np.ndarray
    front_m_W: np.ndarray
    halted_W: np.ndarray
    standing_W: np.ndarray
    beside_W: np.ndarray
    ttc_W: np.ndarray
    comfort_WC: np.ndarray
    speed_WH: np.ndarray
    heading_WH: np.ndarray
    driven_m_W: np.ndarray
    cut_W: np.ndarray
    fault_WF: np.ndarray
    lasts_WF: np.ndarray
    path_WK: np.ndarray
    path_s_WK: np.ndarray
    speed_WK: np.ndarray
    alive_WK: np.ndarray
    stuck_WK: np.ndarray
    turn_WK: np.ndarray

    @classmethod
    def empty(cls, worlds: int, cars: int) -> State:
        """Room for so many."""
        wide = {"pose_W4": 4, "action_W2": 2, "comfort_WC": len(COMFORT), "speed_WH": MOMENTS, "heading_WH": MOMENTS}
        wide |= {"fault_WF": len(COUNTED), "lasts_WF": len(COUNTED)}
        counts = (
            "episode_W",
            "step_W",
            "halted_W",
            "standing_W",
            "beside_W",
            "ttc_W",
            "comfort_WC",
            "fault_WF",
            "path_WK",
            "stuck_WK",
            "turn_WK",
        )
        made = {}
        for field in fields(cls):
            name = field.name
            shape = (worlds, cars) if name.endswith("_WK") else (worlds, wide[name]) if name in wide else (worlds,)
            dtype = np.int64 if name in counts else bool if name in ("alive_WK", "lasts_WF") else np.float64
            made[name] = np.zeros(shape, dtype)
        return cls(**made)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def begin(library: Library, scene: Scene, state: State, row: int, seed: int, environment: int, *, speed: float) -> None:
    """Set world ``row`` to the beginning of its episode, which follows from the seed, the environment's number and the episode's."""
    rng = np.random.default_rng(episode_seed(seed, environment, int(state.episode_W[row])))
    cars, walkers = state.path_WK.shape[1], scene.walker_s_WM.shape[1]
    number = int(rng.integers(len(library.route_MR)))
    route = int(rng.choice(library.route_MR[number]))
    scene.map_W[row], scene.route_W[row], scene.offset_W[row] = number, route, rng.uniform(0, 1000)
    farthest = max(float(library.length_Q[route]) - 15.0, 26.0)
    # Each of them has a second place, for where the first one will not do.
    place_2M = rng.uniform(25.0, farthest, (2, walkers))
    is_free_2M = np.array([[_may_cross(library, number, route, place) for place in place_M] for place_M in place_2M])
    scene.walker_s_WM[row] = np.where(is_free_2M[0], place_2M[0], np.where(is_free_2M[1], place_2M[1], -1.0))
    scene.walker_period_WM[row], scene.walker_phase_WM[row] = rng.uniform(12, 30, walkers), rng.uniform(0, 60, walkers)
    for name, array in state.arrays().items():
        if name != "episode_W":
            array[row] = 0
    x, y, heading = library.at(np.array([route]), np.array([START_M]))[0, :3]
    state.pose_W4[row] = x, y, heading, speed
    state.s_W[row] = state.done_m_W[row] = START_M
    state.front_m_W[row] = START_M + CAR[0] / 2
    state.speed_WH[row], state.heading_WH[row] = speed, heading
    state.path_WK[row] = rng.choice(library.traffic_MT[number], cars)
    length_K = library.length_Q[state.path_WK[row]]
    state.path_s_WK[row] = rng.uniform(0, 0.8, cars) * length_K
    _place_traffic(library, state, row, (float(x), float(y)))


def _may_cross(library: Library, number: int, route: int, place: float) -> bool:
    """Whether somebody crosses so many metres along a route: within no junction, and waiting in no lane of any road."""
    if library.junction_QP[route, int(place)]:
        return False
    x, y, heading = library.at(np.array([route]), np.array([place]))[0, :3]
    across_2 = np.array([_WALK_FROM, _WALK_FROM + _WALK_OVER])
    return not library.is_in_lane(number, x - across_2 * np.sin(heading), y + across_2 * np.cos(heading)).any()


def _place_traffic(library: Library, state: State, row: int, ego: tuple[float, float]) -> None:
    """Cars that would stand too near to the ego car or to one before them do not take part at first."""
    place_K5 = library.at(state.path_WK[row], state.path_s_WK[row])
    taken = [(*ego, 22.0)]
    for car, (x, y, _, _, pace) in enumerate(place_K5):
        is_free = all((x - other_x) ** 2 + (y - other_y) ** 2 > room**2 for other_x, other_y, room in taken)
        state.alive_WK[row, car] = is_free
        if is_free:
            state.speed_WK[row, car] = 0.7 * pace
            taken.append((float(x), float(y), 9.0))


def walkers_at(
    library: Library, scene: Scene, time_W: np.ndarray, rows: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """x, y, heading and speed of walkers at a time, ``[W, M, 4]``; far away where there is none.

    Each goes over the road and some time later back, for ever: where it is follows from the time.
    """
    s_WM = scene.walker_s_WM[rows]
    clock_WM = time_W[:, None] + scene.walker_phase_WM[rows]
    period_WM = np.maximum(scene.walker_period_WM[rows], 1.0)
    crossing_WM = np.floor(clock_WM / period_WM)
    share_WM = (clock_WM - crossing_WM * period_WM) * _WALK_SPEED / _WALK_OVER
    walks_WM = share_WM < 1
    share_WM = np.minimum(share_WM, 1.0)
    goes_back_WM = crossing_WM % 2 == 1
    across_WM = _WALK_FROM + _WALK_OVER * np.where(goes_back_WM, 1 - share_WM, share_WM)
    route_WM = np.broadcast_to(scene.route_W[rows][:, None], s_WM.shape)
    place_WM5 = library.at(route_WM, s_WM)
    heading_WM = place_WM5[..., 2]
    is_there_WM = s_WM >= 0
    return np.stack(
        [
            np.where(is_there_WM, place_WM5[..., 0] - across_WM * np.sin(heading_WM), AWAY),
            np.where(is_there_WM, place_WM5[..., 1] + across_WM * np.cos(heading_WM), AWAY),
            heading_WM + np.where(goes_back_WM, -np.pi / 2, np.pi / 2),
            np.where(walks_WM & is_there_WM, _WALK_SPEED, 0.0),
        ],
        axis=-1,
    )
