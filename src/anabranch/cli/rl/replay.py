"""``anabranch rl replay``: a moving picture of what a policy does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.bounds import MOST_SEED
from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import fact, print_json, shell_word, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.rl.kinds import is_router_run
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart


def replay(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run of anabranch rl train.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The picture: a .gif.")],
    seed: Annotated[
        int | None,
        typer.Option(metavar="S", min=0, max=MOST_SEED, help="Of the episode's beginning. Default: the run's."),
    ] = None,
    every: Annotated[int, typer.Option(metavar="N", min=1, help="Steps between two frames.")] = 2,
    most: Annotated[int, typer.Option("--frames", metavar="N", min=1, max=10_000, help="Frames at most.")] = 500,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw one episode of a policy as a GIF. No display is needed.

    Example: anabranch rl replay runs/cartpole --out episode.gif
    """
    require("lm", "images", by="anabranch rl replay")
    from anabranch.rl import load_agent, record

    if out.suffix.lower() != ".gif":
        raise ConfigError(f"--out is {out}; name a file that ends in .gif")
    check_apart([out], [run])
    if is_router_run(run):
        raise ConfigError(
            f"the run in {run} is a router's, which writes and moves nothing; read its episodes: anabranch rl eval --csv"
        )
    agent = load_agent(run)
    begins = agent.config.train.seed if seed is None else seed
    with Progress(most, "frame", quiet=quiet) as progress:
        film = record(
            agent.model, agent.task.environment, seed=begins, every=every, most=most, on_frame=progress.update
        )
    film.write_gif(out)
    if as_json:
        told = {"folder": str(run), "file": str(out), "frames": len(film.frames), "steps": film.steps}
        print_json(told | {"return": film.total, "seed": begins})
        return
    fact("episode", f"{film.steps} steps, return {film.total:.2f}, {len(film.frames)} frames")
    wrote(str(out), f"anabranch rl eval {shell_word(run)}")
