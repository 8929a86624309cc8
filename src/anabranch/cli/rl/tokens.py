"""``anabranch rl train`` and ``rl eval`` of policies of tokens: routers, and models that answer questions of one's own."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from anabranch.cli.options import check_settings
from anabranch.cli.output import fact, print_json, shell_word, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.rl.conclusion import Conclusion
from anabranch.cli.rl.given import check_resumed
from anabranch.cli.rl.kinds import ANSWERS
from anabranch.cli.rl.own import Own, kept_at, own_training, start_of, tell_most
from anabranch.cli.rl.strategy import write_strategy
from anabranch.cli.train import INTERRUPTED
from anabranch.errors import ConfigError, DataError, LimitError
from anabranch.files import atomic_write_text
from anabranch.interrupts import Ending

if TYPE_CHECKING:
    from anabranch.lm import Decoder
    from anabranch.rl.tokens.runs import Policy
    from anabranch.rl.tokens.trajectory import Trajectory
    from anabranch.train import Event, TaskRunConfig, Trainer, TrainResult


def train_tokens(
    out: Path,
    name: str | None,
    own: Own,
    samples: int | None,
    seed: int | None,
    settings: dict[str, Any],
    *,
    resume: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """A warm start where a world has one and there is none yet, then the training."""
    from anabranch.train import Trainer
    from anabranch.train.run import check_free, check_new

    is_first = int(os.environ.get("RANK", "0")) == 0
    shown = not quiet and is_first
    if resume:
        config, start = _resumed(out, name, own, samples, seed, settings)
    else:
        assert name is not None, "asked for by name"
        check_free(out)
        check_new(out)
        is_own = name in ANSWERS or bool(own.given)
        examples = "task.questions or task.world.turn_tokens" if is_own else "task.world.alpha or warm.steps"
        check_settings(settings, ("task", "train") if is_own else ("task", "train", "warm"), examples)
        if is_own:
            config, start = own_training(name, own, out, samples=samples, seed=seed or 0, settings=settings)
        else:
            config, start = _warmed(name, out, samples, seed or 0, settings, shown=shown)
    given = {} if start is None else {"model": start}
    # As a further Ctrl-C: what calls to a pool that are out may cost is kept.
    with Ending(ends_trainings=False), Progress(config.train.steps, "step", quiet=not shown) as progress:
        trainer = Trainer(config, out, resume=resume, on_event=lambda event: _show(event, progress, "loss"), **given)
        try:
            result = trainer.fit()
        except LimitError:
            line = f"anabranch rl train --out {shell_word(out)} --resume --max-calls N --max-usd USD"
            fact("next", f"what was learned and asked is kept; with other limits it goes on: {line}", to=sys.stderr)
            raise
        finally:
            trainer.stream.close()
    if is_first:
        world: Any = trainer.task.world  # type: ignore[attr-defined]
        _conclude(trainer, result, out, write_strategy(world, out), as_json=as_json)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED.get(result.signal or "", 130))


def _warmed(
    name: str, out: Path, samples: int | None, seed: int, settings: dict[str, Any], *, shown: bool
) -> tuple[TaskRunConfig, Decoder]:
    """The run in the two-hop world, and what its warm start came to."""
    from anabranch.rl.router_r1.runs import router_training, warm_model, warm_up

    made = router_training(name, samples=samples, seed=seed, settings=settings)
    with Progress(made.warm.train.steps, "step", quiet=not shown) as progress:
        warm = warm_up(made.warm, out, lambda event: _show(event, progress, "warm start, loss"))
    if warm.status == "interrupted":
        fact("next", "the warm start was interrupted; the same line goes on with it", to=sys.stderr)
        raise typer.Exit(INTERRUPTED.get(warm.signal or "", 130))
    return made.run, warm_model(out)


def _resumed(
    out: Path, name: str | None, own: Own, samples: int | None, seed: int | None, settings: dict[str, Any]
) -> tuple[TaskRunConfig, Decoder | None]:
    """The config of the run in ``out``, with what is set anew; and what it starts from, where it has not saved anything yet."""
    from anabranch.config import override
    from anabranch.rl.router_r1.runs import WARM, warm_model
    from anabranch.rl.tokens.runs import KINDS, is_policy, steps_for
    from anabranch.run_folder import task_kind
    from anabranch.train import checkpoints, read_task_run_config

    check_resumed(out, name, seed)
    if not is_policy(out):
        raise DataError(f"no training run of a router in {out}; start one: anabranch rl train router-r1 --out {out}")
    wrong = [option for option in own.given if option not in ("--max-calls", "--max-usd")]
    if wrong:
        raise ConfigError(
            f"{wrong[0]} is given with --resume, which goes on with the run in {out} as it began; leave it out"
        )
    config: TaskRunConfig = read_task_run_config(out, KINDS[str(task_kind(out))])
    if samples is not None:
        config = config.replace(train=config.train.replace(steps=steps_for(config, samples)))
    check_settings(settings, ("task", "train", "warm"), "task.world.alpha or warm.steps")
    if any(path.startswith("warm.") for path in settings):
        raise ConfigError("--set warm....: the warm start of a run that goes on is over; leave it out")
    moved = kept_at(out)
    if own.limits and "task.world.kept" not in moved:
        own.refuse("a run without a pool that is asked")
    config = override(config, settings | moved | own.limits)
    if "task.world.kept" in moved:
        tell_most(config)
    if checkpoints(out):
        return config, None
    return config, start_of(out) or (warm_model(out) if (out / WARM).is_dir() else None)


def _show(event: Event, progress: Progress, what: str) -> None:
    if event.kind == "step":
        progress.update(event.step, f"{what} {event.values['loss']:.3f}")
    elif event.kind == "evaluation" and "mean_reward" in event.values:
        width = len(str(event.steps))
        values = event.values
        progress.note(
            f"step {event.step:>{width}}/{event.steps}  mean reward {values['mean_reward']:.3f} of {values['episodes']} episodes"
        )


def _conclude(
    trainer: Trainer[TaskRunConfig], result: TrainResult, out: Path, written: dict[str, str], *, as_json: bool
) -> None:
    from anabranch.rl.tokens.runs import samples_of

    config = trainer.config
    told = Conclusion(config, result, out, samples_of(config, result.step), "episodes")
    asked = _asked(trainer.task.world)  # type: ignore[attr-defined]
    if as_json:
        print_json(told.to_dict() | written | asked)
        return
    _tell(told.measures)
    if asked:
        kept = f"; what it said is in {asked['pool']}" if asked["pool_calls"] else ""
        fact("pool", f"{asked['pool_calls']:,} calls, ${asked['pool_usd']:.4f}{kept}")
    told.tell_work()
    if result.status == "interrupted":
        wrote(f"{result.checkpoint}", f"anabranch rl train --out {shell_word(out)} --resume")
        return
    made = " and ".join([str(result.checkpoint), *written.values()])
    if "gateway" in written:
        wrote(made, f"anabranch gateway serve --config {shell_word(written['gateway'])}")
    elif written:
        wrote(made, f"anabranch serve {shell_word(out)} --served-name router")
    else:
        wrote(made, f"anabranch rl eval {shell_word(out)} --csv episodes.csv")


def _asked(world: Any) -> dict[str, Any]:
    """What was asked of a pool that is there; nothing for other worlds."""
    pool: Any = getattr(world, "pool", None)
    if getattr(pool, "live", None) is None:
        return {}
    return {"pool_calls": pool.calls, "pool_usd": pool.usd, "pool": world.config.kept}


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


def evaluate_tokens(
    run: Path,
    episodes: int,
    seed: int | None,
    csv_file: Path | None,
    picture: Path | None,
    own: Own,
    *,
    as_json: bool,
) -> None:
    """How good a policy is, on questions that nothing was learned from."""
    from anabranch.rl.tokens.runs import judge_policy, load_policy
    from anabranch.train import read_metrics

    policy = load_policy(run, kept_at(run) | own.limits)
    played, rewards = judge_policy(policy, episodes=episodes, seed=seed)
    measures = policy.task.measures(played, rewards)
    if csv_file is not None:
        atomic_write_text(csv_file, _table(policy, played, rewards))
    if picture is not None:
        from anabranch.cli.rl.curve import draw_curve

        records = [
            {**record, "samples": record["episodes_played"], "training_return": record["reward"]}
            for record in read_metrics(run)
            if record.get("kind") == "train"
        ]
        ends = {"mean_return": measures["mean_reward"], "return_interval": measures["reward_interval"]}
        draw_curve(records, measures | ends, picture, run.name)
    begins = policy.config.train.seed if seed is None else seed
    if as_json:
        told = {"folder": str(run), "step": policy.step, "seed": begins, "mean_return": measures["mean_reward"]}
        print_json(told | measures)
        return
    _tell(measures)
    made = ", ".join(str(path) for path in (csv_file, picture) if path is not None)
    then = f"anabranch rl replay {shell_word(run)} --out episodes.txt"
    if made:
        wrote(made, then)
    else:
        fact("next", then)


def _table(policy: Policy, played: list[Trajectory], rewards: list[float]) -> str:
    """A line for each episode: what the world tells of it, and behind the three texts what it was worth."""
    made = io.StringIO()
    table = csv.writer(made, lineterminator="\n")
    for number, (trajectory, reward) in enumerate(zip(played, rewards, strict=True)):
        assert trajectory.outcome is not None
        row = policy.task.world.row(trajectory.outcome)
        texts = {name: row.pop(name) for name in ("question", "answer", "wanted") if name in row}
        line = texts | {"reward": reward} | row
        if number == 0:
            table.writerow(line)
        table.writerow(line.values())
    return made.getvalue()
