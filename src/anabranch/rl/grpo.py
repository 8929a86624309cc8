"""`GRPO` and `TokenPPO`: policies of tokens that learn from what their episodes were worth, as tasks of the trainer.

GRPO (group relative policy optimisation; Shao et al., "DeepSeekMath", arXiv 2402.03300) has no critic: an answer is held against the others
to the same question. PPO (as Router-R1, arXiv 2506.09033, has it) has one, which begins as a copy of the policy.
"""
# Shapes: Q questions, G episodes of each, B = Q G, L tokens

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.rl.tokens.advantages import group_advantages, rewards_by_token, token_advantages, whitened
from anabranch.rl.tokens.losses import ESTIMATORS, value_loss
from anabranch.rl.tokens.network import Scored
from anabranch.rl.tokens.scoring import response_of
from anabranch.rl.tokens.task import TokenTask
from anabranch.rl.tokens.trajectory import Samples
from anabranch.train.optimizer import Speed

__all__ = ["GRPO", "TokenPPO"]


class GRPO(TokenTask, kind="grpo"):
    """Learns from groups of answers to the same question. See the module, and `GRPO.Config`."""

    @configclass
    class Config(TokenTask.Config):
        """As of `TokenTask`, and how answers are held against each other.

        Attributes:
            baseline: what is taken from a reward: the ``mean`` of its group, the mean of the ``others`` (RLOO), or ``none``.
            scale: what that is divided by: the deviation of its ``group``, that of the ``batch``, or ``none`` (Dr. GRPO).
        """

        baseline: Literal["mean", "others", "none"] = "mean"
        scale: Literal["group", "batch", "none"] = "group"

        def __post_init__(self) -> None:
            if self.group < 2 and (self.baseline != "none" or self.scale == "group"):
                raise ConfigError("group is 1, and one answer cannot be held against others; use at least 2")
            if self.kl_in == "reward" and self.kl_weight > 0:
                raise ConfigError("kl_in is 'reward', which needs a critic (token_ppo); use 'loss'")

    config: Config

    def worth(self, samples: Samples, reward_B: Tensor) -> Samples:
        """See `TokenTask`: the same for all tokens of an episode."""
        config = self.config
        made_QG = group_advantages(reward_B.view(-1, config.group), baseline=config.baseline, scale=config.scale)
        return samples._replace(advantage_BL=made_QG.view(-1, 1) * self.learned(samples))


class TokenPPO(TokenTask, kind="token_ppo"):
    """Learns with a critic, token by token. See the module, and `TokenPPO.Config`."""

    @configclass
    class Config(TokenTask.Config):
        """As of `TokenTask`, with Router-R1's values where those differ, and what a critic needs.

        Attributes:
            gamma: discount of a token.
            gae_lambda: of the advantages.
            value_clip: of the critic's change; None for none.
            value_weight: of the critic's loss.
            critic_speed: times the learning rate; Router-R1's critic learns ten times as fast as its policy.
            values_information: the critic learns of the world's tokens too, which are steps then (Router-R1's code).
            normalize_advantage: mean 0 and deviation 1 over the tokens of a rollout.
        """

        group: int = Field(default=1, ge=1)
        kl_weight: float = Field(default=0.001, ge=0)
        kl_estimator: Literal["k1", "k2", "k3"] = "k1"
        kl_in: Literal["loss", "reward"] = "reward"
        entropy_weight: float = Field(default=0.001, ge=0)
        gamma: float = Field(default=1.0, ge=0, le=1)
        gae_lambda: float = Field(default=1.0, ge=0, le=1)
        value_clip: float | None = Field(default=0.5, gt=0)
        value_weight: float = Field(default=1.0, ge=0)
        critic_speed: float = Field(default=10.0, gt=0)
        values_information: bool = False
        normalize_advantage: bool = True

    config: Config
    has_critic = True

    def worth(self, samples: Samples, reward_B: Tensor) -> Samples:
        """See `TokenTask`: the reward stands on the last of an episode's own tokens, and drift costs where it happens."""
        config, weight = self.config, self.config.kl_weight if self.config.kl_in == "reward" else 0.0
        drift_BL = ESTIMATORS[config.kl_estimator](samples.old_BL - samples.reference_BL) if weight else None
        reward_BL = rewards_by_token(reward_B, samples.own_BL, drift_BL, weight)
        made_BL = token_advantages(
            reward_BL, samples.value_BL, self.steps(samples), gamma=config.gamma, gae_lambda=config.gae_lambda
        )
        mask_BL = self.learned(samples)
        advantage_BL = whitened(made_BL, mask_BL) if config.normalize_advantage else made_BL * mask_BL
        return samples._replace(advantage_BL=advantage_BL, return_BL=made_BL + samples.value_BL)

    def steps(self, samples: Samples) -> Tensor:
        """See `TokenTask`: the policy's own, or all of a response."""
        takes_all = self.config.values_information or self.config.learns_information
        return response_of(samples) if takes_all else samples.own_BL

    def more_terms(self, found: Scored, batch: Samples) -> dict[str, Tensor]:
        """The critic's."""
        assert found.value_BL is not None
        loss = value_loss(
            found.value_BL, batch.value_BL, batch.return_BL, self.steps(batch), clip=self.config.value_clip
        )
        return {"value": self.config.value_weight * loss}

    def speed(self, name: str, parameter: nn.Parameter) -> Speed | None:
        """See `Task`: the critic's own."""
        return None if name.startswith("policy.") else Speed(self.config.critic_speed)
