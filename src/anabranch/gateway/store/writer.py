"""The one thread that writes: jobs from the event loop, gathered into few transactions (group commit).

What somebody waits for is written at once, with all else that has gathered; the rest within `GATHER_S`. A job is told done when its
transaction is committed. Nothing that the database or the system does ends the thread:

    the database cannot write now   what is to be written is kept and tried again, at last every second; who waits (a reservation, a change)
                                    is refused after `PATIENCE_S`
    a job is itself at fault        it fails alone; but the settlement of a request is kept, and tried again until the store is closed

What is kept is bounded: there are no more settlements than reservations that were granted, and beyond `MOST_ROWS` or `MOST_BYTES` rows that
cost nobody anything (of refused requests, decisions, texts) are left out, which the log says.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from anabranch.errors import AnabranchError, CapacityError
from anabranch.gateway.store.batch import apply, recover
from anabranch.gateway.store.database import BusyError, Database
from anabranch.gateway.store.jobs import Append, Do, Insert, Job, Reserve, Settle, Unmake
from anabranch.web.turns import plainly

logger = logging.getLogger(__name__)
GATHER_S = 0.05
GATHER_ROWS = 256
TICK_S = 1.0

# Between looks at the other replicas.
WATCH_S = 3.0

# Of those who wait.
PATIENCE_S = 5.0
RETRY_S = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)

# Of trying, once told to close.
GIVE_UP_S = 10.0

# Waiting to be written, the bytes those of texts and decisions.
MOST_ROWS = 20_000
MOST_BYTES = 64 << 20

# What passes: the database is busy, read-only, full or gone, or the process is out of descriptors or memory.
_PASSING = (BusyError, OSError, MemoryError)


class Writer:
    """See the module. Jobs are given by the thread of one event loop.

    Attributes:
        trouble: why the database cannot write now; "" while it can.

    Args:
        database: open.
        now_us: the time.
        watches: settle what other replicas leave behind.
    """

    def __init__(self, database: Database, now_us: Callable[[], int], watches: bool) -> None:
        self._database, self._now_us, self._watches = database, now_us, watches
        self._jobs: deque[Job] = deque()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._is_woken = self._is_timed = self._closes = False
        self._closed_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watched_s = time.monotonic()
        self.trouble = ""
        # Given and not yet told; of the loop's thread alone.
        self._num_rows = self._num_bytes = self._left_out = 0
        # Settlements that fail by themselves; of the writer's thread alone.
        self._aside: list[Job] = []
        self._connection = database.connect()
        # From now on others see that the database is in use. What it cannot do now, the thread tries again.
        with suppress(BusyError):
            self._connection.rows("SELECT 1")
        self._thread = threading.Thread(target=self._run, name="anabranch-store", daemon=True)
        self._thread.start()

    async def done(self, job: Job) -> Any:
        """Have a job done at once, and wait for it: what came of it.

        Raises what it fails of, and CapacityError if the database could not do it within `PATIENCE_S`. Work that was begun and goes on,
        such as giving room back, is waited for.
        """
        future = self.give(job, at_once=True)
        # Seen, whoever waits still when it comes.
        future.add_done_callback(_seen)
        while not (await asyncio.wait((future,), timeout=PATIENCE_S))[0]:
            if isinstance(job, Do) and job.is_tried and not self.trouble:
                continue
            job.is_withdrawn = True
            raise self._refusal()
        return future.result()

    def give(self, job: Job, *, at_once: bool) -> "asyncio.Future[Any]":
        """Have a job done; the future is done when it is."""
        loop = asyncio.get_running_loop()
        self._loop = loop
        job.future = loop.create_future()
        if isinstance(job, Append | Insert) and (self._num_rows >= MOST_ROWS or self._num_bytes >= MOST_BYTES):
            self._leave_out(job.future)
            return job.future
        self._num_rows += 1
        if isinstance(job, Insert):
            self._num_bytes += _size(job)
        self._jobs.append(job)
        if at_once or len(self._jobs) >= GATHER_ROWS:
            self._rouse()
        elif not self._is_timed:
            self._is_timed = True
            loop.call_later(GATHER_S, self._rouse)
        return job.future

    def _leave_out(self, future: "asyncio.Future[Any]") -> None:
        if not self._left_out:
            logger.error(
                "%d rows wait to be written (%s): rows that cost nobody anything are left out until there is room again",
                self._num_rows,
                self.trouble or "the database is slow",
            )
        self._left_out += 1
        future.set_exception(self._refusal())
        # Seen, for whoever does not look.
        future.exception()

    def _refusal(self) -> CapacityError:
        return CapacityError(f"the store cannot write: {self.trouble or 'it is busy with other work'}")

    def _rouse(self) -> None:
        self._is_timed = False
        if not self._is_woken:
            self._is_woken = True
            self._wake.put(None)

    def _deliver(self, jobs: Sequence[Job]) -> None:
        """Of the loop's thread: tell who waits."""
        self._num_rows -= len(jobs)
        for job in jobs:
            if isinstance(job, Insert):
                self._num_bytes -= _size(job)
        if self._left_out and self._num_rows < MOST_ROWS // 2 and self._num_bytes < MOST_BYTES // 2:
            logger.error("there is room again; %d rows were left out, which cost nobody anything", self._left_out)
            self._left_out = 0
        for job in jobs:
            future = job.future
            if future is None or future.done():
                continue
            if job.error is not None:
                future.set_exception(job.error)
            else:
                future.set_result(job.result)

    def close(self) -> None:
        """Write what is there, and end. Blocks; call it from another thread than the event loop's."""
        self._closes, self._closed_s = True, time.monotonic()
        self._wake.put(None)
        self._thread.join()

    # The rest runs in the thread.

    def _run(self) -> None:
        while not (self._closes and not self._jobs):
            try:
                self._wake.get(timeout=TICK_S)
            except Empty:
                pass
            # Before jobs are taken: one that comes later wakes again.
            self._is_woken = False
            while self._jobs:
                self._write(self._taken())
                self._watch()
            self._watch()
        self._write_aside()
        for job in self._aside:
            assert isinstance(job, Settle)
            logger.error(
                "request %s is not settled, at %d nano-dollars: %s", job.row.request_id, job.row.cost_nano, job.error
            )
        self._tell(self._aside)
        self._connection.close()

    def _taken(self) -> list[Job]:
        """Jobs for one transaction: a `Do` alone, or all up to the next one."""
        taken = [self._jobs.popleft()]
        while (
            len(taken) < GATHER_ROWS
            and self._jobs
            and not isinstance(taken[0], Do)
            and not isinstance(self._jobs[0], Do)
        ):
            taken.append(self._jobs.popleft())
        return taken

    def _write(self, jobs: list[Job]) -> None:
        """Do jobs in one transaction, however long it takes until the database can; those that are at fault fail alone."""
        tries = 0
        while jobs := self._wanted(jobs):
            try:
                self._once(jobs)
            except _PASSING as error:
                self._rollback()
                self._troubled(error)
                time.sleep(RETRY_S[min(tries, len(RETRY_S) - 1)])
                tries += 1
                continue
            except Exception as error:
                self._rollback()
                # One of them is at fault: find it.
                if len(jobs) > 1:
                    for job in jobs:
                        self._write([job])
                    return
                self._failed(jobs[0], error)
                return
            self._works()
            self._tell(jobs)
            return

    def _once(self, jobs: list[Job]) -> None:
        first = jobs[0]
        for job in jobs:
            job.is_tried = True
        if not isinstance(first, Do):
            apply(self._connection, jobs, self._database.replica, self._now_us())
            return
        if first.in_transaction:
            self._connection.begin()
        # Whatever it raises fails it alone: the thread is everybody's.
        work, connection = first.work, self._connection
        first.result = plainly(lambda: work(connection))
        if first.in_transaction:
            self._connection.commit()

    def _rollback(self) -> None:
        """Nothing of what failed stays. Where not even that can be said, the connection ends, and with it what it has begun."""
        try:
            self._connection.rollback()
        except Exception as error:
            logger.warning("the store's connection is given up: %s", error)
            old, self._connection = self._connection, self._database.connect()
            try:
                old.close()
            except Exception as again:
                logger.warning("the store's connection could not be closed: %s", again)

    def _wanted(self, jobs: list[Job]) -> list[Job]:
        """What is still to be done. The others are told that it cannot be."""
        ends = self._closes and bool(self.trouble) and time.monotonic() - self._closed_s > GIVE_UP_S
        gone = [job for job in jobs if ends or job.is_withdrawn]
        if not gone:
            return jobs
        for job in gone:
            job.error = self._refusal()
        if ends:
            logger.error("the store could not write %d rows before it closed: %s", len(gone), self.trouble)
        self._tell(gone)
        kept = [job for job in jobs if job.error is None or job not in gone]
        # Whether a commit whose answer was lost had happened is not known: if so, take it back.
        back: list[Job] = [Unmake(job.reservation) for job in gone if isinstance(job, Reserve) and job.is_tried]
        return kept if ends else kept + back

    def _troubled(self, error: BaseException) -> None:
        if not self.trouble:
            logger.warning("the store cannot write (%s); it is tried again", error)
        self.trouble = str(error) or type(error).__name__

    def _works(self) -> None:
        if self.trouble:
            logger.warning("the store can write again")
            self.trouble = ""

    def _failed(self, job: Job, error: Exception) -> None:
        """A job that fails by itself. Money is not lost for it."""
        if isinstance(job, Settle):
            if not job.is_aside:
                logger.error("request %s cannot be settled yet", job.row.request_id, exc_info=error)
            job.error, job.is_aside = error, True
            self._aside.append(job)
            return
        if not isinstance(error, AnabranchError):
            logger.error("the store could not write %s", type(job).__name__, exc_info=error)
        job.error = error
        self._tell([job])

    def _write_aside(self) -> None:
        aside, self._aside = self._aside, []
        for job in aside:
            self._write([job])

    def _tell(self, jobs: Sequence[Job]) -> None:
        # What nobody gave, nobody waits for.
        jobs = [job for job in jobs if job.future is not None]
        if not jobs or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._deliver, jobs)
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            logger.debug("nobody waits for %d jobs", len(jobs))

    def _watch(self) -> None:
        """From time to time: settlements that were put aside, and what others left behind."""
        now_s = time.monotonic()
        if now_s - self._watched_s < WATCH_S:
            return
        self._watched_s = now_s
        self._write_aside()
        if not self._watches:
            return
        try:
            count = recover(self._database, self._connection, self._now_us())
        except Exception as error:
            self._rollback()
            is_known = isinstance(error, _PASSING)
            logger.warning(
                "the store cannot look after other replicas: %s", error, exc_info=None if is_known else error
            )
        else:
            if count:
                logger.warning("settled %d requests that another process left behind", count)


def _seen(done: "asyncio.Future[Any]") -> None:
    if not done.cancelled():
        done.exception()


def _size(job: Insert) -> int:
    """Bytes, about, of the texts of a job."""
    return sum([len(value) for value in job.row if isinstance(value, str)])
