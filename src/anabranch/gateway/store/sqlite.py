"""SQLite: one file, write-ahead log, several processes of one machine at a time."""

import glob
import json
import os
import sqlite3
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from anabranch.errors import DataError
from anabranch.files import SQLITE_LOGS, atomic_file, check_apart, mode_of
from anabranch.gateway.store.database import BusyError, Row
from anabranch.gateway.store.schema import MIGRATIONS, TABLES
from anabranch.locks import locked
from anabranch.places import check_database_file

try:
    import fcntl
except ImportError:
    # Not on Windows: there, one process at a time.
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

# That a write waits for another process.
BUSY_S = 5.0

# Rows of one INSERT: few statements to prepare, few times the interpreter's lock changes hands.
CHUNKS = (64, 16, 4, 1)
SYNCHRONOUS = ("normal", "full")

# Between moves of the log into the file, which wait for the disk, by a thread that nobody waits for.
CHECKPOINT_S = 1.0
# Of the log (64 MB): then the writer does it itself, or under steady load the log would never begin anew.
WAL_PAGES = 16_384

# Mistakes of ours: the same statement fails again, however often and wherever it is run.
_OURS = frozenset(
    {
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_INTERNAL,
        sqlite3.SQLITE_TOOBIG,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_MISUSE,
        sqlite3.SQLITE_RANGE,
    }
)

# The connection is as good as before. After all else (a file that was read-only, moved or damaged) a new one may do better.
_WAITING = frozenset((sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM))


