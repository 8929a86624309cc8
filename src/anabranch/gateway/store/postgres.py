"""PostgreSQL, for a gateway of several replicas: the same tables and statements, with row locks where SQLite locks the file.

A thread of each replica says every `BEAT_S` that it is alive, however busy its writer is. One whose sign of life another has seen unchanged
for `LEASE_S`, looking all the while, is taken for dead, and what it had reserved is settled by the other. Clocks play no part in it: one
that leaps makes nobody dead, and nobody immortal.
"""

import logging
import math
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from anabranch.errors import BackendError, DataError
from anabranch.extras import require
from anabranch.gateway.store.database import BusyError, Row
from anabranch.gateway.store.schema import MIGRATIONS

logger = logging.getLogger(__name__)
LEASE_S = 15.0
BEAT_S = 3.0

# Whoever has not looked at the others for so long begins to watch them anew: that nothing changed may be for the database's sake.
AWAY_S = 6.0

# Connections of a replica: of the writer, of who says that it is alive, of readers, and of locks.
POOL = 9

# A server that is not heard is given up: while connecting, and later, where nothing comes back of what was sent.
PATIENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}

# SQLSTATE of a right that is missing: somebody else can put that right.
_NO_RIGHT = "42501"

# Of the advisory lock that lets one replica migrate at a time.
_LOCK = 0x616E6162
_NOW_US = "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)"


def _is_ours(error: Any) -> bool:
    """Whether it is a mistake of ours: the same statement fails again, however often and wherever it is run."""
    from sqlalchemy.exc import DataError as ValuesError
    from sqlalchemy.exc import IntegrityError, NotSupportedError, ProgrammingError

    is_ours = isinstance(error, ValuesError | IntegrityError | NotSupportedError | ProgrammingError)
    return is_ours and getattr(error.orig, "sqlstate", None) != _NO_RIGHT


