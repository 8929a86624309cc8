"""`Store`: keys, budgets, the ledger, decisions and feedback, for one event loop.

    store = open_store("gateway.db")
    held = await store.reserve(request_id, subjects_of(key), nano)        # raises BudgetError; committed before it returns
    ...                                                                   # the call
    store.settle(held, LedgerRow(request_id=request_id, cost_nano=cost))  # need not be awaited

All that changes goes through one thread in transactions of many jobs (`writer`); budgets are decided there, on rows that nobody else
can touch, so they are exact over any number of processes. Reservations that a process leaves behind when it ends, however it ends, are
settled at what was reserved by whoever comes next, and their rows flagged.
"""

import asyncio
import hmac
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from anabranch.bounds import finite, is_whole, shown
from anabranch.errors import CapacityError, DataError, InputError
from anabranch.gateway.store import key_rows, queries, schema, writer
from anabranch.gateway.store.batch import Append, Do, Grow, Insert, Reserve, Settle, Unmake, recover
from anabranch.gateway.store.calibration import Calibration, read_calibration
from anabranch.gateway.store.database import BusyError, Connection, Database
from anabranch.gateway.store.keyring import FRESH_S, Keyring, digest_of, new_secret
from anabranch.gateway.store.period import check_period
from anabranch.gateway.store.records import (
    Budget,
    CollectedRow,
    DecisionRow,
    FeedbackRow,
    KeyRecord,
    LedgerQuery,
    LedgerRow,
    Reservation,
    SaidBeforeError,
    Spend,
    check_subject,
    clean,
    listed,
)
from anabranch.gateway.store.writer import Writer
from anabranch.routers.money import MOST_NANO

T = TypeVar("T")
logger = logging.getLogger(__name__)
READERS = 4

# Rows deleted in one transaction.
PRUNED = 2000

REQUEST_CHARACTERS = 128


