"""``anabranch gateway keys``: make, show, change, renew and revoke keys of a gateway."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.gateway.stores import DEFAULT_STORE, StoreOption, missing_store, seconds, when, with_store
from anabranch.cli.options import FLAG, AsJson, finite_number
from anabranch.cli.output import fact, print_json, say, table
from anabranch.errors import InputError

if TYPE_CHECKING:
    from anabranch.gateway.store import KeyRecord, Store

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Make, list, change and revoke keys of a gateway."
)

KeyArgument = Annotated[str, typer.Argument(metavar="ID", help="Id of the key, the beginning of its id, or its name.")]

# Of `edit --clear`: the field of a key, and what it is when it is empty.
CLEARED: dict[str, tuple[str, Any]] = {
    "name": ("name", ""),
    "user": ("user", ""),
    "team": ("team", ""),
    "tags": ("tags", ()),
    "models": ("models", ()),
    "rpm": ("rpm", None),
    "tpm": ("tpm", None),
    "max-in-flight": ("max_in_flight", None),
    "expires": ("expires_s", None),
    "speaks-for": ("speaks_for", ()),
}


def _positive(context: typer.Context, option: typer.CallbackParam, value: int | None) -> int | None:
    """A limit; who means to lift one with a 0 is told how."""
    if value is not None and value < 1:
        how = f" (--clear {(option.name or '').replace('_', '-')} lifts the limit)"
        raise typer.BadParameter(f"it must be 1 or more{how if context.info_name == 'edit' else ''}")
    return value


RpmOption = Annotated[int | None, typer.Option(metavar="N", callback=_positive, help="Maximum requests per minute.")]
TpmOption = Annotated[int | None, typer.Option(metavar="N", callback=_positive, help="Maximum tokens per minute.")]
InFlightOption = Annotated[
    int | None, typer.Option(metavar="N", callback=_positive, help="Maximum number of simultaneous requests.")
]
SpeaksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--speaks-for",
        metavar="WHOM",
        help="Users and tags that requests with this key may name: user:NAME, tag:NAME, user:*, tag:* or *. May be repeated.",
    ),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(metavar="DOLLARS", min=0, callback=finite_number, help="Maximum spending in each --period."),
]
PeriodOption = Annotated[str, typer.Option(metavar="P", help="total, hour, day, week or month.")]


@app.command()
def create(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Name of the key, e.g. what it is for. Default: none.")
    ] = None,
    user: Annotated[str, typer.Option(metavar="USER", help="User of the key.")] = "",
    team: Annotated[str, typer.Option(metavar="TEAM", help="Team of the key.")] = "",
    tags: Annotated[
        list[str] | None,
        typer.Option("--tag", metavar="TAG", help="Tag for every request with this key. May be repeated."),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="MODEL", help="Model that the key may use. May be repeated. Default: all."),
    ] = None,
    rpm: RpmOption = None,
    tpm: TpmOption = None,
    max_in_flight: InFlightOption = None,
    speaks_for: SpeaksOption = None,
    expires: Annotated[str | None, typer.Option(metavar="IN", help="Time until the key expires, e.g. 90d.")] = None,
    budget: BudgetOption = None,
    period: PeriodOption = "total",
    admin: Annotated[
        bool, typer.Option("--admin", metavar=FLAG, help="The key also gives access to the admin interface.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown once; the store keeps only its SHA-256.

    Example: anabranch gateway keys create ci --team ml --budget 25 --period month
    """
    if name is not None and not name.strip():
        raise InputError("the name is empty; write what the key is for, or leave it out")
    limit = _limit(budget, period)
    ends = None if expires is None else time.time() + seconds(expires, "--expires")

    async def work(opened: Store) -> tuple[str, KeyRecord]:
        secret, key = await opened.create_key(
            name or "",
            user=user,
            team=team,
            tags=tags or (),
            models=models or (),
            rpm=rpm,
            tpm=tpm,
            max_in_flight=max_in_flight,
            expires_s=ends,
            is_admin=admin,
            speaks_for=speaks_for or (),
        )
        if limit is not None:
            await opened.set_budget(f"key:{key.id}", limit, period)
        return secret, key

    place = missing_store(store)
    if place is not None:
        say(
            f"there is no store at {place}: making one. A gateway whose store is elsewhere does not know its keys; name it with --store"
        )
    _show_once(*with_store(store, work, makes=True), as_json)


