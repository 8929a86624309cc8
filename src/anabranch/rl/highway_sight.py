"""What a car of HighwayEnv sees of the others, put together without tables of pandas: the same numbers to the bit.

HighwayEnv makes two tables for every observation and works on them column by column, which takes longer than what it computes.
"""
# Shapes: C cars that are seen, F features, V rows of an observation

from __future__ import annotations

from typing import Any

import numpy as np
from highway_env import utils
from highway_env.envs.common.observation import KinematicObservation
from highway_env.road.lane import AbstractLane
from highway_env.vehicle.kinematics import Vehicle

__all__ = ["hasten_sight"]

# They are seen from the car's own place and speed, unless coordinates are absolute.
_RELATIVE = ("x", "y", "vx", "vy")


def hasten_sight(observation: Any) -> None:
    """Let an observation be put together quickly, from now on. One of another class than ``Kinematics`` stays as it is."""
    if type(observation) is KinematicObservation:
        observation.__class__ = _QuickKinematics


class _QuickKinematics(KinematicObservation):
    """See the module."""

    features_range: Any

    def observe(self) -> np.ndarray:
        """``[V, F]``; see HighwayEnv."""
        road, own = self.env.road, self.observer_vehicle
        if not road:
            return super().observe()
        near = road.close_objects_to(
            own,
            self.env.PERCEPTION_DISTANCE,
            count=self.vehicles_count - 1,
            see_behind=self.see_behind,
            sort=self.order == "sorted",
            vehicles_only=not self.include_obstacles,
        )
        told = own.to_dict()
        rows = [[told[name] for name in self.features]]
        for other in near[-self.vehicles_count + 1 :]:
            seen = other.to_dict(None, observe_intentions=self.observe_intentions)
            if not self.absolute:
                seen |= {name: seen[name] - told[name] for name in _RELATIVE}
            rows.append([seen.get(name, np.nan) for name in self.features])
        # Where only the car itself is to be seen, HighwayEnv gives all others too.
        seen_VF = np.zeros((max(self.vehicles_count, len(rows)), len(self.features)))
        seen_CF = seen_VF[: len(rows)]
        seen_CF[:] = rows
        if self.normalize:
            self._scale(seen_CF)
        if self.order == "shuffled":
            self.env.np_random.shuffle(seen_VF[1:])
        return seen_VF.astype(np.float32)

    def _scale(self, seen_CF: np.ndarray) -> None:
        """Each feature that has a range from -1 to 1, in place."""
        if not self.features_range:
            num_lanes = len(self.env.road.network.all_side_lanes(self.observer_vehicle.lane_index))
            wide = AbstractLane.DEFAULT_WIDTH * num_lanes
            self.features_range = {
                "x": [-5.0 * Vehicle.MAX_SPEED, 5.0 * Vehicle.MAX_SPEED],
                "y": [-wide, wide],
                "vx": [-2 * Vehicle.MAX_SPEED, 2 * Vehicle.MAX_SPEED],
                "vy": [-2 * Vehicle.MAX_SPEED, 2 * Vehicle.MAX_SPEED],
            }
        for place, name in enumerate(self.features):
            bounds = self.features_range.get(name)
            if bounds is not None:
                scaled_C = utils.lmap(seen_CF[:, place], list(bounds), [-1, 1])
                seen_CF[:, place] = np.clip(scaled_C, -1, 1) if self.clip else scaled_C
