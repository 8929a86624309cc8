"""Rows on disk as they come: an SQLite file, so that a device that loses power loses no click that was recorded."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from anabranch.errors import CapacityError, DataError
from anabranch.graph.rank.rows import Row, row_from_json

VERSION = 1


class RowStore:
    """Rows of one node's log. Raises DataError for a file that is damaged, foreign, or another node's."""

    def __init__(self, path: str | Path, node_id: str) -> None:
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
        run("INSERT OR IGNORE INTO about VALUES ('node', ?), ('version', ?)", (node_id, str(VERSION)))
        about = dict(run("SELECT name, value FROM about").fetchall())
        if about["version"] != str(VERSION):
            raise DataError(
                f"{self.path} is version {about['version']} of a store of rows; this release reads {VERSION}"
            )
        if about["node"] != node_id:
            raise DataError(f"{self.path} holds the log of {about['node']!r}, not of {node_id!r}")

    def rows(self) -> Iterator[Row]:
        """All rows, by origin and number."""
        try:
            for (body,) in self._database.execute("SELECT body FROM rows ORDER BY origin, number"):
                yield row_from_json(json.loads(body))
        except (sqlite3.Error, ValueError) as error:
            raise DataError(f"{self.path} is damaged: {error}") from error

    def add(self, rows: Sequence[Row]) -> None:
        """Write rows, all or none."""
        values = [(row.origin, row.number, json.dumps(row.to_json())) for row in rows]
        try:
            self._database.execute("BEGIN")
            self._database.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)", values)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            kind = CapacityError if "full" in str(error) else DataError
            raise kind(f"cannot write to {self.path}: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._database.close()
