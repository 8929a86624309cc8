"""`Sumo`: the roads, cars and lights of Eclipse SUMO, on which a policy of LaneWorld drives and SUMO tells what it did wrong.

What LaneWorld finds out about a driver it finds out by rules of our own, in which its policies were trained; an error of these rules
would be learned and never told. SUMO (Lopez et al., ITSC 2018) is somebody else's: it makes the roads, drives the other cars by its own
models, switches the lights, and says who ran into whom. The car of the policy moves as in LaneWorld, and sees what it does there.

    agent = load_agent("runs/driver")                                # trained in LaneWorld
    referee = Sumo.Config(world=agent.config.task.environment.world).build()
    judge(agent.model, referee, episodes=20)                         # also: anabranch rl eval runs/driver --referee sumo
"""

from __future__ import annotations

import math

import numpy as np

from anabranch.config import Field, configclass
from anabranch.extras import require
from anabranch.rl.environment import Environment, World
from anabranch.rl.laneworld.observe import BESIDE_PICTURE, NUM_OBSERVED, NUM_PRIVATE
from anabranch.rl.laneworld.raster import CHANNELS, SIDE
from anabranch.rl.laneworld.settings import Settings
from anabranch.rl.network import Layout
from anabranch.rl.policies import Actions

__all__ = ["Sumo"]


class Sumo(Environment, kind="sumo"):
    """See the module; needs the extra ``sumo``. Worlds of another seed have other roads. It judges; nothing is trained there."""

    @configclass
    class Config(Environment.Config):
        """What is driven in.

        Attributes:
            world: as of LaneWorld. Its ``traffic`` is how many cars a policy is told of, the nearest ones; walkers there are none, and
                of maps one.
            side: junctions along each side of the grid.
            trips_per_second: cars that set out in all of the grid, each somewhere else.
            warm_up_s: for which cars drive before that of the policy comes in.
        """

        world: Settings = Field(default_factory=Settings)
        side: int = Field(default=4, ge=3, le=10)
        trips_per_second: float = Field(default=0.5, ge=0, le=10)
        warm_up_s: float = Field(default=30.0, ge=0, le=600)

    config: Config
    # The place of SUMO's cars is not kept, so a run could not go on.
    is_for_training = False

    def make(self, num: int, *, seed: int, first: int = 0) -> World:
        """See `Environment`: each of ``num`` is a process of SUMO, so let there be few.

        Raises MissingExtraError without SUMO, DataError if it cannot be run.
        """
        require("sumo", by="the referee SUMO")
        from anabranch.rl.referee.world import SumoWorld

        return SumoWorld(self.config, num, seed=seed, first=first)

    @property
    def layout(self) -> Layout:
        """See `Environment`: LaneWorld's, whether SUMO is here or not."""
        actions = Actions(0, (-1.0, -1.0), (1.0, 1.0))
        if not self.config.world.raster:
            return Layout(NUM_OBSERVED, NUM_PRIVATE, actions)
        picture = (CHANNELS, SIDE, SIDE)
        return Layout(len(BESIDE_PICTURE) + math.prod(picture), NUM_PRIVATE, actions, picture)

    def frame(self, world: World) -> np.ndarray:
        """See `Environment`; drawn as LaneWorld is."""
        from anabranch.rl.laneworld.draw import picture

        return picture(world)
