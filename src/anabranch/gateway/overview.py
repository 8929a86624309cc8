"""`Overview`: the figures of the page, gathered as requests end and read from the store every few seconds."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anabranch import __version__
from anabranch.gateway.config import GatewayConfig
from anabranch.gateway.metrics import Metrics, totals
from anabranch.gateway.store import Calibration, LedgerRow, Store
from anabranch.gateway.ui import DeploymentFact, Point, Seen, Snapshot, Spend
from anabranch.routers.money import dollars

# How long what was read from the store is shown.
FRESH_S = 3.0

# Spend of the last day.
SPEND_S = 86_400.0

# How long what was read of weeks is shown.
STALE_S = 60.0
WEEKS_S = 8 * 7 * 86_400.0
NAMED = "no strategy: the request named its model"

# Requests that can be looked into.
SHOWN = 60


class _Mean:
    """Of cost, and of quality as judged or, where nobody judged, as predicted."""

    __slots__ = ("cost", "count", "judged", "predicted")

    def __init__(self) -> None:
        self.count, self.cost = 0, 0.0
        # How many, and their sum.
        self.judged, self.predicted = [0, 0.0], [0, 0.0]

    def quality(self) -> float | None:
        for count, total in (self.judged, self.predicted):
            if count:
                return total / count
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What the page's figures are read from.

    Attributes:
        metrics: of the process.
        recent: the last requests, oldest first.
        began_s: when the gateway did, in seconds since 1970.
        store: gives the store, open.
        config: gives the config that is in use now.
        in_flight: gives how many requests are under way.
        states: gives how deployments are doing.
    """

    metrics: Metrics
    recent: deque[Seen]
    began_s: float
    store: Callable[[], Store]
    config: Callable[[], GatewayConfig]
    in_flight: Callable[[], int]
    states: Callable[[], list[dict[str, Any]]]


class Overview:
    """Of one gateway, since its start."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._means: dict[tuple[str, str], _Mean] = {}
        self._spend: dict[str, list[Spend]] = {}
        self._calibration: list[Calibration] = []
        self._read_s = self._weeks_read_s = 0.0

    def ended(self, request: Seen) -> None:
        """A request is over."""
        if request.status != 200 or request.cache or not request.chosen:
            return
        quality = next((one.get("quality") for one in request.candidates if one.get("model") == request.chosen), None)
        asked_nano = sum(call["nano"] for call in request.calls)
        for (kind, _), mean in self._of(request.chosen, request.strategy).items():
            mean.count += 1
            # What a strategy asked is no cost of the model that it chose.
            mean.cost += dollars(request.nano - (asked_nano if kind == "model" else 0))
            if quality is not None:
                mean.predicted[0] += 1
                mean.predicted[1] += quality

    def judged(self, row: LedgerRow, score: float) -> None:
        """Somebody scored an answer."""
        if row.model:
            for mean in self._of(row.model, row.strategy).values():
                mean.judged[0] += 1
                mean.judged[1] += score

    def _of(self, model: str, strategy: str) -> dict[tuple[str, str], _Mean]:
        names = [("model", model), ("live", "all traffic"), *([("strategy", strategy)] if strategy else [])]
        return {name: self._means.setdefault(name, _Mean()) for name in names}

    async def snapshot(self) -> Snapshot:
        """All of it, now."""
        sources, metrics, config = self._sources, self._sources.metrics, self._sources.config()
        now_s = time.time()
        if now_s - self._read_s > FRESH_S:
            self._read_s = now_s
            self._spend = await self._read()
        if now_s - self._weeks_read_s > STALE_S:
            self._weeks_read_s = now_s
            self._calibration = await sources.store().calibration(since_s=now_s - WEEKS_S)
        requests = list(totals(metrics.requests))
        cache = {labels["result"]: int(value) for labels, value in totals(metrics.cache)}
        return Snapshot(
            now_s=now_s,
            uptime_s=now_s - sources.began_s,
            version=__version__,
            requests=int(sum(value for _, value in requests)),
            errors=int(sum(value for labels, value in requests if _is_error(labels["status"]))),
            in_flight=sources.in_flight(),
            hits={name: count for name, count in cache.items() if name != "miss"},
            misses=cache.get("miss", 0),
            bypassed=int(sum(value for _, value in totals(metrics.bypassed))),
            spend=self._spend,
            latency=_buckets(metrics.latency),
            ttft=_buckets(metrics.ttft),
            overhead=_buckets(metrics.overhead),
            timeline=tuple(metrics.history),
            deployments=self._deployments(),
            points=self._points(),
            calibration=self._calibration,
            recent=tuple(reversed(sources.recent))[:SHOWN],
            has_tests=bool(config.ab),
            refused=int(sum(value for _, value in totals(metrics.refused))),
            keeps_texts=config.log.prompts,
            can_label=config.log.prompts and config.admin.key is not None,
        )

    async def _read(self) -> dict[str, list[Spend]]:
        store, since_s = self._sources.store(), time.time() - SPEND_S
        names = {key.id: key.name or key.id for key in await store.keys()}
        found = {}
        for by in ("model", "strategy", "key", "team"):
            rows = [
                Spend(_shown(by, row.group[0], names), row.cost_nano, row.requests)
                for row in await store.spend(by, since_s=since_s)
            ]
            found[by] = sorted((row for row in rows if row.name), key=lambda row: (-row.nano, -row.requests, row.name))
        return found

    def _deployments(self) -> tuple[DeploymentFact, ...]:
        calls: dict[str, list[int]] = {}
        for labels, value in totals(self._sources.metrics.attempts):
            counted = calls.setdefault(labels["deployment"], [0, 0])
            counted[0] += int(value)
            counted[1] += 0 if labels["outcome"] in ("ok", "cancelled", "rejected") else int(value)
        return tuple(
            DeploymentFact(
                name=state["deployment"],
                model=state["model"],
                state=state["breaker"],
                in_flight=state["in_flight"],
                requests=calls.get(state["deployment"], [0, 0])[0],
                failures=calls.get(state["deployment"], [0, 0])[1],
                latency_s=state["latency_s"],
            )
            for state in self._sources.states()
        )

    def _points(self) -> tuple[Point, ...]:
        points = []
        for (kind, name), mean in self._means.items():
            quality = mean.quality()
            if quality is not None and mean.count:
                points.append(
                    Point(name=name, kind=kind, cost=mean.cost / mean.count, quality=quality, count=mean.count)
                )
        return tuple(points)


def _shown(by: str, group: str, names: dict[str, str]) -> str:
    if by == "key":
        return names.get(group, group or "no key")
    if by == "strategy":
        return group or NAMED
    return group


def _is_error(status: str) -> bool:
    return status >= "500" or status == "429"


def _buckets(histogram: Any) -> list[tuple[float, int]]:
    """All label sets together: upper bound, and how many lie in each bucket alone."""
    below: dict[float, int] = {}
    for family in histogram.collect():
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                upper = float(sample.labels["le"])
                below[upper] = below.get(upper, 0) + int(sample.value)
    bounds = sorted(below)
    return [(upper, below[upper] - (below[bounds[at - 1]] if at else 0)) for at, upper in enumerate(bounds)]
