"""``anabranch gateway keys``: make, show and revoke keys of a gateway."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.gateway.stores import DEFAULT_STORE, StoreOption, seconds, when, with_store
from anabranch.cli.options import FLAG, AsJson, finite_number
from anabranch.cli.output import fact, print_json, table

if TYPE_CHECKING:
    from anabranch.gateway.store import KeyRecord, Store

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Make, list and revoke keys of a gateway.")


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for, in words.")] = "",
    user: Annotated[str, typer.Option(metavar="USER", help="Whose it is.")] = "",
    team: Annotated[str, typer.Option(metavar="TEAM", help="Whose team's.")] = "",
    tags: Annotated[
        list[str] | None, typer.Option("--tag", metavar="TAG", help="On every request with it. May be repeated.")
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="MODEL", help="That it may use. May be repeated. Default: all."),
    ] = None,
    rpm: Annotated[int | None, typer.Option(metavar="N", min=1, help="Requests a minute.")] = None,
    tpm: Annotated[int | None, typer.Option(metavar="N", min=1, help="Tokens a minute.")] = None,
    expires: Annotated[str | None, typer.Option(metavar="IN", help="Ends after so long, e.g. 90d.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="DOLLARS", min=0, callback=finite_number, help="Most it may spend, in each --period."),
    ] = None,
    period: Annotated[str, typer.Option(metavar="P", help="total, hour, day, week or month.")] = "total",
    admin: Annotated[bool, typer.Option("--admin", metavar=FLAG, help="It opens the admin interface too.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown once; the store keeps its SHA-256 alone.

    Example: anabranch gateway keys create ci --team ml --budget 25 --period month
    """
    from anabranch.gateway.money import nano_dollars
    from anabranch.gateway.store.period import check_period

    check_period(period)
    limit = None if budget is None else nano_dollars(budget)
    ends = None if expires is None else time.time() + seconds(expires, "--expires")

    async def work(opened: Store) -> tuple[str, KeyRecord]:
        secret, key = await opened.create_key(
            name, user=user, team=team, tags=tags or (), models=models or (), rpm=rpm, tpm=tpm, expires_s=ends, is_admin=admin
        )  # fmt: skip
        if limit is not None:
            await opened.set_budget(f"key:{key.id}", limit, period)
        return secret, key

    secret, key = with_store(store, work, makes=True)
    if as_json:
        print_json({"key": secret, **facts(key)})
        return
    fact("key", secret)
    fact("id", key.id)
    fact("note", "this is the only time the key is shown")


@app.command("list")
def show(store: StoreOption = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List keys, the revoked ones too.

    Example: anabranch gateway keys list
    """
    found = with_store(store, lambda opened: opened.keys())
    if as_json:
        print_json({"keys": [facts(key) for key in found]})
        return
    now_us = int(time.time() * 1e6)
    rows = [
        [
            key.id, f"...{key.hint}", key.name, key.user, key.team, " ".join(key.tags), state(key, now_us),
            "-" if key.rpm is None else f"{key.rpm:,}", "-" if key.tpm is None else f"{key.tpm:,}",
        ]
        for key in found
    ]  # fmt: skip
    table(["id", "key", "name", "user", "team", "tags", "state", "rpm", "tpm"], rows, text_columns=7)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Of the key, or how it begins.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """End a key for good. Gateways at work see it within two seconds.

    Example: anabranch gateway keys revoke k1b5625cb90ce
    """
    key = with_store(store, lambda opened: opened.revoke_key(key_id))
    if as_json:
        print_json(facts(key))
    else:
        fact("revoked", f"{key.id} (...{key.hint}) {key.name}")


def state(key: KeyRecord, now_us: int) -> str:
    """What may become of a request with it."""
    if key.revoked_us is not None:
        return f"revoked {when(key.revoked_us)}"
    if not key.is_valid(now_us):
        return f"expired {when(key.expires_us)}"
    ends = "" if key.expires_us is None else f", until {when(key.expires_us)}"
    return ("admin" if key.is_admin else "valid") + ends


def facts(key: KeyRecord) -> dict[str, Any]:
    """Of a key, with times that people can read."""
    out = dataclasses.asdict(key)
    for name in ("created", "expires", "revoked"):
        us = out.pop(f"{name}_us")
        out[name] = None if us is None else when(us)
    return out
