"""``anabranch rl train router-r1`` and ``rl eval`` of what it made: routers that learn in tokens."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from anabranch.cli.output import duration, fact, print_json, quantity, shell_word, size, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.rl.given import check_resumed, check_settings
from anabranch.cli.train import INTERRUPTED
from anabranch.errors import ConfigError, DataError
from anabranch.files import atomic_write_text

if TYPE_CHECKING:
    from anabranch.rl.router_r1.runs import Router
    from anabranch.rl.tokens.trajectory import Trajectory
    from anabranch.train import Event, TaskRunConfig, Trainer, TrainResult

# In the folder of a run: what a gateway's config says of the router.
STRATEGY = "strategy.toml"
_COLUMNS = ("question", "answer", "wanted", "reward", "turns", "calls", "raw_cost", "faults")


def train_router(
    out: Path,
    name: str | None,
    samples: int | None,
    seed: int | None,
    settings: dict[str, Any],
    *,
    resume: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """A warm start where there is none yet, then the training."""
    from anabranch.rl.router_r1.runs import router_training, warm_model, warm_up
    from anabranch.train import Trainer
    from anabranch.train.run import check_free, check_new

    is_first = int(os.environ.get("RANK", "0")) == 0
    given: dict[str, Any] = {}
    if resume:
        config = _resumed(out, name, samples, seed, settings)
    else:
        assert name is not None, "asked for by name"
        check_free(out)
        check_new(out)
        check_settings(settings, ("task", "train", "warm"), "task.world.alpha or warm.steps")
        made = router_training(name, samples=samples, seed=seed or 0, settings=settings)
        config = made.run
        with Progress(made.warm.train.steps, "step", quiet=quiet or not is_first) as progress:
            status = warm_up(made.warm, out, lambda event: _show(event, progress, "warm start, loss"))
        if status == "interrupted":
            fact("next", "the warm start was interrupted; the same line goes on with it", to=sys.stderr)
            raise typer.Exit(INTERRUPTED.get("", 130))
        given["model"] = warm_model(out)
    with Progress(config.train.steps, "step", quiet=quiet or not is_first) as progress:
        trainer = Trainer(config, out, resume=resume, on_event=lambda event: _show(event, progress, "loss"), **given)
        try:
            result = trainer.fit()
        finally:
            trainer.stream.close()
    if is_first:
        atomic_write_text(out / STRATEGY, _strategy(trainer.task.world))  # type: ignore[attr-defined]
        _conclude(trainer, result, out, as_json=as_json)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED.get(result.signal or "", 130))


def _resumed(
    out: Path, name: str | None, samples: int | None, seed: int | None, settings: dict[str, Any]
) -> TaskRunConfig:
    """That of the run in ``out``, with what is set anew."""
    from anabranch.config import override
    from anabranch.rl.router_r1.runs import KINDS, is_router, steps_for
    from anabranch.train import read_task_run_config
    from anabranch.train.config import task_kind

    check_resumed(out, name, seed)
    if not is_router(out):
        raise DataError(f"no training run of a router in {out}; start one: anabranch rl train router-r1 --out {out}")
    config = read_task_run_config(out, KINDS[str(task_kind(out))])
    if samples is not None:
        config = config.replace(train=config.train.replace(steps=steps_for(config, samples)))
    check_settings(settings, ("task", "train", "warm"), "task.world.alpha or warm.steps")
    if any(path.startswith("warm.") for path in settings):
        raise ConfigError("--set warm....: the warm start of a run that goes on is over; leave it out")
    return override(config, settings)


def _show(event: Event, progress: Progress, what: str) -> None:
    if event.kind == "step":
        progress.update(event.step, f"{what} {event.values['loss']:.3f}")
    elif event.kind == "evaluation" and "mean_reward" in event.values:
        width = len(str(event.steps))
        values = event.values
        progress.note(
            f"step {event.step:>{width}}/{event.steps}  mean reward {values['mean_reward']:.3f} of {values['episodes']} episodes"
        )


def _strategy(world: Any) -> str:
    """What a gateway's config says of a router that learned in this world, with the models as one of its episodes names them."""
    lines = [
        '# For a gateway that has the router\'s checkpoint as the model "router", and the models of the world by these names.',
        "[strategies.router-r1]",
        'policy = "router"',
        *(f"{name} = {json.dumps(value)}" for name, value in world.strategy().items()),
        "",
        "[strategies.router-r1.about]",
        *(f"{json.dumps(name)} = {json.dumps(text)}" for name, text in world.about().items()),
    ]
    return "\n".join(lines) + "\n"


