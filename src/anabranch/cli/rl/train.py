"""``anabranch rl train``: a policy that learns by acting."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.bounds import MOST_SEED
from anabranch.cli.options import AsJson, Assignments, Quiet, read_assignments
from anabranch.cli.output import duration, fact, print_json, quantity, shell_word, size, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.rl.given import check_resumed, check_settings
from anabranch.cli.rl.kinds import learns_router
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
            metavar="WHAT", help="What is learned: cartpole, pendulum, laneworld, highway, router-r1 or router-r1-grpo."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Steps of environments (of a router: episodes) to learn from, at most. Default: as it is usually learned.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="S", min=0, max=MOST_SEED, help="Of everything random. Default: 0.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", metavar=" ", help="Go on with the run in DIR, with its config.")
    ] = False,
    assignments: Assignments = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Let a policy learn by acting, with PPO. Ctrl-C saves; --resume goes on, to the bit.

    Any field of the run can be set: --set task.gamma=0.95, --set train.learning_rate=1e-4. What is told at the end is the mean return of
    20 episodes (100 of pendulum) in which nothing is tried out, none of which was learned from; rl eval plays more.

    router-r1 is a language model that learns which models to ask, in a world of facts that models know; router-r1-grpo learns it without a
    critic. Its checkpoints can be served.

    Example: anabranch rl train cartpole --samples 100000 --out runs/cartpole
    """
    require("lm", by="anabranch rl train")
    from anabranch.rl.runs import training
    from anabranch.train import Trainer
    from anabranch.train.run import check_free, check_new

    settings = read_assignments(assignments)
    if learns_router(out, environment, resume=resume):
        from anabranch.cli.rl.router import train_router

        return train_router(out, environment, samples, seed, settings, resume=resume, quiet=quiet, as_json=as_json)
    if resume:
        config = _resumed(out, environment, samples, seed, settings)
    else:
        if environment is None:
            raise ConfigError("WHAT is not given; name what is learned, such as cartpole, or go on with --resume")
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
    acts = (
        f"{layout.actions.choices} choices" if layout.actions.is_discrete else f"{layout.actions.num_numbers} numbers"
    )
    private = f" and {layout.num_private} that only the critic sees" if layout.num_private else ""
    fact(
        "agent",
        f"sees {layout.num_observed} numbers{private}, does one of {acts}"
        if layout.actions.is_discrete
        else f"sees {layout.num_observed} numbers{private}, does {acts}",
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
            self.progress.update(event.step, f"loss {event.values['loss']:.3f}  {quantity(rate)} samples/s")
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
    samples = samples_of(config, result.step)
    rate = samples / result.seconds if result.seconds else 0.0
    measures = {name: value for name, value in result.measures.items() if name not in ("step", "kind")}
    if as_json:
        print_json(
            {
                "folder": str(out),
                "status": result.status,
                "step": result.step,
                "steps": config.train.steps,
                "mean_return": result.headline,
                **measures,
                "samples": samples,
                "samples_per_second": rate,
                "updates": samples // task.collecting.num_samples,
                "seconds": result.seconds,
                "seed": config.train.seed,
                "skipped_steps": result.skipped_steps,
                "peak_memory_bytes": result.peak_memory_bytes,
                "checkpoint": str(result.checkpoint) if result.checkpoint else None,
            }
        )
        return
    if math.isfinite(result.headline):
        fact("return", _returned(measures))
    fact(
        "work",
        f"{samples:,} samples, {result.step:,} of {config.train.steps:,} steps in {duration(result.seconds)}, "
        f"{quantity(rate)} samples/s, {size(result.peak_memory_bytes)} memory",
    )
    if result.status == "interrupted":
        wrote(f"{result.checkpoint}", f"anabranch rl train --out {shell_word(out)} --resume")
        return
    wrote(f"{result.checkpoint}", f"anabranch rl eval {shell_word(out)}")


def _returned(measures: dict[str, Any]) -> str:
    """The mean return in words."""
    interval = measures.get("return_interval", math.nan)
    within = f" +- {interval:.2f}" if interval is not None and math.isfinite(interval) else ""
    return f"{measures['mean_return']:.2f}{within} on average of {measures['episodes']} episodes (95 % interval)"
