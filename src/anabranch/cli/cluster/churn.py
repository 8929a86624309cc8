"""``anabranch cluster churn``: does a run outlive its peers, here?"""

from __future__ import annotations

from typing import Annotated

import typer

from anabranch.cli.options import AsJson, Quiet, Seed
from anabranch.cli.output import fact, print_json, say
from anabranch.extras import require


def churn(
    seconds: Annotated[float, typer.Option(metavar="S", min=1, max=86_400, help="How long.")] = 30.0,
    peers: Annotated[
        int, typer.Option(metavar="N", min=3, max=64, help="Processes at a time, at most; 2 stay alive.")
    ] = 6,
    every: Annotated[
        float,
        typer.Option(metavar="S", min=0.05, max=60, help="Seconds between a kill or a start and the next, on average."),
    ] = 0.9,
    hangs: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0, max=1, help="Of kills, how many stop a process instead of ending it."),
    ] = 0.1,
    master_every: Annotated[
        float | None,
        typer.Option(metavar="S", min=0.5, help="Also end the master so often, and start another from its journal."),
    ] = None,
    numbers: Annotated[
        int, typer.Option(metavar="N", min=1, max=2**26, help="Numbers of the shared state and the gradient.")
    ] = 4096,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Kill and start peers of a run at random, and see whether those who are left go on with the same bits (PCCL).

    Processes on this machine share a state and reduce a gradient, step by step. The exit code is 1 where any of them failed that was not
    killed, or had other bits than the others.

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
        done = f"{found.steps} steps   {found.tries} reductions of peers, {found.lost} of them ended by a loss and tried again"
        fact("done", done)
        fact(
            "events",
            f"{found.kills} kills, {found.hangs} hangs, {found.starts} starts, {found.master_kills} of the master",
        )
        fact("gap", f"{found.longest_gap_s:.2f} s between two steps, at most")
        fact("bits", "equal at every step" if not found.differing else f"differ at steps {list(found.differing)[:10]}")
        for error in found.errors:
            fact("failed", error)
    if not found.is_sound:
        raise typer.Exit(1)
