"""Calls that ended, written down as they do, so that a run that broke off goes on without making them again.

A file of lines in JSON. The first says whose it is. Each further one holds a call that came, by its place in the run (stage, index,
attempt), the digest of what was asked, and the answer; one that failed, with the name of its error; or what was lost in calls that failed,
in all so far. A call that failed is asked again only where none that came was written after it: past others the run went on, and does so
again. An answer that is of no form that is read, as journals of earlier versions may have, is dropped, and counts as a call that failed.
A last line that was not written to its end is dropped, and written over. One run at a time has the file: a second one is refused
before it writes, by a lock beside it, and what another wrote where there are no locks is never written over. Answers are texts of models:
whoever keeps the file keeps those.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from anabranch.errors import DataError
from anabranch.locks import locked
from anabranch.routers.contract.ask import Answered
from anabranch.routers.contract.choices import wrong_choices
from anabranch.routers.scale.records import Tokens

VERSION = 1


def digest_of(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """One run's, until it is closed; a context that closes it.

    Attributes:
        lost: tokens of calls that failed, of all runs so far.
        dropped: answers in the file that are none, and are asked for again.

    Args:
        path: of the file; made where there is none, gone on with where there is one.
        run: digest of what tells this run from others: its problem, seed and systems.

    Raises DataError for a file that is none, of another run, or in use by one, and for one that cannot be read or written.
    """

    def __init__(self, path: str | Path, run: str) -> None:
        self._path = Path(path)
        self._known: dict[str, tuple[str, Answered]] = {}
        # Of calls that failed: what was asked, the error, and how many had come before.
        self._failed: dict[str, tuple[str, str, int]] = {}
        self.lost = Tokens()
        self.dropped = 0
        # Of those, what is not yet written down as failed, by place: what was asked, and its tokens.
        self._unpaid: dict[str, tuple[str, Tokens]] = {}
        self._first = json.dumps({"version": VERSION, "run": run}).encode() + b"\n"
        # Bytes of the file as this run knows it.
        self._size = 0
        with ExitStack() as held:
            self._lock(held)
            self._end = self._read(run)
            if not self._end:
                self._write(self._first)
            if self._unpaid:
                self._drop()
            self._held = held.pop_all()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the file to other runs. Idempotent."""
        self._held.close()

    def _lock(self, held: ExitStack) -> None:
        # By whatever name it is reached.
        path = Path(os.path.realpath(self._path))
        if path.parent.is_dir() and not held.enter_context(locked(path.with_name(f".{path.name}.lock"))):
            raise DataError(
                f"journal {str(self._path)!r} is in use by another run; wait for its end, or take another file"
            )

    def find(self, key: str, digest: str) -> Answered | None:
        """The answer that a call had; None if none came. Raises DataError if something else was asked there."""
        if key not in self._known:
            return None
        asked, found = self._known[key]
        self._check(key, asked, digest)
        return found

    def find_failed(self, key: str, digest: str) -> str | None:
        """The error that a call ended with, past which the run went on; None for none. Raises as `find`."""
        asked, status, came_before = self._failed.get(key, ("", "", 0))
        if not status or len(self._known) <= came_before:
            return None
        self._check(key, asked, digest)
        return status

    def _check(self, key: str, asked: str, digest: str) -> None:
        if asked != digest:
            raise DataError(
                f"journal {str(self._path)!r} has another call as {key}: prompts or settings have changed since; take another file"
            )

    def note(self, key: str, digest: str, found: Answered) -> None:
        """Write down a call that came."""
        self._append({"key": key, "digest": digest, "answer": _written(found)})

    def note_failed(self, key: str, digest: str, status: str) -> None:
        """Write down a call that failed."""
        self._append(_failed_line(key, digest, status))

    def note_lost(self, lost: Tokens) -> None:
        """Write down what was lost in failed calls, in all so far."""
        if lost != self.lost:
            self.lost = lost
            self._append(_lost_line(lost))

    def _read(self, run: str) -> int:
        """Where the last whole line ends; 0 for no file."""
        if not self._path.exists():
            return 0
        try:
            data = self._path.read_bytes()
        except OSError as error:
            raise DataError(f"journal {str(self._path)!r} cannot be read: {error.strerror}") from None
        self._size, end = len(data), data.rfind(b"\n") + 1
        lines = data[:end].splitlines()
        if data and not end:
            # Not even the first line was written to its end, or it is somebody's file that is no journal.
            if not self._first.startswith(data):
                raise DataError(f"{str(self._path)!r} is no journal, and is left as it is; take another file")
            return 0
        for number, line in enumerate(lines, start=1):
            try:
                self._take(json.loads(line), run, is_first=number == 1)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(
                    f"journal {str(self._path)!r}, line {number}: {type(error).__name__}: {error}"
                ) from None
        return end

    def _take(self, line: Mapping[str, Any], run: str, *, is_first: bool) -> None:
        if is_first:
            if line["version"] != VERSION:
                raise ValueError(f"version {line['version']!r}; this program reads {VERSION}")
            if line["run"] != run:
                raise DataError(
                    f"journal {str(self._path)!r} is of another problem, seed or pair of systems; take another file"
                )
        elif "lost" in line:
            self.lost = Tokens(*line["lost"])
        elif "failed" in line:
            self._unpaid.pop(line["key"], None)
            self._failed[line["key"]] = line["digest"], str(line["failed"]), len(self._known)
        else:
            found = _read_answer(line["answer"])
            if wrong_choices(found.choices):
                self.dropped += 1
                paid = Tokens(found.prompt_tokens, found.completion_tokens, found.cost, 1)
                self._unpaid[line["key"]] = line["digest"], paid
            else:
                self._known[line["key"]] = line["digest"], found

    def _drop(self) -> None:
        """Write down answers that are none as failed, and what they came to as lost, at once: neither is counted twice."""
        self.lost = sum((paid for _, paid in self._unpaid.values()), self.lost)
        lines = [_failed_line(key, digest, "BackendError") for key, (digest, _) in self._unpaid.items()]
        for key, (digest, _) in self._unpaid.items():
            self._failed[key] = digest, "BackendError", len(self._known)
        self._unpaid = {}
        self._append(*lines, _lost_line(self.lost))

    def _append(self, *lines: Mapping[str, Any]) -> None:
        self._write(b"".join(json.dumps(line, default=_plain).encode() + b"\n" for line in lines))

    def _write(self, data: bytes) -> None:
        try:
            with open(self._path, "r+b" if self._size or self._path.exists() else "wb") as file:
                if file.seek(0, os.SEEK_END) != self._size:
                    raise DataError(
                        f"journal {str(self._path)!r} was written by another meanwhile, and is left as it is"
                    )
                file.seek(self._end)
                file.truncate()
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # What was written of it is written over by what comes next.
            with suppress(OSError):
                self._size = self._path.stat().st_size
            raise DataError(f"journal {str(self._path)!r} cannot be written: {error.strerror}") from None
        self._end = self._size = self._end + len(data)


def _failed_line(key: str, digest: str, status: str) -> dict[str, Any]:
    return {"key": key, "digest": digest, "failed": status}


def _lost_line(lost: Tokens) -> dict[str, Any]:
    return {"lost": [lost.prompt, lost.completion, lost.cost, lost.calls]}


def _plain(value: Any) -> Any:
    """Of an answer of anybody, whose objects need be no dicts. Raises TypeError."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def _written(found: Answered) -> dict[str, Any]:
    return {
        "model": found.model,
        "choices": list(found.choices),
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "cached_tokens": found.cached_tokens,
        "cost": found.cost,
        "latency_s": found.latency_s,
    }


def _read_answer(table: Mapping[str, Any]) -> Answered:
    for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "cost", "latency_s"):
        value = table[name]
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r:.40}; it must be a number of at least 0")
    choices = table["choices"]
    return Answered(**{**table, "choices": tuple(choices) if isinstance(choices, list) else ()})
