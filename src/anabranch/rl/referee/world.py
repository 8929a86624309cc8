"""`SumoWorld`: LaneWorld's car and eyes on SUMO's roads, among SUMO's cars; collisions and red lights are what SUMO says they are.

What else ends an episode (off the road, another way, standing, time, the end of the route) is judged as in LaneWorld. LaneWorld's own word
on collisions and lights is told beside SUMO's, as ``own_vehicle`` and ``own_red_light``, so that the two can be compared.
"""
# Shapes: W worlds, O others that are told of

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import CheckpointError
from anabranch.rl.environment import episode_seed
from anabranch.rl.laneworld.judge import Faults
from anabranch.rl.laneworld.library import Library
from anabranch.rl.laneworld.state import AWAY
from anabranch.rl.laneworld.world import DT, LaneWorldVector
from anabranch.rl.referee.roads import SumoRoads, generate
from anabranch.rl.referee.simulation import Simulation, Verdict

__all__ = ["SumoWorld"]

# Stands beside a seed where routes are drawn.
_ROUTES = 11


class SumoWorld(LaneWorldVector):
    """See the module. A `anabranch.rl.environment.World` whose place cannot be found again: nothing is trained there.

    Args:
        config: a `Sumo.Config`.
        num: W, a process each.
        seed: of roads, routes and other cars.
        first: number of the first world.

    Attributes:
        verdicts: what SUMO said of the last step, of each world.

    Raises DataError if SUMO cannot be run.
    """

    def __init__(self, config: Any, num: int, *, seed: int, first: int = 0) -> None:
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="anabranch-sumo-")
        self._simulations: list[Simulation] = []
        settings = config.world.replace(walkers=0)
        try:
            folder = Path(self._folder.name)
            net = generate(folder, seed=seed % 2**31, side=config.side)
            roads = SumoRoads(net)
            roads.write_lights(folder / "lights.add.xml")
            rng = np.random.default_rng([seed, _ROUTES])
            ways = roads.ways(rng, settings.routes, settings.shortest_m, settings.longest_m)
            self._edges = [[edge for number in way if (edge := roads.edges[number]) is not None] for way in ways]
            paths = [roads.path(way) for way in ways]
            super().__init__(Library([paths], [paths], [roads.lanes()]), settings, num, seed=seed, first=first)
            names = [edge for edge in roads.edges if edge is not None]
            for row in range(num):
                self._simulations.append(
                    Simulation(
                        folder,
                        roads=net,
                        lights=folder / "lights.add.xml",
                        edges=names,
                        dt=DT,
                        name=f"world{row}",
                    )
                )
        except BaseException:
            self.close_extras()
            raise
        self.verdicts = [Verdict() for _ in range(num)]
        # How often LaneWorld would have said so, and whether it does now: what lasts counts once, as in `count_faults`.
        self._own = {name: np.zeros(num, np.int64) for name in ("own_vehicle", "own_red_light")}
        self._own_lasts = {name: np.zeros(num, bool) for name in self._own}
        self._others_WO7 = np.zeros((num, settings.traffic, 7))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Of the cars of the policy alone."""
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises CheckpointError: where SUMO's cars were is not kept."""
        raise CheckpointError("SUMO judges, and a training cannot go on there; train in laneworld")

    def close_extras(self, **_: Any) -> None:
        """End the processes."""
        for simulation in self._simulations:
            simulation.close()
        self._simulations = []
        self._folder.cleanup()

    # In the place of LaneWorld's

    def _begin(self, row: int) -> None:
        super()._begin(row)
        config, simulation = self._config, self._simulations[row]
        episode = int(self.state.episode_W[row])
        route = int(np.flatnonzero(self.library.route_MR[0] == self.scene.route_W[row])[0])
        simulation.begin(
            self._edges[route],
            seed=episode_seed(self._seed, self._first + row, episode),
            trips_per_second=config.trips_per_second,
            warm_up_s=config.warm_up_s,
            speed=self.settings.start_speed,
        )
        # Lights go by SUMO's time.
        self.scene.offset_W[row] = simulation.time_s
        self.verdicts[row] = Verdict()
        for name, count_W in self._own.items():
            count_W[row], self._own_lasts[name][row] = 0, False
        self._look_around(row)

    def _move_traffic(self) -> None:
        for row, simulation in enumerate(self._simulations):
            self.verdicts[row] = simulation.step(*(float(value) for value in self.state.pose_W4[row]))
            self._look_around(row)

    def _look_around(self, row: int) -> None:
        """Tell of the nearest others, as many as there is room for."""
        x, y = self.state.pose_W4[row, :2]
        found = sorted(self._simulations[row].others(), key=lambda other: (other.x - x) ** 2 + (other.y - y) ** 2)
        others_O7 = self._others_WO7[row]
        others_O7[:] = 0.0
        others_O7[:, :2], others_O7[:, 4:6] = AWAY, 1.0
        for place, other in enumerate(found[: len(others_O7)]):
            others_O7[place, :6] = other.x, other.y, other.heading, other.speed, other.length, other.width

    def others(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """See `LaneWorldVector`: SUMO's cars."""
        return self._others_WO7[rows].copy()

    def _faults(self, others_WO7: np.ndarray) -> Faults:
        found = super()._faults(others_WO7)
        for name, now_W in (("own_vehicle", found.vehicle_W), ("own_red_light", found.red_light_W)):
            self._own[name] += now_W & ~self._own_lasts[name]
            self._own_lasts[name] = now_W.copy()
        hit_W, red_W, off_W = (
            np.array([getattr(verdict, name) for verdict in self.verdicts])
            for name in ("collided", "ran_red", "off_road")
        )
        return replace(found, vehicle_W=hit_W, red_light_W=red_W, off_road_W=found.off_road_W | off_W)

    def _outcome(self, faults: Faults) -> dict[str, np.ndarray]:
        arrived_W = np.array([float(verdict.arrived) for verdict in self.verdicts])
        own = {name: count_W.astype(np.float64) for name, count_W in self._own.items()}
        return {**super()._outcome(faults), **own, "sumo_arrived": arrived_W}
