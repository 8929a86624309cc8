"""The file of recorded outcomes that collecting writes: one line for each question, gone on with after the last whole one."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from anabranch.errors import DataError
from anabranch.files import explained
from anabranch.gateway.collect.origins import identity
from anabranch.locks import locked
from anabranch.routers.data.splits import question

# Of every line that is written.
_START = b'{"query":'


class Table:
    """An open file of outcomes, of one set of models and one judge.

    Attributes:
        seen: identities of the questions in it.
        requests: ids of the requests that they came from.
        lines: how many.
    """

    def __init__(self, out: Path, models: Sequence[str], judge: str) -> None:
        self._out, self._models, self._judge = out, models, judge
        self.seen: set[str] = set()
        self.requests: set[str] = set()
        self.lines = 0

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path, models: Sequence[str], judge: str) -> Iterator[Self]:
        """See to it that it can be written to, by nobody else meanwhile, and read what is there.

        Raises DataError if it cannot, or is of something else than these models and this judge.
        """
        path, was_there = out.resolve(), out.exists()
        # Before anything is paid for. The texts are the users', so nobody else may read them.
        with explained(out):
            os.close(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        with contextlib.ExitStack() as held:
            if not held.enter_context(locked(path.with_name(f".{path.name}.lock"))):
                raise DataError(
                    f"another anabranch gateway collect writes {out}; wait for its end, or choose a new file"
                )
            made = cls(out, models, judge)
            made._read()
            try:
                yield made
            finally:
                if not was_there and not made.lines:
                    out.unlink(missing_ok=True)

    def has(self, key: str, request_id: str) -> bool:
        """Whether a question is in it."""
        return key in self.seen or request_id in self.requests

    def add(self, key: str, line: dict[str, Any]) -> None:
        """One write, then to the disk: what is there is whole. Raises DataError if it cannot be written."""
        with explained(self._out):
            handle = os.open(self._out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with contextlib.closing(os.fdopen(handle, "wb", buffering=0)) as file:
                file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
                os.fsync(handle)
        self.seen.add(key)
        self.lines += 1

    def _read(self) -> None:
        """Take in what is there; a line that an interruption cut off is taken away."""
        with explained(self._out):
            raw = self._out.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            self._take(line, number)
        if len(whole) < len(raw):
            if not raw[len(whole) :].startswith(_START[: len(raw) - len(whole)]):
                raise DataError(f"{self._out} ends in something that is no collected outcome; choose a new file")
            with explained(self._out):
                os.truncate(self._out, len(whole))

    def _take(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            named, text, judge = set(row["scores"]), row["query"], row["judge"]
            messages = row.get("messages")
            key = question(text) if messages is None else identity(messages)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError(f"{self._out}, line {number} is no collected outcome; choose a new file") from None
        if named != set(self._models):
            raise DataError(
                f"{self._out} compares {', '.join(sorted(named))}, not {', '.join(sorted(self._models))}; choose a new file"
            )
        if judge != self._judge:
            raise DataError(f"{self._out} was judged by {judge}, not by {self._judge}; choose a new file")
        self.seen.add(key)
        self.requests.add(str(row.get("request_id")))
        self.lines += 1
