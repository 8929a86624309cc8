"""Policies of tokens: worlds that are played in tokens, the engine that plays them, and what is learned from it.

`anabranch.rl.GRPO` and `anabranch.rl.TokenPPO` are the tasks; here is what they are made of.
"""

from anabranch.rl.tokens.advantages import group_advantages, rewards_by_token, token_advantages, whitened
from anabranch.rl.tokens.engine import Drawn, PolicyEngine
from anabranch.rl.tokens.losses import divergence_of, mean_over, surrogate, value_loss
from anabranch.rl.tokens.network import TokenPolicy
from anabranch.rl.tokens.rollout import TokenRollouts
from anabranch.rl.tokens.task import TokenTask
from anabranch.rl.tokens.trajectory import Samples, Trajectory, padded
from anabranch.rl.tokens.world import Outcome, Play, TokenWorld, Told

__all__ = [
    "Drawn",
    "Outcome",
    "Play",
    "PolicyEngine",
    "Samples",
    "TokenPolicy",
    "TokenRollouts",
    "TokenTask",
    "TokenWorld",
    "Told",
    "Trajectory",
    "divergence_of",
    "group_advantages",
    "mean_over",
    "padded",
    "rewards_by_token",
    "surrogate",
    "token_advantages",
    "value_loss",
    "whitened",
]
