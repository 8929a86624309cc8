"""What a gateway counts: for Prometheus at ``/metrics``, and a short history in memory for the page."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from anabranch.gateway.durations import Durations
from anabranch.gateway.store import LedgerRow

LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
OVERHEAD_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
STAGE_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 120)

# Of a request, in their order: whose key it is; checking and counting the body; a look into caches, and the wait for the same request;
# the strategy; setting money aside; upstreams, to the first token of a stream or to a whole answer; the rest of a stream; the row.
STAGES = ("key", "read", "cache", "decide", "reserve", "call", "stream", "settle")

# Of the history: an hour in steps of ten seconds.
BUCKET_S, BUCKETS = 10, 360

# Codes of refusals. A label takes no other text: who writes it would fill the memory.
REFUSALS = frozenset(
    {
        "failed",
        "forbidden_host",
        "forbidden_origin",
        "insufficient_quota",
        "invalid_api_key",
        "invalid_http",
        "invalid_json",
        "invalid_value",
        "model_not_allowed",
        "model_not_found",
        "not_found",
        "overloaded",
        "rate_limit_exceeded",
        "too_many",
        "too_many_connections",
        "unsupported",
    }
)


@dataclass(slots=True)
class Moment:
    """What happened in ten seconds.

    Attributes:
        start: seconds since 1970.
        requests: ended.
        errors: of them, with a status of 500 or more or 429.
        hits: answered by a cache.
        nano: spent.
        opened: breakers that opened, by deployment.
    """

    start: int
    requests: int = 0
    errors: int = 0
    hits: int = 0
    nano: int = 0
    opened: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """One request, when it is over.

    Attributes:
        endpoint: ``chat``, ``completions``, ``embeddings`` or ``responses``.
        model: that answered; "" if none did.
        strategy: that chose; "" if the sender named the model.
        status: of the response; 499 if the client went away.
        cache: ``exact``, ``semantic``, ``shared`` or "".
        latency_s: from the first byte of the request to the last of the answer.
        ttft_s: to the first token of a stream; None if there was none.
        overhead_s: what the gateway took of it.
    """

    endpoint: str
    model: str = ""
    strategy: str = ""
    status: int = 200
    cache: str = ""
    latency_s: float = 0.0
    ttft_s: float | None = None
    overhead_s: float = 0.0


class StageClock:
    """Tells the stages of one request apart; the time to a failure is that of the stage it came in.

    Args:
        tell: called with each stage, of `STAGES`, and its seconds.
    """

    __slots__ = ("_since", "_stage", "_tell")

    def __init__(self, tell: Callable[[str, float], None]) -> None:
        self._tell, self._since, self._stage = tell, time.perf_counter(), ""

    def begin(self, stage: str) -> None:
        """The stage before has ended."""
        self.end()
        self._stage = stage

    def end(self) -> None:
        """No stage is under way any more; does nothing if none is."""
        now = time.perf_counter()
        if self._stage:
            self._tell(self._stage, now - self._since)
        self._stage, self._since = "", now


class Metrics:
    """Counters of one gateway. Labels come from the config and from fixed sets, so their number is bounded."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "anabranch_requests", "Requests that ended", ["endpoint", "model", "strategy", "status"], registry=registry
        )
        self.latency = Durations(
            "anabranch_request_seconds", "To the end of the answer", ["endpoint", "model"], LATENCY_S, registry
        )
        self.ttft = Durations(
            "anabranch_first_token_seconds", "To the first token of a stream", ["model"], LATENCY_S, registry
        )
        self.overhead = Durations(
            "anabranch_overhead_seconds", "What the gateway itself took", [], OVERHEAD_S, registry
        )
        self.stages = Durations("anabranch_stage_seconds", "Stages of requests", ["stage"], STAGE_S, registry)
        self.tokens = Counter("anabranch_tokens", "Tokens", ["model", "direction"], registry=registry)
        self.nano = Counter(
            "anabranch_spend_nano_dollars", "Nano-dollars spent", ["model", "strategy"], registry=registry
        )
        self.cache = Counter("anabranch_cache", "Answers from a cache, and misses", ["result"], registry=registry)
        self.bypassed = Counter(
            "anabranch_strategy_bypassed",
            "Decisions left to the default strategy",
            ["strategy", "why"],
            registry=registry,
        )
        self.outcomes = Counter(
            "anabranch_outcomes",
            "Outcomes that strategies were told of, or not",
            ["strategy", "result"],
            registry=registry,
        )
        self.shadowed = Counter(
            "anabranch_shadow_questions", "Questions that other models were asked too", ["result"], registry=registry
        )
        self.shadow_nano = Counter("anabranch_shadow_nano_dollars", "Nano-dollars spent on that", registry=registry)
        self.attempts = Counter(
            "anabranch_attempts", "Calls to deployments", ["deployment", "outcome"], registry=registry
        )
        self.calls = Counter(
            "anabranch_strategy_calls",
            "Calls of models that strategies made to decide",
            ["purpose", "model", "status"],
            registry=registry,
        )
        self.refused = Counter("anabranch_refused", "Requests refused before any call", ["code"], registry=registry)
        self.in_flight = Gauge("anabranch_in_flight", "Requests under way", registry=registry)
        self.tasks = Gauge("anabranch_tasks", "asyncio tasks of the process", registry=registry)
        self.breaker = Gauge("anabranch_breaker_open", "1 where a breaker is open", ["deployment"], registry=registry)
        self.exceeded = Gauge(
            "anabranch_output_speed_exceeded",
            "Tokens a second of one answer, of the fastest whole stream of the last hour that was faster than output_speed; 0 for none",
            ["deployment"],
            registry=registry,
        )
        self.reloads = Counter("anabranch_reloads", "Reloads of the config", ["result"], registry=registry)
        self.history: deque[Moment] = deque(maxlen=BUCKETS)
        self._open: set[str] = set()
        self._children: dict[tuple[Any, ...], Any] = {}
        self._of_strategies: dict[str, Any] = {}
        self._lock = threading.Lock()

    def shared(self) -> "SharedMetrics":
        """Of what processes share; there only where they do. Call it once."""
        return SharedMetrics(
            Gauge("anabranch_shared_up", "1 while what processes share can be asked (Redis)", registry=self.registry),
            Counter("anabranch_shared_lost", "Times it did not answer, or not in time", registry=self.registry),
            Counter("anabranch_shared_refused", "Commands that it refused", registry=self.registry),
        )

    def staged(self, stage: str, seconds: float) -> None:
        """A stage of a request took so long."""
        self.stages.observe(seconds, stage)

    def ended(self, request: Ended) -> None:
        """Count a request that is over, but for what it cost: that is told by `priced`, as soon as it is known."""
        held = self._child
        model = request.model or "none"
        held(self.requests, request.endpoint, model, request.strategy or "none", str(request.status)).inc()
        self.latency.observe(request.latency_s, request.endpoint, model)
        self.overhead.observe(request.overhead_s)
        if request.ttft_s is not None:
            self.ttft.observe(request.ttft_s, model)
        now = self.now()
        now.requests += 1
        now.errors += request.status >= 500 or request.status == 429
        now.hits += bool(request.cache)

    def called(self, call: LedgerRow) -> None:
        """Count a call that a strategy made, by its row in the ledger; what it cost as for `ended`."""
        self._child(self.calls, call.purpose, call.requested, call.status).inc()

    def priced(self, row: LedgerRow) -> None:
        """Count the tokens and the money of a request, or of a call that a strategy made."""
        held, model = self._child, row.requested if row.parent_id else row.model or "none"
        if row.prompt_tokens:
            held(self.tokens, model, "prompt").inc(row.prompt_tokens)
        if row.completion_tokens:
            held(self.tokens, model, "completion").inc(row.completion_tokens)
        if row.cost_nano:
            held(self.nano, model, row.strategy or "none").inc(row.cost_nano)
            self.now().nano += row.cost_nano

    def refuse(self, code: str | None) -> None:
        """Count a request that was refused. A code that is none of ours, which an upstream chose, counts as ``other``."""
        self._child(self.refused, code if code in REFUSALS else "other").inc()

    def cached(self, result: str) -> None:
        """Count a look into the caches: ``exact``, ``semantic``, ``shared`` or ``miss``."""
        self._child(self.cache, result).inc()

    def attempted(self, deployment: str, outcome: str) -> None:
        """Count a call to a deployment: ``ok`` or the kind of failure."""
        self._child(self.attempts, deployment, outcome).inc()

    def breakers(self, is_open: Mapping[str, bool]) -> None:
        """Note which breakers are open now."""
        for name, state in is_open.items():
            self._child(self.breaker, name).set(int(state))
            if state and name not in self._open:
                opened = self.now().opened
                opened[name] = opened.get(name, 0) + 1
        self._open = {name for name, state in is_open.items() if state}
        self._forget(self.breaker, is_open)

    def speeds(self, exceeded: Mapping[str, float]) -> None:
        """Note whose whole streams were faster than is declared."""
        for name, speed in exceeded.items():
            self._child(self.exceeded, name).set(speed)
        self._forget(self.exceeded, exceeded)

    def of(self, strategy: str) -> "StrategyMetrics":
        """Where a strategy puts its own numbers."""
        return StrategyMetrics(self.registry, strategy, self._of_strategies, self._lock)

    def now(self) -> Moment:
        """The moment under way."""
        start = int(self._clock()) // BUCKET_S * BUCKET_S
        if not self.history or self.history[-1].start != start:
            self.history.append(Moment(start))
        return self.history[-1]

    def text(self) -> bytes:
        """For Prometheus."""
        return generate_latest(self.registry)

    def _forget(self, metric: Any, deployments: Mapping[str, Any]) -> None:
        """Say nothing more of deployments that are no more."""
        for key in [one for one in self._children if one[0] is metric and one[1] not in deployments]:
            del self._children[key]
            metric.remove(*key[1:])

    def _child(self, metric: Any, *labels: str) -> Any:
        """A metric with its labels set. prometheus_client's own look-up takes a lock and some microseconds."""
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child


@dataclass(frozen=True, slots=True)
class SharedMetrics:
    """Whether what processes share can be asked, and how often it could not."""

    up: Gauge
    lost: Counter
    refused: Counter


class StrategyMetrics:
    """The `Metrics` of one strategy, among those of a gateway: each with a label that names it.

    Args:
        registry: of the gateway.
        strategy: its name.
        families: of all strategies, by name.
        lock: of these.
    """

    def __init__(
        self, registry: CollectorRegistry, strategy: str, families: dict[str, Any], lock: threading.Lock
    ) -> None:
        self._registry, self._strategy, self._families, self._lock = registry, strategy, families, lock

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        self._child(Counter, name, labels).inc(value)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._child(Gauge, name, labels).set(value)

    def _child(self, kind: Any, name: str, labels: dict[str, str]) -> Any:
        with self._lock:
            family = self._families.get(name)
            if family is None:
                about = f"Of strategies that say so: {name}"
                family = self._families[name] = kind(name, about, ["strategy", *labels], registry=self._registry)
        return family.labels(strategy=self._strategy, **labels)


def totals(metric: Any) -> Iterable[tuple[dict[str, str], float]]:
    """Labels and value of each child of a counter."""
    for family in metric.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                yield dict(sample.labels), sample.value
