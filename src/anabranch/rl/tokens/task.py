"""`TokenTask`: what learning by acting in tokens has in common, as a task of the trainer; `GRPO` and `TokenPPO` say what a token was worth.

    run = TaskRunConfig(task=GRPO.Config(world=..., model=...), train=TrainConfig(batch_size=64))
    Trainer(run, "runs/router", model=warm).fit()              # a checkpoint is a model folder, which `anabranch serve` serves

Every step of the trainer is one mini-batch of episodes; `TokenRollouts` plays in between, through the engine of `anabranch serve`. What the
engine held its tokens for and what the model that learns holds them for are compared in every rollout, and logged.
"""
# Shapes: B episodes, L tokens

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anabranch.bounds import Repeats, Size
from anabranch.config import Field, configclass
from anabranch.errors import CapacityError, CheckpointError, ConfigError
from anabranch.lm.checkpoint import load_weights, write_model
from anabranch.lm.decoder import Decoder
from anabranch.machine import room_bytes
from anabranch.rl.student import within_95
from anabranch.rl.tokens.engine import Drawn, PolicyEngine
from anabranch.rl.tokens.losses import divergence_of, mean_over, surrogate
from anabranch.rl.tokens.network import Scored, TokenPolicy, router_layers_of
from anabranch.rl.tokens.rollout import Playing, TokenRollouts, _seed
from anabranch.rl.tokens.scoring import Before, compared, joined, response_of
from anabranch.rl.tokens.trajectory import Samples, Trajectory
from anabranch.rl.tokens.world import TokenWorld
from anabranch.train import Losses, Task, TaskContext

__all__ = ["TokenTask"]

CRITIC, REFERENCE = "critic.safetensors", "reference.safetensors"
_POLICY = "policy."
# Of a token of an episode, as tensors and while it is written.
_BYTES_PER_TOKEN = 200
# Beside the run's seed, where an evaluation is drawn.
_EVALUATION = 5


