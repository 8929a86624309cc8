"""``anabranch gateway route``: where a fitted router would send a query, and why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.gateway.doors import door
from anabranch.cli.options import AsJson, finite_number
from anabranch.cli.output import fact, print_json, say, table
from anabranch.errors import ConfigError, InputError
from anabranch.extras import require
from anabranch.interrupts import Ending

if TYPE_CHECKING:
    from anabranch.routers.recommendation import Picked


def route(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The query.")],
    router: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Routers made by fit: their folder, or one file; or a run of rl train router-r1."
        ),
    ],
    strategy: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which router of the folder. Default: what eval recommends, else the first."),
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="The task of the query, if known.")] = None,
    trade_off: Annotated[
        float | None,
        typer.Option(
            metavar="F", min=0, callback=finite_number, help="How much score to give up to save a dollar on this query."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show where a fitted router would send a query, and why.

    With a run of Router-R1 the router answers the query itself, asking the models of its pool.

    Example: anabranch gateway route 'What is 12 * 34?' --router routers --strategy knn
    """
    if not text.strip():
        raise InputError("the query is empty; write what is asked")
    from anabranch.cli.rl.kinds import is_token_run

    if is_token_run(router):
        return _by_policy(text, router, strategy=strategy, task=task, trade_off=trade_off, as_json=as_json)
    from anabranch.routers.contract.knobs import LAMBDA, check_knobs

    picked = _picked(router, strategy)
    fitted, name = picked.router, picked.name
    if trade_off is not None:
        check_knobs({LAMBDA: str(trade_off)}, fitted.strategy.sender_knobs, name)
    query = fitted.query(text, task=task, knobs={} if trade_off is None else {"lambda": str(trade_off)})
    chosen = None if picked.choice is None else dataclasses.asdict(picked.choice)
    facts = {"router": name, "recommended": chosen, **fitted.strategy.explain(query, fitted.pool)}
    if as_json:
        print_json(facts)
        return
    fact("router", name if picked.choice is None else f"{name}: {picked.why}")
    fact("why", facts["reason"])
    rows = [
        [item["model"], _number(item["quality"]), _number(item["cost"], 1000), _number(item["score"])]
        for item in facts["candidates"]
    ]
    table(["model", "predicted\nquality", "predicted\n$ per 1k", "ordered\nby"], rows)
    if facts["details"]:
        print()
        table(["detail", "value"], [[key, _short(value)] for key, value in facts["details"].items()], text_columns=2)


def _by_policy(text: str, run: Path, *, as_json: bool, **others: Any) -> None:
    """The answer of a router that was trained, and whom it asked."""
    given = next((name for name, value in others.items() if value is not None), None)
    if given is not None:
        raise ConfigError(
            f"--{given.replace('_', '-')} is for routers of fit, and {run} is a run of rl train; leave it out"
        )
    require("lm", by=f"{door()} route of a run of rl train")
    from anabranch.cli.rl.transcripts import route_question

    # As Ctrl-C: what calls to a pool that are out may cost is kept.
    with Ending():
        route_question(run, text, as_json=as_json)


def _picked(place: Path, strategy: str | None) -> Picked:
    """The router that was named, or the recommended one, or the first; the latter with a word that it is no more than that."""
    from anabranch.routers.fitted import load_folder
    from anabranch.routers.recommendation import Picked, no_recommendation, pick

    if strategy is None:
        picked = pick(place)
        if picked is not None:
            return picked
        say(f"{no_recommendation(place, door())}; the first one decides")
    held = load_folder(place, None if strategy is None else [strategy]).routers
    name = strategy or next(iter(held))
    return Picked(name=name, router=held[name], choice=None, why="it was named" if strategy else "it is the first")


def _number(value: float | None, times: float = 1) -> str:
    return "" if value is None else f"{value * times:.4g}"


def _short(value: Any) -> str:
    """A detail in a line: tables as ``name value``, lists with semicolons between."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
