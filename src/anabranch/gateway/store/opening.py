"""How a `Store` is opened, and where one may be."""

import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, urlsplit

from anabranch.errors import DataError
from anabranch.gateway.store.database import Database
from anabranch.gateway.store.sqlite import SqliteDatabase, check_folder
from anabranch.gateway.store.store import Store

_UNREADABLE = (
    "the URL of the store cannot be read; write a path, sqlite:///PATH?synchronous=full or postgresql://user@host/name"
)


def open_store(url: str, *, serves: bool = True, makes: bool = True, clock: Callable[[], float] = time.time) -> Store:
    """Open a store, made or migrated where that is needed.

    Args:
        url: path of a SQLite file (a store outlives its process: ``:memory:`` is refused), ``sqlite:///PATH`` (``?synchronous=full`` to
            outlive a power cut), or ``postgresql://user@host/name``.
        serves: it reserves money: what a process that is gone had reserved is settled first. Tools that only look or edit say no.
        makes: a new store where there is none; else that is an error. An old one is migrated all the same.
        clock: unix seconds.

    Raises DataError for what is no store or cannot be reached, BackendError if a package is missing.
    """
    database = _database(url)
    try:
        database.open(makes=makes)
        return Store(database, serves=serves, clock=clock)
    except BaseException:
        database.close()
        raise


def store_file(url: str) -> Path | None:
    """The file of a store, see `open_store`; None for one on a server. Raises DataError for what is no URL."""
    if "://" not in url:
        return Path(url)
    parts = _parts(url)
    return Path(parts.path[1:]) if parts.scheme == "sqlite" else None


def check_place(url: str) -> None:
    """Whether a store may be at ``url``, which is neither opened nor made.

    Raises DataError for what can be no store, BackendError if a package is missing.
    """
    _database(url)
    file = store_file(url)
    if file is None:
        return
    if file.is_dir():
        raise DataError(f"the store is {str(file)!r}, which is a folder; name a file in it")
    check_folder(file, f"open the store {file}")


def _database(url: str) -> Database:
    if url.startswith(("postgresql://", "postgres://", "postgresql+")):
        from anabranch.gateway.store.postgres import PostgresDatabase

        return PostgresDatabase(url.replace("postgres://", "postgresql://", 1))
    if "://" not in url:
        return SqliteDatabase(url)
    parts = _parts(url)
    options = dict(parse_qsl(parts.query))
    if parts.scheme != "sqlite" or parts.netloc or not parts.path.strip("/") or set(options) - {"synchronous"}:
        raise DataError(_UNREADABLE)
    return SqliteDatabase(parts.path[1:], **options)


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        # Such as brackets around what is no IPv6 address.
        raise DataError(_UNREADABLE) from None
