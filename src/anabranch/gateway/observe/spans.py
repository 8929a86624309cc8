"""`Spans`: OpenTelemetry. One server span for each request, and below it one client span for each call of an upstream.

Names and attributes are those of the semantic conventions for HTTP servers and generative models (``gen_ai.*``); what they have no
word for is ``anabranch.*``. No text of a request or an answer is among them. Spans wait in a bounded queue, and a thread of the SDK
sends them to a collector (OTLP over HTTP): what a collector that is away leaves no room for is dropped.
"""

import random
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from anabranch.extras import require
from anabranch.gateway.config import GatewayConfig, OtelConfig
from anabranch.gateway.core.finished import Finished, Priced
from anabranch.gateway.dispatch import Attempt
from anabranch.gateway.observe.trace_context import Trace, new_trace, trace_of
from anabranch.gateway.providers.media import PATHS

NANO = 10**9

ROUTES: dict[str, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    **{endpoint: f"/v1{path}" for endpoint, path in PATHS.items()},
}
_OPERATIONS = {"completions": "text_completion", "embeddings": "embeddings", "responses": "chat", "messages": "chat"}

# Kinds of our providers, where the conventions call them otherwise.
_PROVIDERS = {"azure": "azure.ai.openai", "bedrock": "aws.bedrock", "gemini": "gcp.gemini", "vertex": "gcp.vertex_ai"}


