"""`KeptPool`: a pool whose replies are written down, so that nobody is asked the same twice; with an end of calls and of money.

    {"model": "small", "query": "Who wrote it?", "text": "Ann", "prompt_tokens": 31, "completion_tokens": 1, "usd": 0.0000035}
    {"model": "large", "query": "Who wrote it?", "error": "large did not answer within 60 seconds", "usd": 0.0012}

The file is what `RecordedPool` is made of (`read_table`): a table to train by later, or elsewhere. A call that failed is a line too, since
it may have cost something, and is made again when it is asked for again. What is not known to have cost less is taken for what it may
have cost at most: a call that failed, unless nobody bills it (``is_free`` of its error), and an answer that does not tell its tokens.
Every line says what it counts as (``usd``), whatever prices are later; those of older files are counted at today's.
"""

import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Protocol

from anabranch.errors import AnabranchError, BackendError, DataError, LimitError
from anabranch.files import explained, parse_json
from anabranch.locks import locked
from anabranch.routers.router_r1.environment import Price, Reply, RoutePool, folded

__all__ = ["KeptPool", "read_lines", "read_table"]

_FIELDS = ("model", "query", "text")
# For another process that asks with the same file.
_WAIT_S = 600.0
# For calls that are ended, before what they leave is not waited for.
_CLOSE_S = 10.0
# Between two times that they are ended.
_AGAIN_S = 0.1


# All that there are, for processes that are copies of this one.
_POOLS = weakref.WeakSet["KeptPool"]()


def _begin_in_copy() -> None:
    for pool in list(_POOLS):
        pool._begin_in_copy()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_copy)


class LivePool(RoutePool, Protocol):
    """A pool that says what a call may cost."""

    def most_usd(self, model: str, query: str) -> float:
        """In dollars."""

    def close(self) -> None:
        """End calls that are out, which fail, and free what it holds."""


