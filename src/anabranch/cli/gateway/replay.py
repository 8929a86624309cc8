"""``anabranch gateway replay``: what fitted routers would have earned on logged traffic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.gateway.options import AllowLeak, ColumnMap, Data, Named, Prices, Unseen, embed, read_data, rest
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.options import AsJson, Quiet
from anabranch.cli.output import print_json, print_line, say, table

if TYPE_CHECKING:
    from anabranch.routers.referee.off_policy import Replay

# Share of a router's choices that the log may have made; one is told where it is surely below.
ENOUGH_SUPPORT = 0.95


def replay(
    data: Data,
    router: Annotated[Path, typer.Option(metavar="DIR", help="Routers made by fit: their folder, or one file.")],
    strategy: Named = None,
    columns: ColumnMap = None,
    prices: Prices = None,
    unseen: Unseen = False,
    allow_leak: AllowLeak = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Estimate how fitted routers would have scored on logged traffic, in which one model answered each query.

    Only rows count in which the router would have chosen the model that answered. If the log has probabilities, rows are weighted by
    their inverse.

    Example: anabranch gateway replay traffic.jsonl --router routers
    """
    from anabranch.routers.data import is_store
    from anabranch.routers.fitted import load_folder
    from anabranch.routers.referee.off_policy import replay as estimate

    found = load_folder(router, strategy)
    with waiting(f"reading {data}", quiet):
        log, pool = read_data(data, columns, prices, keep_copies=True)
    if not allow_leak and (unseen or is_store(data)):
        # A store goes on growing: what was not learned from is what was held out, and what came since.
        log = rest(found, log)
    elif not allow_leak:
        found.check_unseen(log)
    strategies = {}
    for name, one in found.routers.items():
        strategies[name] = one.strategy
        if one.embedder is not None and log.vector_ND is None:
            log = embed(one.embedder, log, (lambda text: None) if quiet else say)
    result = estimate(strategies, log, pool)
    if as_json:
        print_json({**result.to_dict(), "read": log.what_was_read()})
        return
    print_replay(result)


def is_past(value: float | None, result: Replay) -> bool:
    """Whether an estimate lies outside the range of scores."""
    low, high = result.score_range
    return value is not None and not low <= value <= high


def print_replay(result: Replay) -> None:
    """As a table, with what is to be known about it below."""

    def number(value: float | None, form: str = ".4f") -> str:
        return "" if value is None else f"{value:{form}}"

    def span(interval: list[float] | None, form: str, between: str) -> str:
        return "" if interval is None else between.join(f"{end:{form}}" for end in interval)

    rows = [
        [
            one.name,
            f"{one.matched:,}",
            number(one.effective, ",.0f"),
            number(one.score),
            span(one.interval, ".4f", "-"),
            number(one.gain, "+.4f"),
            span(one.gain_interval, "+.4f", " to "),
            *(
                [number(one.ips), number(one.doubly_robust), span(one.doubly_robust_interval, ".4f", "-")]
                if result.drawn
                else []
            ),
            "" if one.cost is None else f"{1000 * one.cost:.4g}",
        ]
        for one in result.strategies
    ]
    robust = ["IPS", "doubly\nrobust", "95% interval"] if result.drawn else []
    headers = (
        "router",
        "rows\nmatched",
        "worth\nrows",
        "score",
        "95% interval",
        "gain on\nthe log",
        "95% interval",
        *robust,
        "$ per 1k\nqueries",
    )
    table(headers, rows)
    past = [
        one.name for one in result.strategies if any(is_past(value, result) for value in (one.ips, one.doubly_robust))
    ]
    if past:
        print_line(
            "\nIPS and doubly robust are right on average, and single ones may pass the range of scores; the score, whose weights add up "
            f"to 1, keeps to it. Here they do for {', '.join(past)}."
        )
    cost = "" if result.cost is None else f" at ${1000 * result.cost:.4g} per thousand"
    print_line(f"\nthe log: {result.rows:,} scored answers, mean score {result.score:.4f}{cost}")
    if not result.drawn:
        what = "no choice of the log was drawn" if result.has_probabilities else "The log says no probabilities"
        print_line(
            f"{what[0].upper()}{what[1:]}: estimates are right only if models were drawn without a look at the query."
        )
    elif result.drawn < result.rows:
        print_line(
            f"Estimated on the {result.drawn:,} answers whose model was drawn; the others say nothing of another model."
        )
    for one in result.strategies:
        low, high = one.support_interval or (1.0, 1.0)
        if high < ENOUGH_SUPPORT:
            print_line(
                f"{one.name}: the log may have made only about {one.support:.0%} of its choices; the estimate is of those."
            )
        elif low > 1 / ENOUGH_SUPPORT:
            print_line(f"{one.name}: it draws as the log did, which flatters or harms it; judge it with another seed.")