class PostgresConnection:
    """See `Connection`. A connection that breaks is replaced when it is used next."""

    for_update: ClassVar[str] = " FOR UPDATE"

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._raw: Any = None
        self._in_transaction = False

    def _do(self, sql: str, values: Any) -> Any:
        """What the database cannot do now as BusyError; the rest is a mistake of ours."""
        from sqlalchemy.exc import DBAPIError
        from sqlalchemy.exc import TimeoutError as PoolError

        try:
            if self._raw is None:
                self._raw = self._engine.connect()
            return self._raw.execute(_text(sql), values)
        except PoolError as error:
            raise BusyError(f"no connection is free: {error}") from error
        except DBAPIError as error:
            if error.connection_invalidated:
                self._drop()
            elif _is_ours(error):
                raise
            raise BusyError(str(error.orig).strip()) from error

    def _drop(self) -> None:
        raw, self._raw, self._in_transaction = self._raw, None, False
        if raw is not None:
            raw.invalidate()
            raw.close()

    def begin(self) -> None:
        """See `Connection`."""
        self._do("BEGIN", {})
        self._in_transaction = True

    def commit(self) -> None:
        """See `Connection`."""
        self._do("COMMIT", {})
        self._in_transaction = False

    def rollback(self) -> None:
        """See `Connection`."""
        if not self._in_transaction:
            return
        self._in_transaction = False
        try:
            self._do("ROLLBACK", {})
        except Exception:
            # With the connection ends what it has begun.
            self._drop()

    def rows(self, sql: str, **values: Any) -> list[Row]:
        """See `Connection`."""
        return [tuple(row) for row in self._do(sql, values)]

    def run(self, sql: str, **values: Any) -> int:
        """See `Connection`."""
        return self._do(sql, values).rowcount

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> int:
        """See `Connection`."""
        if not rows:
            return 0
        marks = ", ".join(f":{name}" for name in columns)
        sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) ON CONFLICT DO NOTHING"
        return self._do(sql, [dict(zip(columns, row, strict=True)) for row in rows]).rowcount

    def update(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """See `Connection`."""
        if rows:
            key, *others = columns
            sets = ", ".join(f"{name} = :{name}" for name in others)
            values = [dict(zip(columns, row, strict=True)) for row in rows]
            self._do(f"UPDATE {table} SET {sets} WHERE {key} = :{key}", values)

    def among(self, column: str, name: str) -> str:
        """See `Connection`."""
        return f"{column} = ANY(:{name})"

    def values(self, items: Sequence[str]) -> Any:
        """See `Connection`."""
        return list(items)

    def lock_budgets(self) -> None:
        """See `Connection`."""
        # Waits for each SELECT ... FOR UPDATE under way, and holds up new ones.
        self.run("LOCK TABLE budgets IN EXCLUSIVE MODE")

    def lock(self, table: str) -> None:
        """See `Connection`."""
        self.run(f"LOCK TABLE {table} IN EXCLUSIVE MODE")

    def close(self) -> None:
        """See `Connection`."""
        self.rollback()
        if self._raw is not None:
            self._raw.close()
            self._raw = None


class PostgresDatabase:
    """See `Database`.

    Args:
        url: ``postgresql://user:password@host:port/name``; the password may come from ``PGPASSWORD`` or ``~/.pgpass`` instead.
    """

    def __init__(self, url: str) -> None:
        require("postgres", by="a store in PostgreSQL")
        import sqlalchemy

        try:
            parsed = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")
            # Transactions are begun and committed by statements.
            self._engine = sqlalchemy.create_engine(
                parsed,
                isolation_level="AUTOCOMMIT",
                pool_size=POOL,
                max_overflow=0,
                connect_args={name: value for name, value in PATIENCE.items() if name not in parsed.query},
            )
        except (sqlalchemy.exc.ArgumentError, ValueError):
            raise DataError("the URL of the store cannot be read; write postgresql://user@host/name") from None
        self.name, self.replica = parsed.render_as_string(hide_password=True), uuid.uuid4().hex
        self._beater: threading.Thread | None = None
        self._ends = threading.Event()
        # Of other replicas: their last sign of life, and when, by our clock, that was first seen.
        self._signs: dict[str, tuple[int, float]] = {}
        self._looked_s = -math.inf

    def connect(self) -> PostgresConnection:
        """See `Database`."""
        return PostgresConnection(self._engine)

    def open(self, *, makes: bool = True) -> None:
        """See `Database`."""
        connection = self.connect()
        try:
            connection.begin()
            connection.rows("SELECT 1 FROM (SELECT pg_advisory_xact_lock(:lock)) AS locked", lock=_LOCK)
            if not makes and not connection.rows("SELECT to_regclass('anabranch_schema') IS NOT NULL")[0][0]:
                raise DataError(f"{self.name} holds no store of a gateway")
            connection.run("CREATE TABLE IF NOT EXISTS anabranch_schema (version BIGINT NOT NULL)")
            found = connection.rows("SELECT coalesce(max(version), 0) FROM anabranch_schema")[0][0]
            if found > len(MIGRATIONS):
                raise DataError(
                    f"the store {self.name} has schema {found}, and this version knows up to {len(MIGRATIONS)}; upgrade anabranch"
                )
            for number in range(found, len(MIGRATIONS)):
                for statement in MIGRATIONS[number]:
                    connection.run(statement.replace("{serial}", "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"))
                connection.insert("anabranch_schema", ("version",), [(number + 1,)])
            connection.commit()
        except BusyError as error:
            raise DataError(f"cannot open the store {self.name}: {' '.join(str(error).split())}") from None
        finally:
            connection.close()

    def hold(self) -> None:
        """See `Database`."""
        connection = self.connect()
        try:
            self._beat(connection)
        except BusyError as error:
            connection.close()
            raise DataError(f"cannot open the store {self.name}: {error}") from None
        self._beater = threading.Thread(
            target=self._keep_beating, args=(connection,), name="anabranch-store-beat", daemon=True
        )
        self._beater.start()

    def _keep_beating(self, connection: PostgresConnection) -> None:
        """Of a thread: say that this replica is alive, until it lets go."""
        while not self._ends.wait(BEAT_S):
            try:
                self._beat(connection)
            except Exception as error:
                # The others will take it for dead, but not before the database works for them.
                logger.warning("the store could not be told that this replica is alive: %s", error)
        connection.close()

    def _beat(self, connection: PostgresConnection) -> None:
        connection.run(
            f"INSERT INTO replicas (id, seen_us) VALUES (:id, {_NOW_US}) ON CONFLICT (id) DO UPDATE SET seen_us = excluded.seen_us",
            id=self.replica,
        )

    def dead(self, connection: Any) -> list[str]:
        """See `Database`. Those that said goodbye are dead at once; for others it is said here, once they are taken for dead."""
        found = connection.rows(
            "SELECT id, seen_us FROM replicas WHERE id <> :own UNION ALL SELECT DISTINCT replica, CAST(NULL AS BIGINT) FROM reservations"
            " WHERE replica <> :own AND replica NOT IN (SELECT id FROM replicas)",
            own=self.replica,
        )
        now_s = time.monotonic()
        if now_s - self._looked_s > AWAY_S:
            self._signs.clear()
        self._looked_s = now_s
        before, self._signs = self._signs, {}
        dead = []
        for replica, seen_us in found:
            sign = before.get(replica)
            since_s = sign[1] if sign is not None and sign[0] == seen_us else now_s
            if seen_us is None or (now_s - since_s >= LEASE_S and self._has_ended(connection, replica, seen_us)):
                dead.append(replica)
            else:
                self._signs[replica] = (seen_us, since_s)
        return dead

    def gone(self, connection: Any, replicas: Sequence[str]) -> list[str]:
        """See `Database`: those that have said goodbye, or for whom `dead` has said it since their lease was over."""
        rows = connection.rows("SELECT id FROM replicas WHERE id = ANY(:ids)", ids=list(replicas))
        alive = {self.replica, *(id for (id,) in rows)}
        return [replica for replica in replicas if replica not in alive]

    def _has_ended(self, connection: PostgresConnection, replica: str, seen_us: int) -> bool:
        """Say goodbye for a replica; not if it has just given a sign of life."""
        return bool(connection.run("DELETE FROM replicas WHERE id = :id AND seen_us = :seen", id=replica, seen=seen_us))

    def let_go(self) -> None:
        """See `Database`."""
        if self._beater is None:
            return
        self._ends.set()
        # One that hangs in the database is left there: the lease ends by itself.
        self._beater.join(BEAT_S)
        self._beater = None
        connection = self.connect()
        with suppress(BusyError):
            connection.run("DELETE FROM replicas WHERE id = :id", id=self.replica)
        connection.close()

    @contextmanager
    def alone(self, work: str) -> Iterator[bool]:
        """See `Database`. The lock is the connection's, and ends with it."""
        connection = self.connect()
        try:
            names = {"lock": _LOCK, "work": work}
            is_alone = bool(connection.rows("SELECT pg_try_advisory_lock(:lock, hashtext(:work))", **names)[0][0])
        except BusyError as error:
            connection.close()
            raise DataError(f"the store {self.name} cannot be locked: {error}") from None
        try:
            yield is_alone
        finally:
            # A connection that broke has let go of it already.
            with suppress(BusyError):
                if is_alone:
                    connection.rows("SELECT pg_advisory_unlock(:lock, hashtext(:work))", **names)
            connection.close()

    def backup(self, path: str | Path) -> None:
        """See `Database`."""
        raise BackendError(f"{self.name} is backed up with PostgreSQL's own pg_dump")

    def vacuum(self, connection: Any) -> None:
        """See `Database`."""
        connection.run("VACUUM")

    def close(self) -> None:
        """See `Database`."""
        self.let_go()
        self._engine.dispose()


@lru_cache(maxsize=256)
def _text(sql: str) -> Any:
    from sqlalchemy import text

    return text(sql)
