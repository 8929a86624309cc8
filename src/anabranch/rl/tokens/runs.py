"""Trainings of policies of tokens by their tasks, and policies back from the folder of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anabranch.config import override
from anabranch.errors import CheckpointError, ConfigError, DataError, InputError
from anabranch.lm.decoder import Decoder
from anabranch.rl.grpo import GRPO, TokenPPO
from anabranch.rl.tokens.engine import Drawn
from anabranch.rl.tokens.network import TokenPolicy
from anabranch.rl.tokens.rollout import TokenRollouts
from anabranch.rl.tokens.task import TokenTask
from anabranch.rl.tokens.trajectory import Trajectory
from anabranch.rl.tokens.world import Play
from anabranch.run_folder import task_kind
from anabranch.train import Constant, TaskContext, TaskRunConfig, TrainConfig, checkpoints, read_task_run_config
from anabranch.train.checkpoint import read_checkpoint

__all__ = [
    "KINDS",
    "Policy",
    "is_policy",
    "judge_policy",
    "load_policy",
    "own_run",
    "play_once",
    "samples_of",
    "steps_for",
    "token_run",
]

KINDS: dict[str, type[TokenTask]] = {"grpo": GRPO, "token_ppo": TokenPPO}
_CHECKPOINTS = 10
# Of models that read and write already: Router-R1's rate and its critic's, and a group as TRL has it.
_OWN_RATE, _OWN_POSITIONS, _OWN_SLOTS = 1e-6, 4096, 16
_OWN_SIZES: dict[str, dict[str, int]] = {
    "grpo": {"questions": 8, "group": 8},
    "token_ppo": {"questions": 64, "group": 1},
}


def token_run(task: Any, *, samples: int, seed: int, rate: float, settings: Mapping[str, Any]) -> TaskRunConfig:
    """A run of this task on so many episodes, checked.

    Args:
        task: its config.
        samples: episodes to learn from, at most: as many whole rollouts as there is room for, and at least one.
        seed: of everything random.
        rate: of learning.
        settings: fields of the run by dotted path; those of ``task`` are in it already.

    Raises ConfigError for what cannot be.
    """
    per_rollout = task.questions * task.group
    rollouts = max(samples // per_rollout, 1)
    train = TrainConfig(
        # The paper's mini-batches are half of a rollout.
        batch_size=max(per_rollout // 2, 1) if per_rollout % 2 == 0 else per_rollout,
        learning_rate=rate,
        schedule=Constant.Config(),
        betas=(0.9, 0.95),
        weight_decay=0.0,
        clip=1.0,
        eval_every=None,
        seed=seed,
    )
    of_train = {path: value for path, value in settings.items() if path.startswith("train.")}
    train = override(TaskRunConfig(task=task, train=train), of_train).train
    each = task.epochs * max(per_rollout // train.batch_size, 1)
    follows = {
        "steps": steps_for(TaskRunConfig(task=task, train=train), samples),
        "log_every": each,
        "checkpoint_every": max(rollouts // _CHECKPOINTS, 1) * each,
    }
    free = {field: value for field, value in follows.items() if f"train.{field}" not in settings}
    run = TaskRunConfig(task=task, train=train.replace(**free))
    # What cannot be is told before anything is learned, not after it.
    task.build().training_data(TaskContext(run.train, max(train.batch_size // train.accumulation, 1))).close()
    return run


def own_run(
    kind: str, world: Any, model: Decoder, *, samples: int, seed: int = 0, settings: Mapping[str, Any] | None = None
) -> TaskRunConfig:
    """A training that starts from a model of one's own, at the sizes and rates of models that read and write already.

    Args:
        kind: one of `KINDS`.
        world: config of the world, whose `longest_prompt` has to fit the model.
        model: that it starts from.
        samples, seed, settings: see `token_run`.

    Raises ConfigError for what cannot be, and for a question that leaves no room for a turn: none is cut.
    """
    settings = dict(settings or {})
    common = {"world": world, "model": model.config, "slots": _OWN_SLOTS, **_OWN_SIZES[kind]}
    if model.config.max_positions > _OWN_POSITIONS:
        common["max_positions"] = _OWN_POSITIONS
    made: Any = TaskRunConfig(task=KINDS[kind].Config(**common))
    task: Any = override(made, {path: value for path, value in settings.items() if path.startswith("task.")}).task
    if task.model != model.config:
        raise ConfigError("--set task.model....: the model is the one that training starts from; leave it out")
    built = task.world.build()
    longest, room = (
        built.longest_prompt(),
        min(task.max_positions or model.config.max_positions, model.config.max_positions),
    )
    built.close()
    if longest + 1 > room:
        raise ConfigError(
            f"the longest prompt has {longest:,} tokens, and the policy reads {room:,}; leave out such questions, or set "
            "task.max_positions where the model reads more"
        )
    return token_run(task, samples=samples, seed=seed, rate=_OWN_RATE, settings=settings)


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
class Policy:
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


def is_policy(out: str | Path) -> bool:
    """Whether the run in ``out`` is one of a policy of tokens."""
    return task_kind(out) in KINDS


def load_policy(out: str | Path, settings: Mapping[str, Any] | None = None) -> Policy:
    """The policy of a run, from its newest checkpoint, with a world that judges as it did there (by the window of costs, say).

    Args:
        out: folder of the run.
        settings: fields of its config that are otherwise now, by dotted path.

    Raises DataError if there is no such run in ``out``, or it has no checkpoint yet, CheckpointError if that is damaged.
    """
    kind = task_kind(out)
    if kind not in KINDS:
        raise DataError(f"{out} holds no run of a policy of tokens; train one: anabranch rl train router-r1")
    config = override(read_task_run_config(out, KINDS[kind]), dict(settings or {}))
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
    judged_by = TokenRollouts.judged_by(found[-1])
    if judged_by is not None:
        task.world.judge_as(judged_by)
    return Policy(task, model.eval(), config, state["progress"]["step"])


def judge_policy(
    policy: Policy, *, episodes: int = 100, seed: int | None = None, first: int = 0
) -> tuple[list[Trajectory], list[float]]:
    """Let a policy play questions that nothing was learned from, taking what is likeliest; episodes, and what each was worth.

    Args:
        policy: see `load_policy`.
        episodes: at most as many as there are such questions.
        seed: of what the world draws; None for the run's.
        first: number of the first question.

    Raises InputError for a number that no question has.
    """
    task, seed, num_tests = policy.task, policy.config.train.seed if seed is None else seed, policy.task.world.num_tests
    if not 0 <= first < num_tests:
        raise InputError(
            f"episode {first} is not there; the run has {num_tests} questions that nothing was learned from"
        )
    with _stream_of(policy):
        return task.tried(policy.model, min(episodes, num_tests - first), seed=seed, first=first)


def play_once(policy: Policy, play: Play) -> Trajectory:
    """Let a policy play an episode that has been begun, taking what is likeliest."""
    with _stream_of(policy) as stream:
        policy.task.act_with(policy.model)
        drawn = Drawn(0.0, 1.0, policy.task.world.turn_tokens)
        return stream.played([play], [policy.config.train.seed], drawn)[0]


@contextmanager
def _stream_of(policy: Policy) -> Iterator[TokenRollouts]:
    settings = policy.config.train
    stream = policy.task.training_data(TaskContext(settings.replace(parallel="none"), settings.batch_size))
    try:
        yield stream
    finally:
        stream.close()
