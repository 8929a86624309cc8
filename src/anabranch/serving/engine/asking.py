"""`Asking`: what requests ask of a pool, as terms of its experts; an endpoint that fails or is slow has no part in them and fails nobody.

While an endpoint that makes vectors or writes instructions does not answer, or is later than a request waits for it, requests go by their
tokens alone (a = 0). What comes late is for the next request with the same query. A query that an endpoint refuses, as being too long, goes
by its tokens for itself: the endpoint is asked by others as before. So few calls of a pool are under way at a time that one that is slow
takes no more of a server than one that is not: who comes beyond these goes by its tokens at once.
"""
# Shapes: E experts

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.adapters.glider import GliderPool, PoolSettings
from anabranch.config import to_dict
from anabranch.errors import AnabranchError, DataError
from anabranch.serving.core.client import BusyError

__all__ = ["MOST_CALLS", "MOST_LATE", "REST_S", "Asking", "Either", "Terms", "Threads"]

logger = logging.getLogger(__name__)

# Seconds in which nobody asks an endpoint that has failed, or was late again and again, and in which one refusal of a query is told.
REST_S = 10.0
# Calls of a pool that are under way at a time, those among them for which nobody waits any longer; each has a thread, and one of a request.
MOST_CALLS = 8
# Requests in a row that waited in vain, after which an endpoint is left alone.
MOST_LATE = 8


@dataclass(frozen=True)
class Terms:
    """What a query says of each expert.

    Attributes:
        instruction: what was compared; None for nothing.
        a: the weight of its cosines; 0 where nothing was compared.
        cosines: of the E experts.
    """

    instruction: str | None
    a: float
    cosines: tuple[float, ...]

    @classmethod
    def nothing(cls, num_experts: int) -> "Terms":
        """Of a query of which nothing is known."""
        return cls(None, 0.0, (0.0,) * num_experts)

    @property
    def bias(self) -> tuple[float, ...] | None:
        """What is added to the logits of each; None for nothing."""
        bias_E = (self.a * np.asarray(self.cosines)).astype(np.float32)
        return tuple(bias_E.tolist()) if bias_E.any() else None


class Threads(Executor):
    """Each call in a thread of its own, for calls that wait for somebody else; the end of the process does not wait for them.

    Args:
        most: calls at a time; None for as many as come.
    """

    def __init__(self, most: int | None = None) -> None:
        self._free = None if most is None else threading.BoundedSemaphore(most)

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Begin. Raises BusyError where there are as many calls as there may be."""
        if self._free is not None and not self._free.acquire(blocking=False):
            raise BusyError("as many calls to an endpoint are under way as there may be")
        made: Future[Any] = Future()

        def run() -> None:
            try:
                found = work(*args, **kwargs)
            except BaseException as error:
                self._let_go()
                made.set_exception(error)
            else:
                # Before that is known: who hears of it may call again.
                self._let_go()
                made.set_result(found)

        try:
            threading.Thread(target=run, name="anabranch endpoint of a pool", daemon=True).start()
        except BaseException:
            self._let_go()
            raise
        return made

    def _let_go(self) -> None:
        if self._free is not None:
            self._free.release()


class Either(Executor):
    """Each call by one executor, or by another, as is known when it begins."""

    def __init__(self, is_first: Callable[[], bool], first: Executor, second: Executor) -> None:
        self._is_first, self._first, self._second = is_first, first, second

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Begin."""
        return (self._first if self._is_first() else self._second).submit(work, *args, **kwargs)