class SqliteConnection:
    """See `Connection`. The file is opened when it is used first, and again after an error that may lie with the connection."""

    for_update: ClassVar[str] = ""

    def __init__(self, path: Path, synchronous: str, wal_pages: int = 1000) -> None:
        self._path, self._synchronous, self._wal_pages = path, synchronous, wal_pages
        self._raw: sqlite3.Connection | None = None

    def _opened(self) -> sqlite3.Connection:
        if self._raw is not None:
            return self._raw
        # Never made anew: rows in an empty file would be lost for whoever puts the old one back.
        raw = sqlite3.connect(
            f"{self._path.as_uri()}?mode=rw",
            uri=True,
            timeout=BUSY_S,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
        try:
            raw.execute("PRAGMA journal_mode = WAL")
            raw.execute(f"PRAGMA synchronous = {self._synchronous}")
            raw.execute("PRAGMA journal_size_limit = 67108864")
            raw.execute(f"PRAGMA wal_autocheckpoint = {self._wal_pages}")
        except BaseException:
            raw.close()
            raise
        self._raw = raw
        return raw

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What the database cannot do now as BusyError; the rest is a mistake of ours."""
        try:
            return work(self._opened())
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code is None or code & 0xFF in _OURS:
                raise
            if code & 0xFF not in _WAITING:
                self._drop()
            raise BusyError(str(error)) from error

    def _drop(self) -> None:
        raw, self._raw = self._raw, None
        if raw is not None:
            with suppress(sqlite3.Error):
                raw.close()

    def begin(self) -> None:
        """See `Connection`."""
        self.run("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """See `Connection`."""
        self.run("COMMIT")

    def rollback(self) -> None:
        """See `Connection`."""
        if self._raw is None or not self._raw.in_transaction:
            return
        try:
            self._raw.execute("ROLLBACK")
        except sqlite3.Error:
            # With the connection ends what it has begun.
            self._drop()

    def rows(self, sql: str, **values: Any) -> list[Row]:
        """See `Connection`."""
        return self._do(lambda raw: raw.execute(sql, values).fetchall())

    def run(self, sql: str, **values: Any) -> int:
        """See `Connection`."""
        return self._changed(sql, values)

    def _changed(self, sql: str, values: Any) -> int:
        return self._do(lambda raw: raw.execute(sql, values).rowcount)

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> int:
        """See `Connection`."""
        added, at = 0, 0
        marks = f"({', '.join('?' * len(columns))})"
        while at < len(rows):
            size = next(size for size in CHUNKS if size <= len(rows) - at)
            sql = (
                f"INSERT INTO {table} ({', '.join(columns)}) VALUES {', '.join([marks] * size)} ON CONFLICT DO NOTHING"
            )
            added += self._changed(sql, [value for row in rows[at : at + size] for value in row])
            at += size
        return added

    def update(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """See `Connection`."""
        key, *others = columns
        found = ", ".join(f"json_extract(value, '$[{place}]') AS {name}" for place, name in enumerate(columns))
        sets = ", ".join(f"{name} = new.{name}" for name in others)
        self.run(
            f"UPDATE {table} SET {sets} FROM (SELECT {found} FROM json_each(:rows)) AS new WHERE {table}.{key} = new.{key}",
            rows=json.dumps(rows),
        )

    def among(self, column: str, name: str) -> str:
        """See `Connection`."""
        return f"{column} IN (SELECT value FROM json_each(:{name}))"

    def values(self, items: Sequence[str]) -> Any:
        """See `Connection`."""
        return json.dumps(list(items))

    def lock_budgets(self) -> None:
        """`begin` has done so."""

    def lock(self, table: str) -> None:
        """`begin` has done so."""

    def close(self) -> None:
        """See `Connection`."""
        self._drop()


def check_folder(path: Path, what: str) -> None:
    """Raises DataError where there is no folder for a file: "cannot ``what``: there is no folder ...".

    None is made: where a disk is not mounted the file would lie on another one, and nobody would know.
    """
    if not path.absolute().parent.is_dir():
        raise DataError(f"cannot {what}: there is no folder {path.parent}; make it, or name another")


def _check_replaceable(path: Path, source: Path) -> None:
    """Raise InputError or DataError if something would be lost were a copy of ``source`` to take the place of ``path``."""
    check_apart([path], [source])
    check_folder(path, f"write {path}")
    logs = (Path(f"{path}{ending}") for ending in SQLITE_LOGS)
    log = next((log for log in logs if log.exists()), None)
    if log is not None:
        raise DataError(
            f"{path} is a database in use, or was when its program was killed ({log.name} lies beside it); name another file"
        )
    if not path.is_file() or not path.stat().st_size:
        return
    # Nobody uses it, and looking at it is to leave nothing beside it either.
    reader = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        tables = {row[0] for row in reader.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.DatabaseError:
        tables = set()
    finally:
        reader.close()
    if not tables >= TABLES:
        raise DataError(
            f"{path} is no SQLite store of a gateway, and would be lost if a copy took its place; name another file"
        )


def _is_at(path: Path, handle: int) -> bool:
    """Whether an open file is still what ``path`` leads to."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


class SqliteDatabase:
    """See `Database`. Which processes are alive is told by locks on files beside the store, which end with their process.

    Args:
        path: of the file.
        synchronous: ``normal``: what is committed outlives the process, killed however; ``full``: a power cut too, and each commit
            waits for the disk.
    """

    def __init__(self, path: str | Path, synchronous: str = "normal") -> None:
        if synchronous not in SYNCHRONOUS:
            raise DataError(f"synchronous is {synchronous!r}; use one of {', '.join(SYNCHRONOUS)}")
        check_database_file(path)
        self.path, self._synchronous, self.replica = Path(path), synchronous, uuid.uuid4().hex
        # Whatever name leads to it: one file has one lock for each process. It stays this file, also if a link is turned elsewhere.
        try:
            self._file = self.path.resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"cannot open the store {self.path}: {error}") from None
        self._held: int | None = None
        self._mover: threading.Thread | None = None
        self._ends = threading.Event()

    def connect(self) -> SqliteConnection:
        """See `Database`."""
        return SqliteConnection(self._file, self._synchronous, 1000 if self._mover is None else WAL_PAGES)

    def open(self, *, makes: bool = True) -> None:
        """See `Database`."""
        if not makes and not (self.path.is_file() and self.path.stat().st_size):
            raise DataError(
                f"{self.path} is no store of a gateway: it is {'empty' if self.path.is_file() else 'not there'}"
            )
        check_folder(self.path, f"open the store {self.path}")
        try:
            # A file that is there is not even opened: closing it would free the locks that other connections of this process have on it.
            if not self._file.exists():
                os.close(os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise DataError(f"cannot open the store {self.path}: {(error.strerror or str(error)).lower()}") from None
        connection = self.connect()
        try:
            if self._version(connection) < len(MIGRATIONS):
                connection.begin()
                for number in range(self._version(connection), len(MIGRATIONS)):
                    for statement in MIGRATIONS[number]:
                        connection.run(statement.replace("{serial}", "INTEGER PRIMARY KEY"))
                connection.run(f"PRAGMA user_version = {len(MIGRATIONS)}")
                connection.commit()
        except BusyError as error:
            connection.rollback()
            raise DataError(f"cannot open the store {self.path}: {error}") from None
        finally:
            connection.close()

    def _version(self, connection: SqliteConnection) -> int:
        found = connection.rows("PRAGMA user_version")[0][0]
        if found > len(MIGRATIONS):
            raise DataError(
                f"the store {self.path} has schema {found}, and this version knows up to {len(MIGRATIONS)}; upgrade anabranch"
            )
        if found == 0 and connection.rows("SELECT count(*) FROM sqlite_master")[0][0]:
            raise DataError(f"{self.path} is a database of something else; choose another file")
        return found

    def _lock_path(self, replica: str) -> Path:
        return self._file.with_name(f"{self._file.name}-replica-{replica}")

    def hold(self) -> None:
        """See `Database`."""
        self._mover = threading.Thread(target=self._checkpoint, name="anabranch-store-log", daemon=True)
        self._mover.start()
        if fcntl is None:
            return
        path = self._lock_path(self.replica)
        try:
            while self._held is None:
                handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
                fcntl.flock(handle, fcntl.LOCK_EX)
                if _is_at(path, handle):
                    self._held = handle
                else:
                    # Taken for a dead one's and removed between the two lines above.
                    os.close(handle)
        except OSError as error:
            raise DataError(
                f"cannot open the store {self.path}: its folder takes no file beside it ({(error.strerror or str(error)).lower()})"
            ) from None
        for other in self._file.parent.glob(f"{glob.escape(self._file.name)}-replica-*"):
            self._is_dead(other.name.rpartition("-")[2])

    def _checkpoint(self) -> None:
        """Of a thread: move the log into the file as far as that holds up nobody. What it cannot move now it moves later."""
        connection = self.connect()
        while not self._ends.wait(CHECKPOINT_S):
            with suppress(BusyError, sqlite3.Error):
                connection.rows("PRAGMA wal_checkpoint(PASSIVE)")
        connection.close()

    def dead(self, connection: Any) -> list[str]:
        """See `Database`."""
        found = [row[0] for row in connection.rows("SELECT DISTINCT replica FROM reservations")]
        return [replica for replica in found if self._is_dead(replica)]

    def gone(self, connection: Any, replicas: Sequence[str]) -> list[str]:
        """See `Database`. Without locks nobody can be told from the dead."""
        return [] if fcntl is None else [replica for replica in replicas if self._is_dead(replica)]

    def _is_dead(self, replica: str) -> bool:
        """Whether its lock is free; then its file is removed."""
        if replica == self.replica:
            return False
        if fcntl is None:
            return True
        try:
            path = self._lock_path(replica)
            if not path.exists():
                # The store may have been renamed, or have a second name.
                path = next(iter(self._file.parent.glob(f"*-replica-{replica}")), path)
            handle = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return True
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise BusyError(f"whether the process of {path.name} is alive cannot be seen: {why}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # What is left of it, where it cannot be removed, means nothing.
            with suppress(OSError):
                path.unlink()
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(handle)

    def let_go(self) -> None:
        """See `Database`."""
        if self._mover is not None:
            self._ends.set()
            self._mover.join()
            self._mover = None
        if self._held is not None:
            with suppress(OSError):
                self._lock_path(self.replica).unlink()
            os.close(self._held)
            self._held = None

    def alone(self, work: str) -> AbstractContextManager[bool]:
        """See `Database`."""
        return locked(self._file.with_name(f".{self._file.name}-{work}.lock"))

    def backup(self, path: str | Path) -> None:
        """A compact copy of one moment, while others go on writing, for the eyes of those who may read the store.

        Raises InputError if ``path`` is the store, and DataError if it is something else than a store that nobody uses: a program that has
        a database open goes on writing its log, which does not fit another file.
        """
        path = Path(path)
        _check_replaceable(path, self.path)
        with atomic_file(path, mode=mode_of(self.path)) as temporary:
            connection = self.connect()
            try:
                connection.run("VACUUM INTO :path", path=str(temporary))
                _check_replaceable(path, self.path)
            except BusyError as error:
                raise DataError(f"cannot back up {self.path} to {path}: {error}") from None
            finally:
                connection.close()

    def vacuum(self, connection: Any) -> None:
        """See `Database`."""
        connection.run("VACUUM")
        connection.rows("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """See `Database`."""
        self.let_go()
