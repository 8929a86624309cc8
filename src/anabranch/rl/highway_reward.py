"""`RouteCompletion`: CaRL's reward on environments of HighwayEnv.

How far a car is along its route is read from lane coordinates: the lanes of the route that lie behind it, and its place on the present one.
Where HighwayEnv itself says who has arrived, its word counts and the route ends there; elsewhere who has come to the end of its last lane,
or on to a lane behind it, has arrived. Without a route (continuous control of ``intersection-v1``) metres count, and the arrival that
HighwayEnv says pays for what is left of them. Of the soft factors `outside`, `speed` and `ttc` are known there. A step of HighwayEnv is a
decision that holds for a second, so `comfort` and `centre`, which look at tenths of a second, are 1.
"""

from __future__ import annotations

import inspect
from typing import Any

import gymnasium
import numpy as np

from anabranch.rl.environment import OUTCOME
from anabranch.rl.laneworld.geometry import boxes_overlap
from anabranch.rl.rewards import RouteReward, driving_score, route_reward, speed_factor

__all__ = ["RouteCompletion"]

# The end of a route counts as reached from so many metres before it.
_REACHED_M = 3.0
_TTC_S = np.array([0.2, 0.4, 0.6, 0.8])


class RouteCompletion(gymnasium.Wrapper):
    """CaRL's reward on an environment of HighwayEnv.

    ``info["reward_terms"]`` has what a reward is made of (`route_reward`); where an episode ends, ``info["outcome"]`` has
    ``route_completion``, ``driving_score`` (percent), ``arrived``, ``collided`` and ``own_return``, the sum of HighwayEnv's rewards: all of
    them as they were at the end. An arrival ends the episode, by whichever reward, and is a truncation, without a bonus.

    Args:
        env: the environment.
        reward: which parts count.
        own_reward: give HighwayEnv's reward; then an arrival ends an episode for good where it does there.
        straight_m: metres to be driven where there is no route.
    """

    # In the order in which they came: see `ReplayedWorld`.
    changed_rules = ("an arrival ends an episode, wherever the end of the route was passed",)

    def __init__(
        self, env: gymnasium.Env, reward: RouteReward, *, own_reward: bool = False, straight_m: float = 400.0
    ) -> None:
        super().__init__(env)
        self._reward, self._own_reward, self._straight_m = reward, own_reward, straight_m
        # Its type is HighwayEnv's own.
        self._driven: Any = None

    def reset(self, **given: Any) -> tuple[Any, dict[str, Any]]:
        """See `gymnasium.Env`."""
        observation, info = self.env.reset(**given)
        self._driven = _Driven(self.env.unwrapped, self._straight_m)
        self._danger_left, self._own_return = 0, 0.0
        return observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """See `gymnasium.Env`."""
        observation, own, terminated, truncated, info = self.env.step(action)
        self._own_return += float(own)
        road: Any = self.env.unwrapped
        car = road.vehicle
        before, now = self._driven.percent, self._driven.move()
        has_arrived = getattr(road, "has_arrived", None)
        collided = bool(car.crashed)
        arrived = not collided and (now >= 100.0 if has_arrived is None else bool(has_arrived(car)))
        now = 100.0 if arrived else now
        self._danger_left = self._reward.window if _danger(road) else max(self._danger_left - 1, 0)
        limit = car.lane.speed_limit if car.lane is not None and car.lane.speed_limit is not None else np.inf
        one = np.ones(1)
        factors = self._reward.factors(
            {
                "outside": one * bool(car.on_road),
                "speed": speed_factor(one * car.speed, one * limit),
                "ttc": one * (0.5 if self._danger_left else 1.0),
                "comfort": one,
                "centre": one,
            }
        )
        reward, terms = route_reward(one * (now - before), factors, one * (self._reward.hint if collided else 0.0))
        info = {**info, "reward_terms": {name: float(value[0]) for name, value in terms.items()}}
        if arrived:
            # HighwayEnv's reward of an arrival may count on nothing to come.
            terminated = self._own_reward and terminated
            truncated = not terminated
        if terminated or truncated:
            info[OUTCOME] = {
                "route_completion": now,
                "driving_score": float(driving_score(one * now, {"vehicle": one * collided})[0]),
                "arrived": float(arrived),
                "collided": float(collided),
                "own_return": self._own_return,
            }
        return (
            observation,
            float(own) if self._own_reward else float(reward[0]),
            bool(terminated),
            bool(truncated),
            info,
        )