class Asking:
    """Asks one pool, from any thread.

    Args:
        pool: whose experts are on no model.
        settings: of its file.
        place: what the log calls it.
        rest_s: see `REST_S`.

    At most `MOST_CALLS` calls to endpoints are under way, and an endpoint that made `MOST_LATE` requests in a row wait in vain rests as one
    that failed does.
    """

    def __init__(self, pool: GliderPool, settings: PoolSettings, place: str, *, rest_s: float = REST_S) -> None:
        self.pool, self._settings, self._place, self._rest_s = pool, settings, place, rest_s
        self._lock = threading.Lock()
        # Whether it was told that something is wrong; until when no endpoint is asked, and no refusal is told; how many requests in a row
        # waited in vain.
        self._has_told, self._rests_until, self._told_until, self._num_late = False, 0.0, 0.0, 0
        self._threads = Threads(MOST_CALLS)

    @property
    def compares(self) -> bool:
        """Whether what a request asks for has a part in who is chosen."""
        return self.pool.config.instruction and bool(self.pool.matcher.members()[0])

    @property
    def is_remote(self) -> bool:
        """Whether endpoints are asked, which may take long."""
        return self._settings.is_remote

    @property
    def chosen_by(self) -> tuple[object, ...]:
        """What beside their numbers decides which experts are chosen: how, and what queries are compared with, and by whom, if they are."""
        if not self.pool.config.instruction:
            return to_dict(self.pool.config), None
        named = {what: getattr(self._settings, what) for what in ("embedder", "writer")}
        by = {
            what: said if isinstance(said, str) else (said.url, said.model)
            for what, said in named.items()
            if said not in (None, "tfidf")
        }
        return (to_dict(self.pool.config), list(self.pool.matcher.texts.values()), *([by] if by else []))

    def terms(self, query: str | None, instruction: str | None = None, *, asker: str = "") -> Terms | None:
        """What is asked for, in the words of a request: its ``query``, or an ``instruction`` that was told; None where nobody compares it.

        What endpoints made of it is known the next time to the same ``asker`` alone (the salt of prefixes, which are kept apart likewise).
        Whatever goes wrong is told in the log, once until it is over; the terms are 0 then.
        """
        if not self.compares or (query is None and instruction is None):
            return None
        try:
            if self.is_remote and not self._has_come(query or "", instruction, asker):
                return Terms.nothing(len(self.pool))
            a, cosine_E = self.pool.terms(query or "", instruction, asker=asker)
            text, _ = self.pool.matcher.instruct(query or "", instruction, asker=asker)
            found = Terms(text, a, tuple(cosine_E.tolist()))
        except Exception as error:
            self._failed(error)
            return Terms.nothing(len(self.pool))
        if not self.is_remote:
            self._has_told = False
        return found

    def _has_come(self, query: str, instruction: str | None, asker: str) -> bool:
        """Whether what endpoints make of a query is there, or comes in time."""
        matcher = self.pool.matcher
        if matcher.knows(query, instruction, asker=asker):
            return True
        with self._lock:
            if time.monotonic() < self._rests_until:
                return False
        try:
            call = self._threads.submit(self._instruct, query, instruction, asker)
        except BusyError:
            return False
        try:
            call.result(self._settings.wait_s)
        except Exception:
            # It failed, which is told already, or is late.
            if not call.done():
                self._was_late()
            return False
        with self._lock:
            self._has_told, self._num_late = False, 0
        return True

    def _instruct(self, query: str, instruction: str | None, asker: str) -> None:
        try:
            self.pool.matcher.instruct(query, instruction, asker=asker)
        except Exception as error:
            self._failed(error)
            raise
        with self._lock:
            # What comes late again and again is not over when it comes.
            if self._num_late < MOST_LATE:
                self._has_told = False

    def _was_late(self) -> None:
        with self._lock:
            # Where nobody waits, all is for the next request, and nothing late.
            self._num_late += bool(self._settings.wait_s)
            is_slow = self._num_late >= MOST_LATE
        if is_slow:
            times = f"{self._num_late} requests in a row"
            self._failed(
                DataError(
                    f"what endpoints make of a query came later than wait_s ({self._settings.wait_s:g} s) for {times}"
                )
            )

    def _failed(self, error: BaseException) -> None:
        why = str(error) if isinstance(error, AnabranchError) else f"{type(error).__name__}: {error}"
        now, is_of_one = time.monotonic(), isinstance(error, AnabranchError) and error.is_of_this_call
        with self._lock:
            if is_of_one:
                # Whoever asks such things is not to fill the log either.
                has_told, self._told_until = now < self._told_until, max(self._told_until, now + self._rest_s)
            else:
                self._rests_until = now + self._rest_s if self.is_remote else 0.0
                has_told, self._has_told = self._has_told, True
        if not has_told:
            whose = "a request goes by its" if is_of_one else "until that is over its requests go by their"
            logger.warning("pool %s: %s; %s tokens alone", self._place, why, whose)
