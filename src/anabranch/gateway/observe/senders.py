"""Metrics by key and team. Each label takes a bounded set of names, the first that send; all others count as ``other``."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter

from anabranch.gateway.store import LedgerRow

OTHER, NONE = "other", "none"


class SenderMetrics:
    """Requests, tokens and money by who asked.

    Args:
        registry: of the gateway's metrics.
        most: names of each label; more are counted as ``other``. 0 counts nothing by sender.
    """

    def __init__(self, registry: CollectorRegistry, most: int) -> None:
        self.most = most
        self._names: dict[str, set[str]] = {"key": set(), "team": set()}
        # Counters by their labels: prometheus_client's own look-up takes a lock and some microseconds.
        self._children: dict[tuple[Any, ...], Any] = {}
        self.requests = Counter(
            "anabranch_sender_requests", "Requests that ended", ["key", "team", "status"], registry=registry
        )
        self.tokens = Counter("anabranch_sender_tokens", "Tokens", ["key", "team", "direction"], registry=registry)
        self.nano = Counter(
            "anabranch_sender_spend_nano_dollars", "Nano-dollars spent", ["key", "team"], registry=registry
        )

    def ended(self, key: str, team: str, status: int) -> None:
        """Count a request that is over: of a key by its name or id, "" for none, and its team."""
        if self.most:
            self._child(self.requests, *self._labels(key, team), f"{status // 100}xx").inc()

    def priced(self, key: str, team: str, row: LedgerRow) -> None:
        """Count the tokens and the money of a request, or of a call that was made for it."""
        if not self.most:
            return
        key, team = self._labels(key, team)
        if row.prompt_tokens:
            self._child(self.tokens, key, team, "prompt").inc(row.prompt_tokens)
        if row.completion_tokens:
            self._child(self.tokens, key, team, "completion").inc(row.completion_tokens)
        if row.cost_nano:
            self._child(self.nano, key, team).inc(row.cost_nano)

    def _child(self, metric: Counter, *labels: str) -> Any:
        child = self._children.get((metric, *labels))
        if child is None:
            child = self._children[metric, *labels] = metric.labels(*labels)
        return child

    def _labels(self, key: str, team: str) -> tuple[str, str]:
        return self._label("key", key), self._label("team", team)

    def _label(self, label: str, name: str) -> str:
        known = self._names[label]
        # One that is called as all others are is among them.
        if not name or name in known:
            return name or NONE
        if len(known) >= self.most or name in (OTHER, NONE):
            return OTHER
        known.add(name)
        return name
