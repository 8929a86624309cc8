"""``anabranch cluster churn``: does a run outlive its peers, here?"""

from __future__ import annotations

from typing import Annotated

import typer

from anabranch.cli.options import AsJson, Quiet, Seed
from anabranch.cli.output import fact, print_json, say
from anabranch.extras import require


def churn(
    seconds: Annotated[float, typer.Option(metavar="S", min=1, max=86_400, help="Duration in seconds.")] = 30.0,
    peers: Annotated[
        int, typer.Option(metavar="N", min=3, max=64, help="Maximum number of processes; 2 always stay alive.")
    ] = 6,
    every: Annotated[
        float,
        typer.Option(metavar="S", min=0.05, max=60, help="Average seconds between one kill or start and the next."),
    ] = 0.9,
    hangs: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0, max=1, help="Share of kills that freeze a process instead of ending it."),
    ] = 0.1,
    master_every: Annotated[
        float | None,
        typer.Option(
            metavar="S", min=0.5, help="Also kill the master every S seconds, and start another from its journal."
        ),
    ] = None,
    numbers: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=2**26, help="Size of the shared state and of the gradient, in numbers."),
    ] = 4096,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Test PCCL on this machine: kill and start peers at random, and check that the others continue with identical bits.

    Processes share a state and reduce a gradient, step by step. The exit code is 1 if a process failed that was not killed, or if its
    bits differ from those of the others.

    Example: anabranch cluster churn --seconds 180 --peers 8 --seed 1
    """
    require("lm", by="anabranch cluster churn")
    from anabranch.cluster.pccl.churn import churn as run

    found = run(
        seconds=seconds,
        peers=peers,
        every=(every / 3, every * 5 / 3),
        hangs=hangs,
        master_every=master_every,
        numbers=numbers,
        seed=seed,
        on_event=(lambda text: None) if quiet else say,
    )
    if as_json:
        print_json(
            {
                **vars(found),
                "differing": list(found.differing),
                "errors": list(found.errors),
                "is_sound": found.is_sound,
            }
        )
    else:
        done = f"{found.steps} steps   {found.completed} of {found.begun} steps of survivors completed"
        fact("done", f"{done}; of {found.interrupted} that a loss interrupted {found.recovered}")
        fact(
            "events",
            f"{found.kills} kills, {found.hangs} hangs ({found.woken} woken), {found.starts} starts, {found.master_kills} of the master",
        )
        fact("gap", f"{found.longest_gap_s:.2f} s between two steps, at most")
        fact("bits", "equal at every step" if not found.differing else f"differ at steps {list(found.differing)[:10]}")
        for error in found.errors:
            fact("failed", error)
    if not found.is_sound:
        raise typer.Exit(1)
