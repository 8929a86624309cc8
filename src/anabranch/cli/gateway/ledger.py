"""``anabranch gateway ledger``: what was asked, what it cost, and taking it elsewhere."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.gateway.stores import DEFAULT_STORE, StoreOption, amount, moment, when, with_store
from anabranch.cli.options import AsJson
from anabranch.cli.output import fact, print_json, table
from anabranch.errors import InputError
from anabranch.extras import require
from anabranch.files import atomic_file, check_apart, mode_of

if TYPE_CHECKING:
    from anabranch.gateway.store import LedgerRow, Spend, Store

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Inspect, export and prune the ledger of requests."
)
PAGE = 5000
Since = Annotated[
    str | None, typer.Option(metavar="WHEN", help="Only from this time on: a date (UTC) or an age, e.g. 24h, 7d.")
]
Until = Annotated[str | None, typer.Option(metavar="WHEN", help="Only before this time.")]
Key = Annotated[str | None, typer.Option("--key", metavar="ID", help="Only requests with this key.")]
User = Annotated[str | None, typer.Option(metavar="USER", help="Only requests of this user.")]
Team = Annotated[str | None, typer.Option(metavar="TEAM", help="Only requests of this team.")]
Tag = Annotated[str | None, typer.Option(metavar="TAG", help="Only requests with this tag.")]
Model = Annotated[str | None, typer.Option(metavar="MODEL", help="Only requests answered by this model.")]
Status = Annotated[
    str | None,
    typer.Option(metavar="S", help="Only requests with this status: ok, error, refused, cancelled or crashed."),
]
Calls = Annotated[bool, typer.Option("--calls", help="Also list the calls that strategies made for requests.")]


@app.command("list")
def show(
    since: Since = None,
    until: Until = None,
    key: Key = None,
    user: User = None,
    team: Team = None,
    tag: Tag = None,
    model: Model = None,
    status: Status = None,
    calls: Calls = False,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="Maximum number of rows.")] = 20,
    store: StoreOption = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """List requests, newest first. Their cost includes the calls that strategies made for them, unless --calls lists those separately.

    Example: anabranch gateway ledger list --since 24h --status error
    """
    query = dataclasses.replace(_query(since, until, key, user, team, tag, model, status), calls=calls, limit=limit)
    rows = with_store(store, lambda opened: opened.ledger(query))
    if as_json:
        print_json({"rows": [facts(row) for row in rows]})
        return
    heads = [
        "time",
        "request",
        "key",
        "asked for",
        "model",
        "status",
        "tokens\nin",
        "tokens\nout",
        "cost\n($)",
        "time\n(ms)",
    ]
    table(heads, [_cells(row, row.cost_nano if calls else row.total_nano) for row in rows], text_columns=6)


@app.command()
def spend(
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="key, user, team, tag, model, strategy, day, ... May be repeated."),
    ] = None,
    since: Since = None,
    until: Until = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Add up spending, including calls that strategies made. A request with several tags counts for each tag.

    Example: anabranch gateway ledger spend --by team --by model --since 30d
    """
    names = by or ["model"]
    bounds = {"since_s": moment(since, "--since"), "until_s": moment(until, "--until")}

    async def read(opened: Store) -> tuple[list[Spend], dict[str, str]]:
        called = {key.id: key.name for key in await opened.keys()} if "key" in names else {}
        return await opened.spend(names, **bounds), called

    found, called = with_store(store, read)
    if as_json:
        groups = [
            {
                **dict(zip(names, one.group, strict=True)),
                **({"key_name": called.get(one.group[names.index("key")], "")} if "key" in names else {}),
                **{k: v for k, v in dataclasses.asdict(one).items() if k != "group"},
            }
            for one in found
        ]
        print_json({"by": names, "groups": groups})
        return
    rows = [
        [
            *(_named(name, text, called) or "-" for name, text in zip(names, one.group, strict=True)),
            f"{one.requests:,}",
            f"{one.errors:,}",
            f"{one.prompt_tokens:,}",
            f"{one.completion_tokens:,}",
            amount(one.cost_nano),
        ]
        for one in found
    ]
    heads = [*names, "requests", "not ok", "tokens\nin", "tokens\nout", "cost\n($)"]
    table(heads, rows, text_columns=len(names))


def _named(by: str, text: str, called: dict[str, str]) -> str:
    """What a group is called: of a key its id, with its name where it has one."""
    return f"{called[text]} ({text})" if by == "key" and called.get(text) else text


