"""The one thread that writes: jobs from the event loop, gathered into few transactions (group commit).

What somebody waits for is written at once, with all else that has gathered; the rest within `GATHER_S`. A job is told done when its
transaction is committed. While the database cannot write, reservations are refused after a while; all else is kept and tried again.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from anabranch.errors import CapacityError
from anabranch.gateway.store.batch import Do, Grow, Job, Reserve, Settle, apply, recover
from anabranch.gateway.store.database import BusyError, Connection, Database
from anabranch.gateway.store.records import LedgerRow

logger = logging.getLogger(__name__)
GATHER_S = 0.05
GATHER_ROWS = 256
TICK_S = 1.0

# Between looks at the other replicas.
WATCH_S = 3.0

# Of those who wait for a reservation.
PATIENCE_S = 5.0
RETRY_S = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)

# Of trying, once told to close.
GIVE_UP_S = 10.0


class Writer:
    """See the module. Jobs are given by the thread of one event loop.

    Args:
        database: open.
        now_us: the time.
        watches: settle what other replicas leave behind, and say that this one is alive.
    """

    def __init__(self, database: Database, now_us: Callable[[], int], watches: bool) -> None:
        self._database, self._now_us, self._watches = database, now_us, watches
        self._jobs: deque[Job] = deque()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._is_woken = self._is_timed = self._closes = False
        self._closed_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watched_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="anabranch-store", daemon=True)
        self._thread.start()

    def give(self, job: Job, *, at_once: bool) -> "asyncio.Future[object]":
        """Have a job done; the future is done when it is."""
        loop = asyncio.get_running_loop()
        self._loop = loop
        job.future = loop.create_future()
        job.asked_s = time.monotonic()
        self._jobs.append(job)
        if at_once or len(self._jobs) >= GATHER_ROWS:
            self._rouse()
        elif not self._is_timed:
            self._is_timed = True
            loop.call_later(GATHER_S, self._rouse)
        return job.future

    def _rouse(self) -> None:
        self._is_timed = False
        if not self._is_woken:
            self._is_woken = True
            self._wake.put(None)

    @property
    def is_idle(self) -> bool:
        """Everything given was taken up."""
        return not self._jobs

    def close(self) -> None:
        """Write what is there, and end. Blocks; call it from another thread than the event loop's."""
        self._closes, self._closed_s = True, time.monotonic()
        self._wake.put(None)
        self._thread.join()

    # The rest runs in the thread.

    def _run(self) -> None:
        connection = self._database.connect()
        try:
            while not (self._closes and not self._jobs):
                try:
                    self._wake.get(timeout=TICK_S)
                except Empty:
                    pass
                # Before jobs are taken: one that comes later wakes again.
                self._is_woken = False
                while self._jobs:
                    self._write(connection, self._taken())
                    self._watch(connection)
                self._watch(connection)
        finally:
            connection.close()

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

    def _write(self, connection: Connection, jobs: list[Job]) -> None:
        tries = 0
        while jobs:
            try:
                self._once(connection, jobs)
                break
            except BusyError as error:
                connection.rollback()
                jobs = self._kept(jobs, error)
                time.sleep(RETRY_S[min(tries, len(RETRY_S) - 1)])
                tries += 1
            except Exception as error:
                connection.rollback()
                # One of them is at fault: find it.
                if len(jobs) > 1:
                    for job in jobs:
                        self._write(connection, [job])
                    return
                logger.exception("the store could not write %s", type(jobs[0]).__name__)
                jobs[0].error = error
                break
        self._tell(jobs)

    def _once(self, connection: Connection, jobs: list[Job]) -> None:
        first = jobs[0]
        if not isinstance(first, Do):
            apply(connection, jobs, self._database.replica, self._now_us())
            return
        if first.in_transaction:
            connection.begin()
        first.result = first.work(connection)
        if first.in_transaction:
            connection.commit()

    def _kept(self, jobs: list[Job], error: BusyError) -> list[Job]:
        """What is tried again; the others are told that it cannot be."""
        now_s = time.monotonic()
        ends = self._closes and now_s - self._closed_s > GIVE_UP_S
        late = [
            job for job in jobs if ends or (isinstance(job, Reserve | Grow | Do) and now_s - job.asked_s > PATIENCE_S)
        ]
        for job in late:
            job.error = CapacityError(f"the store cannot write: {error}")
        if ends:
            logger.error("the store could not write %d rows before it closed: %s", len(late), error)
        elif late or now_s - jobs[0].asked_s > PATIENCE_S:
            logger.warning("the store cannot write (%s); trying again", error)
        self._tell(late)
        gone = set(map(id, late))
        kept = [job for job in jobs if id(job) not in gone]
        # Whether a commit whose answer was lost had happened is not known: if so, take it back.
        if not ends:
            kept += [Settle(job.reservation, _unmade(job)) for job in late if isinstance(job, Reserve)]
        return kept

    def _tell(self, jobs: Sequence[Job]) -> None:
        if not jobs or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(_deliver, jobs)
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            logger.debug("nobody waits for %d jobs", len(jobs))

    def _watch(self, connection: Connection) -> None:
        now_s = time.monotonic()
        if not self._watches or now_s - self._watched_s < WATCH_S:
            return
        self._watched_s = now_s
        try:
            count = recover(self._database, connection, self._now_us())
            if count:
                logger.warning("settled %d requests that another process left behind", count)
        except BusyError as error:
            connection.rollback()
            logger.warning("the store cannot look after other replicas: %s", error)


def _unmade(job: Reserve) -> LedgerRow:
    return LedgerRow(
        request_id=job.reservation.request_id,
        requested=job.requested,
        strategy=job.strategy,
        status="refused",
        code="store",
    )


def _deliver(jobs: Sequence[Job]) -> None:
    for job in jobs:
        future = job.future
        if future is None or future.done():
            continue
        if job.error is not None:
            future.set_exception(job.error)
        else:
            future.set_result(job.result)
