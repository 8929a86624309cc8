"""What a server counts, for Prometheus. Every series is there, at zero, before the first request; labels come from fixed sets."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from anabranch.serving.core.client import EngineStats
from anabranch.serving.core.overload import REASONS

PREFIX = "anabranch_serving_"
ENDPOINTS = (
    "chat",
    "completions",
    "responses",
    "embeddings",
    "tokenize",
    "detokenize",
    "models",
    "adapters",
    "admin",
    "other",
)
CODES = ("200", "400", "401", "403", "404", "405", "408", "409", "413", "415", "429", "499", "500", "501", "503", "504")
# Beside those of `anabranch.serving.core.admission`.
HTTP_REASONS = ("bodies", "answers", "connections")
ABORTS = ("client_gone", "deadline", "slow_reader", "shutdown", "engine_failed", "request_failed", "room")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
# What an engine counts; a restart of it begins at zero, which these do not.
ENGINE_COUNTERS = {
    "preemptions": "Requests that lost their blocks and were computed again",
    "steps": "Steps of the engine",
    "drafted_tokens": "Tokens that prompt lookup guessed (engine.prompt_lookup)",
    "accepted_draft_tokens": "Of them, those that the model chose; their share of drafted_tokens is the rate of acceptance",
    "adapter_loads": "Adapters that were read",
    "adapter_evictions": "Adapters that left memory for others",
    "rewiring_phases": "Times that routers were turned to the text of a request",
    "rewiring_steps": "Gradient steps of that",
    "rewiring_seconds": "Seconds of that, beside the engine's steps",
    "expert_hits": "Experts that were there when needed",
    "expert_misses": "Experts that were not",
    "expert_late": "Experts whose loading was under way when they were needed",
    "expert_prefetched_unused": "Experts that were loaded early for nothing",
    "expert_bytes_moved": "Bytes of experts that were loaded",
    "expert_unit_loads_given": "Experts that pairs of steps load by prediction, as requests came",
    "expert_unit_loads_regrouped": "The same, as requests were regrouped",
}
ENGINE_GAUGES = {
    "streams": "Sequences whose readers the engine answers, those that wait included",
    "running": "Sequences under way in the engine",
    "waiting": "Sequences that wait in the engine",
    "queued_tokens": "Prompt tokens that wait in the engine",
    "kv_usage_ratio": "Share of the key-value blocks in use",
    "adapters_in_memory": "Adapters in memory",
    "adapter_resident_bytes": "Bytes of adapters in memory",
    "expert_resident_bytes": "Bytes of experts in memory",
}

# Counted here, by what was answered.
OURS = frozenset({"prompt_tokens", "cached_prompt_tokens", "generation_tokens"})


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, what, labels, registry=registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(PREFIX + name, what, buckets=buckets, registry=registry)

        self.requests = counter("requests", "HTTP requests that ended", "endpoint", "code")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that were answered")
        self.cached_tokens = counter("cached_prompt_tokens", "Of them, those whose keys and values were there")
        self.generation_tokens = counter("generation_tokens", "Tokens that were answered")
        self.rejections = counter("admission_rejections", "Requests over a limit", "reason")
        self.aborted = counter("aborted", "Sequences that were cut short", "reason")
        self.restarts = counter("engine_restarts", "Starts of the engine after it died")
        self.state = Enum(
            PREFIX + "engine_state",
            "What the server does",
            states=["loading", "ready", "draining", "failed"],
            registry=registry,
        )
        self.in_flight = Gauge(PREFIX + "in_flight", "Sequences of requests that were admitted", registry=registry)
        self.ttft = histogram("ttft_seconds", "To the first token")
        self.inter_token = histogram("inter_token_seconds", "Between two tokens of a sequence")
        self.e2e = histogram("e2e_seconds", "To the end of a sequence")
        self.queue_time = histogram("queue_time_seconds", "Before the engine began a sequence")
        self.step_time = histogram("step_time_seconds", "A step of the engine")
        self.batch_tokens = histogram("batch_tokens", "Tokens of a step", TOKENS)
        self.prompt_len = histogram("prompt_len_tokens", "Tokens of a prompt", TOKENS)
        self.output_len = histogram("output_len_tokens", "Tokens of an answer", TOKENS)
        self._gauges = {name: Gauge(PREFIX + name, what, registry=registry) for name, what in ENGINE_GAUGES.items()}
        self._engine = _EngineCounters()
        registry.register(self._engine)
        for endpoint in ENDPOINTS:
            for code in CODES:
                self.requests.labels(endpoint, code)
        for reason in (*REASONS, *HTTP_REASONS):
            self.rejections.labels(reason)
        for reason in ABORTS:
            self.aborted.labels(reason)

    def absorb(self, stats: EngineStats) -> None:
        """Take over a picture of the engine."""
        self._engine.now = {name: value for name, value in stats.counters.items() if name not in OURS}
        self._engine.gauges = {name: value for name, value in stats.gauges.items() if name not in ENGINE_GAUGES}
        for name, gauge in self._gauges.items():
            gauge.set(stats.gauges.get(name, 0.0))
        for name, histogram in (("step_time", self.step_time), ("batch_tokens", self.batch_tokens)):
            for value in stats.samples.get(name, ()):
                histogram.observe(value)

    def forget_engine(self) -> None:
        """The engine has ended; a new one counts from zero."""
        self._engine.rest()
        for gauge in self._gauges.values():
            gauge.set(0)

    def text(self) -> bytes:
        """For Prometheus."""
        return generate_latest(self.registry)


class _EngineCounters:
    """The engine's counters, over all engines there were, and what gauges it has beside the usual ones (of a group of devices)."""

    def __init__(self) -> None:
        self.now: dict[str, float] = {}
        self.gauges: dict[str, float] = {}
        self._before: dict[str, float] = {}

    def rest(self) -> None:
        for name, value in self.now.items():
            self._before[name] = self._before.get(name, 0.0) + value
        self.now, self.gauges = {}, {}

    def collect(self) -> Iterator[Any]:
        for name in dict.fromkeys((*ENGINE_COUNTERS, *self._before, *self.now)):
            value = self._before.get(name, 0.0) + self.now.get(name, 0.0)
            yield CounterMetricFamily(PREFIX + name, ENGINE_COUNTERS.get(name, "Counted by the engine"), value=value)
        for name, value in self.gauges.items():
            yield GaugeMetricFamily(PREFIX + name, "Said by the engine", value=value)