@app.command()
def export(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Output file: .csv or .parquet.")],
    since: Since = None,
    until: Until = None,
    key: Key = None,
    user: User = None,
    team: Team = None,
    tag: Tag = None,
    model: Model = None,
    status: Status = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Write requests to a table, oldest first, including calls that strategies made. Money is in nano-dollars, so that sums are exact.

    Example: anabranch gateway ledger export --since 2026-11-01 --out november.parquet
    """
    from anabranch.gateway.store.opening import store_file

    writers = {".csv": _write_csv, ".parquet": _write_parquet}
    if out.suffix not in writers:
        raise InputError(f"--out is {str(out)!r}; it must end in {' or '.join(writers)}")
    if out.suffix == ".parquet":
        require("parquet", by=f"writing {out}")
    file = store_file(store)
    check_apart([out], [file])
    query = dataclasses.replace(_query(since, until, key, user, team, tag, model, status), calls=True)

    async def pages(opened: Store) -> AsyncIterator[list[LedgerRow]]:
        last = 0
        while rows := await opened.ledger(dataclasses.replace(query, after_seq=last, newest_first=False, limit=PAGE)):
            yield rows
            assert rows[-1].seq is not None
            last = rows[-1].seq

    async def work(opened: Store) -> int:
        with atomic_file(out, mode=None if file is None else mode_of(file)) as temporary:
            return await writers[out.suffix](temporary, pages(opened))

    count = with_store(store, work)
    if as_json:
        print_json({"rows": count, "wrote": str(out)})
    else:
        fact("rows", f"{count:,}")
        fact("wrote", str(out))


@app.command()
def prune(
    before: Annotated[
        str, typer.Argument(metavar="WHEN", help="Delete what is older than this: a date (UTC) or an age, e.g. 90d.")
    ],
    store: StoreOption = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Delete older rows, decisions and feedback, and free their disk space. Counted budgets stay.

    Example: anabranch gateway ledger prune 90d
    """

    async def work(opened: Store) -> int:
        count = await opened.prune(moment(before, "WHEN") or 0.0)
        await opened.vacuum()
        return count

    count = with_store(store, work)
    if as_json:
        print_json({"deleted": count})
    else:
        fact("deleted", f"{count:,} rows")


@app.command()
def backup(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="File for the copy.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Copy a SQLite store while gateways keep writing to it.

    Example: anabranch gateway ledger backup gateway-copy.db
    """
    from anabranch.gateway.store.opening import store_file

    check_apart([out], [store_file(store)])
    with_store(store, lambda opened: opened.backup(out))
    if as_json:
        print_json({"wrote": str(out)})
    else:
        fact("wrote", str(out))


def _query(
    since: str | None,
    until: str | None,
    key: str | None,
    user: str | None,
    team: str | None,
    tag: str | None,
    model: str | None,
    status: str | None,
) -> Any:
    from anabranch.gateway.store import LedgerQuery

    bounds = [moment(text, option) for text, option in ((since, "--since"), (until, "--until"))]
    since_us, until_us = (None if bound is None else int(bound * 1e6) for bound in bounds)
    return LedgerQuery(
        since_us=since_us, until_us=until_us, key_id=key, user=user, team=team, tag=tag, model=model, status=status
    )


def _cells(row: LedgerRow, nano: int) -> list[str]:
    asked = f"{row.purpose}: {row.requested}" if row.parent_id else row.requested
    return [
        when(row.ts_us),
        row.request_id,
        row.key_id or "-",
        asked or "-",
        row.model or "-",
        f"{row.status} {row.code}".strip() + (f" ({row.cache})" if row.cache else ""),
        f"{row.prompt_tokens:,}",
        f"{row.completion_tokens:,}",
        amount(nano),
        "-" if row.latency_us is None else f"{row.latency_us / 1000:,.1f}",
    ]


def facts(row: LedgerRow) -> dict[str, Any]:
    """Of a row; its price flattened, its lists kept."""
    out = dataclasses.asdict(row)
    price = out.pop("price") or {}
    for name in ("input", "output", "cached_input"):
        out[f"price_{name}"] = price.get(name)
    return {"time": when(row.ts_us), **out}


def _flat(row: LedgerRow) -> dict[str, Any]:
    return {name: " ".join(value) if isinstance(value, tuple) else value for name, value in facts(row).items()}


async def _write_csv(path: Path, pages: AsyncIterator[list[LedgerRow]]) -> int:
    count = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _names())
        writer.writeheader()
        async for rows in pages:
            writer.writerows({name: _harmless(value) for name, value in _flat(row).items()} for row in rows)
            count += len(rows)
    return count


def _harmless(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula is marked as text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


async def _write_parquet(path: Path, pages: AsyncIterator[list[LedgerRow]]) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"is_estimated": pa.bool_(), "quality": pa.float64()}
    whole = ("_us", "_tokens", "_nano", "attempts", "calls", "seq", "price_input", "price_output", "price_cached_input")
    texts = {name: pa.int64() if name.endswith(whole) else pa.string() for name in _names()}
    schema = pa.schema({**texts, **kinds}.items())
    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        async for rows in pages:
            writer.write_table(pa.Table.from_pylist([_flat(row) for row in rows], schema))
            count += len(rows)
    return count


def _names() -> list[str]:
    from anabranch.gateway.store import LedgerRow

    return list(facts(LedgerRow(request_id="")))
