"""What a server counts, in the form that Prometheus reads."""

import math
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client import generate_latest as _render

from anabranch.graph.serve.sources import Loaded

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, math.inf)


class Metrics:
    """Counters of one server, in a registry of its own.

    ``anabranch_requests_total`` by endpoint and status, ``anabranch_request_seconds`` by endpoint, ``anabranch_queries_total`` (vectors and
    seed sets answered) by endpoint, ``anabranch_refused_total`` by reason, ``anabranch_in_flight``, ``anabranch_reloads_total`` by outcome,
    ``anabranch_generation``, ``anabranch_loaded_timestamp_seconds``, ``anabranch_vectors``, ``anabranch_nodes``, and those of the process.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._requests = Counter(
            "anabranch_requests", "Requests answered.", ["endpoint", "status"], registry=registry
        )  # fmt: skip
        self._seconds = Histogram(
            "anabranch_request_seconds", "From the request's first byte to the answer.", ["endpoint"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._queries = Counter("anabranch_queries", "Vectors and seed sets answered.", ["endpoint"], registry=registry)
        self._refused = Counter("anabranch_refused", "Requests not answered, by reason.", ["reason"], registry=registry)
        self.in_flight = Gauge("anabranch_in_flight", "Requests under way or waiting.", registry=registry)
        self._reloads = Counter("anabranch_reloads", "Attempts to load files.", ["outcome"], registry=registry)
        self._generation = Gauge("anabranch_generation", "How often files were loaded.", registry=registry)
        self._loaded_at = Gauge("anabranch_loaded_timestamp_seconds", "When they were, last.", registry=registry)
        self._vectors = Gauge("anabranch_vectors", "Vectors in the index.", registry=registry)
        self._nodes = Gauge("anabranch_nodes", "Nodes of the graph.", registry=registry)

    def answered(self, endpoint: str, status: int, started: float) -> None:
        """A request that began at ``started`` (of `time.perf_counter`) was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(time.perf_counter() - started)

    def queries(self, endpoint: str, count: int) -> None:
        """So many vectors or seed sets were answered."""
        self._queries.labels(endpoint).inc(count)

    def refused(self, reason: str) -> None:
        """A request was not answered."""
        self._refused.labels(reason).inc()

    def reloaded(self, new: Loaded | None) -> None:
        """Files were loaded, or could not be."""
        self._reloads.labels("failed" if new is None else "done").inc()
        if new is not None:
            self._generation.set(new.generation)
            self._loaded_at.set(new.loaded_at)
            self._vectors.set(0 if new.vectors is None else new.vectors.about["vectors"])
            self._nodes.set(0 if new.scores is None else new.scores.num_nodes)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return _render(self.registry)
