"""`Observers`: all who are told of requests and are no part of the gateway: the access log, and what counts by sender."""

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter

from anabranch.extras import require
from anabranch.gateway.config import GatewayConfig
from anabranch.gateway.core.finished import Finished, Priced
from anabranch.gateway.metrics import Metrics
from anabranch.gateway.observe.access_log import AccessLog
from anabranch.gateway.observe.senders import SenderMetrics
from anabranch.gateway.observe.trace_context import Trace, trace_of

if TYPE_CHECKING:
    from anabranch.gateway.observe.spans import Spans

# For spans that wait when the gateway stops: a collector that is away does not hold it up for longer.
LAST_S = 5.0

# Of a path that nobody serves.
LONGEST_PATH = 200


class Observers:
    """Use from the event loop's thread. Nothing here waits.

    Args:
        metrics: of the gateway.
        config: of it; see `start`.

    Raises MissingExtraError if it asks for spans, and the extra ``otel`` is not there.
    """

    def __init__(self, metrics: Metrics, config: GatewayConfig) -> None:
        if config.otel is not None:
            # Before anything is served, and by serve --check too.
            require("otel", by="[otel] in the config")
        self.senders = SenderMetrics(metrics.registry, config.metrics.senders)
        self._dropped = Counter(
            "anabranch_access_log_dropped", "Lines of the access log that were left out", registry=metrics.registry
        )
        self._access: AccessLog | None = None
        self._spans: Spans | None = None
        # Requests that are over, until it is known what they cost.
        self._open: dict[str, Finished] = {}

    @property
    def has_access_log(self) -> bool:  # noqa: D102
        return self._access is not None

    def start(self, config: GatewayConfig) -> None:
        """Begin, or go on with another config. Raises ConfigError, and nothing has changed."""
        old_access, old_spans = self._access, self._spans
        access = self._access_of(config)
        try:
            spans = self._spans_of(config)
        except BaseException:
            if access is not None and access is not old_access:
                _close_aside(access)
            raise
        self._access, self._spans = access, spans
        for old, new in ((old_access, access), (old_spans, spans)):
            if old is not None and old is not new:
                _close_aside(old)
        if spans is not None:
            spans.take(config)
        self.senders.most = config.metrics.senders

    def _access_of(self, config: GatewayConfig) -> AccessLog | None:
        path = config.log.access
        if self._access is not None and self._access.path == path:
            return self._access
        return None if path is None else AccessLog(path, self._dropped.inc)

    def _spans_of(self, config: GatewayConfig) -> "Spans | None":
        if config.otel is None:
            return None
        if self._spans is not None and self._spans.config == config.otel:
            return self._spans
        from anabranch.gateway.observe.spans import Spans

        return Spans(config.otel)

    def reopen(self) -> None:
        """The log's file was moved away."""
        if self._access is not None:
            self._access.reopen()

    def close(self) -> None:
        """Write what is left. Blocks, for some seconds at most."""
        if self._access is not None:
            self._access.close()
            self._access = None
        spans, self._spans = self._spans, None
        if spans is not None:
            _close_aside(spans).join(LAST_S)

    def begin_trace(self, headers: Mapping[str, str]) -> Trace | None:
        """The trace of a request; None for none."""
        return trace_of(headers) if self._spans is None else self._spans.begin(headers)

    def finished(self, done: Finished) -> None:
        """A request is over."""
        self.senders.ended(done.key, done.row.team, done.http_status)
        self._open[done.id] = done

    def priced(self, priced: Priced) -> None:
        """It is known what it cost. It is told of before, once."""
        done = self._open.pop(priced.row.request_id, None)
        if done is None:
            return
        for row in (priced.row, *priced.calls):
            self.senders.priced(done.key, done.row.team, row)
        if self._access is not None:
            self._access.put(_line(done, priced))
        if self._spans is not None:
            self._spans.emit(done, priced)

    def refused(
        self,
        endpoint: str,
        status: int,
        *,
        time_s: float,
        latency_s: float,
        code: str = "",
        id: str = "",
        key_id: str = "",
        trace: Trace | None = None,
    ) -> None:
        """A request is over that came to nothing, or that asks no model."""
        if self._spans is not None and trace is not None:
            self._spans.server(trace, endpoint, status, time_s, latency_s, code=code)
        if self._access is not None:
            said = {"code": code} if code else {}
            what = {"time": _iso(time_s), "id": id, "endpoint": endpoint[:LONGEST_PATH], "status": status, **said}
            self._access.put({**what, "key": key_id, "latency_ms": _ms(latency_s)})


def _close_aside(one: "AccessLog | Spans") -> threading.Thread:
    """What is still in it goes where it was meant to; nobody needs to wait for that."""
    thread = threading.Thread(target=one.close, name="anabranch-last-words", daemon=True)
    thread.start()
    return thread


def _line(done: Finished, priced: Priced) -> dict[str, Any]:
    """What the access log says of a request: no texts, no secrets."""
    row, rows = priced.row, (priced.row, *priced.calls)
    line: dict[str, Any] = {
        "time": _iso(done.time_s),
        "id": done.id,
        "endpoint": done.endpoint,
        "status": done.http_status,
        "code": row.code,
        "key": row.key_id,
        "team": row.team,
        "requested": row.requested,
        "strategy": row.strategy,
        "model": row.model,
        "deployment": row.deployment,
        "attempts": row.attempts,
        "calls": len(priced.calls),
        "cache": row.cache,
        "prompt_tokens": sum(one.prompt_tokens for one in rows),
        "completion_tokens": sum(one.completion_tokens for one in rows),
        "cached_tokens": sum(one.cached_tokens for one in rows),
        "cost_usd": priced.nano / 1e9,
        "latency_ms": _ms(done.latency_s),
        "overhead_ms": _ms(done.overhead_s),
    }
    if done.first_s is not None:
        line["first_token_ms"] = _ms(done.first_s)
    if done.trace is not None:
        line["trace_id"] = done.trace.trace_id
    return line


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _iso(time_s: float) -> str:
    """``2026-11-28T18:44:02.123Z``."""
    whole, thousandths = divmod(round(time_s * 1e3), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{thousandths:03d}Z"
