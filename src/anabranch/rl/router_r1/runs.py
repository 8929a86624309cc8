"""Ready trainings of routers in the two-hop world: a warm start, then PPO or GRPO; and routers back from the folder of a run.

made = router_training("router-r1", samples=10_000)
warm_up(made, "runs/router")                               # runs/router/warm, where it is not there yet
Trainer(made.run, "runs/router", model=warm_model("runs/router")).fit()
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anabranch.config import override
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.lm import load_model
from anabranch.lm.decoder import Decoder
from anabranch.nn.attention import SelfAttention
from anabranch.nn.feed_forward import SwiGLU
from anabranch.nn.rotary import Rotary
from anabranch.rl.grpo import GRPO, TokenPPO
from anabranch.rl.router_r1.world import TwoHopWorld
from anabranch.rl.tokens.imitation import Imitation
from anabranch.rl.tokens.network import TokenPolicy
from anabranch.rl.tokens.task import TokenTask
from anabranch.rl.tokens.trajectory import Trajectory
from anabranch.train import (
    Constant,
    Cosine,
    Event,
    TaskContext,
    TaskRunConfig,
    TrainConfig,
    Trainer,
    checkpoints,
    read_task_run_config,
)
from anabranch.train.checkpoint import read_checkpoint
from anabranch.train.config import task_kind

__all__ = [
    "PRESETS",
    "Router",
    "Training",
    "is_router",
    "judge_router",
    "load_router",
    "router_training",
    "samples_of",
    "steps_for",
    "warm_model",
    "warm_up",
]

KINDS: dict[str, type[TokenTask]] = {"grpo": GRPO, "token_ppo": TokenPPO}
PRESETS = {"router-r1": "token_ppo", "router-r1-grpo": "grpo"}
# In the folder of a run.
WARM = "warm"
_SAMPLES = 76_800
_CHECKPOINTS = 10


@dataclass(frozen=True)
class Training:
    """What a router is taught by.

    Attributes:
        warm: the imitation of traces that comes first.
        run: the training proper.
    """

    warm: TaskRunConfig
    run: TaskRunConfig


def small_decoder(vocab_size: int) -> Decoder.Config:
    """3 layers of 192: about 2 million parameters, with a vocabulary of some hundred words."""
    return Decoder.Config(
        vocab_size=vocab_size,
        dim=192,
        num_layers=3,
        attention=SelfAttention.Config(num_heads=6),
        feed_forward=SwiGLU.Config(hidden_dim=512),
        rotary=Rotary.Config(),
        tie_embeddings=True,
        max_positions=256,
    )


def router_training(
    name: str, *, samples: int | None = None, seed: int = 0, settings: Mapping[str, Any] | None = None
) -> Training:
    """A training of ``router-r1`` (PPO, as the paper) or ``router-r1-grpo``.

    Args:
        name: one of `PRESETS`.
        samples: episodes to learn from, at most: as many whole rollouts as there is room for, and at least one.
        seed: of everything random.
        settings: fields by dotted path: ``task.world.alpha``, ``train.learning_rate``; ``warm.traces``, ``warm.steps``, ``warm.batch_size``
            and ``warm.learning_rate`` of the warm start.

    Raises ConfigError for another name, and for a setting that cannot be.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise ConfigError(
            f"no router is called {name!r}; "
            + (f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(PRESETS)}")
        )
    settings = dict(settings or {})
    of_warm = {path.removeprefix("warm."): value for path, value in settings.items() if path.startswith("warm.")}
    of_run = {path: value for path, value in settings.items() if not path.startswith("warm.")}
    begun: Any = override(
        TaskRunConfig(task=_task(PRESETS[name], TwoHopWorld.Config(), 2)), _only(of_run, "task.world.")
    )
    world = begun.task.world
    model = small_decoder(world.build().vocab_size)
    task: Any = override(TaskRunConfig(task=_task(PRESETS[name], world, model.vocab_size)), _only(of_run, "task.")).task
    per_rollout = task.questions * task.group
    samples = _SAMPLES if samples is None else samples
    rollouts = max(samples // per_rollout, 1)
    train = TrainConfig(
        # The paper's mini-batches are half of a rollout.
        batch_size=max(per_rollout // 2, 1) if per_rollout % 2 == 0 else per_rollout,
        learning_rate=1e-4,
        schedule=Constant.Config(),
        betas=(0.9, 0.95),
        weight_decay=0.0,
        clip=1.0,
        eval_every=None,
        seed=seed,
    )
    train = override(TaskRunConfig(task=task, train=train), _only(of_run, "train.")).train
    each = task.epochs * max(per_rollout // train.batch_size, 1)
    follows = {
        "steps": steps_for(TaskRunConfig(task=task, train=train), samples),
        "log_every": each,
        "checkpoint_every": max(rollouts // _CHECKPOINTS, 1) * each,
    }
    free = {field: value for field, value in follows.items() if f"train.{field}" not in of_run}
    run = TaskRunConfig(task=task, train=train.replace(**free))
    # What cannot be is told before the warm start, not after it.
    task.build().training_data(TaskContext(run.train, max(train.batch_size // train.accumulation, 1)))
    return Training(_warm(run, of_warm), run)


def _only(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {path: value for path, value in settings.items() if path.startswith(prefix)}


def _task(kind: str, world: Any, vocab_size: int) -> TokenTask.Config:
    common = {"world": world, "model": small_decoder(vocab_size), "slots": 64}
    if kind == "grpo":
        return GRPO.Config(**common, questions=32, group=8, entropy_weight=0.001)
    return TokenPPO.Config(**common, questions=256, critic_speed=1.0)


# What can be set of a warm start, and what it is otherwise.
_WARM = {"traces": 8192, "steps": 600, "batch_size": 64, "learning_rate": 1e-3}


def _warm(run: TaskRunConfig, settings: Mapping[str, Any]) -> TaskRunConfig:
    task: Any = run.task
    unknown = sorted(settings.keys() - _WARM.keys())
    if unknown:
        raise ConfigError(f"--set warm.{unknown[0]}: of the warm start {', '.join(_WARM)} can be set")
    given = _WARM | dict(settings)
    config = Imitation.Config(world=task.world, model=task.model, traces=given.pop("traces"))
    train = TrainConfig(
        schedule=Cosine.Config(),
        weight_decay=0.01,
        eval_every=None,
        checkpoint_every=None,
        seed=run.train.seed,
        device=run.train.device,
        parallel=run.train.parallel,
    )
    return TaskRunConfig(task=config, train=train.replace(**given))


def warm_up(warm: TaskRunConfig, out: str | Path, on_event: Callable[[Event], None] | None = None) -> str:
    """Make the warm start of the run in ``out``, or go on with it; how it ended: ``finished`` or ``interrupted``."""
    place = Path(out) / WARM
    resumes = (place / "config.json").is_file()
    return Trainer(warm, place, resume=resumes, on_event=on_event).fit().status


def warm_model(out: str | Path) -> Decoder:
    """What the warm start of a run came to. Raises CheckpointError if there is none."""
    return load_model(Path(out) / WARM)[0]


def steps_for(config: TaskRunConfig, samples: int) -> int:
    """Optimizer steps of a training on so many episodes: whole rollouts, and at least one."""
    task: Any = config.task
    rollout = task.questions * task.group
    return max(samples // rollout, 1) * task.epochs * max(rollout // config.train.batch_size, 1)


def samples_of(config: TaskRunConfig, step: int) -> int:
    """Episodes that were played for ``step`` optimizer steps: whole rollouts."""
    task: Any = config.task
    rollout = task.questions * task.group
    return -(-step * config.train.batch_size // (rollout * task.epochs)) * rollout


@dataclass(frozen=True)
class Router:
    """What was learned.

    Attributes:
        task: with the world.
        model: in evaluation mode, on the CPU.
        config: of the run.
        step: optimizer steps that it has learned for.
    """

    task: TokenTask
    model: TokenPolicy
    config: TaskRunConfig
    step: int


def is_router(out: str | Path) -> bool:
    """Whether the run in ``out`` is one of a policy of tokens."""
    return task_kind(out) in KINDS


def load_router(out: str | Path) -> Router:
    """The router of a run, from its newest checkpoint.

    Raises DataError if there is no such run in ``out``, or it has no checkpoint yet, CheckpointError if that is damaged.
    """
    kind = task_kind(out)
    if kind not in KINDS:
        raise DataError(f"{out} holds no run of a policy of tokens; train one: anabranch rl train router-r1")
    config = read_task_run_config(out, KINDS[kind])
    found = checkpoints(out)
    if not found:
        raise DataError(f"the run in {out} has no checkpoint yet; wait for one, or go on with --resume")
    state, _ = read_checkpoint(found[-1])
    task: Any = config.task.build()
    with torch.random.fork_rng([]):
        model = task.network()
    try:
        task.load(found[-1], model)
    except ValueError as error:
        raise CheckpointError(f"{found[-1]} does not fit its run: {error}") from None
    return Router(task, model.eval(), config, state["progress"]["step"])


def judge_router(
    router: Router, *, episodes: int = 100, seed: int | None = None
) -> tuple[list[Trajectory], list[float]]:
    """Let a router play questions that nothing was learned from, taking what is likeliest; episodes, and what each was worth.

    Args:
        router: see `load_router`.
        episodes: at most as many as there are such questions.
        seed: of the names and the order of models; None for the run's.
    """
    settings = router.config.train
    task, seed = router.task, settings.seed if seed is None else seed
    stream = task.training_data(TaskContext(settings.replace(parallel="none"), settings.batch_size))
    try:
        return task.tried(router.model, min(episodes, task.world.num_tests), seed=seed)
    finally:
        stream.close()
