"""Ready trainings by the name of what is learned, and agents back from the folder of a run.

run = training("pendulum", samples=300_000, seed=0)
Trainer(run, "runs/pendulum").fit()
agent = load_agent("runs/pendulum")
print(judge(agent.model, agent.task.environment).measures())
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anabranch.config import override
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.rl.environment import Environment, Gymnasium
from anabranch.rl.highway import Highway
from anabranch.rl.laneworld import LaneWorld
from anabranch.rl.network import ActorCritic
from anabranch.rl.ppo import PPO
from anabranch.train import TaskRunConfig, TrainConfig, WarmupStableDecay, checkpoints, read_task_run_config
from anabranch.train.checkpoint import read_checkpoint

__all__ = ["PRESETS", "Agent", "Preset", "load_agent", "samples_of", "steps_for", "training"]

# Of Adam, as OpenAI's baselines and CaRL have it; the usual 1e-8 makes the first updates larger.
_EPS = 1e-5
_CHECKPOINTS = 10


@dataclass(frozen=True)
class Preset:
    """How something is learned well.

    Attributes:
        config: of the task.
        learning_rate: it falls to 0 in a line.
        num_batches: mini-batches of a rollout.
        samples: of a training that nobody says the length of.
        about: where the numbers come from.
    """

    config: PPO.Config
    learning_rate: float
    num_batches: int
    samples: int
    about: str


def _cartpole() -> Preset:
    config = PPO.Config(
        environment=Gymnasium.Config(id="CartPole-v1"),
        num_envs=8,
        rollout_steps=32,
        epochs=20,
        gamma=0.98,
        gae_lambda=0.8,
        clip=0.2,
        clip_anneals=True,
    )
    return Preset(config, 1e-3, 1, 100_000, "tuned values of RL Baselines3 Zoo for CartPole-v1")


def _pendulum() -> Preset:
    config = PPO.Config(
        environment=Gymnasium.Config(id="Pendulum-v1"),
        num_envs=16,
        rollout_steps=128,
        epochs=10,
        # By 0.9 what a swing up is worth is not seen from its beginning.
        gamma=0.95,
        gae_lambda=0.95,
        clip=0.2,
        policy="beta",
        # The largest angular speed is 8; costs of a step are up to 16.3.
        observation_scale=(1.0, 1.0, 8.0),
        reward_scale=0.1,
        # From where it begins matters more than what was learned: fewer say little, and they are short.
        eval_episodes=100,
    )
    return Preset(
        config,
        1e-3,
        8,
        300_000,
        "rate, epochs and clip of RL Baselines3 Zoo for Pendulum-v1; a Beta policy, scaled rewards, gamma and rollouts of our own",
    )


def _laneworld() -> Preset:
    config = PPO.Config(
        environment=LaneWorld.Config(),
        num_envs=64,
        rollout_steps=32,
        epochs=3,
        clip=0.1,
        value_clip=0.1,
        entropy_weight=0.01,
        policy="beta",
        hidden=(256, 256),
        # So that values are about as large as the critic's clip is meant for.
        reward_scale=0.1,
    )
    return Preset(
        config,
        2.5e-4,
        8,
        1_000_000,
        "CaRL's configuration, at a smaller batch; vectors and dense layers instead of pictures",
    )


def _highway() -> Preset:
    config = PPO.Config(
        # A step takes long enough for processes to pay.
        environment=Highway.Config(workers=0),
        num_envs=8,
        rollout_steps=32,
        epochs=10,
        gamma=0.8,
        clip=0.2,
        entropy_weight=0.01,
        hidden=(256, 256),
        reward_scale=0.1,
    )
    return Preset(
        config, 5e-4, 4, 20_000, "HighwayEnv's own example of PPO (gamma, widths, learning rate), more environments"
    )


PRESETS: dict[str, Callable[[], Preset]] = {
    "cartpole": _cartpole,
    "pendulum": _pendulum,
    "laneworld": _laneworld,
    "highway": _highway,
}


# An id of gymnasium's: `Acrobot-v1`, `package:Name-v0`, `space/Name-v0`.
_ID = re.compile(r"(?:[\w.]+:)?(?:[\w-]+/)?[\w.-]+-v\d+")


def _any(environment: Environment.Config) -> Preset:
    """Of an environment that nobody has looked for good settings for: those of CleanRL's scripts, by what is done and seen there."""
    layout = environment.build().layout
    if layout.picture:
        config = PPO.Config(
            environment=environment,
            num_envs=8,
            rollout_steps=128,
            clip=0.1,
            entropy_weight=0.01,
            hidden=(512,),
            activation="relu",
            normalize_rewards=True,
        )
        return Preset(
            config, 2.5e-4, 4, 1_000_000, "CleanRL's ppo_atari.py; running averages in the place of clipped rewards"
        )
    if layout.actions.is_discrete:
        config = PPO.Config(
            environment=environment,
            num_envs=4,
            rollout_steps=128,
            entropy_weight=0.01,
            normalize_observations=True,
            normalize_rewards=True,
        )
        return Preset(config, 2.5e-4, 4, 500_000, "CleanRL's ppo.py, with running averages")
    config = PPO.Config(
        environment=environment,
        num_envs=8,
        rollout_steps=256,
        epochs=10,
        normalize_observations=True,
        normalize_rewards=True,
    )
    return Preset(
        config,
        3e-4,
        32,
        1_000_000,
        "CleanRL's ppo_continuous_action.py, from 8 environments; a Beta policy",
    )


