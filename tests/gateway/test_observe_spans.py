"""Spans for OpenTelemetry: one of a request, one of each call of an upstream, and no text."""

import asyncio
import contextlib
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from anabranch.errors import AnabranchError, ConfigError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LogConfig, ModelConfig, OtelConfig, RetryConfig
from anabranch.gateway.config.secret import Secret
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.openai import OpenAI
from anabranch.routers.money import Price
from anabranch.web.api_error import ApiError
from gateway_upstream import noting

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TEXT = "a-text-that-stays-out"


@contextlib.contextmanager
def collector():
    """What a collector is sent, as spans of OTLP."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    found, headers = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            raw = self.rfile.read(int(self.headers["content-length"]))
            headers.append(dict(self.headers))
            assert self.path == "/v1/traces"
            assert TEXT.encode() not in raw
            for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
                for scope in resource.scope_spans:
                    found.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", found, headers
        server.shutdown()
        thread.join()


def attributes(span):
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def asked(tmp_path, headers, *, failing=(), model="m", keys=None, **otel):
    pytest.importorskip("opentelemetry.sdk")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with noting() as upstream, collector() as (endpoint, spans, sent):
        upstream.failing = list(failing)
        provider = OpenAI.Config(base_url=f"{upstream.url}/v1", model="gpt-x", key_env=None)
        one = ModelConfig(name="m", price=Price.of_dollars(1, 2), deployments=(DeploymentConfig(provider=provider),))
        config = GatewayConfig(
            models=(one,),
            require_key=False,
            store=str(tmp_path / "g.db"),
            retries=RetryConfig(base_s=0),
            log=LogConfig(prompts=True),
            otel=OtelConfig(endpoint=endpoint, headers=keys or {}, **otel),
        )

        async def main():
            async with Gateway(config) as gateway:
                body = {"model": model, "messages": [{"role": "user", "content": TEXT}]}
                with contextlib.suppress(ApiError):
                    await gateway.handle("chat", body, headers=headers)

        asyncio.run(main())
        return spans, [one["traceparent"] for one, _ in upstream.seen if "traceparent" in one], sent


def test_a_request_and_each_attempt_have_spans_that_upstreams_were_told_of(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_OTEL_KEY", "the-collectors-key")
    given, secret = {"traceparent": f"00-{TRACE}-{SPAN}-01"}, Secret("env:TEST_OTEL_KEY")
    spans, told, sent = asked(tmp_path, given, failing=[500], keys={"x-api-key": secret})
    server = next(one for one in spans if one.kind == 2)
    clients = sorted((one for one in spans if one.kind == 3), key=lambda one: one.start_time_unix_nano)
    assert len(spans) == 3
    assert {one.trace_id.hex() for one in spans} == {TRACE}
    assert server.parent_span_id.hex() == SPAN
    assert {one.parent_span_id for one in clients} == {server.span_id}
    assert [f"00-{TRACE}-{one.span_id.hex()}-01" for one in clients] == told
    assert server.name == "POST /v1/chat/completions"
    assert [one.name for one in clients] == ["chat gpt-x", "chat gpt-x"]
    failed, answered = (attributes(one) for one in clients)
    assert failed["error.type"] == "server"
    assert failed["http.response.status_code"] == 500
    assert clients[0].status.code == 2
    assert "error.type" not in answered
    assert answered["gen_ai.provider.name"] == "openai"
    assert answered["gen_ai.operation.name"] == "chat"
    assert (answered["gen_ai.usage.input_tokens"], answered["gen_ai.usage.output_tokens"]) == (3, 2)
    assert answered["server.address"] == "127.0.0.1"
    whole = attributes(server)
    assert whole["http.response.status_code"] == 200
    assert whole["gen_ai.request.model"] == whole["gen_ai.response.model"] == "m"
    assert whole["anabranch.cost_usd"] > 0
    assert server.start_time_unix_nano <= clients[0].start_time_unix_nano
    assert clients[1].end_time_unix_nano <= server.end_time_unix_nano + 10**7
    assert sent[0]["x-api-key"] == "the-collectors-key"


def test_a_request_without_a_trace_begins_one_and_a_refused_one_has_a_span_too(tmp_path):
    spans, told, _ = asked(tmp_path, {})
    assert len(spans) == 2
    assert told[0].startswith(f"00-{spans[0].trace_id.hex()}-")
    assert told[0].endswith("-01")
    (refused,), told, _ = asked(tmp_path, {}, model="none")
    assert told == []
    assert attributes(refused)["error.type"] == "model_not_found"
    assert refused.parent_span_id == b""


def test_what_is_not_sampled_is_not_recorded_and_upstreams_are_told(tmp_path):
    spans, told, _ = asked(tmp_path, {"traceparent": f"00-{TRACE}-{SPAN}-00"})
    assert spans == []
    assert told[0].startswith(f"00-{TRACE}-")
    assert told[0].endswith("-00")
    spans, told, _ = asked(tmp_path, {}, sample=0.0)
    assert spans == []
    assert told[0].endswith("-00")


def test_without_the_extra_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    one = ModelConfig(name="m", deployments=(DeploymentConfig(provider=OpenAI.Config(model="m", key_env=None)),))
    config = GatewayConfig(models=(one,), otel=OtelConfig(), store=str(tmp_path / "g.db"))
    with pytest.raises(AnabranchError, match=r"\[otel\] in the config.*pip install.*anabranch\[otel\]"):
        Gateway(config)


@pytest.mark.parametrize(
    "endpoint", ["collector:4318", "ftp://x", "http://u:p@x", "http://x?key=1", "http://[host]:4318", "http://x:port"]
)
def test_an_endpoint_that_is_none_is_told(endpoint):
    with pytest.raises(ConfigError, match="endpoint must be a URL"):
        OtelConfig(endpoint=endpoint)
