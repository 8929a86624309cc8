"""`Durations`: a histogram for Prometheus that costs a request next to nothing."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

__all__ = ["Durations"]


class Durations(Collector):
    """Counts seconds by buckets, as prometheus_client's ``Histogram`` does, which takes locks and some ten times as long.

    It is for one thread, that of the event loop, which both counts and collects.

    Args:
        name, about: of the metric.
        labels: their names.
        buckets: upper bounds in seconds, rising; the last one, infinity, is added.
        registry: where it is told.
    """

    def __init__(
        self, name: str, about: str, labels: Sequence[str], buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._about, self._labels = name, about, tuple(labels)
        self._bounds = (*buckets, math.inf)
        self._told = [floatToGoString(bound) for bound in self._bounds]
        # By the values of labels: how many came into each bucket, and the sum of their seconds.
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        registry.register(self)

    def observe(self, seconds: float, *labels: str) -> None:
        """Count one, with a value for each label."""
        counts = self._counts.get(labels)
        if counts is None:
            if len(labels) != len(self._labels):
                raise ValueError(f"{self._name} has the labels {self._labels}, not {labels}")
            counts = self._counts[labels] = [0] * len(self._bounds)
            self._sums[labels] = 0.0
        counts[bisect_left(self._bounds, seconds)] += 1
        self._sums[labels] += seconds

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """The name, for the registry."""
        return [HistogramMetricFamily(self._name, self._about, labels=self._labels)]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """All that was counted."""
        family = HistogramMetricFamily(self._name, self._about, labels=self._labels)
        for labels, counts in self._counts.items():
            buckets, total = [], 0
            for told, count in zip(self._told, counts, strict=True):
                total += count
                buckets.append((told, float(total)))
            family.add_metric(labels, buckets, self._sums[labels])
        return [family]