# What learns in tokens, and has its trainings in `anabranch.rl.router_r1`.
ROUTERS = ("router-r1", "router-r1-grpo")


def preset(name: str, environment: Mapping[str, Any] | None = None) -> Preset:
    """The preset of this name, or of a gymnasium environment with this id.

    ``environment`` has fields of it by dotted path, ``task.environment.arguments``, which decide what is seen and done there. Raises
    ConfigError, with the nearest name, for another.
    """
    if name in ROUTERS:
        raise ConfigError(f"{name!r} learns in tokens; train it with anabranch.rl.router_r1.router_training")
    if name not in PRESETS and _ID.fullmatch(name):
        made: Any = override(
            TaskRunConfig(task=PPO.Config(environment=Gymnasium.Config(id=name))), dict(environment or {})
        )
        return _any(made.task.environment)
    if name not in PRESETS:
        near = difflib.get_close_matches(name, (*PRESETS, *ROUTERS), n=1)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"use one of {', '.join(PRESETS)}, or the id of a gymnasium environment, such as Acrobot-v1"
        )
        raise ConfigError(f"nothing called {name!r} is there to be learned; {hint}")
    return PRESETS[name]()


def training(
    name: str, *, samples: int | None = None, seed: int = 0, settings: Mapping[str, Any] | None = None
) -> TaskRunConfig:
    """A run that learns ``cartpole``, ``pendulum``, ..., or any environment of gymnasium: ``Acrobot-v1``.

    Args:
        name: one of `PRESETS`, or an id of gymnasium's.
        samples: steps of environments to learn from, at most: as many whole rollouts as there is room for. Where there is room for none,
            rollouts are made shorter. None for the preset's own number.
        seed: of everything random.
        settings: fields of the run by dotted path, such as ``task.gamma``. How many steps it takes then follows from ``samples`` still.

    Raises ConfigError for another name, a setting that cannot be, or where there are fewer samples than environments side by side.
    """
    settings = dict(settings or {})
    found = preset(name, {path: value for path, value in settings.items() if path.startswith("task.environment.")})
    of_task = {path: value for path, value in settings.items() if path.startswith("task.")}
    config: Any = override(TaskRunConfig(task=found.config), of_task).task
    samples = found.samples if samples is None else samples
    if samples < max(config.num_envs, 2):
        raise ConfigError(
            f"samples is {samples}, and {name} has {config.num_envs} environments side by side; use at least {max(config.num_envs, 2)}"
        )
    config = config.replace(rollout_steps=min(config.rollout_steps, samples // config.num_envs))
    rollout = config.collecting.num_samples
    # Whole mini-batches of at least two samples, and about as many of them as the preset has.
    num_batches = next(number for number in range(min(found.num_batches, rollout // 2), 0, -1) if rollout % number == 0)
    train = TrainConfig(
        batch_size=rollout // num_batches,
        learning_rate=found.learning_rate,
        schedule=WarmupStableDecay.Config(warmup=0, decay=1.0, final=0.0),
        betas=(0.9, 0.999),
        eps=_EPS,
        weight_decay=0.0,
        clip=0.5,
        eval_every=None,
        seed=seed,
    )
    rest = {path: value for path, value in settings.items() if path not in of_task}
    train = override(TaskRunConfig(task=config, train=train), rest).train
    per_rollout = config.epochs * max(rollout // train.batch_size, 1)
    every = max(samples // rollout // _CHECKPOINTS, 1) * per_rollout
    follows = {
        "steps": steps_for(config, train.batch_size, samples),
        "log_every": per_rollout,
        "checkpoint_every": every,
    }
    free = {field: value for field, value in follows.items() if f"train.{field}" not in rest}
    return TaskRunConfig(task=config, train=train.replace(**free))


def steps_for(config: PPO.Config, batch_size: int, samples: int) -> int:
    """Optimizer steps of a training on so many samples: whole rollouts, and at least one."""
    rollout = config.collecting.num_samples
    return max(samples // rollout, 1) * config.epochs * max(rollout // batch_size, 1)


def samples_of(config: TaskRunConfig, step: int) -> int:
    """Steps of environments that were made for ``step`` optimizer steps: whole rollouts."""
    task: Any = config.task
    rollout = task.collecting.num_samples
    rollouts = -(-step * config.train.batch_size // (rollout * task.epochs))
    return rollouts * rollout


@dataclass(frozen=True)
class Agent:
    """What was learned.

    Attributes:
        task: with the environment.
        model: in evaluation mode, on the CPU.
        config: of the run.
        step: optimizer steps that it has learned for.
    """

    task: PPO
    model: ActorCritic
    config: TaskRunConfig
    step: int


def load_agent(out: str | Path) -> Agent:
    """The agent of a run, from its newest checkpoint.

    Raises DataError if there is no run of PPO in ``out``, or it has no checkpoint yet, CheckpointError if that is damaged.
    """
    config = read_task_run_config(out, PPO)
    found = checkpoints(out)
    if not found:
        raise DataError(f"the run in {out} has no checkpoint yet; wait for one, or go on with --resume")
    state, _ = read_checkpoint(found[-1])
    task = config.task.build()
    with torch.random.fork_rng([]):
        model = task.network()
    try:
        task.load(found[-1], model)
    except ValueError as error:
        raise CheckpointError(f"{found[-1]} does not fit its run: {error}") from None
    return Agent(task, model.eval(), config, state["progress"]["step"])
