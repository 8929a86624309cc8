"""``anabranch gateway route``: where a fitted router would send a query, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.options import AsJson
from anabranch.cli.output import fact, print_json, table
from anabranch.errors import InputError


def route(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The query.")],
    router: Annotated[Path, typer.Option(metavar="DIR", help="Routers of gateway fit: their folder, or one file.")],
    strategy: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which router of the folder. Default: the first.")
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="The kind of work, where it is known.")] = None,
    trade_off: Annotated[
        float | None, typer.Option(metavar="F", min=0, help="Score given up to save a dollar on this query.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say where a fitted router would send a query, and why.

    Example: anabranch gateway route 'What is 12 * 34?' --router routers --strategy knn
    """
    from anabranch.gateway.saving import load_folder

    if not text.strip():
        raise InputError("the query is empty; write what is asked")
    found = load_folder(router, None if strategy is None else [strategy])
    name = strategy or next(iter(found.routers))
    fitted = found.routers[name]
    query = fitted.query(text, task=task, knobs={} if trade_off is None else {"lambda": str(trade_off)})
    facts = {"router": name, **fitted.strategy.explain(query, fitted.pool)}
    if as_json:
        print_json(facts)
        return
    fact("router", name)
    fact("why", facts["reason"])
    rows = [
        [item["model"], _number(item["quality"]), _number(item["cost"], 1000), _number(item["score"])]
        for item in facts["candidates"]
    ]
    table(["model", "predicted\nquality", "predicted\n$ per 1k", "ordered\nby"], rows)
    if facts["details"]:
        print()
        table(["detail", "value"], [[key, _short(value)] for key, value in facts["details"].items()], text_columns=2)


def _number(value: float | None, times: float = 1) -> str:
    return "" if value is None else f"{value * times:.4g}"


def _short(value: Any) -> str:
    """A detail in a line: tables as ``name value``, lists with semicolons between."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
