"""Learning by acting: PPO as a task of the trainer, policies, rollouts, environments, evaluation.

    from anabranch.rl import training
    from anabranch.train import Trainer

    result = Trainer(training("cartpole", samples=100_000), "runs/cartpole").fit()

An environment is anything that gymnasium makes, or `LaneWorld`, roads of our own on which thousands of cars drive at once. Policies of
tokens (`GRPO`, `TokenPPO`) act through the engine of `anabranch serve`, see `anabranch.rl.tokens`.
"""

from typing import TYPE_CHECKING

from anabranch.extras import lazy, require

require("lm", by=__name__)

from anabranch.rl.acting import Samples
from anabranch.rl.environment import Environment, Gymnasium, World, episode_seed
from anabranch.rl.evaluation import Episodes, judge
from anabranch.rl.film import Film, record
from anabranch.rl.highway import Highway
from anabranch.rl.laneworld import LaneWorld
from anabranch.rl.network import ActorCritic, Layout
from anabranch.rl.policies import Actions, Beta, Categorical, Distribution, Kind, Normal
from anabranch.rl.ppo import PPO, Clipped, clipped_losses
from anabranch.rl.referee import Sumo
from anabranch.rl.returns import Ends, advantages
from anabranch.rl.rollout import Rollout, Rollouts
from anabranch.rl.runs import PRESETS, Agent, Preset, load_agent, training

if TYPE_CHECKING:
    from anabranch.rl.grpo import GRPO, TokenPPO

__all__ = [
    "GRPO",
    "PPO",
    "PRESETS",
    "Actions",
    "ActorCritic",
    "Agent",
    "Beta",
    "Categorical",
    "Clipped",
    "Distribution",
    "Ends",
    "Environment",
    "Episodes",
    "Film",
    "Gymnasium",
    "Highway",
    "Kind",
    "LaneWorld",
    "Layout",
    "Normal",
    "Preset",
    "Rollout",
    "Rollouts",
    "Samples",
    "Sumo",
    "TokenPPO",
    "World",
    "advantages",
    "clipped_losses",
    "episode_seed",
    "judge",
    "load_agent",
    "record",
    "training",
]

# They need the engine, which nobody who drives a car has to load.
__getattr__, __dir__ = lazy(__name__, dict.fromkeys(("GRPO", "TokenPPO"), ".grpo"))
