"""What an elastic group counts: its ranks' counters added up over changes and deaths, and its own."""

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from anabranch.serving.core.client import EngineStats
from anabranch.serving.core.scheduler import COUNTERS
from anabranch.serving.elasticmoe.instance import Instance
from anabranch.serving.elasticmoe.memory import MemoryManager
from anabranch.serving.elasticmoe.report import ScaleReport

if TYPE_CHECKING:
    from anabranch.serving.elasticmoe.group import Group

__all__ = ["Counts"]

_PHASES = ("plan", "prepare", "attach", "warm", "switch", "drain", "release", "commit")
_OWN = (
    "elastic_scale_events",
    "elastic_scale_failures",
    "elastic_recoveries",
    "elastic_moves",
    "elastic_bytes_p2p",
    "elastic_bytes_disk",
    "elastic_bytes_zero_copy",
    "elastic_tokens_brought",
    "elastic_tokens_again",
    *(f"elastic_phase_seconds_{name}" for name in _PHASES),
)


class Counts:
    """Counters of a group. Thread-safe."""

    def __init__(self) -> None:
        self.recoveries = 0
        self.peak_bytes = 0
        self._own: Counter[str] = Counter(dict.fromkeys(_OWN, 0))
        self._down_s = 0.0
        self._down_since: float | None = None
        # By instance and device.
        self._pictures: dict[tuple[int, int], EngineStats] = {}
        self._batch_tokens: list[float] = []
        self._lock = threading.Lock()

    def picture(self, instance: Instance, device: int, stats: EngineStats) -> None:
        """How a rank is."""
        with self._lock:
            self._pictures[id(instance), device] = stats
            self._batch_tokens = (self._batch_tokens + stats.samples.get("batch_tokens", []))[-4096:]

    def moved(self, old: Instance, new: Instance, devices: list[int]) -> None:
        """Schedulers of these devices went from one instance to another, with their counters."""
        with self._lock:
            for device in devices:
                picture = self._pictures.pop((id(old), device), None)
                if picture is not None:
                    self._pictures[id(new), device] = picture

    def scaled(self, report: ScaleReport) -> None:
        """A change is done."""
        with self._lock:
            own = self._own
            own["elastic_scale_events"] += 1
            own["elastic_moves"] += report.moves
            for kind in ("p2p", "disk", "zero_copy"):
                own[f"elastic_bytes_{kind}"] += int(report.bytes.get(kind, 0))
            own["elastic_tokens_brought"] += report.tokens_brought
            own["elastic_tokens_again"] += report.tokens_again
            for name, seconds in report.phases.items():
                own[f"elastic_phase_seconds_{name}"] += seconds  # type: ignore[assignment]  # a Counter of seconds

    def failed(self, phase: str) -> None:
        """A change was given up."""
        with self._lock:
            self._own["elastic_scale_failures"] += 1

    def down(self) -> None:
        """Nothing serves from now on."""
        with self._lock:
            self._down_since = self._down_since or time.monotonic()

    def up(self) -> None:
        """Something serves again."""
        with self._lock:
            if self._down_since is not None:
                self._down_s += time.monotonic() - self._down_since
                self._down_since = None

    @property
    def downtime_s(self) -> float:
        """Seconds in which nothing served."""
        since = self._down_since
        return self._down_s + (time.monotonic() - since if since is not None else 0.0)

    def peak(self, memory: MemoryManager) -> None:
        """Note how much memory the devices take."""
        self.peak_bytes = max(self.peak_bytes, memory.usage()["resident"])

    def stats(self, group: "Group") -> EngineStats:
        """All of it."""
        ledger = group.ledger
        active = ledger.active
        with self._lock:
            counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
            for picture in self._pictures.values():
                counters.update(picture.counters)
            counters.update(self._own)
            now = [self._pictures.get((id(active), device)) for device in group.devices]
            samples, self._batch_tokens = self._batch_tokens, []
        gauges = {
            "running": float(ledger.num_running),
            "waiting": float(ledger.num_waiting),
            "paused": float(ledger.num_paused),
            "queued_tokens": float(ledger.queued_tokens),
            "kv_usage_ratio": max((picture.gauges["kv_usage_ratio"] for picture in now if picture), default=0.0),
            "elastic_devices": float(len(group.devices)),
            "elastic_standby": float(len(group.standby.configurations())),
            "elastic_peak_bytes": float(self.peak_bytes),
            "elastic_longest_gap_s": ledger.longest_gap_s,
        }
        more = {
            "elastic_requests": ledger.requests,
            "elastic_requests_rerun": ledger.reruns,
            "elastic_recoveries": self.recoveries,
            "elastic_downtime_s": self.downtime_s,
        }
        return EngineStats(
            counters={**counters, **ledger.counted, **more}, gauges=gauges, samples={"batch_tokens": samples}
        )
