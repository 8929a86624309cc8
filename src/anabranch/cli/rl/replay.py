"""``anabranch rl replay``: a moving picture of what a policy does, or a transcript of what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.bounds import MOST_SEED
from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import fact, print_json, shell_word, wrote
from anabranch.cli.progress import Progress
from anabranch.cli.rl.kinds import is_token_run
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.files import check_apart
from anabranch.interrupts import Ending

if TYPE_CHECKING:
    from anabranch.rl import Film


def replay(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run of anabranch rl train.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The picture (.gif), or one for each frame (.png); for a language model the transcript (.txt or .jsonl).",
        ),
    ],
    episode: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Episode of rl eval, numbered from 0 as in its CSV. Default: 0, and all for a language model.",
        ),
    ] = None,
    episodes: Annotated[
        int, typer.Option(metavar="N", min=1, max=1_000_000, help="Number of episodes that rl eval plays.")
    ] = 100,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="S", min=0, max=MOST_SEED, help="Seed of the initial states. Default: the seed of the run."
        ),
    ] = None,
    every: Annotated[int, typer.Option(metavar="N", min=1, help="Environment steps between two frames.")] = 2,
    most: Annotated[
        int, typer.Option("--frames", metavar="N", min=1, max=10_000, help="Maximum number of frames.")
    ] = 500,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw one episode of a policy as a GIF or as PNGs; no display is needed. For a language model, write transcripts of its episodes.

    A transcript has everything that the model wrote and read, and the reward, as text or as JSON lines.

    Example: anabranch rl replay runs/cartpole --out episode.gif
    """
    is_text = is_token_run(run)
    require("lm", *([] if is_text else ["images"]), by="anabranch rl replay")
    check_apart([out], [run])
    if is_text:
        from anabranch.cli.rl.transcripts import write_transcripts

        # As Ctrl-C: what calls to a pool that are out may cost is kept.
        with Ending():
            return write_transcripts(run, out, episode, episodes, seed, as_json=as_json)
    from anabranch.rl import load_agent, record

    kind = out.suffix.lower()
    if kind not in (".gif", ".png"):
        raise ConfigError(f"--out is {out}; name a file that ends in .gif, or in .png for a picture of each frame")
    agent = load_agent(run)
    begins = agent.config.train.seed if seed is None else seed
    with Progress(most, "frame", quiet=quiet) as progress:
        film = record(
            agent.model,
            agent.task.environment,
            seed=begins,
            every=every,
            most=most,
            episode=episode or 0,
            episodes=episodes,
            on_frame=progress.update,
        )
    files = film.write_png(out) if kind == ".png" else [out]
    if kind == ".gif":
        film.write_gif(out)
    if as_json:
        told = {"folder": str(run), "file": str(files[0]), "frames": len(film.frames), "steps": film.steps}
        print_json(told | {"return": film.total, "seed": begins, "episode": episode or 0})
        return
    fact("episode", f"{film.steps} steps, return {film.total:.2f}, {_frames(film, every)}")
    where = f"{files[0]} to {files[-1].name}" if len(files) > 1 else str(files[0])
    wrote(where, f"anabranch rl eval {shell_word(run)}")


def _frames(film: Film, every: int) -> str:
    """How many frames, and of which steps where they end before the episode does."""
    number = len(film.frames)
    is_cut = number * every < film.steps
    return f"{number} frames" + (f", of its first {number * every} steps" if is_cut else "")