class _Driven:
    """How far a car is along its route."""

    def __init__(self, road: Any, straight_m: float) -> None:
        self._road = road
        car = road.vehicle
        network = road.road.network
        # HighwayEnv takes lanes off its list as they are driven.
        self._route = [tuple(index) for index in (getattr(car, "route", None) or [])]
        lengths = [network.get_lane((*index[:2], index[2] or 0)).length for index in self._route]
        self._begins = np.concatenate([[0.0], np.cumsum(lengths)])
        self._on = 0
        self._place = np.array(car.position, float)
        self._start = self._along() if self._route else 0.0
        self._straight = 0.0
        self._whole = max(self._end() - self._start if self._route else straight_m, 1.0)
        self.percent = 0.0

    def move(self) -> float:
        """The percentage now; it never falls."""
        if self._route:
            done = self._along() - self._start
        else:
            now = np.array(self._road.vehicle.position, float)
            lane = self._road.vehicle.lane
            heading = lane.heading_at(lane.local_coordinates(now)[0])
            self._straight += float((now - self._place) @ np.array([np.cos(heading), np.sin(heading)]))
            self._place, done = now, self._straight
        self.percent = max(self.percent, min(100.0 * done / self._whole, 100.0))
        return self.percent

    def _end(self) -> float:
        """Metres from the beginning of the route's first lane to where one has arrived."""
        has_arrived = getattr(self._road, "has_arrived", None)
        if has_arrived is None:
            return float(self._begins[-1]) - _REACHED_M
        told = inspect.signature(has_arrived).parameters.get("exit_distance")
        last = float(self._begins[-1] - self._begins[-2])
        return float(self._begins[-2]) + (last if told is None else min(float(told.default), last))

    def _along(self) -> float:
        """Metres from the beginning of the route's first lane; off the route those of where it was left."""
        car = self._road.vehicle
        here = tuple(car.lane_index[:2])
        ahead = [number for number in range(self._on, len(self._route)) if self._route[number][:2] == here]
        if not ahead:
            return float(self._begins[-1] if self._is_past() else self._begins[self._on])
        self._on = ahead[0]
        lane = self._road.road.network.get_lane(car.lane_index)
        along = float(np.clip(lane.local_coordinates(car.position)[0], 0.0, lane.length))
        # Lanes beside each other are not equally long.
        share = along / max(lane.length, 1e-6)
        return float(self._begins[self._on] + share * (self._begins[self._on + 1] - self._begins[self._on]))

    def _is_past(self) -> bool:
        """Whether the car has driven over the end of the route: on a lane that begins there, along it.

        A decision is as long as a lane, so its last place on the route may have been on the lane before the last one.
        """
        car = self._road.vehicle
        if self._on < len(self._route) - 2 or car.lane_index[0] != self._route[-1][1]:
            return False
        lane = self._road.road.network.get_lane(car.lane_index)
        return bool(np.cos(car.heading - lane.heading_at(lane.local_coordinates(car.position)[0])) > 0)


def _danger(road: Any) -> bool:
    """Whether the car and another, both going straight on, would overlap within less than a second."""
    car = road.vehicle
    others = [other for other in road.road.vehicles if other is not car]
    if car.speed <= 0.1 or not others:
        return False
    pose = np.array(
        [[*other.position, other.heading, other.speed, other.LENGTH, other.WIDTH] for other in others], float
    )
    soon = _TTC_S[:, None]

    def later(x: Any, y: Any, heading: Any, speed: Any, length: Any, width: Any) -> tuple[Any, ...]:
        return x + soon * speed * np.cos(heading), y + soon * speed * np.sin(heading), heading, length, width

    ego = (*car.position, car.heading, car.speed, car.LENGTH, car.WIDTH)
    return bool(np.any(boxes_overlap(later(*ego), later(*pose.T))))
