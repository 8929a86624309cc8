"""Ready trainings of routers: in the two-hop world a warm start, then PPO or GRPO; on questions of one's own with a model that reads.

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

from anabranch.config import override
from anabranch.errors import ConfigError
from anabranch.lm import load_model
from anabranch.lm.decoder import Decoder
from anabranch.nn.attention import SelfAttention
from anabranch.nn.feed_forward import SwiGLU
from anabranch.nn.rotary import Rotary
from anabranch.rl.grpo import GRPO, TokenPPO
from anabranch.rl.router_r1.live import LiveWorld
from anabranch.rl.router_r1.world import TwoHopWorld
from anabranch.rl.tokens.imitation import Imitation
from anabranch.rl.tokens.runs import Policy as Router
from anabranch.rl.tokens.runs import judge_policy as judge_router
from anabranch.rl.tokens.runs import load_policy as load_router
from anabranch.rl.tokens.runs import own_run, samples_of, token_run
from anabranch.rl.tokens.task import TokenTask
from anabranch.train import Cosine, Event, TaskRunConfig, TrainConfig, Trainer
from anabranch.train.result import TrainResult

__all__ = [
    "PRESETS",
    "Router",
    "Training",
    "judge_router",
    "load_router",
    "own_router_training",
    "router_training",
    "warm_model",
    "warm_up",
]

PRESETS = {"router-r1": "token_ppo", "router-r1-grpo": "grpo"}
# In the folder of a run.
WARM, KEPT = "warm", "pool.jsonl"
# Of the paper: 225 steps of 64 questions.
_OWN_SAMPLES = 225 * 64
_SAMPLES = 76_800


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
    _check_name(name)
    settings = dict(settings or {})
    of_warm = {path.removeprefix("warm."): value for path, value in settings.items() if path.startswith("warm.")}
    of_run = {path: value for path, value in settings.items() if not path.startswith("warm.")}
    begun: Any = override(
        TaskRunConfig(task=_task(PRESETS[name], TwoHopWorld.Config(), 2)), _only(of_run, "task.world.")
    )
    world = begun.task.world
    model = small_decoder(world.build().vocab_size)
    task: Any = override(TaskRunConfig(task=_task(PRESETS[name], world, model.vocab_size)), _only(of_run, "task.")).task
    run = token_run(
        task, samples=_SAMPLES if samples is None else samples, seed=seed, rate=1e-4, settings=_only(of_run, "train.")
    )
    return Training(_warm(run, of_warm), run)


def _check_name(name: str) -> None:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise ConfigError(
            f"no router is called {name!r}; "
            + (f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(PRESETS)}")
        )


def own_router_training(
    name: str,
    world: LiveWorld.Config,
    model: Decoder,
    *,
    samples: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> TaskRunConfig:
    """A training of ``router-r1`` or ``router-r1-grpo`` on questions of one's own, from a model that reads; without a warm start.

    Args:
        name: one of `PRESETS`.
        world: questions and pool.
        model: that it starts from; its tokenizer is the world's.
        samples: episodes; None for the paper's 225 times 64.
        seed, settings: as of `router_training`.

    Raises ConfigError for what cannot be, and what the world does.
    """
    _check_name(name)
    many = _OWN_SAMPLES if samples is None else samples
    return own_run(PRESETS[name], world, model, samples=many, seed=seed, settings=settings)


@dataclass(frozen=True)
class Most:
    """What a training may ask of others at most.

    Attributes:
        calls: of models that are there, each with all its tries.
        usd: dollars that these may cost, with questions as long as turns and replies as long as they may be.
        is_billed: some of it is asked of an endpoint.
    """

    calls: int
    usd: float
    is_billed: bool


def most_of(run: TaskRunConfig) -> Most:
    """What a training on a `LiveWorld`, and its evaluation at the end, may ask at most: limits of the world aside."""
    task: Any = run.task
    world = task.world.build()
    calls = (samples_of(run, run.train.steps) + min(task.eval_episodes, world.num_tests)) * task.world.max_turns
    # Each try is a call, and may be billed.
    calls *= 1 + task.world.retries
    usd = world.most_usd_of_call()
    names = [name for name, one in task.world.models.items() if one.price.output_usd or one.price.input_usd]
    is_billed = any(world.endpoint_of(name) is not None for name in names)
    world.close()
    return Most(calls if world.waits else 0, calls * usd, is_billed)


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


def warm_up(warm: TaskRunConfig, out: str | Path, on_event: Callable[[Event], None] | None = None) -> TrainResult:
    """Make the warm start of the run in ``out``, or go on with it; how it ended."""
    place = Path(out) / WARM
    resumes = (place / "config.json").is_file()
    return Trainer(warm, place, resume=resumes, on_event=on_event).fit()


def warm_model(out: str | Path) -> Decoder:
    """What the warm start of a run came to. Raises CheckpointError if there is none."""
    return load_model(Path(out) / WARM)[0]
