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
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from anabranch.errors import CapacityError, InputError
from anabranch.routers.coe.lease import Expert, Job, Lease, signature_of
from anabranch.routers.coe.loading import Loading
from anabranch.routers.coe.tier import Eviction, Tier, Usage


class ExpertStore(Loading):
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
        self._half_life_s = half_life_s
        self._kept: dict[str, Lease] = {}
        tiers = {"host": Tier("host", host_bytes, eviction)}
        if device_bytes is not None:
            tiers["device"] = Tier("device", device_bytes, eviction)
        super().__init__(load, to_device, workers=workers, grace_s=grace_s, tiers=tiers, on_evict=on_evict, clock=clock)

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


def _released(future: Future[Lease]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