class Spans:
    """Makes spans of requests that are over. Use from one thread.

    Args:
        config: where they go.

    Raises MissingExtraError without the extra ``otel``, ConfigError for a secret that is not there.
    """

    def __init__(self, config: OtelConfig) -> None:
        require("otel", by="[otel] in the config")
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import IdGenerator
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        class Given(IdGenerator):
            """Ids that are known: upstreams were told of them before there was a span."""

            trace_id = span_id = 0

            def generate_trace_id(self) -> int:
                return self.trace_id

            def generate_span_id(self) -> int:
                return self.span_id

        self.config, self._trace, self._ids = config, trace, Given()
        headers = {name: secret.reveal() for name, secret in config.headers.items()}
        exporter = OTLPSpanExporter(endpoint=f"{config.endpoint.rstrip('/')}/v1/traces", headers=headers, timeout=10)
        # Whether a trace is recorded is decided before a request is sent on, so that upstreams are told the same.
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create({"service.name": config.service}),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("anabranch.gateway")
        self._hosts: dict[str, dict[str, Any]] = {}

    def take(self, config: GatewayConfig) -> None:
        """What is known of deployments, by their names."""
        self._hosts = {
            model.deployment_name(at): _provider(one.provider)
            for model in config.models
            for at, one in enumerate(model.deployments)
        }

    def begin(self, headers: Mapping[str, str]) -> Trace:
        """The trace of a request: the one that it came with, and recorded where that is, or a new one."""
        return trace_of(headers) or new_trace(is_sampled=random.random() < self.config.sample)

    def emit(self, done: Finished, priced: Priced) -> None:
        """The spans of a request."""
        if done.trace is None or not done.trace.is_sampled:
            return
        row, rows = priced.row, (priced.row, *priced.calls)
        attributes = {
            **_operation(done.endpoint, row.requested),
            "gen_ai.response.model": row.model,
            "gen_ai.usage.input_tokens": sum(one.prompt_tokens for one in rows),
            "gen_ai.usage.output_tokens": sum(one.completion_tokens for one in rows),
            "gen_ai.usage.cache_read.input_tokens": sum(one.cached_tokens for one in rows),
            "anabranch.request.id": row.request_id,
            "anabranch.key.id": row.key_id,
            "anabranch.team": row.team,
            "anabranch.strategy": row.strategy,
            "anabranch.cache": row.cache,
            "anabranch.cost_usd": priced.nano / NANO,
        }
        self.server(
            done.trace, done.endpoint, done.http_status, done.time_s, done.latency_s, code=row.code, more=attributes
        )
        for attempt in (*done.attempts, *done.asked_attempts):
            if attempt.span_id:
                self._client(done, attempt)

    def server(
        self,
        trace: Trace,
        endpoint: str,
        status: int,
        time_s: float,
        latency_s: float,
        *,
        code: str = "",
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """The span of a request, as its sender sees it."""
        if not trace.is_sampled:
            return
        route = ROUTES.get(endpoint, endpoint)
        what = {"http.request.method": "POST", "http.route": route, "http.response.status_code": status}
        attributes = {**what, **(more or {})}
        if status >= 400:
            attributes["error.type"] = code or str(status)
        ids, when = (trace.span_id, trace.parent_id), (time_s, latency_s)
        kind = self._trace.SpanKind.SERVER
        self._span(trace, ids, f"POST {route}", kind, attributes, when, is_failed=status >= 500)

    def _client(self, done: Finished, attempt: Attempt) -> None:
        assert done.trace is not None
        host = self._hosts.get(attempt.deployment, {})
        operation = _operation(done.endpoint, host.get("gen_ai.request.model") or attempt.model)
        attributes: dict[str, Any] = {
            **operation,
            **host,
            "gen_ai.usage.input_tokens": attempt.usage.prompt,
            "gen_ai.usage.output_tokens": attempt.usage.completion,
            "anabranch.deployment": attempt.deployment,
            "anabranch.status": attempt.status,
        }
        attributes["gen_ai.request.model"] = operation["gen_ai.request.model"]
        if attempt.http_status is not None:
            attributes["http.response.status_code"] = attempt.http_status
        is_failed = attempt.status not in ("ok", "rejected", "cancelled", "open")
        if is_failed:
            attributes["error.type"] = attempt.status
        name = f"{operation['gen_ai.operation.name']} {operation['gen_ai.request.model']}"
        ids, when = (attempt.span_id, done.trace.span_id), (attempt.time_s, attempt.total_s or 0.0)
        self._span(done.trace, ids, name, self._trace.SpanKind.CLIENT, attributes, when, is_failed=is_failed)

    def _span(
        self,
        trace: Trace,
        ids: tuple[str, str],
        name: str,
        kind: Any,
        attributes: Mapping[str, Any],
        when: tuple[float, float],
        *,
        is_failed: bool,
    ) -> None:
        api, (span_id, parent_id), (time_s, latency_s) = self._trace, ids, when
        self._ids.trace_id, self._ids.span_id = int(trace.trace_id, 16), int(span_id, 16)
        context = None
        if parent_id:
            flags = api.TraceFlags(api.TraceFlags.SAMPLED)
            parent = api.SpanContext(self._ids.trace_id, int(parent_id, 16), parent_id == trace.parent_id, flags)
            context = api.set_span_in_context(api.NonRecordingSpan(parent))
        given = {name: value for name, value in attributes.items() if value not in ("", None)}
        start = round(time_s * NANO)
        span = self._tracer.start_span(name, context, kind, given, start_time=start)
        if is_failed:
            span.set_status(api.StatusCode.ERROR)
        span.end(start + round(latency_s * NANO))

    def close(self) -> None:
        """Send what is left. Blocks until the collector has taken it, or the SDK gives it up."""
        self._provider.shutdown()


def _operation(endpoint: str, model: str) -> dict[str, str]:
    return {"gen_ai.operation.name": _OPERATIONS.get(endpoint, endpoint), "gen_ai.request.model": model}


def _provider(config: Any) -> dict[str, Any]:
    """What the conventions say of an upstream."""
    kind = config.owner.kind or ""
    found = {"gen_ai.provider.name": _PROVIDERS.get(kind, kind), "gen_ai.request.model": config.model}
    parts = urlsplit(getattr(config, "base_url", None) or "")
    if parts.hostname:
        found["server.address"] = parts.hostname
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return {**found, "server.port": port}
    return found
