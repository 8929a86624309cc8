"""`Highway`: the environments of HighwayEnv (Leurent 2018), with CaRL's reward in the place of their own where that is wanted."""

from __future__ import annotations

from typing import Any

from anabranch.config import Field, configclass
from anabranch.extras import require
from anabranch.rl.environment import Gymnasium
from anabranch.rl.rewards import RouteReward

__all__ = ["Highway"]


class Highway(Gymnasium, kind="highway"):
    """An environment of HighwayEnv; needs the extra ``rl``."""

    @configclass
    class Config(Gymnasium.Config):
        """`Gymnasium.Config`, and how it is judged.

        Attributes:
            id: ``roundabout-v1``, ``intersection-v2``, ``merge-v1``, ``highway-v0``, ``racetrack-v1``, ...
            reward: CaRL's; its window is in decisions.
            own_reward: learn by HighwayEnv's reward instead. Episodes end as by CaRL's, by an arrival too, but for good where that is so
                in HighwayEnv; what is measured is the same.
            straight_m: metres to be driven where there is no route.
            quick: ask for all lanes of a map at once; what happens is the same to the bit, in less than half of the time.
        """

        id: str = Field(default="roundabout-v1", min_length=1)
        reward: RouteReward = Field(default_factory=lambda: RouteReward(window=10))
        own_reward: bool = False
        straight_m: float = Field(default=400.0, gt=0)
        quick: bool = True

    config: Config

    def register(self) -> None:
        """HighwayEnv tells gymnasium of its environments where it is imported."""
        require("highway-env", by=f"the environment {self.config.id}")
        import gymnasium
        import highway_env

        gymnasium.register_envs(highway_env)

    def single(self, **drawing: Any) -> Any:
        """See `Gymnasium`; with the reward put on."""
        from anabranch.rl.highway_reward import RouteCompletion
        from anabranch.rl.highway_roads import hasten

        config, env = self.config, super().single(**drawing)
        if config.quick:
            hasten(env.unwrapped)
        return RouteCompletion(env, config.reward, own_reward=config.own_reward, straight_m=config.straight_m)
