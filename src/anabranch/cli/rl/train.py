"""``anabranch rl train``: a policy that learns by acting."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.bounds import MOST_SEED
from anabranch.cli.options import AsJson, Quiet, check_settings, read_assignments, setting
from anabranch.cli.output import fact, print_json, quantity, shell_word, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.rl.conclusion import Conclusion
from anabranch.cli.rl.given import check_resumed
from anabranch.cli.rl.kinds import learns_tokens
from anabranch.cli.rl.own import Data, MaxCalls, MaxUsd, Model, Own, PoolFile, Reward
from anabranch.cli.train import INTERRUPTED
from anabranch.errors import ConfigError
from anabranch.extras import require

if TYPE_CHECKING:
    from anabranch.train import Event, TaskRunConfig, Trainer, TrainResult


def train(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run.")],
    environment: Annotated[
        str | None,
        typer.Argument(
            metavar="WHAT",
            help="The task: cartpole, pendulum, laneworld, highway, the id of a gymnasium environment (Acrobot-v1), router-r1, "
            "router-r1-grpo, grpo or token-ppo.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Environment steps (for a language model: episodes) to train on. Default: that of the task.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="S", min=0, max=MOST_SEED, help="Seed of all random choices. Default: 0.")
    ] = None,
    model: Model = None,
    data: Data = None,
    pool: PoolFile = None,
    reward: Reward = None,
    max_calls: MaxCalls = None,
    max_usd: MaxUsd = None,
    resume: Annotated[
        bool, typer.Option("--resume", metavar=" ", help="Continue the run in DIR with its config.")
    ] = False,
    assignments: Annotated[list[str] | None, setting("train.learning_rate=0.001")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a policy with PPO. Ctrl-C saves; --resume continues exactly where it stopped.

    The id of any gymnasium environment can be given, such as Acrobot-v1 or package:Name-v0; observations and rewards are then normalised
    by running averages.

    Any field of the run can be set: --set task.gamma=0.95, --set train.learning_rate=1e-4. At the end it reports the mean return of 20
    new episodes (100 for pendulum) without exploration; rl eval plays more.

    router-r1 trains a language model to decide which models to ask; router-r1-grpo does so without a critic. On its own it learns in a
    small world of facts that the models know; with --model, --data and --pool it learns from your questions, asking the models of the
    pool.

    grpo and token-ppo train --model to answer the questions of --data, with a reward that checks the answer. Checkpoints can be served.

    Example: anabranch rl train cartpole --samples 100000 --out runs/cartpole
    """
    require("lm", by="anabranch rl train")
    from anabranch.rl.runs import training
    from anabranch.train import Trainer
    from anabranch.train.run import check_free, check_new

    settings = read_assignments(assignments)
    own = Own(model, data, pool, reward, max_calls, max_usd)
    if learns_tokens(out, environment, resume=resume):
        from anabranch.cli.rl.tokens import train_tokens

        return train_tokens(out, environment, own, samples, seed, settings, resume=resume, quiet=quiet, as_json=as_json)
    own.refuse(environment or out)
    if resume:
        config = _resumed(out, environment, samples, seed, settings)
    else:
        if environment is None:
            raise ConfigError("WHAT is missing; name a task, such as cartpole, or continue a run with --resume")
        check_free(out)
        check_new(out)
        check_settings(settings, ("task", "train"), "task.gamma or train.learning_rate")
        config = training(environment, samples=samples, seed=seed or 0, settings=settings)
    first = int(os.environ.get("RANK", "0")) == 0
    progress = Progress(config.train.steps, "step", quiet=quiet or not first)
    with progress:
        shown = _Shown(config, progress)
        trainer = Trainer(config, out, resume=resume, on_event=shown)
        if first and not quiet:
            _introduce(trainer)
        try:
            result = trainer.fit()
        finally:
            trainer.stream.close()
    if first:
        _conclude(trainer, result, out, as_json=as_json)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED.get(result.signal or "", 130))


def _resumed(
    out: Path, environment: str | None, samples: int | None, seed: int | None, settings: dict[str, Any]
) -> TaskRunConfig:
    """That of the run in ``out``, with what is set anew."""
    from anabranch.config import override
    from anabranch.rl import PPO
    from anabranch.rl.runs import steps_for
    from anabranch.train import read_task_run_config

    check_resumed(out, environment, seed)
    config = read_task_run_config(out, PPO)
    task: Any = config.task
    if samples is not None:
        steps = steps_for(task, config.train.batch_size, samples)
        config = config.replace(train=config.train.replace(steps=steps))
    check_settings(settings, ("task", "train"), "task.gamma or train.learning_rate")
    return override(config, settings)


def _introduce(trainer: Trainer[TaskRunConfig]) -> None:
    from anabranch.rl.runs import samples_of

    config = trainer.config
    task: Any = config.task
    layout = trainer.model.layout
    private = f" and {layout.num_private} that only the critic sees" if layout.num_private else ""
    fact(
        "agent",
        f"sees {layout.num_observed} numbers{private}, answers with {layout.actions}",
        to=sys.stderr,
    )
    learns = sum(each.numel() for each in trainer.model.parameters())
    fact(
        "work",
        f"{samples_of(config, config.train.steps):,} samples in rollouts of {task.num_envs} x {task.rollout_steps}, "
        f"mini-batches of {config.train.batch_size}, {task.epochs} epochs   {quantity(learns)} parameters   "
        f"{trainer.workers.device}, seed {config.train.seed}",
        to=sys.stderr,
    )


class _Shown:
    """Shows a training as it goes on."""

    def __init__(self, config: TaskRunConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress

    def __call__(self, event: Event) -> None:
        task: Any = self.config.task
        if event.kind == "step":
            rate = event.values["uses_per_second"] / task.epochs
            loss = event.values["loss"]
            # Of a mini-batch that was passed over there is none.
            told = "passed over" if math.isnan(loss) else f"loss {loss:.3f}"
            self.progress.update(event.step, f"{told}  {quantity(rate)} samples/s")
        elif event.kind == "evaluation":
            width = len(str(event.steps))
            values = event.values
            self.progress.note(
                f"step {event.step:>{width}}/{event.steps}  mean return {values['mean_return']:.2f} of {values['episodes']} episodes"
            )


def _conclude(trainer: Trainer[TaskRunConfig], result: TrainResult, out: Path, *, as_json: bool) -> None:
    from anabranch.rl.runs import samples_of

    config = trainer.config
    task: Any = config.task
    told = Conclusion(config, result, out, samples_of(config, result.step), "samples")
    if as_json:
        learner: Any = trainer.task
        passed = learner.steps_passed()
        books = {
            "updates": told.samples // task.collecting.num_samples,
            "gradient_steps": result.step - result.skipped_steps - passed,
            "passed_steps": passed,
            "learning_rate": config.train.learning_rate,
            "halvings": learner.halvings,
        }
        print_json(told.to_dict() | books)
        return
    if math.isfinite(result.headline):
        fact("return", _returned(told.measures))
    told.tell_work()
    if result.status == "interrupted":
        wrote(f"{result.checkpoint}", f"anabranch rl train --out {shell_word(out)} --resume")
        return
    wrote(f"{result.checkpoint}", f"anabranch rl eval {shell_word(out)}")


def _returned(measures: dict[str, Any]) -> str:
    """The mean return in words."""
    interval = measures.get("return_interval", math.nan)
    within = f" +- {interval:.2f}" if interval is not None and math.isfinite(interval) else ""
    return f"{measures['mean_return']:.2f}{within} on average of {measures['episodes']} episodes (95 % interval)"
