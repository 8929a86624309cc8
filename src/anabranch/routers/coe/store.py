"""Many experts in little memory: checkpoints on disk, some of them in host memory, fewer on a device.

    store = ExpertStore(load=read_checkpoint, host_bytes=8 << 30, to_device=copy_to_gpu, device_bytes=2 << 30)
    store.add("maths", "experts/maths")
    store.prefetch("maths")                       # while the prompt still arrives
    with store.use("maths") as expert:            # pinned meanwhile
        expert.generate(...)
    async with store.use_async("maths") as expert:  # the same on an event loop
        ...

How things are loaded is the caller's: ``load(path)`` reads a checkpoint into host memory, ``to_device(value)`` copies it on. Without
``to_device`` experts are used from host memory. An expert is handed out only when its loading came to an end and its files were the
same before and after; whatever fails half-way leaves no trace. Room is taken before loading begins, so capacities are never passed. An
expert that leaves the device stays in host memory for as long as there is room.

Source: Composition of Experts, arXiv 2412.01868, and SN40L, arXiv 2405.07518 (three tiers, at most one copy a request); eviction by rate
and the bound on waiting (`ExpertQueue`) are ours.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from anabranch.errors import CapacityError, CheckpointError, InputError
from anabranch.routers.coe.lease import Expert, Job, Lease, signature_of
from anabranch.routers.coe.tier import Eviction, Resident, Tier, Usage, quantile

log = logging.getLogger(__name__)

# Switch times for quantiles.
REMEMBERED = 4096


class ExpertStore:
    """See the module. All methods may be called from any thread.

    Args:
        load: (path) -> expert in host memory; runs on a thread of the store.
        host_bytes: capacity of host memory.
        to_device: (what ``load`` gave) -> expert on the device; None if experts are used from host memory.
        device_bytes: capacity of the device; wanted with ``to_device``.
        eviction: "rate", "lru" or "lfu", see `tier`.
        half_life_s: of request rates.
        workers: loads at once.
        grace_s: how long an expert that was fetched ahead is evicted last.
        on_evict: (tier, name, value), called before the room is used again; it must not call the store.
        clock: seconds.

    Raises InputError for capacities and names that may not be.
    """

    def __init__(
        self,
        load: Callable[[Path], Any],
        *,
        host_bytes: int,
        to_device: Callable[[Any], Any] | None = None,
        device_bytes: int | None = None,
        eviction: Eviction = "rate",
        half_life_s: float = 300.0,
        workers: int = 1,
        grace_s: float = 1.0,
        on_evict: Callable[[str, str, Any], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if (to_device is None) != (device_bytes is None):
            raise InputError("to_device and device_bytes belong together: give both or neither")
        if workers < 1 or not half_life_s > 0:
            raise InputError(f"workers is {workers} and half_life_s {half_life_s}; both must be above 0")
        self._read, self._copy = load, to_device
        self._half_life_s, self._grace_s, self._on_evict, self._clock = half_life_s, grace_s, on_evict, clock
        self._tiers = {"host": Tier("host", host_bytes, eviction)}
        if device_bytes is not None:
            self._tiers["device"] = Tier("device", device_bytes, eviction)
        self._top = self._tiers["device" if device_bytes is not None else "host"]
        self._experts: dict[str, Expert] = {}
        self._jobs: dict[str, Job] = {}
        # Of jobs nobody has begun; those with somebody waiting go first.
        self._queue: deque[str] = deque()
        self._changed = threading.Condition()
        self._kept: dict[str, Lease] = {}
        self._counts = dict.fromkeys(
            ("requests", "hits", "switches", "failed", "prefetched", "prefetch_used", "prefetch_dropped"), 0
        )
        self._moved = {name: {"bytes": 0, "loads": 0, "evictions": 0} for name in self._tiers}
        self._switch_s: deque[float] = deque(maxlen=REMEMBERED)
        self._is_open = True
        self._threads = [
            threading.Thread(target=self._work, name=f"experts-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    # What there is

    def add(
        self,
        name: str,
        path: str | Path,
        *,
        host_bytes: int | None = None,
        device_bytes: int | None = None,
    ) -> None:
        """Register a checkpoint: a file, or a folder with files. Adding a name again takes the new files from the next load on.

        Args:
            name: of the expert.
            path: of its files.
            host_bytes: that it takes in host memory; the size of its files if left out.
            device_bytes: likewise on the device.

        Raises:
            CheckpointError: nothing is there.
            CapacityError: it fits a tier not even alone.
        """
        path = Path(path)
        signature = signature_of(path)
        size = sum(num_bytes for _, num_bytes, _ in signature)
        wanted = {
            "host": size if host_bytes is None else host_bytes,
            "device": size if device_bytes is None else device_bytes,
        }
        for tier in self._tiers.values():
            if not 0 < wanted[tier.name] <= tier.capacity_bytes:
                raise CapacityError(
                    f"expert {name!r} takes {wanted[tier.name]:,} bytes of {tier.name} memory, which has {tier.capacity_bytes:,}; "
                    f"raise {tier.name}_bytes to {wanted[tier.name]:,} or more"
                )
        with self._changed:
            old = self._experts.get(name)
            if old is not None:
                self._forget(name)
            usage = Usage(self._half_life_s) if old is None else old.usage
            self._experts[name] = Expert(path, signature, wanted, usage)

    def _forget(self, name: str) -> None:
        """Drop what is resident of an expert. Raises InputError while it is in use or on its way."""
        if name in self._jobs or any(
            name in tier.residents and tier.residents[name].pins for tier in self._tiers.values()
        ):
            raise InputError(f"expert {name!r} is in use; wait until its leases are released")
        for tier in self._tiers.values():
            if name in tier.residents:
                self._evict(tier, name)

    def remove(self, name: str) -> None:
        """Forget an expert; its files stay. Raises InputError while it is in use."""
        with self._changed:
            self._expert(name)
            self._forget(name)
            del self._experts[name]

    def __contains__(self, name: str) -> bool:
        return name in self._experts

    def resident(self, tier: str | None = None) -> list[str]:
        """Experts that are loaded whole in a tier ("host" or "device"); by default in the one they are used from."""
        with self._changed:
            found = self._top if tier is None else self._tiers[tier]
            return [name for name, resident in found.residents.items() if resident.is_ready]

    # Use

    def request(self, name: str) -> Future[Lease]:
        """Ask for an expert; the future gives a `Lease`, at once if it is resident. Cancel it to take the request back.

        Raises InputError for an unknown name, or a closed store. The future raises what the loader raises, or CheckpointError.
        """
        future: Future[Lease] = Future()
        with self._changed:
            now_s = self._begin(name)
            self._counts["requests"] += 1
            self._experts[name].usage.touch(now_s)
            found = self._top.ready(name)
            if found is None:
                self._jobs.setdefault(name, Job(name)).waiting.append((future, now_s))
                self._enqueue(name)
                # A request taken back may be all that a load waited for room for.
                future.add_done_callback(self._wake)
                return future
            self._counts["hits"] += 1
            lease = self._leased(name, found)
        future.set_result(lease)
        return future

    @contextmanager
    def use(self, name: str, timeout_s: float | None = None) -> Iterator[Any]:
        """The expert, pinned for the time of a ``with``.

        Raises as `request` does, and CapacityError if it was not there in time.
        """
        lease = self._awaited(self.request(name), name, timeout_s)
        with lease as expert:
            yield expert

    @asynccontextmanager
    async def use_async(self, name: str, timeout_s: float | None = None) -> AsyncIterator[Any]:
        """`use` on an event loop. Whoever is cancelled while waiting leaves no pin behind."""
        future = self.request(name)
        try:
            lease = await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
        except BaseException as error:
            # It came this moment, and nobody will look.
            if not future.cancel():
                future.add_done_callback(_released)
            if isinstance(error, TimeoutError):
                raise self._late(name, timeout_s) from None
            raise
        with lease as expert:
            yield expert

    def prefetch(self, name: str) -> Future[None]:
        """Load an expert that will probably be asked for. Never waits for room that others use, and waits behind requests.

        The future ends when it is there, or was given up (its failure is logged and shows again when the expert is asked for).
        """
        future: Future[None] = Future()
        with self._changed:
            self._begin(name)
            if self._top.ready(name) is None:
                self._jobs.setdefault(name, Job(name)).ahead.append(future)
                self._enqueue(name)
                return future
        future.set_result(None)
        return future

    def retract(self, name: str) -> None:
        """Take a guess back, as the prompt turned out to need another expert: what was not begun is dropped, what is there may go."""
        dropped: Job | None = None
        with self._changed:
            self._expert(name)
            job, found = self._jobs.get(name), self._top.residents.get(name)
            if job is not None:
                job.is_spared = False
                if not job.has_begun and not job.waiting:
                    self._queue.remove(name)
                    dropped = self._jobs.pop(name)
                    self._counts["prefetch_dropped"] += 1
            elif found is not None:
                found.spare_until_s = -float("inf")
        if dropped is not None:
            dropped.finish_ahead()

    def pin(self, name: str, timeout_s: float | None = None) -> None:
        """Keep an expert resident until `unpin`. Raises as `request`, and CapacityError if it was not there in time."""
        lease = self._awaited(self.request(name), name, timeout_s)
        with self._changed:
            extra = self._kept.setdefault(name, lease)
        if extra is not lease:
            # It was pinned before.
            lease.release()

    def _awaited(self, future: Future[Lease], name: str, timeout_s: float | None) -> Lease:
        try:
            return future.result(timeout_s)
        except FutureTimeout:
            if not future.cancel():
                # It came this moment.
                return future.result()
            raise self._late(name, timeout_s) from None

    def _late(self, name: str, timeout_s: float | None) -> CapacityError:
        return CapacityError(
            f"expert {name!r} was not loaded within {timeout_s} s; others in use may hold all of {self._top.name} memory"
        )

    def unpin(self, name: str) -> None:
        """Let a pinned expert go when its room is needed. Raises InputError if it is not pinned."""
        with self._changed:
            lease = self._kept.pop(name, None)
        if lease is None:
            raise InputError(f"expert {name!r} is not pinned; pinned are: {', '.join(self._kept) or 'none'}")
        lease.release()

    def close(self) -> None:
        """Stop the loading threads; what waits is cancelled. Leases stay usable."""
        with self._changed:
            self._is_open = False
            jobs, self._jobs = list(self._jobs.values()), {}
            self._queue.clear()
            self._changed.notify_all()
        for job in jobs:
            for waiting, _ in job.waiting:
                waiting.cancel()
            for ahead in job.ahead:
                ahead.cancel()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def __enter__(self) -> "ExpertStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> dict[str, Any]:
        """What happened so far, ready for JSON.

        requests, hits, hit_rate (of requests, in the tier experts are used from); switches (loads that a request waited for) with
        switch_s_mean, switch_s_p50 and switch_s_p95 (seconds from request to lease, of the last 4,096); prefetched, prefetch_used,
        prefetch_dropped (no room, or failed); failed loads; and of each tier bytes_moved, loads, evictions, used_bytes, peak_bytes.
        """
        with self._changed:
            counts, times = dict(self._counts), list(self._switch_s)
            tiers = {
                name: {
                    "bytes_moved": self._moved[name]["bytes"],
                    "loads": self._moved[name]["loads"],
                    "evictions": self._moved[name]["evictions"],
                    "used_bytes": tier.used_bytes,
                    "peak_bytes": tier.peak_bytes,
                    "capacity_bytes": tier.capacity_bytes,
                }
                for name, tier in self._tiers.items()
            }
        return {
            **counts,
            "hit_rate": counts["hits"] / counts["requests"] if counts["requests"] else None,
            "switch_s_mean": sum(times) / len(times) if times else None,
            "switch_s_p50": quantile(times, 0.5),
            "switch_s_p95": quantile(times, 0.95),
            "tiers": tiers,
        }

    # Under the lock

    def _expert(self, name: str) -> Expert:
        found = self._experts.get(name)
        if found is None:
            raise InputError(f"no expert {name!r} in the store; it has {', '.join(self._experts) or 'none'}")
        return found

    def _begin(self, name: str) -> float:
        self._expert(name)
        if not self._is_open:
            raise InputError("the expert store is closed")
        return self._clock()

    def _enqueue(self, name: str) -> None:
        """Put a job that has not begun behind those that somebody waits for, and before the others if somebody waits for it."""
        job = self._jobs[name]
        if job.has_begun:
            return
        if name in self._queue:
            self._queue.remove(name)
        first = sum(bool(self._jobs[other].waiting) for other in self._queue)
        self._queue.insert(first if job.waiting else len(self._queue), name)
        self._changed.notify_all()

    def _wake(self, future: Future[Lease]) -> None:
        if future.cancelled():
            with self._changed:
                self._changed.notify_all()

    def _leased(self, name: str, resident: Resident) -> Lease:
        resident.pins += 1
        if resident.spare_until_s > -float("inf"):
            resident.spare_until_s = -float("inf")
            self._counts["prefetch_used"] += 1
        return Lease(name, resident, self._unpin)

    def _unpin(self, resident: Resident) -> None:
        with self._changed:
            resident.pins -= 1
            self._changed.notify_all()

    def _evict(self, tier: Tier, name: str) -> None:
        resident = tier.drop(name)
        self._moved[tier.name]["evictions"] += 1
        if self._on_evict is not None:
            self._on_evict(tier.name, name, resident.value)
        resident.value = None

    # On the loading threads

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
        with self._changed:
            below = self._tiers["host"].ready(job.name)
            if below is not None:
                below.pins += 1
        try:
            if below is None:
                below = self._bring(job, self._tiers["host"], lambda: self._whole(expert, job.name))
            if below is not None and self._copy is not None:
                value, copy = below.value, self._copy
                above = self._bring(job, self._top, lambda: copy(value))
                value = None
                self._hand_out(job, above)
                if above is not None:
                    self._unpin(above)
            else:
                self._hand_out(job, below)
        finally:
            if below is not None:
                self._unpin(below)

    def _bring(self, job: Job, tier: Tier, make: Callable[[], Any]) -> Resident | None:
        """Load into a tier; the resident comes back pinned. None if nobody waits and there is no room."""
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
            self._moved[tier.name]["bytes"] += num_bytes
            self._moved[tier.name]["loads"] += 1
        return resident

    def _usage(self) -> dict[str, Usage]:
        return {name: expert.usage for name, expert in self._experts.items()}

    def _whole(self, expert: Expert, name: str) -> Any:
        """Read a checkpoint whose files do not change meanwhile."""
        signature = signature_of(expert.path)
        value = self._read(expert.path) if signature == expert.signature else None
        if not signature == signature_of(expert.path) == expert.signature:
            raise CheckpointError(
                f"the files of expert {name!r} in {expert.path} are not those that were added; add it again when they are whole"
            )
        return value

    def _hand_out(self, job: Job, resident: Resident | None) -> None:
        """Give leases to all that wait. None: nobody waited and there was no room; if somebody came since, try again."""
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


def _released(future: Future[Lease]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
