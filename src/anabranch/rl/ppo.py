"""Proximal policy optimisation: `PPO`, a task of the trainer (Schulman et al., arXiv 1707.06347).

    run = training("cartpole", samples=100_000)                   # a `TaskRunConfig` with a tuned config
    result = Trainer(run, "runs/cartpole").fit()
    print(result.headline)                                        # mean return of 20 episodes

    ratio = pi(a | s) / pi_old(a | s)
    L = -mean min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + c_v mean max((V - R)^2, (V_clipped - R)^2) / 2 - c_e mean H

Every optimizer step of the trainer is one mini-batch; `Rollouts` acts in between. The page of `anabranch.rl` numbers every detail of the
implementation and says where it comes from.
"""
# Shapes: B samples of a part of a mini-batch, D numbers of an observation, A of an action, P parameters of its distribution

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from anabranch.bounds import Repeats, Size
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.rl.acting import Collecting, Samples
from anabranch.rl.environment import Environment, Gymnasium
from anabranch.rl.evaluation import judge
from anabranch.rl.network import ActorCritic
from anabranch.rl.policies import Distribution
from anabranch.rl.preemption import Stragglers
from anabranch.rl.rollout import Rollouts
from anabranch.rl.target_kl import TargetKL
from anabranch.train import Losses, Task, TaskContext

__all__ = ["PPO", "Clipped", "clipped_losses"]


@dataclass(frozen=True)
class Clipped:
    """The parts of PPO's loss on some samples, each a mean over them; and how far the policy has moved, worked out where it is asked for.

    Attributes:
        policy: minus the clipped surrogate.
        value: half the squared error of the critic, the larger of the clipped and the plain one.
        entropy: of the policy, in nats.
        log_ratio_B: of the samples, without a gradient.
        new, old: the policy now, and the one that acted.
        clip: epsilon.
    """

    policy: Tensor
    value: Tensor
    entropy: Tensor
    log_ratio_B: Tensor
    new: Distribution
    old: Distribution
    clip: float

    @property
    def ratio_clipped(self) -> Tensor:
        """Share of samples whose ratio lies outside of the clip."""
        return ((self.log_ratio_B.exp() - 1).abs() > self.clip).to(self.log_ratio_B.dtype).mean()

    @property
    def approximate_divergence(self) -> Tensor:
        """Mean of ratio - 1 - log ratio (Schulman's third estimator), an estimate of KL(old || new)."""
        return (self.log_ratio_B.exp() - 1 - self.log_ratio_B).mean()

    @property
    def divergence(self) -> Tensor:
        """KL(old || new) itself."""
        with torch.no_grad():
            return self.old.divergence(self.new).mean()


def clipped_losses(
    new: Distribution, old: Distribution, value_B: Tensor, samples: Samples, *, clip: float, value_clip: float | None
) -> Clipped:
    """The parts of PPO's loss.

    Args:
        new: the policy as it is now, on the observations of ``samples``.
        old: the one that acted.
        value_B: what the critic says now.
        samples: with advantages normalised as they are to be.
        clip: epsilon of the ratio.
        value_clip: the critic's say moves at most so far from that of the rollout before its error counts as if it had not; None: no clip.
    """
    log_ratio_B = new.log_prob(samples.action_BA) - samples.log_prob_B
    ratio_B = log_ratio_B.exp()
    plain_B = ratio_B * samples.advantage_B
    bounded_B = ratio_B.clamp(1 - clip, 1 + clip) * samples.advantage_B
    error_B = (value_B - samples.return_B) ** 2
    if value_clip is not None:
        moved_B = samples.value_B + (value_B - samples.value_B).clamp(-value_clip, value_clip)
        error_B = torch.maximum(error_B, (moved_B - samples.return_B) ** 2)
    policy, value = -torch.minimum(plain_B, bounded_B).mean(), 0.5 * error_B.mean()
    return Clipped(policy, value, new.entropy().mean(), log_ratio_B.detach(), new, old, clip)


