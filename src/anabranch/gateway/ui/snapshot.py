"""The facts the page shows, of one moment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anabranch.gateway.metrics import Moment
from anabranch.gateway.store import Calibration

# Upper bound in seconds (the last infinite), and how many lie below it and above the one before.
Buckets = Sequence[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Spend:
    """What one key, model or strategy has cost."""

    name: str
    nano: int
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentFact:
    """How a deployment is doing.

    Attributes:
        name: of the deployment.
        model: it serves.
        state: of its breaker: ``closed``, ``open`` or ``half_open``.
        in_flight: requests under way.
        requests: calls so far.
        failures: of them.
        latency_s: smoothed; None before the first.
    """

    name: str
    model: str
    state: str = "closed"
    in_flight: int = 0
    requests: int = 0
    failures: int = 0
    latency_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model, a strategy or all traffic in the plane of cost and quality.

    Attributes:
        name: shown beside it.
        kind: ``model``, ``strategy`` or ``live``.
        cost: mean dollars of a request.
        quality: mean score.
        count: of requests behind it; 0 if it comes from the config or from recorded data.
    """

    name: str
    kind: str
    cost: float
    quality: float
    count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A request whose decision can be looked into. Nothing of what was asked is kept here.

    Attributes:
        request_id: as in ``x-request-id``.
        time_s: seconds since 1970.
        key: name of the key.
        asked: the model the sender named.
        strategy: that chose; "" if a model was named.
        chosen: the model that answered; "" if none did.
        reason: one sentence.
        confidence: of the strategy.
        candidates: model, score, quality and cost, best first.
        details: what else explains it.
        attempts: deployment, outcome and seconds of each call.
        status: of the response.
        cache: ``exact``, ``semantic``, ``shared`` or "".
        bypassed: why the strategy was bypassed, if it was.
        prompt_tokens: counted or estimated.
        completion_tokens: given.
        nano: nano-dollars, those of ``calls`` among them.
        latency_s: to the end.
        overhead_s: of it, what the gateway took.
        calls: purpose, model, outcome and nano-dollars of each call that the strategy made to decide.
    """

    request_id: str
    time_s: float
    key: str = ""
    asked: str = ""
    strategy: str = ""
    chosen: str = ""
    reason: str = ""
    confidence: float | None = None
    candidates: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    attempts: Sequence[Mapping[str, Any]] = ()
    status: int = 200
    cache: str = ""
    bypassed: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nano: int = 0
    latency_s: float = 0.0
    overhead_s: float = 0.0
    calls: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All of it.

    Attributes:
        now_s: seconds since 1970.
        uptime_s: since the start.
        version: of the package.
        requests: ended since the start.
        errors: of them.
        in_flight: under way.
        refused: before any call: of a model that is not there, over a limit, or in a wrong form; not among ``requests``.
        hits: answers from a cache, by kind.
        misses: looks into a cache that found nothing.
        bypassed: decisions left to the default strategy.
        spend: of the last day by ``model``, ``strategy``, ``key`` and ``team``, dearest first.
        latency: to the end of the answer.
        ttft: to the first token of a stream.
        overhead: what the gateway itself took.
        timeline: the last hour, oldest first.
        deployments: in the order of the config.
        points: for the plot of cost against quality.
        calibration: what strategies expected and what was said, by week, newest first.
        recent: requests, newest first.
        has_tests: the config has A/B tests.
        keeps_texts: what is asked and answered is kept in the store.
        can_label: there are such texts, and a browser can be asked for the key that opens the page where people judge them.
    """

    now_s: float
    uptime_s: float = 0.0
    version: str = ""
    requests: int = 0
    errors: int = 0
    in_flight: int = 0
    refused: int = 0
    hits: Mapping[str, int] = field(default_factory=dict)
    misses: int = 0
    bypassed: int = 0
    spend: Mapping[str, Sequence[Spend]] = field(default_factory=dict)
    latency: Buckets = ()
    ttft: Buckets = ()
    overhead: Buckets = ()
    timeline: Sequence[Moment] = ()
    deployments: Sequence[DeploymentFact] = ()
    points: Sequence[Point] = ()
    calibration: Sequence[Calibration] = ()
    recent: Sequence[Seen] = ()
    has_tests: bool = False
    keeps_texts: bool = False
    can_label: bool = False


def quantile(buckets: Buckets, share: float) -> float | None:
    """Seconds below which this share of a histogram lies, by straight lines within a bucket; None if it is empty.

    What lies in the last, endless bucket counts as its lower bound.
    """
    total = sum(count for _, count in buckets)
    if not total:
        return None
    wanted, below, low = share * total, 0, 0.0
    for upper, count in buckets:
        if count and below + count >= wanted:
            return low if upper == float("inf") else low + (upper - low) * (wanted - below) / count
        below += count
        low = upper if upper != float("inf") else low
    return low
