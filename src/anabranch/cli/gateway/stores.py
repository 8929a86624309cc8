"""What commands on a store share: opening it, and how amounts and times are read and shown."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from anabranch.errors import DataError, InputError

if TYPE_CHECKING:
    from anabranch.gateway.store import Store

T = TypeVar("T")
StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="STORE",
        envvar="ANABRANCH_STORE",
        show_envvar=False,
        help="The gateway's store: a SQLite file, or postgresql://user@host/name. Also $ANABRANCH_STORE.",
    ),
]
DEFAULT_STORE = "gateway.db"
LONGEST_S = 100 * 365 * 86_400
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def with_store(url: str, work: Callable[[Store], Awaitable[T]], *, makes: bool = False) -> T:
    """Do something with the store and close it. Raises DataError if there is none, unless it is to be made."""
    from anabranch.gateway.store import open_store

    if not makes and "://" not in url and not Path(url).exists():
        raise DataError(f"no store at {url}; give its place with --store, or make one: anabranch gateway keys create")

    async def run() -> T:
        async with open_store(url, serves=False, makes=makes) as store:
            return await work(store)

    return asyncio.run(run())


def missing_store(url: str) -> Path | None:
    """Where a store would be made; None if there is one, or it is on a server."""
    from anabranch.gateway.store.opening import store_file

    path = store_file(url)
    return None if path is None or path.exists() else path.resolve()


def moment(text: str | None, option: str) -> float | None:
    """Unix seconds of a date (2026-11-25, 2026-11-25T12:00), or of so long ago (36h, 7d). Raises InputError."""
    if text is None:
        return None
    ago = re.fullmatch(r"(\d{1,12})([smhdw])", text)
    if ago:
        found_s = time.time() - int(ago[1]) * UNITS_S[ago[2]]
        if found_s < 0:
            raise InputError(f"{option} is {text!r}, which is before 1970; take a shorter time")
        return found_s
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{option} is {text!r}; write a date (2026-11-25, in UTC) or how long ago (36h, 7d)") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def seconds(text: str, option: str) -> float:
    """Seconds of 30m, 12h, 90d. Raises InputError."""
    match = re.fullmatch(r"(\d{1,12})([smhdw])", text)
    if not match:
        raise InputError(f"{option} is {text!r}; write a number and s, m, h, d or w, such as 90d")
    found_s = int(match[1]) * UNITS_S[match[2]]
    if found_s > LONGEST_S:
        raise InputError(f"{option} is {text!r}; it must be at most 100 years")
    return float(found_s)


def amount(nano: int) -> str:
    """Nano-dollars as dollars, to the last digit: what is left of a limit never looks like the limit, or like nothing."""
    from anabranch.routers.money import in_full

    return in_full(nano).replace("$", "", 1)


def when(us: int | None) -> str:
    """Microseconds since 1970 as a time; a dash for none."""
    from anabranch.gateway.store.period import iso

    return "-" if us is None else iso(us)