@app.command("list")
def show(store: StoreOption = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List keys, including revoked ones.

    Example: anabranch gateway keys list
    """
    found = with_store(store, lambda opened: opened.keys())
    if as_json:
        print_json({"keys": [facts(key) for key in found]})
        return
    now_us = int(time.time() * 1e6)
    rows = [
        [
            key.id,
            f"...{key.hint}",
            key.name,
            key.user,
            key.team,
            " ".join(key.tags),
            " ".join(key.speaks_for),
            state(key, now_us),
            "-" if key.rpm is None else f"{key.rpm:,}",
            "-" if key.tpm is None else f"{key.tpm:,}",
        ]
        for key in found
    ]
    table(["id", "key", "name", "user", "team", "tags", "speaks for", "state", "rpm", "tpm"], rows, text_columns=8)


@app.command()
def edit(
    key: KeyArgument,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the key, e.g. what it is for.")] = None,
    user: Annotated[str | None, typer.Option(metavar="USER", help="User of the key.")] = None,
    team: Annotated[str | None, typer.Option(metavar="TEAM", help="Team of the key.")] = None,
    tags: Annotated[
        list[str] | None,
        typer.Option("--tag", metavar="TAG", help="Tag for every request with this key. May be repeated."),
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", metavar="MODEL", help="Model that the key may use. May be repeated.")
    ] = None,
    rpm: RpmOption = None,
    tpm: TpmOption = None,
    max_in_flight: InFlightOption = None,
    speaks_for: SpeaksOption = None,
    expires: Annotated[
        str | None, typer.Option(metavar="IN", help="Time from now until the key expires, e.g. 90d.")
    ] = None,
    budget: BudgetOption = None,
    period: PeriodOption = "total",
    clear: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help=f"Field to clear: {', '.join(CLEARED)}. May be repeated."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Change the settings of a key. The key itself and its recorded spending stay as they are.

    Running gateways see the change within two seconds.

    Example: anabranch gateway keys edit ci --team research --rpm 60 --clear expires
    """
    ends = None if expires is None else time.time() + seconds(expires, "--expires")
    given = {
        "name": name,
        "user": user,
        "team": team,
        "tags": tags or None,
        "models": models or None,
        "rpm": rpm,
        "tpm": tpm,
        "max_in_flight": max_in_flight,
        "expires_s": ends,
        "speaks_for": speaks_for or None,
    }
    changes = {field: value for field, value in given.items() if value is not None}
    for field in clear or ():
        if field not in CLEARED:
            raise InputError(f"--clear is {field!r}; it takes {', '.join(CLEARED)}")
        column, empty = CLEARED[field]
        if column in changes:
            raise InputError(f"{field} is both given and cleared; say one")
        changes[column] = empty
    if not changes and budget is None:
        raise InputError("nothing is to be changed; give a field, such as --team ml")
    limit = _limit(budget, period)

    async def work(opened: Store) -> KeyRecord:
        changed = await opened.edit_key(key, **changes)
        if limit is not None:
            await opened.set_budget(f"key:{changed.id}", limit, period)
        return changed

    changed = with_store(store, work)
    if as_json:
        print_json(facts(changed))
    else:
        fact("changed", f"{changed.id} (...{changed.hint}) {changed.name}")


@app.command()
def rotate(key: KeyArgument, store: StoreOption = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Replace a key by a new one with the same id and rights. It is shown once.

    Running gateways accept the old key for at most two more seconds.

    Example: anabranch gateway keys rotate ci
    """
    secret, renewed = with_store(store, lambda opened: opened.rotate_key(key))
    _show_once(secret, renewed, as_json)


@app.command()
def revoke(
    key: KeyArgument,
    store: StoreOption = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Revoke a key permanently. Running gateways see the change within two seconds.

    Example: anabranch gateway keys revoke k1b5625cb90ce
    """
    ended = with_store(store, lambda opened: opened.revoke_key(key))
    if as_json:
        print_json(facts(ended))
    else:
        fact("revoked", f"{ended.id} (...{ended.hint}) {ended.name}")


def _limit(budget: float | None, period: str) -> int | None:
    """Nano-dollars; None for no limit. Raises InputError for a period that may not be."""
    from anabranch.gateway.store.period import check_period
    from anabranch.routers.money import nano_dollars

    check_period(period)
    return None if budget is None else nano_dollars(budget)


def _show_once(secret: str, key: KeyRecord, as_json: bool) -> None:
    if as_json:
        print_json({"key": secret, **facts(key)})
        return
    fact("key", secret)
    fact("id", key.id)
    fact("note", "this is the only time the key is shown")


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