def _conclude(trainer: Trainer[TaskRunConfig], result: TrainResult, out: Path, *, as_json: bool) -> None:
    from anabranch.rl.router_r1.runs import samples_of

    config = trainer.config
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
                "seconds": result.seconds,
                "seed": config.train.seed,
                "skipped_steps": result.skipped_steps,
                "peak_memory_bytes": result.peak_memory_bytes,
                "checkpoint": str(result.checkpoint) if result.checkpoint else None,
                "strategy": str(out / STRATEGY),
            }
        )
        return
    _tell(measures)
    fact(
        "work",
        f"{samples:,} episodes, {result.step:,} of {config.train.steps:,} steps in {duration(result.seconds)}, "
        f"{quantity(rate)} episodes/s, {size(result.peak_memory_bytes)} memory",
    )
    if result.status == "interrupted":
        wrote(f"{result.checkpoint}", f"anabranch rl train --out {shell_word(out)} --resume")
        return
    wrote(f"{result.checkpoint} and {out / STRATEGY}", f"anabranch serve {shell_word(out)} --served-name router")


def _tell(measures: dict[str, Any]) -> None:
    if not math.isfinite(measures.get("mean_reward", math.nan)):
        return
    interval = measures["reward_interval"]
    within = f" +- {interval:.3f}" if math.isfinite(interval) else ""
    fact(
        "reward", f"{measures['mean_reward']:.3f}{within} on average of {measures['episodes']} episodes (95 % interval)"
    )
    for name, value in measures.items():
        if name not in ("mean_reward", "reward_interval", "episodes"):
            fact(name.replace("_", " "), f"{value:.4g}")


def evaluate_router(
    run: Path,
    episodes: int,
    seed: int | None,
    csv_file: Path | None,
    picture: Path | None,
    *,
    as_json: bool,
) -> None:
    """How good a router is, on questions that nothing was learned from."""
    from anabranch.rl.router_r1.runs import judge_router, load_router
    from anabranch.train import read_metrics

    router = load_router(run)
    played, rewards = judge_router(router, episodes=episodes, seed=seed)
    measures = router.task.measures(played, rewards)
    if csv_file is not None:
        atomic_write_text(csv_file, _table(router, played, rewards))
    if picture is not None:
        from anabranch.cli.rl.curve import draw_curve

        records = [
            {**record, "samples": record["episodes_played"], "training_return": record["reward"]}
            for record in read_metrics(run)
            if record.get("kind") == "train"
        ]
        ends = {"mean_return": measures["mean_reward"], "return_interval": measures["reward_interval"]}
        draw_curve(records, measures | ends, picture, run.name)
    begins = router.config.train.seed if seed is None else seed
    if as_json:
        told = {"folder": str(run), "step": router.step, "seed": begins, "mean_return": measures["mean_reward"]}
        print_json(told | measures)
        return
    _tell(measures)
    made = ", ".join(str(path) for path in (csv_file, picture) if path is not None)
    then = f"anabranch serve {shell_word(run)} --served-name router"
    if made:
        wrote(made, then)
    else:
        fact("next", then)


def _table(router: Router, played: list[Trajectory], rewards: list[float]) -> str:
    """A line for each episode."""
    made = io.StringIO()
    table = csv.writer(made, lineterminator="\n")
    table.writerow(_COLUMNS)
    for trajectory, reward in zip(played, rewards, strict=True):
        assert trajectory.outcome is not None
        facts: Any = trajectory.outcome.facts
        table.writerow(
            [
                facts.asked,
                facts.judged or "",
                " | ".join(facts.wanted),
                reward,
                facts.turns,
                len(facts.calls),
                facts.cost,
                "; ".join(facts.faults),
            ]
        )
    return made.getvalue()