class KeptPool:
    """See the module. A `RoutePool`.

    Attributes:
        prices: of all models, those among them that are only in ``known``.
        live: models that are there.
        calls, usd: made so far, by earlier runs with the same file too; in dollars, what they cost at most.

    Args:
        live: models that are there; None where all is known.
        path: of the file, which is gone on with; None writes nothing down.
        known: replies from elsewhere.
        prices: of models that are not there.
        max_calls, max_usd: of this file, earlier runs among it; a call whose most would pass the latter is not made. None for no limit.
        max_failures: calls in a row that may fail, each after its last try; None for any number.
        retries: how often a call is made again that failed by what may be over in a moment (``is_transient``); each try is a call of its
            own to limits and file.
        wait_s: before the first of them, in seconds; twice as long before each further one.
        over: set where nobody reads what is said any more, until `close` has ended that: meanwhile no call is begun (BackendError, for
            which nobody is billed), and none is made again. None for never.

    Raises DataError for a file that cannot be read.
    """

    def __init__(
        self,
        live: LivePool | None,
        path: str | Path | None = None,
        *,
        known: Mapping[tuple[str, str], Reply] | None = None,
        prices: Mapping[str, Price] | None = None,
        max_calls: int | None = None,
        max_usd: float | None = None,
        max_failures: int | None = None,
        retries: int = 0,
        wait_s: float = 1.0,
        over: threading.Event | None = None,
    ) -> None:
        self.live, self._path = live, None if path is None else Path(path)
        self.prices: dict[str, Price] = {**(prices or {}), **({} if live is None else live.prices)}
        self.max_calls, self.max_usd, self._max_failures = max_calls, max_usd, max_failures
        self._retries, self._wait_s, self._over = retries, wait_s, over or threading.Event()
        self.calls, self.usd = 0, 0.0
        self._known: dict[tuple[str, str], Reply] = {}
        for (model, query), reply in (known or {}).items():
            self._keep(model, query, reply)
        self._lock = threading.Condition()
        # Dollars that calls under way may cost; and those calls, which whoever asks the same waits for.
        self._reserved, self._failures = 0.0, 0
        self._coming: dict[tuple[str, str], Future[Reply]] = {}
        # Of the file: how far it is read, and what there was no room for; calls under way, while which no other process asks.
        self._read, self._num_lines, self._unwritten = 0, 0, b""
        self._under_way, self._held = 0, ExitStack()
        # How often it was closed: who began before that asks nobody any more. And closes under way.
        self._closed = 0
        self._closing, self._closing_lock = set[object](), threading.RLock()
        _POOLS.add(self)
        if self._path is not None:
            self._go_on(self._path)

    def reply(self, model: str, query: str) -> Reply:
        """See `RoutePool`.

        Raises LimitError where a call would pass a limit, or too many failed; DataError where a model is not there and was not recorded;
        BackendError for what a model fails with, where the pool is closed before the answer is there, and where another thread that
        asked the same was interrupted.
        """
        key, closed = (model, folded(query)), self._closed
        with self._lock:
            found = self._known.get((model, query)) or self._known.get(key)
            if found is not None:
                return found
            coming = self._coming.get(key)
            is_first = coming is None
            if coming is None:
                self._enter(closed)
                try:
                    # Another process may have asked it meanwhile.
                    found = self._known.get(key)
                    if found is None and self._is_ended(closed):
                        raise BackendError(f"{model} was not asked: the pool was closed")
                    most = self._room_for(model, query) if found is None else 0.0
                except BaseException:
                    self._leave()
                    raise
                if found is not None:
                    self._leave()
                    return found
                coming = self._coming[key] = Future()
        if not is_first:
            return coming.result()
        try:
            reply = self._tried(model, query, most, closed)
        except BaseException as error:
            # An interruption is of this thread alone.
            is_shared = isinstance(error, Exception)
            coming.set_exception(
                error if is_shared else BackendError(f"{model} did not answer: who asked it first was interrupted")
            )
            raise
        finally:
            with self._lock:
                del self._coming[key]
                self._leave()
        coming.set_result(reply)
        return reply

    def close(self) -> None:
        """End calls that are out, which count as any that failed, and free what models hold; asked again after that it begins anew.

        Whoever asks meanwhile, until the last of several that close it has done so, is refused (BackendError), which costs nothing.
        """
        # Not for ever: one may be a call of this very thread.
        end, is_done, this = time.monotonic() + _CLOSE_S, False, object()
        try:
            # In this order: whoever comes between the two began before.
            with self._closing_lock:
                self._closing.add(this)
                self._over.set()
            self._closed += 1
            while not is_done and time.monotonic() < end:
                # Again, for a call that there was room for before, and that came to a model only after it had been closed.
                if self.live is not None:
                    self.live.close()
                with self._lock:
                    is_done = self._lock.wait_for(lambda: not self._under_way, timeout=_AGAIN_S)
                    # Not sound models ended them.
                    self._failures = 0
        finally:
            with self._closing_lock:
                self._closing.discard(this)
                if not self._closing:
                    self._over.clear()

    def _begin_in_copy(self) -> None:
        """In a process that is a copy of another (fork): calls and closes that are under way there end nowhere here."""
        self._lock, self._closing_lock = threading.Condition(), threading.RLock()
        self._coming, self._under_way, self._reserved = {}, 0, 0.0
        # They write what they cost themselves.
        self._unwritten = b""
        self._held.close()
        if self._closing:
            self._closing.clear()
            self._over.clear()

    # Calls

    def _enter(self, closed: int) -> None:
        """Have the file alone from the first of the calls under way to the last, and take over what others added: limits are of all."""
        if self._is_ended(closed):
            raise BackendError("nobody was asked: the pool was closed")
        if self._path is not None and self.live is not None and not self._under_way:
            with explained(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            if not self._has_file(self._path, closed):
                raise LimitError(f"another process asks models with {self._path}; wait until it has ended")
            try:
                self._go_on(self._path, is_alone=True)
            except BaseException:
                self._held.close()
                raise
        self._under_way += 1

    def _is_ended(self, closed: int) -> bool:
        """Whether nobody is asked for who came when the pool had been closed so often."""
        return self._closed != closed or self._over.is_set()

    def _has_file(self, path: Path, closed: int) -> bool:
        """Wait for the file, which `close` ends."""
        end = time.monotonic() + _WAIT_S
        while not self._held.enter_context(locked(self._lock_file(path), wait_s=min(1.0, _WAIT_S))):
            self._held.close()
            if self._is_ended(closed):
                raise BackendError(f"nobody was asked, as another process had {path}, and the pool was closed")
            if time.monotonic() >= end:
                return False
        return True

    def _leave(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._held.close()
            self._lock.notify_all()

    @staticmethod
    def _lock_file(path: Path) -> Path:
        return path.with_name(f".{path.name}.lock")

    def _room_for(self, model: str, query: str) -> float:
        """Take a call into account; what it may cost."""
        live = self.live
        if live is None or model not in live.prices:
            raise DataError(f"{model} was not recorded with this question")
        most = live.most_usd(model, query)
        if self.max_calls is not None and self.calls >= self.max_calls:
            raise LimitError(f"the pool was asked {self.calls:,} times, which is all that max_calls allows")
        if self.max_usd is not None and self.usd + self._reserved + most > self.max_usd:
            raise LimitError(
                f"the pool has cost ${self.usd:.4f}, and a further call may cost ${most:.4f}, which would pass max_usd ({self.max_usd:g})"
            )
        self.calls += 1
        self._reserved += most
        return most

    def _tried(self, model: str, query: str, most: float, closed: int) -> Reply:
        """A call for which there is room, and further ones where it failed by what may be over in a moment, as far as there is room.

        No further one is made once the pool was closed more than ``closed`` times.
        """
        for number in range(self._retries):
            try:
                return self._called(model, query, most, is_last=False)
            except LimitError:
                raise
            except AnabranchError as error:
                if not error.is_transient or self._over.wait(self._wait_s * 2**number):
                    raise
                with self._lock:
                    if self._is_ended(closed):
                        raise
                    most = self._room_for(model, query)
        return self._called(model, query, most, is_last=True)

    def _called(self, model: str, query: str, most: float, *, is_last: bool) -> Reply:
        assert self.live is not None
        row: dict[str, Any] = {"model": model, "query": query}
        try:
            reply = self.live.reply(model, query)
        # An interruption, too: the call is under way.
        except BaseException as error:
            usd = 0.0 if isinstance(error, AnabranchError) and error.is_free else most
            with self._lock:
                self._charge(usd, most)
                is_final = is_last or not (isinstance(error, AnabranchError) and error.is_transient)
                self._failures += is_final
                self._write(row | {"error": str(error)[:200], "usd": usd})
                is_enough = self._max_failures is not None and self._failures >= self._max_failures
                if is_final and is_enough and isinstance(error, AnabranchError):
                    raise LimitError(
                        f"the pool failed {self._failures} times in a row; mend it, and resume: {error}"
                    ) from error
            raise
        counts = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        with self._lock:
            usd = self._cost(model, reply) if reply.is_counted else most
            self._charge(usd, most)
            self._failures = 0
            self._keep(model, query, reply)
            self._write(row | {"text": reply.text} | (counts if reply.is_counted else {}) | {"usd": usd})
        return reply

    def _charge(self, usd: float, reserved: float) -> None:
        """A call has ended, for which so much was reserved."""
        self._reserved -= reserved
        self.usd += usd

    def _cost(self, model: str, reply: Reply) -> float:
        price = self.prices.get(model, Price(0.0))
        return (price.prompt * reply.prompt_tokens + price.completion * reply.completion_tokens) / 1e6

    def _keep(self, model: str, query: str, reply: Reply) -> None:
        self._known[model, query] = self._known[model, folded(query)] = reply

    # The file

    def _write(self, row: Mapping[str, Any]) -> None:
        """Raises LimitError where it cannot be written: nobody is asked what cannot be kept. It is written with the next line."""
        if self._path is None:
            return
        self._unwritten += (json.dumps(row) + "\n").encode()
        try:
            with explained(self._path), open(self._path, "ab", buffering=0) as file:
                left = self._unwritten
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError:
                    # No half a line that another is written behind.
                    os.truncate(self._path, self._read)
                    raise
        except AnabranchError as error:
            raise LimitError(f"what models say cannot be kept: {error}") from error
        self._read += len(self._unwritten)
        self._num_lines += self._unwritten.count(b"\n")
        self._unwritten = b""

    def _go_on(self, path: Path, *, is_alone: bool = False) -> None:
        """Take over what other runs added, and drop a last line that none could finish: whoever is not alone here may be writing it."""
        if not path.exists():
            return
        try:
            with open(path, "rb") as file:
                file.seek(self._read)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                with nullcontext(True) if is_alone else locked(self._lock_file(path)) as is_ours:
                    if is_ours:
                        os.truncate(path, self._read + len(whole))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}") from None
        first = self._num_lines + 1
        for number, row in _objects(whole, path, first):
            self.calls += 1
            is_failed = isinstance(row.get("error"), str)
            usd = self._most_of_failed(row) if is_failed else 0.0
            if not is_failed:
                key, reply = _row(row, number, path)
                usd = self._cost(key[0], reply)
                self._keep(*key, reply)
            self.usd += _usd(row, number, path) if "usd" in row else usd
        self._read += len(whole)
        self._num_lines += whole.count(b"\n")

    def _most_of_failed(self, row: Mapping[str, Any]) -> float:
        """Of a line that was written before they told what a call may have cost."""
        model, query = row.get("model"), row.get("query")
        if self.live is None or not isinstance(model, str) or not isinstance(query, str):
            return 0.0
        return self.live.most_usd(model, query) if model in self.live.prices else 0.0


def read_lines(path: str | Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a file of JSON lines, with the numbers of their lines. Raises DataError with the line that is none."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    yield from _objects(data, path, 1)


def _objects(data: bytes, path: str | Path, first: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        text = data.decode("utf-8")
    except ValueError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(text.split("\n"), first):
        if not line.strip():
            continue
        try:
            found = parse_json(line)
        except ValueError as error:
            raise DataError(f"line {number} of {path} is no JSON: {error}") from None
        if not isinstance(found, dict):
            raise DataError(f"line {number} of {path} is a {type(found).__name__}; it must be an object")
        yield number, found


def read_table(path: str | Path) -> dict[tuple[str, str], Reply]:
    """What each model said to each question; calls that failed are left out. Raises DataError for a file that is damaged."""
    rows = ((number, row) for number, row in read_lines(path) if not isinstance(row.get("error"), str))
    return dict(_row(row, number, path) for number, row in rows)


def _usd(line: Mapping[str, Any], number: int, path: str | Path) -> float:
    usd = line["usd"]
    if type(usd) not in (int, float) or not 0 <= usd <= sys.float_info.max:
        raise DataError(f"line {number} of {path} has usd {usd!r:.40}; it must be a number of dollars of at least 0")
    return float(usd)


def _row(line: Mapping[str, Any], number: int, path: str | Path) -> tuple[tuple[str, str], Reply]:
    wrong = [name for name in _FIELDS if not isinstance(line.get(name), str)]
    if wrong:
        raise DataError(f"line {number} of {path} has no {wrong[0]} that is a text")
    words = {"prompt_tokens": len(line["query"].split()), "completion_tokens": len(line["text"].split())}
    counts = {name: line.get(name, count) for name, count in words.items()}
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count <= 10**9:
            raise DataError(f"line {number} of {path} has {name} {count!r}; it must be a whole number of at least 0")
    return (line["model"], line["query"]), Reply(line["text"], **counts)
