"""What a store of experts holds: tiers and what is in them, jobs that wait, and what happened; all of it under one lock."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from anabranch.errors import InputError
from anabranch.routers.coe.lease import Expert, Job, Lease
from anabranch.routers.coe.tier import Resident, Tier, Usage, quantile

# Switch times for quantiles.
REMEMBERED = 4096


class Shelf:
    """See the module.

    Args:
        tiers: by name; experts are used from the last one.
        on_evict, clock: see `anabranch.routers.coe.store.ExpertStore`.
    """

    def __init__(
        self,
        tiers: dict[str, Tier],
        on_evict: Callable[[str, str, Any], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self._tiers, self._top = tiers, list(tiers.values())[-1]
        self._on_evict, self._clock = on_evict, clock
        self._experts: dict[str, Expert] = {}
        self._jobs: dict[str, Job] = {}
        # Of jobs nobody has begun; those with somebody waiting go first.
        self._queue: deque[str] = deque()
        self._changed = threading.Condition()
        self._counts = dict.fromkeys(
            ("requests", "hits", "switches", "failed", "prefetched", "prefetch_used", "prefetch_dropped"), 0
        )
        self._moved = {name: {"bytes": 0, "loads": 0, "evictions": 0} for name in tiers}
        self._switch_s: deque[float] = deque(maxlen=REMEMBERED)
        self._is_open = True

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

    def _usage(self) -> dict[str, Usage]:
        return {name: expert.usage for name, expert in self._experts.items()}
