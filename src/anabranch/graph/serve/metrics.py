"""What a server counts, in the form that Prometheus reads."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client import generate_latest as _render
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from anabranch.graph.serve.sources import Loaded

if TYPE_CHECKING:
    from anabranch.graph.live import LiveIndex

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, math.inf)


class Metrics:
    """Counters of one server, in a registry of its own.

    ``anabranch_requests_total`` by endpoint and status, ``anabranch_request_seconds`` by endpoint, ``anabranch_queries_total`` (vectors and
    seed sets answered) by endpoint, ``anabranch_refused_total`` by reason, ``anabranch_in_flight``, ``anabranch_connections``,
    ``anabranch_answer_bytes``, ``anabranch_cut_off_total`` by reason, ``anabranch_reloads_total`` by outcome,
    ``anabranch_generation``, ``anabranch_loaded_timestamp_seconds``, ``anabranch_vectors``, ``anabranch_nodes``, those of the process, and
    where changes are taken those of `_Written`.

    Args:
        live: what takes changes now, or None.
    """

    def __init__(self, live: "Callable[[], LiveIndex | None]" = lambda: None) -> None:
        self._live = live
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        registry.register(_Written(live))
        self._requests = Counter("anabranch_requests", "Requests answered.", ["endpoint", "status"], registry=registry)
        self._seconds = Histogram(
            "anabranch_request_seconds",
            "From the request's first byte to the answer.",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self._queries = Counter("anabranch_queries", "Vectors and seed sets answered.", ["endpoint"], registry=registry)
        self._refused = Counter("anabranch_refused", "Requests not answered, by reason.", ["reason"], registry=registry)
        self.in_flight = Gauge("anabranch_in_flight", "Requests under way or waiting.", registry=registry)
        self.connections = Gauge("anabranch_connections", "Connections that are open.", registry=registry)
        self.answer_bytes = Gauge("anabranch_answer_bytes", "Of answers made and not read yet.", registry=registry)
        self._cut_off = Counter(
            "anabranch_cut_off", "Connections cut off for what they did not read.", ["reason"], registry=registry
        )
        self._reloads = Counter("anabranch_reloads", "Attempts to load files.", ["outcome"], registry=registry)
        self._generation = Gauge("anabranch_generation", "How often files were loaded.", registry=registry)
        self._loaded_at = Gauge("anabranch_loaded_timestamp_seconds", "When they were, last.", registry=registry)
        self._vectors = Gauge("anabranch_vectors", "Vectors in the index.", registry=registry)
        self._nodes = Gauge("anabranch_nodes", "Nodes of the graph.", registry=registry)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered; its answer began after so long."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def queries(self, endpoint: str, count: int) -> None:
        """So many vectors or seed sets were answered."""
        self._queries.labels(endpoint).inc(count)

    def refused(self, reason: str) -> None:
        """A request was not answered."""
        self._refused.labels(reason).inc()

    def cut_off(self, reason: str) -> None:
        """A connection was: "slow", or for "room"."""
        self._cut_off.labels(reason).inc()

    def reloaded(self, new: Loaded | None) -> None:
        """Files were loaded, or could not be."""
        self._reloads.labels("failed" if new is None else "done").inc()
        if new is not None:
            self._generation.set(new.generation)
            self._loaded_at.set(new.loaded_at)
            self._vectors.set(0 if new.vectors is None else len(new.vectors.index))
            self._nodes.set(0 if new.scores is None else new.scores.num_nodes)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        live = self._live()
        if live is not None:
            self._vectors.set(len(live))
        return _render(self.registry)


class _Written(Collector):
    """What was changed.

    ``anabranch_upserted_total`` and ``anabranch_deleted_total`` (vectors), ``anabranch_log_writes_total``, ``anabranch_log_bytes``,
    ``anabranch_log_syncs_total``, ``anabranch_log_sync_seconds_total``, ``anabranch_log_failed`` (1 where no changes are taken any more),
    ``anabranch_snapshots_total`` by outcome, ``anabranch_snapshot_timestamp_seconds``.
    """

    def __init__(self, live: "Callable[[], LiveIndex | None]") -> None:
        self._live = live

    def describe(self) -> list[Metric]:
        """None beforehand."""
        return []

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        live = self._live()
        if live is None:
            return
        counts = live.counts
        for name, about, value in (
            ("upserted", "Vectors that came or moved.", counts.upserted),
            ("deleted", "Vectors that went.", counts.deleted),
            ("log_writes", "Writes to the log, each of one or more requests.", counts.writes),
            ("log_syncs", "How often the disk was waited for.", counts.syncs),
            ("log_sync_seconds", "Time that took.", counts.sync_s),
        ):
            yield CounterMetricFamily(f"anabranch_{name}", about, value=value)
        snapshots = CounterMetricFamily("anabranch_snapshots", "Attempts to write a snapshot.", labels=["outcome"])
        snapshots.add_metric(["done"], counts.snapshots)
        snapshots.add_metric(["failed"], counts.failed)
        yield snapshots
        for name, about, value in (
            ("log_bytes", "Bytes of the log since the last snapshot.", live.log_bytes),
            ("log_failed", "1 where no changes are taken any more.", float(live.failure is not None)),
            (
                "snapshot_timestamp_seconds",
                "When the last snapshot was written; 0 for not since the start.",
                counts.snapshot_at,
            ),
        ):
            yield GaugeMetricFamily(f"anabranch_{name}", about, value=value)
