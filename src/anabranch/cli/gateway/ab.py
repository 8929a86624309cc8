"""``anabranch gateway ab``: how an A/B test of two strategies stands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.gateway.stores import with_store
from anabranch.cli.options import AsJson
from anabranch.cli.output import fact, print_json, table
from anabranch.errors import DataError, InputError

if TYPE_CHECKING:
    from anabranch.gateway.ab import ABResult, ArmResult
    from anabranch.gateway.config import GatewayConfig
    from anabranch.gateway.store import Store

CONFIGS = (".toml", ".yaml", ".yml", ".json")


def show_tests(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="The gateway's config (.toml, .yaml, .json), or its store: a SQLite file or a URL."
        ),
    ],
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Name of the test. Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the state of A/B tests: both arms with a confidence sequence, and which is better or that it is not resolved.

    You may look as often as you like and end a test as soon as it is resolved: the error probability holds for all looks together.

    Example: anabranch gateway ab gateway.toml try
    """
    config = _config(source)
    if config is not None and not config.ab:
        raise InputError(f"{source} has no A/B test; add [ab.NAME] with two strategies a and b")

    async def work(store: Store) -> list[ABResult]:
        from anabranch.gateway.ab import results_of, results_of_store

        return await (results_of_store(store) if config is None else results_of(store, config))

    found = with_store(source if config is None else config.store, work)
    known = [one.name for one in found]
    if name is not None:
        found = [one for one in found if one.name == name]
    if not found:
        there = f"; there are {', '.join(known)}" if known else ", and no request of any test is in the store yet"
        raise DataError(f"no A/B test {name!r} in {source}{there}" if name else f"no A/B test in {source}{there}")
    if as_json:
        print_json({"tests": [one.to_dict() for one in found]})
        return
    for number, one in enumerate(found):
        if number:
            print()
        _print(one)


def _config(source: str) -> GatewayConfig | None:
    if "://" in source or Path(source).suffix.lower() not in CONFIGS:
        return None
    from anabranch.gateway.config import load_config

    return load_config(Path(source))


def _print(one: ABResult) -> None:
    fact("test", f"auto/{one.name}: {one.share:.0%} of {one.unit}s get b, by {one.metric}")
    rows = [_row(side, arm) for side, arm in (("a", one.a), ("b", one.b))]
    table(
        [
            "arm",
            "strategy",
            "requests",
            f"{one.unit}s",
            "wait",
            "mean",
            f"{1 - one.alpha:.0%} at\nall times",
            "$ a\nrequest",
        ],
        rows,
        text_columns=2,
    )
    if one.uncounted:
        fact("left", f"{one.uncounted:,} requests with neither key nor user went to a and do not count")
    fact("verdict", one.sentence())


def _row(side: str, arm: ArmResult) -> list[str]:
    mean = "" if arm.mean is None else f"{arm.mean:.4g}"
    cost = "" if arm.cost_usd is None else f"{arm.cost_usd:.4g}"
    return [
        side,
        arm.strategy,
        f"{arm.requests:,}",
        f"{arm.units:,}",
        f"{arm.waiting:,}",
        mean,
        f"{arm.low:.4g} to {arm.high:.4g}",
        cost,
    ]
