"""The seam between a store and its database: connections that run one SQL on SQLite and PostgreSQL alike.

Parameters are named (``:name``). Where the two differ, the connection says how: lists (`among`), locks (`for_update`), bulk writes.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

Row = tuple[Any, ...]


class BusyError(Exception):
    """The database cannot do it now and may later; nothing was written, or whether it was is not known. What else a connection raises is a
    mistake of ours, which would be raised again.
    """


class Connection(Protocol):
    """One connection, used by one thread. After a BusyError it can be used as before: what it has begun is over, or ends with `rollback`.

    Attributes:
        for_update: what ends a SELECT whose rows are to be locked until the transaction ends.
    """

    for_update: ClassVar[str]

    def begin(self) -> None:
        """Begin a transaction that will write. Raises BusyError."""

    def commit(self) -> None:
        """End it. Raises BusyError."""

    def rollback(self) -> None:
        """Forget it; does nothing outside one."""

    def rows(self, sql: str, **values: Any) -> list[Row]:
        """What a statement gives."""

    def run(self, sql: str, **values: Any) -> int:
        """Run a statement; how many rows it changed."""

    def insert(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> int:
        """Add rows, leaving out those whose key is there; how many were added."""

    def update(self, table: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Set integer columns of rows by the first one, their key."""

    def among(self, column: str, name: str) -> str:
        """A condition: ``column`` is in the list given as value ``name``."""

    def values(self, items: Sequence[str]) -> Any:
        """A list in the form that `among` takes."""

    def lock_budgets(self) -> None:
        """Let nobody else touch budgets until the transaction ends."""

    def lock(self, table: str) -> None:
        """Let nobody else write a table until the transaction ends."""

    def close(self) -> None:
        """Let go of it."""


class Database(Protocol):
    """Makes connections, migrates, and knows which other processes on the same data are alive."""

    replica: str

    def connect(self) -> Connection:
        """A new connection. It reaches the database when it is used first."""

    def open(self, *, makes: bool = True) -> None:
        """Create, unless ``makes`` forbids it, or migrate. Raises DataError for data of a newer version or another kind."""

    def hold(self) -> None:
        """Say that this process is alive, until `let_go` or its end, whatever else it is busy with."""

    def dead(self, connection: Connection) -> list[str]:
        """Other replicas with reservations that are not alive any more."""

    def gone(self, connection: Connection, replicas: Sequence[str]) -> list[str]:
        """Those of some replicas that have held and are not alive any more, as far as that can be told."""

    def let_go(self) -> None:
        """The opposite of `hold`."""

    def alone(self, work: str) -> AbstractContextManager[bool]:
        """Whether nobody else does ``work`` on this data; then nobody can meanwhile, until the block or the process ends."""

    def backup(self, path: Any) -> None:
        """Write a copy as of now. Raises BackendError where the database has tools of its own for that."""

    def vacuum(self, connection: Connection) -> None:
        """Give free room back."""

    def close(self) -> None:
        """After all connections."""


Work = Callable[[Connection], Any]