def open_store(url: str, *, serves: bool = True, makes: bool = True, clock: Callable[[], float] = time.time) -> "Store":
    """Open a store, made or migrated where that is needed.

    Args:
        url: path of a SQLite file, ``sqlite:///PATH`` (``?synchronous=full`` to outlive a power cut), or
            ``postgresql://user@host/name``.
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
    """The file of a store, see `open_store`; None for one on a server."""
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
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
    above = next((folder for folder in file.resolve().parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise DataError(f"the store is {str(file)!r}, and {above} is no folder")


def _database(url: str) -> Database:
    if url.startswith(("postgresql://", "postgres://", "postgresql+")):
        from anabranch.gateway.store.postgres import PostgresDatabase

        return PostgresDatabase(url.replace("postgres://", "postgresql://", 1))
    from anabranch.gateway.store.sqlite import SqliteDatabase

    if "://" not in url:
        return SqliteDatabase(url)
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if parts.scheme != "sqlite" or parts.netloc or not parts.path.strip("/") or set(options) - {"synchronous"}:
        raise DataError(
            "the URL of the store cannot be read; write a path, sqlite:///PATH?synchronous=full or postgresql://user@host/name"
        )
    return SqliteDatabase(parts.path[1:], **options)


class Store:
    """See the module. Use it from one event loop; every method but `key_of` sees what was written before it was called.

    Args:
        database: open.
        serves, clock: see `open_store`.
    """

    def __init__(self, database: Database, *, serves: bool = True, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock, self._serves = database, clock, serves
        self.recovered = 0
        if serves:
            self._take_over()
        self._keyring, self._open = Keyring(), set[str]()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="anabranch-store-reader")
        self._local, self._connections = threading.local(), list[Connection]()
        self._background: set[asyncio.Future[Any]] = set()
        self._writer = Writer(database, self._now_us, serves)

    def _take_over(self) -> None:
        """Say that this process is alive, and settle what dead ones left."""
        connection = self._database.connect()
        try:
            self._database.hold()
            self.recovered = recover(self._database, connection, self._now_us())
        except BusyError as error:
            raise DataError(f"cannot open the store: {error}") from None
        finally:
            connection.close()

    def _now_us(self) -> int:
        return int(self._clock() * 1e6)

    # Money

    async def reserve(
        self, request_id: str, subjects: Sequence[str], nano: int, *, requested: str = "", strategy: str = ""
    ) -> Reservation:
        """Set aside the most that a request may cost, in every budget of its subjects or in none. It is committed on return.

        Args:
            request_id: unique for ever; it names the row in the ledger.
            subjects: of `subjects_of`.
            nano: nano-dollars.
            requested, strategy: for the ledger, should this process end before the request does.

        Raises BudgetError if a budget has no room, InputError for an id that was used before, CapacityError if the store could not write
        for `PATIENCE_S`.
        """
        assert self._serves
        if not (request_id.isascii() and request_id.isprintable() and 0 < len(request_id) <= REQUEST_CHARACTERS):
            raise InputError(
                f"the request id is {request_id!r}; it must be 1 to {REQUEST_CHARACTERS} printable ASCII characters"
            )
        if request_id in self._open:
            raise InputError(f"the request id {request_id!r} is in use; ids of requests must differ")
        subjects = tuple(dict.fromkeys(listed("subjects", subjects)))
        reservation = Reservation(request_id, subjects, _money("a reservation", nano))
        self._open.add(request_id)
        job = Reserve(reservation, requested, strategy)
        try:
            await self._writer.done(job)
        except (asyncio.CancelledError, CapacityError) as error:
            assert job.future is not None
            is_refused = isinstance(error, CapacityError)
            job.future.add_done_callback(lambda done: self._unwanted(done, reservation, is_refused))
            raise
        except Exception:
            self._open.discard(request_id)
            raise
        return reservation

    def _unwanted(self, done: "asyncio.Future[Any]", reservation: Reservation, is_refused: bool) -> None:
        """Whoever asked for it is gone, or was told that it cannot be made: give it back as soon as it is there."""
        if done.cancelled() or done.exception() is not None or is_refused:
            self._open.discard(reservation.request_id)
            if not done.cancelled() and done.exception() is None:
                self._writer.give(Unmake(reservation), at_once=False)
        else:
            self.release(reservation, LedgerRow(request_id=reservation.request_id, status="cancelled"))

    async def grow(self, reservation: Reservation, nano: int) -> Reservation:
        """Set aside ``nano`` in all, if that is more: for a dearer fallback, or a second attempt that is paid too.

        Raises BudgetError or, if the store cannot write, CapacityError, and the reservation is as it was.
        """
        return await self._writer.done(Grow(reservation, _money("a reservation", nano)))

    def settle(
        self,
        reservation: Reservation,
        row: LedgerRow,
        collected: CollectedRow | None = None,
        calls: Sequence[LedgerRow] = (),
    ) -> "asyncio.Future[Any]":
        """End a request: what it cost takes the place of what was set aside, and its row is written.

        With it what was ``collected``: there is no moment at which it is paid for and not to be found. And with it the ``calls`` that a
        strategy made for it, whose cost is not in ``row``.

        A cost above the reservation is charged in full and flagged, since the money is spent: reserve the worst case. One above all that
        can be paid (`MOST_NANO`) is charged that much and flagged ``capped``: whatever an upstream says, the request has its row.

        Returns what may be awaited until it is committed, which happens anyway. A second settlement of a request is ignored.
        """
        assert row.request_id == reservation.request_id, (row.request_id, reservation.request_id)
        row, calls = _payable(row, calls)
        self._open.discard(row.request_id)
        also: tuple[Insert, ...] = ()
        if collected is not None:
            body = json.dumps(collected.body, separators=(",", ":"))
            also = (Insert("collected", schema.COLLECTED, (collected.key, collected.ts_us, body)),)
        return self._writer.give(Settle(reservation, row, also, calls), at_once=False)

    def release(self, reservation: Reservation, row: LedgerRow) -> "asyncio.Future[Any]":
        """`settle` for a request that cost nothing."""
        assert row.cost_nano == 0
        return self.settle(reservation, row)

    def append(self, row: LedgerRow) -> "asyncio.Future[Any]":
        """The row of a request that ended without a reservation: refused, or answered from a cache."""
        if row.cost_nano:
            raise InputError(
                f"a request without a reservation cost {row.cost_nano} nano-dollars; reserve before calling"
            )
        return self._writer.give(Append(row), at_once=False)

    async def budgets(self) -> list[Budget]:
        """All budgets, as they stand now."""
        return await self._read(lambda connection: queries.read_budgets(connection, self._now_us()))

    async def has_budget(self, subjects: Sequence[str]) -> bool:
        """Whether one of the subjects has a budget."""

        def work(connection: Connection) -> bool:
            condition = connection.among("subject", "subjects")
            values = connection.values(sorted(subjects))
            return bool(connection.rows(f"SELECT 1 FROM budgets WHERE {condition} LIMIT 1", subjects=values))

        return await self._ask(work)

    async def set_budget(self, subject: str, limit_nano: int, period: str = "total") -> Budget:
        """Set a limit on what may be spent for ``subject`` in each period. What was spent in the current one counts.

        Raises InputError for a subject, period or limit that may not be.
        """
        subject, span, limit = check_subject(subject), check_period(period), _money("a limit", limit_nano)
        now_us = self._now_us()
        return await self._do(lambda connection: queries.put_budget(connection, subject, span, limit, now_us))

    async def named_subject(self, subject: str) -> str:
        """``subject`` as requests carry it: with the id of the key where its name, or the beginning of its id, was given.

        Raises InputError for what is no subject, UnknownKeyError for a key that is not there, which a limit would never apply to.
        """
        subject = check_subject(subject)
        scope, _, name = subject.partition(":")
        return f"key:{key_rows.meant(await self.keys(), name).id}" if scope == "key" else subject

    async def remove_budget(self, subject: str, period: str = "total") -> bool:
        """Lift a limit; whether there was one.

        Args:
            subject: as `budgets` shows it, or as `named_subject` takes it.
            period: of it.

        Raises InputError for a subject or a period that may not be, UnknownKeyError for a key that is not there.
        """
        subject, span = check_subject(subject), check_period(period)
        # As it stands: a limit that was set for a key that was never there can be lifted.
        if subject not in {budget.subject for budget in await self.budgets()}:
            subject = await self.named_subject(subject)

        def work(connection: Connection) -> bool:
            connection.lock_budgets()
            sql = "DELETE FROM budgets WHERE subject = :subject AND period = :period"
            return bool(connection.run(sql, subject=subject, period=span))

        return await self._do(work)

    # Keys

    async def key_of(self, secret: str) -> KeyRecord | None:
        """The key a sender came with; None if there is none like it, or it was revoked or has expired.

        What another process changes is seen within two seconds. Raises CapacityError if the store cannot be read for `PATIENCE_S`.
        """
        digest = digest_of(secret)
        found = self._keyring.get(digest)
        if found is None:
            read = await self._patient(lambda: self._read_key(digest))
            if read is None:
                return None
            stored, record = read
        else:
            stored, record, age_s = found
            if age_s > FRESH_S:
                self._in_background(self._read_key(digest))
        if not hmac.compare_digest(stored, digest) or not record.is_valid(self._now_us()):
            return None
        return record

    async def _read_key(self, digest: str) -> tuple[str, KeyRecord] | None:
        generation = self._keyring.generation
        found = await self._ask(lambda connection: queries.find_key(connection, digest))
        if found is not None:
            self._keyring.put(digest, *found, generation)
        return found

    async def has_keys(self) -> bool:
        """Whether there is any key, be it one that has ended. One that another process makes is seen within two seconds."""
        known = self._keyring.has_any
        if known is None:
            known = await self._ask(key_rows.any_key)
            self._keyring.note_any(known)
        return known

    async def create_key(
        self,
        name: str = "",
        *,
        user: str = "",
        team: str = "",
        tags: Iterable[str] = (),
        models: Iterable[str] = (),
        rpm: int | None = None,
        tpm: int | None = None,
        max_in_flight: int | None = None,
        expires_s: float | None = None,
        is_admin: bool = False,
    ) -> tuple[str, KeyRecord]:
        """A new key, and what is known of it. The key is shown this once.

        Args:
            name: unlike that of any other key that has not been revoked; several may have none.
            expires_s: unix seconds; None for never.

        See `KeyRecord` for the others. Raises InputError for a value that may not be.
        """
        secret = new_secret()
        fields = {
            "name": name, "user": user, "team": team, "tags": tags, "models": models, "rpm": rpm, "tpm": tpm, "expires_s": expires_s,
            "max_in_flight": max_in_flight,
            "is_admin": is_admin,
        }  # fmt: skip
        row = key_rows.new_row(fields, secret, self._now_us())
        record = queries.read_key(row)
        is_made = await self._do(lambda connection: key_rows.insert(connection, row))
        self._keyring.forget()
        if not is_made:
            raise key_rows.taken(record.name)
        return secret, record

    async def edit_key(self, key_id: str, **fields: Any) -> KeyRecord:
        """Change what is known of a key; its secret, and what was spent with it, stay as they are.

        Args:
            key_id: its id, how that begins, or its name.
            fields: those to change, see `create_key`.

        Raises InputError for a key that is not there or was revoked, or a value that may not be.
        """
        key = await self._live_key(key_id)
        columns = key_rows.checked(fields, self._now_us())
        if columns and not await self._do(lambda connection: key_rows.update(connection, key.id, columns)):
            # Unless it was revoked meanwhile.
            await self._live_key(key.id)
            raise key_rows.taken(columns.get("name", ""))
        return await self._changed_key(key)

    async def rotate_key(self, key_id: str) -> tuple[str, KeyRecord]:
        """Give a key another secret, which is shown this once; the old one ends. All else stays as it is.

        Raises InputError as `edit_key` does.
        """
        key, secret = await self._live_key(key_id), new_secret()
        await self._do(lambda connection: key_rows.renew(connection, key.id, secret))
        return secret, await self._changed_key(key)

    async def _live_key(self, key_id: str) -> KeyRecord:
        key = key_rows.meant(await self.keys(), key_id)
        if key.revoked_us is not None:
            raise InputError(f"the key {key.id} was revoked, which is for good; make another")
        return key

    async def _changed_key(self, key: KeyRecord) -> KeyRecord:
        self._keyring.forget()
        return next(one for one in await self.keys() if one.id == key.id)

    async def keys(self) -> list[KeyRecord]:
        """All keys, the revoked ones too, oldest first."""
        return await self._read(queries.read_keys)

    async def revoke_key(self, key_id: str) -> KeyRecord:
        """End a key for good. Raises InputError if there is none of this id or name, or several ids begin so."""
        key, now_us = key_rows.meant(await self.keys(), key_id), self._now_us()
        await self._do(lambda connection: key_rows.update(connection, key.id, {"revoked_us": now_us}))
        return await self._changed_key(key)

    # What happened

    def append_decision(
        self, request_id: str, strategy: str, model: str, body: dict[str, Any]
    ) -> "asyncio.Future[Any]":
        """Keep why a model was chosen. What in ``body`` is not ready for JSON is written as text."""
        text = json.dumps(body, separators=(",", ":"), default=str)
        row = (request_id, self._now_us(), clean(strategy), clean(model), text)
        return self._writer.give(Insert("decisions", schema.DECISIONS, row), at_once=False)

    def append_texts(self, request_id: str, body: dict[str, Any]) -> "asyncio.Future[Any]":
        """Keep what was asked and answered."""
        row = (request_id, self._now_us(), json.dumps(body, separators=(",", ":"), default=str))
        return self._writer.give(Insert("texts", schema.TEXTS, row), at_once=False)

    async def told_of(self, request_ids: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """Of some requests, by their ids: why a model was chosen, and what was asked and answered, as far as they are kept."""
        request_ids = listed("request_ids", request_ids)
        return await self._read(
            lambda connection: (
                queries.read_bodies(connection, "decisions", request_ids),
                queries.read_bodies(connection, "texts", request_ids),
            )
        )

    async def collected(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Of calls that were collected, by their keys: what came of them."""
        keys = listed("keys", keys)
        return await self._read(lambda connection: queries.read_bodies(connection, "collected", keys, "key"))

    def alone(self, work: str) -> AbstractContextManager[bool]:
        """Whether nobody else does ``work`` on this store, in this process or another; then nobody can meanwhile."""
        return self._database.alone(work)

    async def decisions(self, request_id: str | None = None, limit: int = 100) -> list[DecisionRow]:
        """Of one request, or of all, newest first."""
        return await self._read(lambda connection: queries.read_decisions(connection, request_id, limit))

    async def feedback(
        self,
        request_id: str,
        score: float,
        *,
        key_id: str | None = None,
        owner: str | None = None,
        comment: str = "",
        once: bool = False,
    ) -> LedgerRow:
        """Keep what somebody says of an answer, in the place of what the same key said of it before; the row it is about.

        Args:
            request_id: of the request.
            score: larger is better.
            key_id: who says so. None for an operator, who may judge any request.
            owner: whose request it must be; None for that of `key_id`.
            comment: in words.
            once: only if the key has said nothing of it before, whichever process it told.

        Raises InputError if there is no such request, or it was somebody else's (which is not told apart); SaidBeforeError.
        """
        score = finite("score", score, -1e9, 1e9)
        whose = key_id if owner is None else owner
        row = (request_id, self._now_us(), key_id or "", score, clean(comment, 2000))
        found, is_kept = await self._do(lambda connection: queries.put_feedback(connection, row, whose, once))
        if found is None:
            raise InputError(f"there is no request {request_id[:REQUEST_CHARACTERS]!r}")
        if not is_kept:
            raise SaidBeforeError(f"this key has scored {request_id!r} already; a request is scored once")
        return found

    async def scores_after(self, seq: int) -> list[tuple[int, str, str, float]]:
        """Scores behind one in the order in which they were numbered, some thousand at most: number, request, who said so, score."""
        return await self._read(lambda connection: queries.read_scores(connection, seq))

    async def newest_score(self) -> int:
        """The number of the newest score; 0 if there is none."""
        return await self._read(queries.newest_score)

    async def feedbacks(self, request_id: str | None = None, limit: int = 100) -> list[FeedbackRow]:
        """Of one request, or of all, newest first."""
        return await self._read(lambda connection: queries.read_feedback(connection, request_id, limit))

    async def ledger(self, query: LedgerQuery | None = None) -> list[LedgerRow]:
        """Rows that fit; without a query, the newest hundred."""
        query = query or LedgerQuery()
        return await self._read(lambda connection: queries.read_ledger_rows(connection, query))

    async def spend(
        self, by: str | Sequence[str] = (), *, since_s: float | None = None, until_s: float | None = None
    ) -> list[Spend]:
        """Totals of the ledger, grouped.

        Args:
            by: one or several of `queries.GROUPS`: key, user, team, model, tag, day, ...
            since_s, until_s: unix seconds, the second excluded.
        """
        names = (by,) if isinstance(by, str) else tuple(by)
        bounds = [None if bound is None else int(bound * 1e6) for bound in (since_s, until_s)]
        return await self._read(lambda connection: queries.read_spend(connection, names, *bounds))

    async def calibration(self, *, since_s: float | None = None) -> list[Calibration]:
        """What strategies expected beside what was said of the answers, by week and strategy, newest week first."""
        since_us = 0 if since_s is None else int(since_s * 1e6)
        return await self._read(lambda connection: read_calibration(connection, since_us))

    # What strategies learned: `learned` has what there is to ask and to do

    async def look(self, work: Callable[[Connection], T]) -> T:
        """What ``work`` reads on a connection, everything written before among it."""
        return await self._read(work)

    async def change(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction of its own; it is committed on return. Raises CapacityError if the store cannot write."""
        return await self._do(work)

    def now_us(self) -> int:
        """Microseconds since 1970."""
        return self._now_us()

    # Care

    async def prune(self, before_s: float) -> int:
        """Delete what happened before unix second ``before_s`` (ledger, decisions, texts, what was collected of them, feedback, examples).

        Returns how many rows. Budgets stay.
        """
        before_us, count = int(before_s * 1e6), 0
        while deleted := await self._do(lambda connection: queries.delete_before(connection, before_us, PRUNED)):
            count += deleted
        return count

    async def backup(self, path: str | Path) -> None:
        """Write a copy of one moment while all goes on. Raises BackendError for PostgreSQL, which has pg_dump."""
        await self._flush()
        await asyncio.get_running_loop().run_in_executor(self._readers, self._database.backup, path)

    async def vacuum(self) -> None:
        """Give the room of deleted rows back to the disk; writes wait meanwhile."""
        await self._writer.done(Do(self._database.vacuum, in_transaction=False))

    async def close(self) -> None:
        """Write what is left, and let go. Requests still under way are settled as crashed by whoever opens the store next."""
        loop = asyncio.get_running_loop()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await loop.run_in_executor(None, self._writer.close)
        await loop.run_in_executor(None, self._readers.shutdown)
        for connection in self._connections:
            connection.close()
        await loop.run_in_executor(None, self._database.close)

    async def __aenter__(self) -> "Store":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _flush(self) -> None:
        """Until all that was given is committed."""
        await self._writer.done(Do(lambda connection: None, in_transaction=False))

    async def _do(self, work: Callable[[Connection], T]) -> T:
        return await self._writer.done(Do(work))

    async def _read(self, work: Callable[[Connection], T]) -> T:
        await self._flush()
        return await self._ask(work)

    async def _ask(self, work: Callable[[Connection], T]) -> T:
        """Run ``work``, which changes nothing, in a reader's thread. Raises CapacityError if the database does not answer."""

        def run() -> T:
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = self._database.connect()
                self._connections.append(connection)
            try:
                return work(connection)
            except BusyError:
                # Perhaps only this connection is broken.
                try:
                    return work(connection)
                except BusyError as error:
                    raise CapacityError(f"the store cannot be read: {error}") from error

        return await asyncio.get_running_loop().run_in_executor(self._readers, run)

    async def _patient(self, read: Callable[[], Awaitable[T]]) -> T:
        """What ``read`` gives, asked again while the database does not answer, for `PATIENCE_S`. Raises CapacityError."""
        refusal = CapacityError("the store cannot be read: it does not answer")
        try:
            async with asyncio.timeout(writer.PATIENCE_S):
                for wait_s in chain(writer.RETRY_S, repeat(writer.RETRY_S[-1])):
                    try:
                        return await read()
                    except CapacityError as error:
                        refusal = error
                    await asyncio.sleep(wait_s)
        except TimeoutError:
            pass
        raise refusal

    def _in_background(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Future[Any]") -> None:
        self._background.discard(task)
        if not task.cancelled():
            # What cannot be read now is read when the key is next used.
            task.exception()


def _payable(row: LedgerRow, calls: Sequence[LedgerRow]) -> tuple[LedgerRow, tuple[LedgerRow, ...]]:
    """A row and its calls as they are; where they cost more than can be paid, each what is left of that."""
    rows, left, is_capped = [], MOST_NANO, False
    for one in (row, *calls):
        nano = min(max(one.cost_nano, 0), left)
        is_capped = is_capped or nano != one.cost_nano
        rows.append(one if nano == one.cost_nano else replace(one, cost_nano=nano))
        left -= nano
    if is_capped:
        logger.error("request %s costs more than can be paid; it is charged %d nano-dollars", row.request_id, MOST_NANO)
        rows[0] = replace(rows[0], flags=(*rows[0].flags, "capped"))
    return rows[0], tuple(rows[1:])


def _money(what: str, nano: int) -> int:
    if not is_whole(nano) or not 0 <= nano <= MOST_NANO:
        raise InputError(f"{what} is {shown(nano)}; it must be whole nano-dollars from 0 to {MOST_NANO:,}")
    return nano
