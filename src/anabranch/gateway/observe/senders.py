"""Metrics by key and team. Each label takes a bounded set of names, the first that send; all others count as ``other``."""

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
            self.requests.labels(*self._labels(key, team), f"{status // 100}xx").inc()

    def priced(self, key: str, team: str, row: LedgerRow) -> None:
        """Count the tokens and the money of a request, or of a call that was made for it."""
        if not self.most:
            return
        key, team = self._labels(key, team)
        if row.prompt_tokens:
            self.tokens.labels(key, team, "prompt").inc(row.prompt_tokens)
        if row.completion_tokens:
            self.tokens.labels(key, team, "completion").inc(row.completion_tokens)
        if row.cost_nano:
            self.nano.labels(key, team).inc(row.cost_nano)

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