class TokenTask(Task):
    """See the module. A subclass says whether there is a critic, and what tokens were worth (`worth`).

    Args:
        config: of the task.
        model: a decoder, whose weights training starts from and whose config must be ``config.model``; or a whole `TokenPolicy`.

    Attributes:
        world: where it acts.
        rollouts: what mini-batches come from; None before training began.
    """

    headline = "mean_reward"
    unit = "episodes"
    material = "world"

    @configclass
    class Config(Task.Config):
        """What is learned where, and how. Mini-batch, learning rate and clipping of gradients are the run's, in `TrainConfig`.

        Attributes:
            world: where.
            model: the policy's shape.
            questions: of a rollout.
            group: episodes of each.
            epochs: how often they are gone through.
            temperature, top_p: how tokens are drawn; probabilities are those at this temperature, and of all tokens.
            clip_low, clip_high: the ratio counts from 1 - low to 1 + high.
            sequence_ratio: one ratio for all tokens of an episode (GSPO).
            mean: what the loss is a mean over, see `mean_over`; ``fixed`` divides by the world's most tokens of a turn.
            entropy_weight: of the entropy, which is to be high.
            kl_weight: of the divergence from the policy that training started from; 0 for none, and none is then kept.
            kl_estimator: see `anabranch.rl.tokens.losses`.
            kl_in: it is part of the ``loss``, or taken from the ``reward`` of each token.
            learns_information: tokens that the world wrote are learned from too, as if the policy had (an ablation).
            correct_cap: where the engine held a token for less than the model that learns, it counts for more, at most so many times
                (truncated importance sampling); None: engine and model are taken for one.
            replay: tokens go to the experts again that the engine sent them to; of a model without experts it says nothing.
            auxiliary_weight: of the losses that layers have of their own, as balancers do.
            slots: episodes that the engine plays at a time.
            max_positions: longest episode; None for the model's.
            eval_episodes: of an evaluation, at most: questions that are not learned from, each once.
            eval_temperature: 0 takes the likeliest tokens.
        """

        world: TokenWorld.Config
        model: Decoder.Config = Field(default_factory=Decoder.Config)
        questions: Size = Field(default=16, ge=1)
        group: Size = Field(default=8, ge=1)
        epochs: Repeats = Field(default=1, ge=1)
        temperature: float = Field(default=1.0, gt=0)
        top_p: float = Field(default=1.0, gt=0, le=1)
        clip_low: float = Field(default=0.2, gt=0)
        clip_high: float = Field(default=0.2, gt=0)
        sequence_ratio: bool = False
        mean: Literal["tokens", "sequences", "fixed"] = "tokens"
        entropy_weight: float = Field(default=0.0, ge=0)
        kl_weight: float = Field(default=0.0, ge=0)
        kl_estimator: Literal["k1", "k2", "k3"] = "k3"
        kl_in: Literal["loss", "reward"] = "loss"
        learns_information: bool = False
        correct_cap: float | None = Field(default=None, gt=0)
        replay: bool = True
        auxiliary_weight: float = Field(default=0.0, ge=0)
        slots: Size = Field(default=64, ge=1)
        max_positions: Size | None = Field(default=None, ge=2)
        eval_episodes: Size = Field(default=100, ge=1)
        eval_temperature: float = Field(default=0.0, ge=0)

    config: Config
    has_critic = False

    def __init__(self, config: TokenTask.Config, *, model: nn.Module | None = None) -> None:
        if model is not None and not isinstance(model, Decoder | TokenPolicy):
            raise ConfigError(f"model is a {type(model).__name__}; give a Decoder, which training starts from")
        super().__init__(config, model=model)
        if config.model.streams is not None:
            raise ConfigError(
                "task.model has parallel streams, which policies of tokens do not learn with; leave streams out"
            )
        self.world: TokenWorld = config.world.build()
        if self.world.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size}, but the world has {self.world.vocab_size} tokens; "
                f"set model.vocab_size={self.world.vocab_size}"
            )
        self.rollouts: TokenRollouts | None = None
        self._policy: TokenPolicy | None = None
        self._reference: Decoder | None = None
        self._device = torch.device("cpu")
        # Episodes of one pass: no more than in training.
        self._at_once = 1

    # What it learns

    def build_model(self, context: TaskContext) -> TokenPolicy:
        """A fresh policy, or one that starts from the given weights; with a critic where the algorithm has one."""
        made = self.model if isinstance(self.model, TokenPolicy) else self.network(context.settings.seed)
        self._policy, self._device = made, context.device
        if self.config.kl_weight > 0 and self._reference is None:
            self._reference = copy.deepcopy(made.policy).eval().requires_grad_(False)
        return made

    def network(self, seed: int = 0) -> TokenPolicy:
        """A policy as the config says. Raises ConfigError if the decoder that was given has another config."""
        given = self.model
        if isinstance(given, Decoder) and given.config != self.config.model:
            raise ConfigError(
                "the given model has another config than task.model; pass config.replace(model=model.config)"
            )
        decoder = given if isinstance(given, Decoder) else self.config.model.build(seed=seed)
        return TokenPolicy.with_critic(decoder) if self.has_critic else TokenPolicy(decoder)

    # From what

    def training_data(self, context: TaskContext) -> TokenRollouts:
        """See `TokenRollouts`. Raises ConfigError for a precision in which what acts and what learns are not the same, and for shards."""
        if context.settings.precision != "float32":
            raise ConfigError(
                f"train.precision is {context.settings.precision!r}, and what a token was and is held for is compared; use float32"
            )
        if context.settings.parallel == "fsdp":
            raise ConfigError("train.parallel is 'fsdp', and the engine that acts needs whole weights; use ddp")
        self._check_room()
        config, self._at_once = self.config, context.batch_size
        drawn = Drawn(config.temperature, config.top_p, self.world.turn_tokens)
        self.rollouts = TokenRollouts(
            self.world,
            Playing(config.questions, config.group, config.epochs, drawn),
            finish=self._finish,
            engine=self._engine,
            batch_size=context.settings.batch_size,
            seed=context.settings.seed,
            rank=context.rank,
            world_size=context.world_size,
        )
        return self.rollouts

    def _check_room(self) -> None:
        """Raise CapacityError where episodes of a rollout, or keys and values of those under way, take more memory than there is."""
        config, room = self.config, room_bytes()
        model = config.model
        longest = min(config.max_positions or model.max_positions, model.max_positions)
        rollout = _BYTES_PER_TOKEN * longest * config.questions * config.group
        heads, keys, values = model.attention.kv_heads, *model.attention.kept(model.dim)
        kept = 4 * model.num_layers * heads * (keys + values) * longest * (config.slots + 1)
        if rollout > room:
            raise CapacityError(
                f"a rollout of {config.questions:,} questions x {config.group:,} episodes of up to {longest:,} tokens takes "
                f"{rollout / 1e9:.1f} GB, and there are {room / 1e9:.1f}; make questions or group smaller"
            )
        if kept > room:
            raise CapacityError(
                f"{config.slots:,} episodes of up to {longest:,} tokens side by side take {kept / 1e9:.1f} GB of keys and values, and "
                f"there are {room / 1e9:.1f}; make slots or max_positions smaller"
            )

    def validation_data(self, context: TaskContext) -> int:
        """How many episodes an evaluation has."""
        return min(self.config.eval_episodes, self.world.num_tests)

    def _engine(self) -> PolicyEngine:
        assert self._policy is not None, "the policy must be made first"
        policy = self._policy.policy
        return PolicyEngine(
            policy,
            slots=self.config.slots,
            max_positions=self.config.max_positions or policy.config.max_positions,
            records=bool(router_layers_of(policy)),
        )

    # What tokens were worth

    def worth(self, samples: Samples, reward_B: Tensor) -> Samples:
        """``samples`` with advantages, and returns where there is a critic; old log probabilities, values and reference are there."""
        raise NotImplementedError  # abstract

    @torch.no_grad()
    def _finish(self, samples: Samples, reward_B: Tensor) -> tuple[Samples, dict[str, float]]:
        """Score a rollout with the model that learns, as it is before it learns from it."""
        parts = [self._scored(samples.rows(rows)) for rows in torch.arange(len(reward_B)).split(self._at_once)]
        old_BL, value_BL, reference_BL, raw_BL = (
            joined([part.tensors[place] for part in parts], samples) for place in range(4)
        )
        samples = samples._replace(old_BL=old_BL, value_BL=value_BL, reference_BL=reference_BL)
        notes = compared(samples.rollout_BL, raw_BL, samples.own_BL)
        of = sum(part.num_choices for part in parts)
        if of:
            notes["flipped_experts"] = sum(part.num_flipped for part in parts) / of
        return self.worth(samples, reward_B), notes

    def _scored(self, samples: Samples) -> Before:
        assert self._policy is not None
        found = self._forward(self._policy, samples, commits=False)
        value_BL = torch.zeros_like(found.log_prob_BL) if found.value_BL is None else found.value_BL
        reference_BL = torch.zeros_like(found.log_prob_BL)
        if self._reference is not None:
            reference = TokenPolicy(self._reference.to(self._device))
            reference_BL = self._forward(reference, samples, commits=False).log_prob_BL
        raw_BL = found.log_prob_BL
        if self.config.temperature != 1:
            raw_BL = self._forward(self._policy, samples, commits=False, temperature=1.0).log_prob_BL
        told = (found.log_prob_BL, value_BL, reference_BL, raw_BL)
        return Before(tuple(each.cpu() for each in told), *found.flipped)

    def _forward(
        self, model: nn.Module, samples: Samples, *, commits: bool = True, temperature: float | None = None
    ) -> Scored:
        samples = Samples(*(tensor.to(self._device) for tensor in samples))
        scored: Scored = model(
            samples.token_BL,
            self.learned(samples),
            temperature=temperature or self.config.temperature,
            real_BL=samples.real_BL,
            route_BLAK=samples.route_BLAK,
            is_replayed=self.config.replay,
            commits=commits,
        )
        return scored

    def learned(self, samples: Samples) -> Tensor:
        """bool ``[B, L]``: the tokens that are learned from."""
        return response_of(samples) if self.config.learns_information else samples.own_BL

    # How

    def step(self, model: nn.Module, batch: Samples, context: TaskContext) -> Losses:
        """The clipped loss on a mini-batch, or a part of one."""
        config = self.config
        found = self._forward(model, batch)
        mask_BL = self.learned(batch)
        made = surrogate(
            found.log_prob_BL,
            batch.old_BL,
            batch.advantage_BL,
            mask_BL,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            whole_sequences=config.sequence_ratio,
        )
        loss_BL = made.loss_BL
        if config.correct_cap is not None:
            weight_BL = (batch.old_BL - batch.rollout_BL).exp().clamp(max=config.correct_cap)
            loss_BL = loss_BL * torch.where(batch.own_BL, weight_BL, 1.0)
        entropy = self._mean(found.entropy_BL, mask_BL)
        terms = {"policy": self._mean(loss_BL, mask_BL)}
        if config.entropy_weight:
            terms["entropy"] = -config.entropy_weight * entropy
        if config.kl_weight and config.kl_in == "loss":
            drift_BL = divergence_of(found.log_prob_BL, batch.reference_BL, config.kl_estimator)
            terms["drift"] = config.kl_weight * self._mean(drift_BL, mask_BL)
        if config.auxiliary_weight:
            terms |= {name: config.auxiliary_weight * loss for name, loss in found.auxiliary.items()}
        more = self.more_terms(found, batch)
        # Means over tokens, of which parts of a mini-batch have more or fewer.
        units = dict.fromkeys(["ratio_clipped", "divergence"], "tokens") | dict.fromkeys(more, "steps")
        if config.mean == "tokens":
            units |= dict.fromkeys(
                [name for name in (*terms, "policy_entropy") if name not in found.auxiliary], "tokens"
            )
        terms |= more
        moved_BL = divergence_of(batch.old_BL, found.log_prob_BL.detach(), "k3")
        metrics = {
            "policy_entropy": entropy.detach(),
            "ratio_clipped": mean_over(made.clipped_BL.float(), mask_BL),
            "divergence": mean_over(moved_BL, mask_BL),
        }
        flipped, of = found.flipped
        if of:
            metrics["flipped_in_training"] = torch.tensor(flipped / of, device=entropy.device)
        metrics |= {name: torch.tensor(value, device=entropy.device) for name, value in self._told().items()}
        return Losses.of(metrics=metrics, mean_of=units, **terms)

    def more_terms(self, found: Scored, batch: Samples) -> dict[str, Tensor]:
        """Further terms of the loss, means over `steps`; none by default."""
        return {}

    def steps(self, samples: Samples) -> Tensor:
        """bool ``[B, L]``: the tokens that count as steps of an episode. Default: those that are learned from."""
        return self.learned(samples)

    def _mean(self, value_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return mean_over(value_BL, mask_BL, self.config.mean, self.world.turn_tokens)

    def counts(self, batch: Samples, context: TaskContext) -> Mapping[str, float]:
        """Tokens that are learned from: parts of a mini-batch with more of them weigh more, where the loss is a mean over tokens."""
        return {"tokens": float(self.learned(batch).sum()), "steps": float(self.steps(batch).sum())}

    def _told(self) -> dict[str, float]:
        """Of the rollout that the mini-batch is from."""
        assert self.rollouts is not None
        rollout = self.rollouts.rollout
        assert rollout is not None
        return rollout.notes | {"episodes_played": float((rollout.number + 1) * self.rollouts.playing.episodes)}

    def evaluate(self, model: nn.Module, data: int, context: TaskContext) -> dict[str, Any]:
        """Play questions that nothing was learned from; means of rewards and of the world's measures."""
        assert isinstance(model, TokenPolicy)
        if self.rollouts is None:
            self.training_data(context)
        return self.measures(*self.tried(model, data, seed=context.settings.seed))

    def tried(
        self, model: TokenPolicy, episodes: int, *, seed: int, temperature: float | None = None, first: int = 0
    ) -> tuple[list[Trajectory], list[float]]:
        """Episodes of questions that nothing was learned from, and what each was worth; nothing of later rewards hangs on them.

        Args:
            model: who plays.
            episodes: so many questions of the test.
            seed: of the world's, and of what is drawn.
            temperature: None as the config says.
            first: number of the first question.
        """
        assert self.rollouts is not None, "training_data comes first"
        self.act_with(model)
        numbers = list(range(first, first + episodes))
        seeds = [_seed(seed, _EVALUATION, number) for number in numbers]
        heat = self.config.eval_temperature if temperature is None else temperature
        kept = copy.deepcopy(self.world.state_dict())
        drawn = Drawn(heat, 1.0, self.world.turn_tokens)
        played = self.rollouts.play(numbers, seeds, drawn, split="test")
        rewards = self.world.rewards([each.outcome for each in played if each.outcome is not None])
        self.world.load_state_dict(kept)
        return played, rewards

    def act_with(self, model: TokenPolicy) -> None:
        """Have this policy play from now on."""
        self._policy = model

    def measures(self, played: list[Trajectory], rewards: list[float]) -> dict[str, Any]:
        """Numbers about episodes, `headline` first."""
        spread = float(np.std(rewards, ddof=1)) if len(rewards) > 1 else float("nan")
        return {
            "mean_reward": float(np.mean(rewards)),
            "reward_interval": within_95(max(len(rewards) - 1, 1)) * spread / len(rewards) ** 0.5,
            **self.world.measured([each.outcome for each in played if each.outcome is not None]),
            "turns": float(np.mean([each.turns for each in played])),
            "own_tokens": float(np.mean([sum(each.own) for each in played])),
            "episodes": len(played),
        }

    # What is kept

    def save(self, folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """A model folder of the policy alone, which can be served; critic, reference and rollout beside it."""
        assert isinstance(model, TokenPolicy)
        state = {name.removeprefix(_POLICY): tensor for name, tensor in tensors.items() if name.startswith(_POLICY)}
        write_model(folder, model.policy, self.world.tokenizer, state=state)
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(_POLICY)}
        if rest:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in rest.items()}, folder / CRITIC)
        if self._reference is not None:
            kept = {name: tensor.detach().cpu().clone() for name, tensor in self._reference.state_dict().items()}
            save_file(kept, folder / REFERENCE)
        if self.rollouts is not None:
            self.rollouts.save(folder)

    def load(self, folder: Path, model: nn.Module) -> None:
        """Put back what `save` wrote. Raises CheckpointError if it does not fit."""
        assert isinstance(model, TokenPolicy)
        load_weights(model.policy, folder)
        try:
            if model.critic is not None:
                missing = model.load_state_dict(load_file(folder / CRITIC), strict=False).missing_keys
                wrong = [name for name in missing if not name.startswith(_POLICY)]
                if wrong:
                    raise CheckpointError(f"{folder / CRITIC} lacks {wrong[0]}; the checkpoint is of another critic")
            if self._reference is not None:
                self._reference.load_state_dict(load_file(folder / REFERENCE))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{folder} does not fit its run: {error}") from None
        if self.rollouts is not None:
            self.rollouts.load(folder)
