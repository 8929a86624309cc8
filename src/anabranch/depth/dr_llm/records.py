"""The file of found paths: JSON lines, one question each, written as each is finished, so that a search may be stopped at any time.

    {"id": "q1", "base_reward": 1.0, "base_right": true, "path": [0, 1, 3], "good": ["1101"], "evaluations": 14, ...}

``path`` is the label, null where no path was right; ``good`` are all right paths, a digit a block: 0 skipped, 1 run, 2 run twice. A search
goes on in its file only with the model, reward and settings it began with, and with questions that ask what they asked.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from anabranch.bounds import MOST_LAYERS, as_finite, is_whole, shown
from anabranch.depth.decisions import MOST_VISITS, decisions_of, path_of
from anabranch.depth.dr_llm.moves import Steps
from anabranch.errors import ConfigError, DataError
from anabranch.files import explained, parse_json
from anabranch.locks import lock_open, locked

# How a row of `PathsFile.add` begins.
_FIRST, _SECOND = b'{"id": "', b', "base_reward": '
_ROW = re.compile(rb'\{"id": "(?:[^"\\]|\\.)*"')

__all__ = ["PathRow", "PathsFile", "digits_of", "read_paths", "steps_of_digits"]


@dataclass(frozen=True)
class PathRow:
    """What the search of one question found.

    Attributes:
        id: of the question.
        base_reward: of the whole model.
        base_right: whether that counts as right.
        path: the label, blocks in order; None where no path was right, or none was looked for.
        good: all right paths, as digits, shortest first.
        evaluations: different paths whose reward was computed.
        simulations: of the tree; a path that was known cost nothing.
        blocks: block passes made.
        blocks_naive: those that running each path from the start would have taken.
        seed: of this question.
        num_blocks: L.
        searched: whether paths were looked for; False for a question whose flips are not wanted.
        prompt: tokens of the prompt, for training.
        search: twelve letters that say which model, reward and settings.
        question: twelve letters that say what was asked and answered, see `Question.content`; in a null control, of the question whose
            decoy this is.
        model: its fingerprint; routers learn from rows of their own model alone.
    """

    id: str
    base_reward: float
    base_right: bool
    path: tuple[int, ...] | None
    good: tuple[str, ...]
    evaluations: int
    simulations: int
    blocks: int
    blocks_naive: int
    seed: int
    num_blocks: int
    searched: bool
    prompt: tuple[int, ...]
    search: str
    question: str
    model: str

    @property
    def decisions(self) -> list[int] | None:
        """The label of each block."""
        return None if self.path is None else decisions_of(self.path, self.num_blocks)


def digits_of(path: Steps, num_blocks: int) -> str:
    """A path as a digit for each block."""
    return "".join(map(str, decisions_of(path, num_blocks)))


def steps_of_digits(digits: str) -> Steps:
    """The path of `digits_of`."""
    return path_of([int(digit) for digit in digits])


def read_paths(path: str | Path, *, least: int = 1) -> list[PathRow]:
    """The rows of a file, as they stand; a last line that was cut off while it was written is left out.

    Args:
        path: the file.
        least: rows that there must be; 0 takes a file in which a search that was stopped has none yet.

    Raises DataError: no file, fewer rows, a line that is none (with its number), an id that comes twice, rows of several searches.
    """
    place = Path(path)
    rows = list(_rows(place, _content(place)))
    if len(rows) < least:
        raise DataError(f"{place} holds no paths; anabranch depth search writes such a file")
    _check(rows, place)
    return rows


def _content(place: Path) -> bytes:
    try:
        return place.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {place}: {(error.strerror or str(error)).lower()}") from None


def _rows(place: Path, content: bytes) -> Iterator[PathRow]:
    """Rows in order. What stands behind the last line end was being written when its process was killed, unless it is whole."""
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip() and (number < len(lines) or _is_whole(line)):
            yield _row(line, f"{place}, line {number}")


def _is_whole(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _row(line: bytes, where: str) -> PathRow:
    try:
        table = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: this is no JSON ({error}); it is to be a row of anabranch depth search") from None
    names = [field.name for field in fields(PathRow)]
    missing = [name for name in names if not isinstance(table, dict) or name not in table]
    if missing:
        raise DataError(f"{where}: there is no field {missing[0]!r}; it is to be a row of anabranch depth search")
    count = table["num_blocks"]
    whole = ("evaluations", "simulations", "blocks", "blocks_naive", "seed", "num_blocks")
    for name in whole:
        if not is_whole(table[name]) or table[name] < 0:
            raise DataError(f"{where}: {name} is {shown(table[name])}; it must be a whole number from 0")
    if not 1 <= count <= MOST_LAYERS:
        raise DataError(f"{where}: num_blocks is {shown(count)}; it must be from 1 to {MOST_LAYERS:,}")
    for name in ("id", "search", "question", "model"):
        if not isinstance(table[name], str) or not (table[name] or name == "id"):
            raise DataError(f"{where}: {name} is {shown(table[name])}; it must be a text")
    reward = as_finite(table["base_reward"])
    if reward is None:
        raise DataError(f"{where}: base_reward is {shown(table['base_reward'])}; it must be a finite number")
    prompt = table["prompt"]
    if not isinstance(prompt, list) or not prompt or not all(is_whole(token) and token >= 0 for token in prompt):
        raise DataError(f"{where}: prompt is {shown(prompt)}; it must be tokens, at least one")
    made = {name: table[name] for name in names}
    made |= {
        "prompt": tuple(prompt),
        "path": _path(table["path"], count, where),
        "good": _good(table["good"], count, where),
    }
    for name in ("base_right", "searched"):
        if not isinstance(table[name], bool):
            raise DataError(f"{where}: {name} is {shown(table[name])}; it must be true or false")
    made["base_reward"] = reward
    return PathRow(**made)


def _path(value: Any, num_blocks: int, where: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(is_whole(block) for block in value):
        raise DataError(f"{where}: path is {shown(value)}; it must be a list of blocks")
    try:
        decisions_of(value, num_blocks)
    except ConfigError as error:
        raise DataError(f"{where}: path is {shown(value)}: {error}") from None
    return tuple(value)


def _good(value: Any, num_blocks: int, where: str) -> tuple[str, ...]:
    digits = "".join(map(str, range(MOST_VISITS + 1)))
    is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
    if not is_list or any(len(one) != num_blocks or one.strip(digits) for one in value):
        raise DataError(f"{where}: good is {shown(value)}; it must be texts of {num_blocks} digits 0, 1 or 2")
    return tuple(value)


def _check(rows: Iterable[PathRow], place: Path) -> None:
    seen: dict[str, PathRow] = {}
    for row in rows:
        if row.id in seen:
            raise DataError(f"{place}: question {shown(row.id)} comes twice")
        first = next(iter(seen.values()), row)
        if (row.search, row.num_blocks, row.model) != (first.search, first.num_blocks, first.model):
            raise DataError(
                f"{place}: questions {shown(first.id)} and {shown(row.id)} are of different searches ({first.search}, {row.search}); "
                "keep those of one model, reward and settings in a file"
            )
        seen[row.id] = row


def _whole_part(place: Path, search: str) -> tuple[list[PathRow], int]:
    """(rows of a file of ours, how many of its bytes stay). Raises DataError for what is none, or of another search."""
    content = _content(place)
    rows = list(_rows(place, content))
    _check(rows, place)
    if rows and rows[0].search != search:
        raise DataError(
            f"{place} holds paths of another search ({rows[0].search}, this one is {search}): another model, reward or settings; name "
            "another file"
        )
    last = content.rpartition(b"\n")[2]
    if _is_whole(last):
        return rows, len(content)
    if not rows and not _begins_a_row(last):
        raise DataError(f"{place} holds something else than paths of anabranch depth search; name another file")
    return rows, len(content) - len(last)


def _begins_a_row(line: bytes) -> bool:
    """Whether a line that was cut off may have become a row of `PathsFile.add`. A blank one may, as nothing is lost with it."""
    known = _ROW.match(line)
    start, rest = (_SECOND, line[known.end() :]) if known else (_FIRST, line)
    if not known and line.startswith(_FIRST):
        # Cut off within the id.
        return b'"' not in line[len(_FIRST) :].replace(b'\\"', b"")
    return not line.strip() or start.startswith(rest) or (known is not None and rest.startswith(start))


def _busy(place: Path) -> DataError:
    return DataError(f"{place} is being written by another process; wait for it, or name another file")


class PathsFile:
    """A file of paths that is being written, by one process at a time.

    Attributes:
        rows: those that there are, by id.
    """

    def __init__(self, path: Path, search: str, handle: Any) -> None:
        self._path, self._search, self._handle = path, search, handle
        self.rows: dict[str, PathRow] = {}

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, search: str) -> Iterator["PathsFile"]:
        """Open ``path`` to go on, or make it. A line that was cut off while it was written is removed.

        Raises DataError where another process is at it, by this name or another, it holds something else, or it is of another search
        (``search`` names it).
        """
        place = Path(path)
        # The file that is meant, whatever link leads there: two names of one file are one file.
        real = Path(os.path.realpath(place))
        with explained(place):
            real.parent.mkdir(parents=True, exist_ok=True)
        if real.exists() and not real.is_file():
            raise DataError(f"cannot write {place}: it is no file; name a file of JSON lines")
        with locked(real.with_name(f".{real.name}.lock")) as alone:
            if not alone:
                raise _busy(place)
            was_there = real.exists()
            rows, end = _whole_part(place, search) if was_there else ([], 0)
            with explained(place):
                # Not buffered: what a full disk does not take is not tried again when the file is closed.
                handle = real.open("ab", buffering=0)
            made = cls(place, search, handle)
            made.rows = {row.id: row for row in rows}
            try:
                with handle:
                    # A hard link has another name, and beside it another lock.
                    if not lock_open(handle.fileno()):
                        raise _busy(place)
                    with explained(place):
                        handle.truncate(end)
                        if rows and real.read_bytes()[-1:] != b"\n":
                            handle.write(b"\n")
                    yield made
            finally:
                # Nothing was found before something went wrong, or nothing was asked for.
                if not was_there and not made.rows:
                    real.unlink(missing_ok=True)

    def check_questions(self, content: Mapping[str, str]) -> None:
        """Raise DataError for a row whose question asked something else.

        Args:
            content: `Question.content` of each question, by id.
        """
        for row in self.rows.values():
            if content.get(row.id, row.question) != row.question:
                raise DataError(
                    f"{self._path} has question {shown(row.id)} with another prompt or answer than is asked now; name another file, or "
                    "give the question another id"
                )

    def add(self, row: PathRow) -> None:
        """Write a row; once this returns it stays, whatever happens to the process."""
        if row.id in self.rows:
            raise DataError(f"{self._path} has question {row.id!r} already")
        table = {**asdict(row), "path": None if row.path is None else list(row.path)}
        with explained(self._path):
            end = os.fstat(self._handle.fileno()).st_size
            left = memoryview(json.dumps(table, ensure_ascii=True).encode() + b"\n")
            try:
                while left:
                    left = left[self._handle.write(left) :]
                os.fsync(self._handle.fileno())
            except OSError:
                with suppress(OSError):
                    self._handle.truncate(end)
                raise
        self.rows[row.id] = row