class PPO(Task, kind="ppo"):
    """Learns a policy by acting. See the module, and `PPO.Config`.

    Attributes:
        environment: where it acts.
        rollouts: what mini-batches come from; None before training began.
    """

    headline = "mean_return"
    unit = "uses"
    material = "environment"

    @configclass
    class Config(Task.Config):
        """What is learned where, and how. Mini-batch, learning rate and clipping of gradients are the run's, in `TrainConfig`.

        Attributes:
            environment: where.
            num_envs: environments that run side by side, in all processes together.
            rollout_steps: steps in each of them before the policy learns again.
            epochs: how often it learns from each of these samples.
            gamma: discount of a step.
            gae_lambda: of the advantages, see `advantages`.
            bootstrap_truncated: count what would have followed an episode that was cut off.
            reward_scale: rewards are multiplied by it in learning; those that are told are the environment's own.
            normalize_rewards: in learning they are divided by the running deviation of discounted returns; ``reward_scale`` is then 1.
            clip: epsilon of the ratio.
            clip_anneals: it falls to 0 in a line over the training.
            value_clip: of the critic's change, in units of scaled returns; None for none.
            value_weight: of the critic's loss.
            entropy_weight: of the entropy, which is to be high.
            normalize_advantage: per ``minibatch``, per ``batch`` (a rollout), or ``none``.
            policy: ``categorical``, ``normal``, ``beta``; ``auto``: as the actions ask for.
            hidden: widths of the layers of policy and critic.
            activation: ``tanh`` or ``relu``.
            observation_scale: observations are divided by it, number by number; empty for as they are.
            normalize_observations: they are normalised by running averages, which are part of the model, in the place of
                ``observation_scale``; pictures are not.
            normalized_clip: what is normalised is cut off at so much.
            target_kl: once the policy has moved farther than this from the one that acted (mean KL divergence over the rollout, in nats),
                ``on_target_kl`` happens; None for never.
            on_target_kl: ``stop`` looks after each epoch, and learns no more from this rollout; ``halve`` looks after the last one, and
                halves the learning rate for the rest of the run.
            preempt_share: in several processes: once so many of them have all their steps, the others stop; None lets all make all. What
                is learned then depends on how quick they are.
            preempt_least: share of its steps that a process makes in any case.
            eval_episodes: of an evaluation; few, as they take time that nothing is learned in. `judge` plays any number afterwards.
        """

        environment: Environment.Config = Field(default_factory=Gymnasium.Config)
        num_envs: Repeats = Field(default=8, ge=1)
        rollout_steps: Size = Field(default=128, ge=1)
        epochs: Repeats = Field(default=4, ge=1)
        gamma: float = Field(default=0.99, ge=0, le=1)
        gae_lambda: float = Field(default=0.95, ge=0, le=1)
        bootstrap_truncated: bool = True
        reward_scale: float = Field(default=1.0, gt=0)
        normalize_rewards: bool = False
        clip: float = Field(default=0.2, gt=0)
        clip_anneals: bool = False
        value_clip: float | None = Field(default=None, gt=0)
        value_weight: float = Field(default=0.5, ge=0)
        entropy_weight: float = Field(default=0.0, ge=0)
        normalize_advantage: Literal["minibatch", "batch", "none"] = "minibatch"
        policy: Literal["auto", "categorical", "normal", "beta"] = "auto"
        hidden: tuple[Annotated[Size, Field(ge=1)], ...] = (64, 64)
        activation: Literal["tanh", "relu"] = "tanh"
        observation_scale: tuple[Annotated[float, Field(gt=0)], ...] = ()
        normalize_observations: bool = False
        normalized_clip: float = Field(default=10.0, gt=0)
        target_kl: float | None = Field(default=None, gt=0)
        on_target_kl: Literal["stop", "halve"] = "stop"
        preempt_share: float | None = Field(default=None, gt=0, le=1)
        preempt_least: float = Field(default=0.25, gt=0, le=1)
        eval_episodes: int = Field(default=20, ge=1)

        def __post_init__(self) -> None:
            if self.normalize_rewards and self.reward_scale != 1:
                raise ConfigError(
                    f"reward_scale is {self.reward_scale:g}, and normalize_rewards divides by the deviation of returns, whatever their "
                    "scale; leave one of them out (reward_scale=1)"
                )

        @property
        def collecting(self) -> Collecting:
            """How `Rollouts` acts."""
            return Collecting(
                num_envs=self.num_envs,
                steps=self.rollout_steps,
                epochs=self.epochs,
                gamma=self.gamma,
                gae_lambda=self.gae_lambda,
                bootstrap_truncated=self.bootstrap_truncated,
                reward_scale=self.reward_scale,
                normalize=self.normalize_advantage,
                reward_clip=self.normalized_clip if self.normalize_rewards else None,
            )

    config: Config

    def __init__(self, config: PPO.Config, *, model: nn.Module | None = None) -> None:
        if model is not None and not isinstance(model, ActorCritic):
            raise ConfigError(f"model is a {type(model).__name__}; PPO trains an ActorCritic")
        super().__init__(config, model=model)
        self.environment: Environment = config.environment.build()
        self.rollouts: Rollouts | None = None
        self._kl = TargetKL(config.target_kl, config.on_target_kl, config.epochs)

    # What it learns

    def build_model(self, context: TaskContext) -> ActorCritic:
        """A new `ActorCritic`, or the one that was given."""
        model = self.model if isinstance(self.model, ActorCritic) else self.network()
        if self.rollouts is not None:
            self.rollouts.model = model
        return model

    def network(self) -> ActorCritic:
        """A new network as the config says, from torch's default generator."""
        config = self.config
        return ActorCritic(
            self.environment.layout,
            hidden=config.hidden,
            activation=config.activation,
            policy=config.policy,
            scale=config.observation_scale,
            normalized_clip=config.normalized_clip if config.normalize_observations else None,
        )

    # From what

    def training_data(self, context: TaskContext) -> Rollouts:
        """See `Rollouts`.

        Raises ConfigError for a precision in which what acts and what learns are not the same, and an environment that judges only.
        """
        if not self.environment.is_for_training:
            name = type(self.environment).__name__
            raise ConfigError(f"task.environment is {name}, which judges and is not learned in; train in laneworld")
        if context.settings.precision != "float32":
            raise ConfigError(
                f"train.precision is {context.settings.precision!r}, and PPO compares how likely an action was and is; "
                "use float32"
            )
        config, stragglers = self.config, None
        if config.preempt_share is not None and context.world_size > 1:
            stragglers = Stragglers(
                config.rollout_steps, context.world_size, share=config.preempt_share, least=config.preempt_least
            )
        self.rollouts = Rollouts(
            self.environment,
            config.collecting,
            batch_size=context.settings.batch_size,
            seed=context.settings.seed,
            rank=context.rank,
            world_size=context.world_size,
            device=context.device,
            stragglers=stragglers,
        )
        return self.rollouts

    def validation_data(self, context: TaskContext) -> int:
        """How many episodes an evaluation has."""
        return self.config.eval_episodes

    # How

    def before_step(self, step: int, fraction: float) -> None:
        """Look how far the policy has moved where an epoch is over, and set the pace."""
        assert self.rollouts is not None
        self.pace = self._kl.pace(self.rollouts)

    def step(self, model: nn.Module, batch: Samples, context: TaskContext) -> Losses:
        """PPO's loss on a mini-batch, or a part of one."""
        config = self.config
        parameter_BP, value_B = model(batch.observation_BD)
        kind = _kind(self.rollouts)
        parts = clipped_losses(
            kind.distribution(parameter_BP),
            kind.distribution(batch.parameter_BP),
            value_B,
            batch,
            clip=config.clip * (1 - context.fraction) if config.clip_anneals else config.clip,
            value_clip=config.value_clip,
        )
        return Losses.of(
            policy=parts.policy,
            value=config.value_weight * parts.value,
            entropy=-config.entropy_weight * parts.entropy,
            # They cost about as much as the loss itself, and only those of steps that are logged are looked at.
            metrics=self._metrics(parts) if (context.step + 1) % context.settings.log_every == 0 else {},
        )

    def _metrics(self, parts: Clipped) -> dict[str, Tensor]:
        told = {name: torch.tensor(value, device=parts.value.device) for name, value in self._told().items()}
        return {
            "policy_entropy": parts.entropy,
            "ratio_clipped": parts.ratio_clipped,
            "divergence": parts.divergence,
            "approximate_divergence": parts.approximate_divergence,
            **told,
        }

    def _told(self) -> Mapping[str, float]:
        """Of the rollout that the mini-batch is from; nan where no episode ended in it."""
        assert self.rollouts is not None
        rollout = self.rollouts.rollout
        assert rollout is not None
        return {
            "training_return": rollout.mean_return,
            "training_length": rollout.mean_length,
            "explained_variance": rollout.explained_variance,
            "samples": float((rollout.number + 1) * self.config.collecting.num_samples),
            **self._kl.told(),
        }

    def steps_passed(self) -> int:
        """Optimizer steps so far in which nothing was learned, because the policy was beyond ``target_kl`` (``stop``)."""
        if self.rollouts is None:
            return 0
        per_epoch = self.rollouts.collecting.num_samples / self.rollouts.batch_size
        return round(self._kl.epochs_passed_so_far(self.rollouts) * per_epoch)

    @property
    def halvings(self) -> int:
        """How often ``target_kl`` (``halve``) has halved the learning rate so far."""
        return self._kl.halvings

    def evaluate(self, model: nn.Module, data: int, context: TaskContext) -> dict[str, Any]:
        """`judge` on the run's seed; the measures of `Episodes`."""
        assert isinstance(model, ActorCritic)
        return judge(model, self.environment, episodes=data, seed=context.settings.seed).measures()

    # What is kept

    def state_dict(self) -> dict[str, Any]:
        """What came of the target of divergence."""
        return self._kl.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that."""
        self._kl.load_state_dict(state)

    def save(self, folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """As `Task.save`, and the rollout."""
        super().save(folder, model, tensors)
        if self.rollouts is not None:
            self.rollouts.save(folder)

    def load(self, folder: Path, model: nn.Module) -> None:
        """As `Task.load`, and the rollout where training goes on."""
        super().load(folder, model)
        if self.rollouts is not None:
            self.rollouts.load(folder)


def _kind(rollouts: Rollouts | None) -> Any:
    assert rollouts is not None
    assert isinstance(rollouts.model, ActorCritic)
    return rollouts.model.kind
