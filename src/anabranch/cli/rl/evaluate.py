"""``anabranch rl eval``: how good a policy is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.bounds import MOST_SEED
from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import fact, print_json, shell_word, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.rl.kinds import is_token_run
from anabranch.cli.rl.own import MaxCalls, MaxUsd, Own
from anabranch.cli.rl.train import _returned
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart
from anabranch.interrupts import Ending

if TYPE_CHECKING:
    from anabranch.rl import Agent, Environment

# What the name of a picture may end in.
_FORMS = (".svg", ".png")
# Told first, or not as they are.
_KNOWN = ("mean_return", "return_deviation", "return_interval", "episodes", "mean_length", "terminated")


# Worlds of a referee side by side: each is a process.
_BESIDE = 4


def _referee(name: str, agent: Agent) -> Environment:
    """Where another judges. Raises ConfigError for another name, and for drivers of another world than laneworld."""
    from anabranch.rl import LaneWorld, Sumo

    if name != "sumo":
        raise ConfigError(f"--referee is {name!r}; use sumo")
    environment = agent.task.environment
    if not isinstance(environment, LaneWorld):
        kind = type(environment).__name__.lower()
        raise ConfigError(f"--referee sumo judges drivers of laneworld, and this one learned in {kind}")
    require("sumo", by="anabranch rl eval --referee sumo")
    return Sumo.Config(world=environment.config.world).build()


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run of anabranch rl train.")],
    episodes: Annotated[int, typer.Option(metavar="N", min=1, max=1_000_000, help="Number of episodes.")] = 100,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="S",
            min=0,
            max=MOST_SEED,
            help="Seed of the initial states. Default: the seed of the run, as after training.",
        ),
    ] = None,
    referee: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Evaluate a laneworld driver in another simulator: sumo, on its own roads. Default: the training environment.",
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write a line for each episode.")] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the returns during training (.svg or .png).")
    ] = None,
    max_calls: MaxCalls = None,
    max_usd: MaxUsd = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a policy for whole episodes without exploration, from initial states that training did not use.

    Example: anabranch rl eval runs/cartpole --episodes 100 --csv episodes.csv
    """
    require("lm", *(["plots"] if picture is not None else []), by="anabranch rl eval")
    from anabranch.rl import judge, load_agent
    from anabranch.train import read_metrics

    if picture is not None and picture.suffix not in _FORMS:
        raise ConfigError(f"--picture is {str(picture)!r}; its name must end in {' or '.join(_FORMS)}")
    check_apart([csv, picture], [run])
    own = Own(max_calls=max_calls, max_usd=max_usd)
    if is_token_run(run):
        from anabranch.cli.rl.tokens import evaluate_tokens

        # As Ctrl-C: what calls to a pool that are out may cost is kept.
        with Ending():
            return evaluate_tokens(run, episodes, seed, csv, picture, own, as_json=as_json)
    own.refuse(run)
    agent = load_agent(run)
    environment = agent.task.environment if referee is None else _referee(referee, agent)
    begins = agent.config.train.seed if seed is None else seed
    with Progress(episodes, "episode", quiet=quiet) as progress:
        found = judge(
            agent.model,
            environment,
            episodes=episodes,
            seed=begins,
            on_step=lambda world, ended: progress.update(ended),
            beside=_BESIDE if referee is not None else None,
        )
    measures, intervals = found.measures(), found.intervals()
    if csv is not None:
        found.write_csv(csv)
    if picture is not None:
        from anabranch.cli.rl.curve import draw_curve

        draw_curve(read_metrics(run), measures, picture, run.name)
    if as_json:
        told = {} if referee is None else {"referee": referee}
        print_json({"folder": str(run), "step": agent.step, "seed": begins, **told, **measures, "intervals": intervals})
        return
    fact("return", _returned(measures))
    fact(
        "length",
        f"{measures['mean_length']:.1f} steps on average; {measures['terminated']:.0%} of episodes ended by themselves",
    )
    for name, value in measures.items():
        if name not in _KNOWN:
            width = intervals.get(name, math.nan)
            fact(name, f"{value:.4g}" + (f" +- {width:.2g}" if math.isfinite(width) else ""))
    made = ", ".join(str(path) for path in (csv, picture) if path is not None)
    then = f"anabranch rl replay {shell_word(run)} --out episode.gif"
    if made:
        wrote(made, then)
    else:
        fact("next", then)
