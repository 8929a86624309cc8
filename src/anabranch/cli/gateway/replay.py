"""``anabranch gateway replay``: what fitted routers would have earned on logged traffic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.gateway.options import AllowLeak, ColumnMap, Data, Named, Prices, embed, read_data
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import print_json, say, table

if TYPE_CHECKING:
    from anabranch.gateway.referee.replay import Replay


def replay(
    data: Data,
    router: Annotated[Path, typer.Option(metavar="DIR", help="Routers of gateway fit: their folder, or one file.")],
    strategy: Named = None,
    columns: ColumnMap = None,
    prices: Prices = None,
    allow_leak: AllowLeak = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say what fitted routers would have earned on logged traffic, where one model answered each query.

    Rows count where a router would have chosen the model that answered; with a probability in the log, they weigh its inverse.

    Example: anabranch gateway replay traffic.jsonl --router routers
    """
    from anabranch.gateway.referee.replay import replay as estimate
    from anabranch.gateway.saving import load_folder

    found = load_folder(router, strategy)
    with waiting(f"reading {data}", quiet):
        log, pool = read_data(data, columns, prices, keep_copies=True)
    if not allow_leak:
        found.check_unseen(log)
    strategies = {}
    for name, one in found.routers.items():
        strategies[name] = one.strategy
        if one.embedder is not None and log.vector_ND is None:
            log = embed(one.embedder, log, (lambda text: None) if quiet else say)
    result = estimate(strategies, log, pool)
    if as_json:
        print_json(result.to_dict())
        return
    _print(result)


def _print(result: Replay) -> None:
    def number(value: float | None, form: str = ".4f") -> str:
        return "" if value is None else f"{value:{form}}"

    rows = [
        [
            one.name, f"{one.matched:,}", number(one.effective, ",.0f"), number(one.score),
            "" if one.interval is None else f"{one.interval[0]:.4f}-{one.interval[1]:.4f}", number(one.gain, "+.4f"),
            "" if one.gain_interval is None else f"{one.gain_interval[0]:+.4f} to {one.gain_interval[1]:+.4f}",
            "" if one.cost is None else f"{1000 * one.cost:.4g}",
        ]
        for one in result.strategies
    ]  # fmt: skip
    headers = (
        "router", "rows\nmatched", "worth\nrows", "score", "95% interval", "gain on\nthe log", "95% interval", "$ per 1k\nqueries",
    )  # fmt: skip
    table(headers, rows)
    cost = "" if result.cost is None else f" at ${1000 * result.cost:.4g} per thousand"
    print(f"\nthe log: {result.rows:,} scored answers, mean score {result.score:.4f}{cost}")
    if not result.has_probabilities:
        print(
            "The log says no probabilities: estimates are right only if models were drawn without a look at the query."
        )
