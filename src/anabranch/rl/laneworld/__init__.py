"""`LaneWorld`: roads of our own, with traffic, lights, signs and walkers, on which many cars learn to drive at once (CaRL's kind of world).

    world = LaneWorld.Config().build().make(64, seed=0)         # 64 worlds, a vector environment of gymnasium
    observations, _ = world.reset()
    observations, rewards, terminated, truncated, infos = world.step(actions)      # actions [64, 2]: steering, gas or brake

Roads come from a grammar (`RoadMap`), collisions are exact (`boxes_overlap`), traffic follows the intelligent driver model, and the
reward is CaRL's (`anabranch.rl.rewards`). Everything of a step is done on arrays of all worlds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anabranch.config import Field, configclass
from anabranch.extras import require
from anabranch.rl.environment import Environment, World
from anabranch.rl.laneworld.library import library_of
from anabranch.rl.laneworld.settings import Settings

__all__ = ["LaneWorld", "Settings"]


class LaneWorld(Environment, kind="laneworld"):
    """See the module; needs gymnasium, of the extra ``rl``. Worlds of another seed have other maps."""

    @configclass
    class Config(Environment.Config):
        """``world``: how it is, see `Settings`."""

        world: Settings = Field(default_factory=Settings)

    config: Config

    def make(self, num: int, *, seed: int, first: int = 0, **drawing: Any) -> World:
        """See `Environment`."""
        require("gymnasium", by="LaneWorld")
        from anabranch.rl.laneworld.world import LaneWorldVector

        settings = self.config.world
        library = library_of(
            seed, settings.maps, settings.routes, _paths(settings), settings.shortest_m, settings.longest_m
        )
        return LaneWorldVector(library, settings, num, seed=seed, first=first)

    def frame(self, world: World) -> np.ndarray:
        """See `Environment`; needs pillow, of the extra ``images``."""
        from anabranch.rl.laneworld.draw import picture

        return picture(world)


def _paths(settings: Settings) -> int:
    """Paths of traffic of a map: some more than there are cars, so that few share one."""
    return max(8, settings.traffic + 12)
