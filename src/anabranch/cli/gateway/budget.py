"""``anabranch gateway budget``: what may be spent, and how it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.gateway.stores import DEFAULT_STORE, StoreOption, amount, when, with_store
from anabranch.cli.options import AsJson
from anabranch.cli.output import fact, print_json, table
from anabranch.errors import InputError

if TYPE_CHECKING:
    from anabranch.gateway.store import Budget, Store

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Set and list limits on spending.")
Subject = Annotated[
    str, typer.Argument(metavar="SUBJECT", help="global, key:NAME (or its ID), user:NAME, team:NAME or tag:NAME.")
]
PeriodOption = Annotated[str, typer.Option(metavar="P", help="total, hour, day, week or month (in UTC).")]


@app.command("set")
def put(
    subject: Subject,
    dollars: Annotated[str, typer.Argument(metavar="DOLLARS", help="Maximum spending in a period.")],
    period: PeriodOption = "total",
    store: StoreOption = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Limit spending. What was already spent in the current period counts; an existing limit is replaced.

    Example: anabranch gateway budget set team:ml 25 --period month
    """
    from anabranch.routers.money import nano_dollars

    limit = nano_dollars(dollars)

    async def work(opened: Store) -> Budget:
        return await opened.set_budget(await opened.named_subject(subject), limit, period)

    budget = with_store(store, work, makes=True)
    if as_json:
        print_json(facts(budget))
    else:
        _print([budget])


@app.command("list")
def show(store: StoreOption = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List limits and what is left of them.

    Example: anabranch gateway budget list
    """
    found = with_store(store, lambda opened: opened.budgets())
    if as_json:
        print_json({"budgets": [facts(budget) for budget in found]})
    else:
        _print(found)


@app.command()
def remove(
    subject: Subject, period: PeriodOption = "total", store: StoreOption = DEFAULT_STORE, as_json: AsJson = False
) -> None:
    """Remove a limit.

    Example: anabranch gateway budget remove team:ml --period month
    """

    async def work(opened: Store) -> bool:
        if await opened.remove_budget(subject, period):
            return True
        named = {subject, await opened.named_subject(subject)}
        there = [budget.period for budget in await opened.budgets() if budget.subject in named]
        what = f"; there is one of a {', one of a '.join(there)}: --period {there[0]}" if there else ""
        raise InputError(
            f"there is no {period} budget of {subject}{what or '; anabranch gateway budget list shows what there is'}"
        )

    with_store(store, work)
    if as_json:
        print_json({"removed": subject, "period": period})
    else:
        fact("removed", f"{period} budget of {subject}")


def _print(budgets: list[Budget]) -> None:
    rows = [
        [
            one.subject,
            one.period,
            when(one.resets_us),
            amount(one.limit_nano),
            amount(one.spent_nano),
            amount(one.reserved_nano),
            amount(one.remaining_nano),
        ]
        for one in budgets
    ]
    heads = ["subject", "period", "begins anew", "limit\n($)", "spent\n($)", "reserved\n($)", "left\n($)"]
    table(heads, rows, text_columns=3)


def facts(budget: Budget) -> dict[str, Any]:
    """Of a budget, in nano-dollars and in dollars."""
    named = {name: getattr(budget, f"{name}_nano") for name in ("limit", "spent", "reserved", "remaining")}
    return {
        "subject": budget.subject,
        "period": budget.period,
        "resets": None if budget.resets_us is None else when(budget.resets_us),
        **{f"{name}_usd": nano / 1e9 for name, nano in named.items()},
        **{f"{name}_nano": nano for name, nano in named.items()},
    }
