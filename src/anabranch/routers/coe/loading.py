"""The threads that load experts: up tier by tier, room taken before loading begins, and nothing left behind by what fails half-way."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from anabranch.errors import CheckpointError
from anabranch.routers.coe.lease import Expert, Job, Lease, signature_of
from anabranch.routers.coe.shelf import Shelf
from anabranch.routers.coe.tier import Resident, Tier

log = logging.getLogger(__name__)


class Loading(Shelf):
    """See the module.

    Args:
        load, to_device, workers, grace_s: see `anabranch.routers.coe.store.ExpertStore`.
        tiers, on_evict, clock: see `Shelf`.
    """

    def __init__(
        self,
        load: Callable[[Path], Any],
        to_device: Callable[[Any], Any] | None,
        *,
        workers: int,
        grace_s: float,
        tiers: dict[str, Tier],
        on_evict: Callable[[str, str, Any], None] | None,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(tiers, on_evict, clock)
        self._read, self._copy, self._grace_s = load, to_device, grace_s
        self._threads = [
            threading.Thread(target=self._work, name=f"experts-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._is_open and not self._queue:
                    self._changed.wait()
                if not self._is_open:
                    return
                job = self._jobs[self._queue.popleft()]
                job.has_begun = True
            try:
                self._run(job)
            except BaseException as error:
                self._fail(job, error)

    def _run(self, job: Job) -> None:
        """Bring an expert up tier by tier, then hand it to all that wait."""
        expert = self._experts[job.name]
        held: list[Resident] = []
        with self._changed:
            below = self._tiers["host"].ready(job.name)
            if below is not None:
                below.pins += 1
                held.append(below)
        try:
            if below is None:
                below = self._bring(job, self._tiers["host"], lambda: self._whole(expert, job.name), held)
            found = below
            if below is not None and self._copy is not None:
                value, copy = below.value, self._copy
                found = self._bring(job, self._top, lambda: copy(value), held)
                value = None
            self._hand_out(job, found, held)
        finally:
            self._let_go(held)

    def _let_go(self, held: list[Resident]) -> None:
        """Take the loading thread's own pins back."""
        while held:
            self._unpin(held.pop())

    def _bring(self, job: Job, tier: Tier, make: Callable[[], Any], held: list[Resident]) -> Resident | None:
        """Load into a tier; the resident is pinned, and noted in ``held``. None if nobody waits and there is no room."""
        num_bytes = self._experts[job.name].bytes_in[tier.name]
        with self._changed:
            while (gone := tier.victims(num_bytes, self._usage(), self._clock())) is None:
                if not self._is_open or not job.is_wanted():
                    return None
                self._changed.wait()
            for name in gone:
                self._evict(tier, name)
            resident = tier.begin(job.name, num_bytes)
        started = self._clock()
        try:
            value = make()
        except BaseException:
            with self._changed:
                tier.drop(job.name)
                self._changed.notify_all()
            raise
        with self._changed:
            now_s = self._clock()
            resident.value, resident.load_s, resident.since_s = value, now_s - started, now_s
            resident.is_ready, resident.pins = True, 1
            held.append(resident)
            self._moved[tier.name]["bytes"] += num_bytes
            self._moved[tier.name]["loads"] += 1
        return resident

    def _whole(self, expert: Expert, name: str) -> Any:
        """Read a checkpoint whose files do not change meanwhile."""
        signature = signature_of(expert.path)
        value = self._read(expert.path) if signature == expert.signature else None
        if not signature == signature_of(expert.path) == expert.signature:
            raise CheckpointError(
                f"the files of expert {name!r} in {expert.path} are not those that were added; add it again when they are whole"
            )
        return value

    def _hand_out(self, job: Job, resident: Resident | None, held: list[Resident]) -> None:
        """Give leases to all that wait. None: nobody waited and there was no room; if somebody came since, try again.

        The thread's own pins (``held``) go in the same breath: whoever gives a lease back may remove the expert at once.
        """
        leases: list[tuple[Future[Lease], Lease]] = []
        with self._changed:
            if resident is None and job.is_wanted() and self._is_open:
                job.has_begun = False
                self._enqueue(job.name)
                return
            self._jobs.pop(job.name, None)
            live = [(future, since) for future, since in job.waiting if future.set_running_or_notify_cancel()]
            if resident is None:
                self._counts["prefetch_dropped"] += bool(job.ahead)
            else:
                now_s = self._clock()
                self._counts["switches"] += bool(live)
                self._counts["prefetched"] += bool(job.ahead)
                if job.ahead and job.is_spared:
                    resident.spare_until_s = now_s + self._grace_s
                self._switch_s.extend(now_s - since for _, since in live)
                leases = [(future, self._leased(job.name, resident)) for future, _ in live]
            self._let_go(held)
        for future, lease in leases:
            future.set_result(lease)
        job.finish_ahead()

    def _fail(self, job: Job, error: BaseException) -> None:
        """Tell all that wait; the next request tries again."""
        with self._changed:
            self._jobs.pop(job.name, None)
            self._counts["failed"] += 1
            self._counts["prefetch_dropped"] += bool(job.ahead)
            live = [future for future, _ in job.waiting if future.set_running_or_notify_cancel()]
        if job.ahead:
            log.warning("fetching expert %s ahead failed: %s", job.name, error)
        for future in live:
            future.set_exception(error)
        job.finish_ahead()
