"""When to scale: policies that look at what was served and how much waits, and say how many devices there should be. Pure, no clock.

slo        more devices while too few requests meet their targets, fewer while they all do and the devices idle
queue      by the requests that wait or run per device
schedule   by the time of day
manual     never by itself
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError

__all__ = ["Autoscaler", "Load", "Policy"]


@dataclass(frozen=True)
class Load:
    """How a group is.

    Attributes:
        devices: that serve.
        running, waiting: requests.
        max_seqs: requests that a device runs at once.
    """

    devices: int
    running: int
    waiting: int
    max_seqs: int

    @property
    def busy(self) -> float:
        """Share of the places for requests that are taken, above 1 where some wait."""
        return (self.running + self.waiting) / (self.devices * self.max_seqs)


@configclass
class Policy(Config):
    """Settings of the autoscaler.

    Attributes:
        by: what it looks at, see the module.
        min_devices, max_devices: the range.
        step: devices at a time; the tensor parallel degree or a multiple of it.
        ttft_s, tpot_s: targets of the time to the first token and of the mean time per token after it (the paper: 1 s and 1 s).
        attainment: share of requests that should meet both (the paper: 0.9).
        window_s: how far back to look.
        min_requests: fewer in the window say nothing.
        cool_down_s: least time between two changes.
        low, high: share of the devices' places in use below which ``slo`` and ``queue`` shrink, above which ``queue`` grows.
        patience_s: how long the load must be low before anything shrinks.
        hours: for ``schedule``: (hour, devices) pairs in order; each holds until the next, the last until the first of the next day.
    """

    by: Literal["slo", "queue", "schedule", "manual"] = "manual"
    min_devices: int = Field(default=1, ge=1)
    max_devices: int = Field(default=8, ge=1)
    step: int = Field(default=1, ge=1)
    ttft_s: float = Field(default=1.0, gt=0)
    tpot_s: float = Field(default=1.0, gt=0)
    attainment: float = Field(default=0.9, gt=0, le=1)
    window_s: float = Field(default=10.0, gt=0)
    min_requests: int = Field(default=4, ge=1)
    cool_down_s: float = Field(default=15.0, ge=0)
    low: float = Field(default=0.3, ge=0)
    high: float = Field(default=1.0, gt=0)
    patience_s: float = Field(default=10.0, ge=0)
    hours: tuple[tuple[float, int], ...] = ()

    def __post_init__(self) -> None:
        if self.min_devices > self.max_devices:
            raise ConfigError(f"min_devices is {self.min_devices}; it must be at most max_devices={self.max_devices}")
        if self.low >= self.high:
            raise ConfigError(f"low is {self.low}; it must be below high={self.high}, or the group would swing")
        if self.by == "schedule" and (not self.hours or list(self.hours) != sorted(self.hours)):
            raise ConfigError("hours must be (hour, devices) pairs in order; schedule needs at least one")


class Autoscaler:
    """The policy at work. Times are seconds of any clock that all calls share."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._served: deque[tuple[float, bool]] = deque()
        self._changed_at = -math.inf
        self._low_since: float | None = None

    def served(self, now: float, ttft_s: float, tpot_s: float) -> bool:
        """A request was served; whether it met its targets."""
        met = ttft_s <= self.policy.ttft_s and tpot_s <= self.policy.tpot_s
        self._served.append((now, met))
        return met

    def attainment(self, now: float) -> float | None:
        """Share of the requests in the window that met their targets; None with too few to tell."""
        while self._served and self._served[0][0] < now - self.policy.window_s:
            self._served.popleft()
        if len(self._served) < self.policy.min_requests:
            return None
        return sum(met for _, met in self._served) / len(self._served)

    def changed(self, now: float) -> None:
        """The number of devices has changed; what was served before says nothing of now."""
        self._changed_at, self._low_since = now, None
        self._served.clear()

    def decide(self, now: float, load: Load, hour: float = 0.0) -> int:
        """How many devices there should be; ``load.devices`` for no change. ``hour`` of the day, for ``schedule``."""
        policy = self.policy
        if policy.by == "manual":
            return load.devices
        if policy.by == "schedule":
            due = [devices for start, devices in policy.hours if start <= hour] or [policy.hours[-1][1]]
            return self._clamped(due[-1])
        is_low = load.busy < policy.low
        self._low_since = (self._low_since if self._low_since is not None else now) if is_low else None
        if now - self._changed_at < policy.cool_down_s:
            return load.devices
        if self._should_grow(now, load):
            return self._clamped(load.devices + policy.step)
        if self._should_shrink(now, load):
            return self._clamped(load.devices - policy.step)
        return load.devices

    def _should_grow(self, now: float, load: Load) -> bool:
        if self.policy.by == "queue":
            return load.busy > self.policy.high
        attained = self.attainment(now)
        # Idle devices that miss their targets are not helped by more of them.
        return attained is not None and attained < self.policy.attainment and load.busy >= self.policy.low

    def _should_shrink(self, now: float, load: Load) -> bool:
        if self._low_since is None or now - self._low_since < self.policy.patience_s:
            return False
        fewer = load.devices - self.policy.step
        if fewer < self.policy.min_devices or load.busy * load.devices / fewer >= self.policy.high:
            # It would grow again at once.
            return False
        attained = self.attainment(now)
        return self.policy.by == "queue" or attained is None or attained >= self.policy.attainment

    def _clamped(self, devices: int) -> int:
        return min(max(devices, self.policy.min_devices), self.policy.max_devices)
