"""Rows on disk as they come: an SQLite file, so that a device that loses power loses no click that was recorded."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import CapacityError, DataError
from anabranch.graph.rank.rows import Row, row_from_json
from anabranch.places import check_database_file

VERSION = 1


class RowStore:
    """Rows of one node's log. Raises DataError for a file that is damaged, foreign, or another node's, and for no file."""

    def __init__(self, path: str | Path, node_id: str) -> None:
        check_database_file(path)
        self.path = Path(path)
        try:
            self._database = sqlite3.connect(self.path, isolation_level=None)
            self._open(node_id)
        except sqlite3.Error as error:
            raise DataError(f"cannot use {self.path} as a store of rows: {error}") from error

    def _open(self, node_id: str) -> None:
        run = self._database.execute
        run("PRAGMA journal_mode = WAL")
        run("CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT)")
        run("CREATE TABLE IF NOT EXISTS rows (origin TEXT, number INTEGER, body TEXT, PRIMARY KEY (origin, number))")
        # A table of its own, so that older releases read and write the file as before.
        run("CREATE TABLE IF NOT EXISTS told (origin TEXT, number INTEGER, teller TEXT, PRIMARY KEY (origin, number))")
        run("INSERT OR IGNORE INTO about VALUES ('node', ?), ('version', ?)", (node_id, str(VERSION)))
        about = dict(run("SELECT name, value FROM about").fetchall())
        if about["version"] != str(VERSION):
            raise DataError(
                f"{self.path} is version {about['version']} of a store of rows; this release reads {VERSION}"
            )
        if about["node"] != node_id:
            raise DataError(f"{self.path} holds the log of {about['node']!r}, not of {node_id!r}")

    def rows(self) -> Iterator[tuple[Row, str]]:
        """All rows by origin and number, each with the neighbour who told it ("" for this node, or where that was not noted)."""
        query = "SELECT body, teller FROM rows LEFT JOIN told USING (origin, number) ORDER BY origin, number"
        try:
            for body, teller in self._database.execute(query):
                yield row_from_json(json.loads(body)), _text(teller)
        except (sqlite3.Error, ValueError) as error:
            raise DataError(f"{self.path} is damaged: {error}") from error

    def add(self, told: Sequence[tuple[Row, str]]) -> None:
        """Write rows and who told them, all or none."""
        values = [(_key(row.origin), row.number, json.dumps(row.to_json())) for row, _ in told]
        tellers = [(_key(row.origin), row.number, _key(teller)) for row, teller in told if teller]
        try:
            self._database.execute("BEGIN")
            self._database.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)", values)
            self._database.executemany("INSERT OR IGNORE INTO told VALUES (?, ?, ?)", tellers)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            kind = CapacityError if "full" in str(error) else DataError
            raise kind(f"cannot write to {self.path}: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _key(name: str) -> str | bytes:
    """A name as SQLite takes it: half of a surrogate pair, which JSON can spell and UTF-8 cannot, makes it bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")
    return name


def _text(key: Any) -> str:
    """The name of a key; "" for what is none."""
    if isinstance(key, bytes):
        return key.decode("utf-8", "surrogatepass")
    return key if isinstance(key, str) else ""
