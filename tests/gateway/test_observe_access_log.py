"""The access log: one line a request, whatever became of it; files that are moved, full or slow cost no request."""

import asyncio
import json
import os
import signal
import threading
import time

import pytest

from anabranch.errors import ConfigError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LogConfig, MetricsConfig, ModelConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.observe import access_log
from anabranch.gateway.observe.access_log import AccessLog
from anabranch.gateway.providers.mock import Mock
from anabranch.routers.money import Price
from anabranch.web.api_error import ApiError
from gateway_process import ask, call, mock_config, served
from waiting import PATIENCE_S, until

SECRET = "a-text-that-stays-out"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture(autouse=True)
def _last_words(monkeypatch):
    """A log that is closed writes what is left, however long its thread gets no time."""
    monkeypatch.setattr(access_log, "LEAVE_S", PATIENCE_S)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def config(tmp_path, **fields):
    provider = Mock.Config(model="small", tokens=4, **fields.pop("behaviour", {}))
    one = ModelConfig(
        name="small", price=Price.of_dollars(1, 2), max_tokens=100, deployments=(DeploymentConfig(provider=provider),)
    )
    log = LogConfig(access=str(tmp_path / "access.log"))
    return GatewayConfig(models=(one,), store=str(tmp_path / "g.db"), **{"log": log, "require_key": False, **fields})


def body(**fields):
    return {"model": "small", "messages": [{"role": "user", "content": SECRET}], **fields}


def test_a_line_tells_who_asked_what_it_cost_and_how_long_it_took(tmp_path):
    async def main():
        async with Gateway(config(tmp_path)) as gateway:
            secret, record = await gateway.store.create_key(name="ci", team="blue")
            reply = await gateway.handle(
                "chat", body(), key=secret, headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
            )
            return reply.headers["x-request-id"], secret, record.id

    id, secret, key_id = asyncio.run(main())
    text = (tmp_path / "access.log").read_text()
    assert SECRET not in text
    assert secret not in text
    (line,) = lines(tmp_path / "access.log")
    times = {name: line.pop(name) for name in ("time", "latency_ms", "overhead_ms")}
    assert times["latency_ms"] >= times["overhead_ms"] > 0
    assert time.strptime(times["time"], "%Y-%m-%dT%H:%M:%S.%fZ")
    prompt = line.pop("prompt_tokens")
    assert prompt > 0
    assert line == {
        "id": id,
        "endpoint": "chat",
        "status": 200,
        "code": "",
        "key": key_id,
        "team": "blue",
        "requested": "small",
        "strategy": "",
        "model": "small",
        "deployment": "small",
        "attempts": 1,
        "calls": 0,
        "cache": "",
        "completion_tokens": 4,
        "cached_tokens": 0,
        "cost_usd": pytest.approx(prompt * 1e-6 + 8e-6),
        "trace_id": TRACE,
    }


def test_each_request_has_one_line_also_one_that_is_refused_fails_or_is_streamed(tmp_path):
    async def main():
        async with Gateway(config(tmp_path, behaviour={"fails": 1})) as gateway:
            await gateway.store.create_key(name="one")
            for sent, key in ((body(), "sk-wrong"), (body(model="none"), None), (body(), None)):
                with pytest.raises(ApiError):
                    await gateway.handle("chat", sent, key=key)

    asyncio.run(main())
    found = [(line["status"], line["code"]) for line in lines(tmp_path / "access.log")]
    assert found == [(401, "invalid_api_key"), (404, "model_not_found"), (502, "upstream_server")]
    assert len({line["id"] for line in lines(tmp_path / "access.log")}) == 3


def test_over_http_each_request_has_one_line_and_hup_goes_on_in_a_new_file(tmp_path):
    log = tmp_path / "access.log"
    path = mock_config(tmp_path / "g.toml", top=f'[admin]\nkey = "env:TEST_ADMIN_KEY"\n[log]\naccess = "{log}"')
    with served("--config", path, environment={"TEST_ADMIN_KEY": "k"}) as running:
        for probe in ("/health", "/health/", "/ready", "/health/liveliness", "/health/liveness", "/health/readiness"):
            assert call(running.url, "GET", probe)[0] == 200
        made = call(running.url, "POST", "/admin/keys", {"name": "ci"}, key="k")[1]
        secret = made["secret"]
        assert ask(running.url, key=secret)[0] == 200
        assert ask(running.url, key="sk-no")[0] == 401
        assert call(running.url, "POST", "/v1/messages", {}, key="sk-no")[0] == 401
        assert ask(running.url, model="no", key=secret)[0] == 404
        assert call(running.url, "GET", "/nothing")[0] == 404
        # Whose request it is, also where no model is asked; operators are shown nothing without their key, here either.
        assert call(running.url, "GET", "/v1/key", key=secret)[0] == 200
        assert call(running.url, "POST", "/v1/feedback", {}, key=secret)[0] == 400
        assert call(running.url, "GET", "/ui", key=secret)[0] == 401
        assert [call(running.url, "GET", "/metrics", key=key)[0] for key in (None, secret, "k")] == [401, 401, 200]
        expected = [
            "POST /admin/keys",
            "chat",
            "POST /v1/chat/completions",
            "POST /v1/messages",
            "chat",
            "GET /nothing",
            "GET /v1/key",
            "POST /v1/feedback",
            "GET /ui",
        ]
        until(lambda: log.exists() and len(lines(log)) == len(expected))
        assert [line["endpoint"] for line in lines(log)] == expected
        assert [line["status"] for line in lines(log)] == [200, 200, 401, 401, 404, 404, 200, 400, 401]
        assert [line["key"] == made["key"]["id"] for line in lines(log)] == [at in (1, 4, 6, 7, 8) for at in range(9)]
        os.rename(log, tmp_path / "old.log")
        running.process.send_signal(signal.SIGHUP)
        until(log.exists)
        assert ask(running.url, key=secret)[0] == 200
        until(lambda: len(lines(log)) == 1)
    assert len(lines(tmp_path / "old.log")) == len(expected)
    assert "k" not in [line.get("key") for line in lines(log)]


def test_a_file_that_cannot_be_opened_is_a_clear_mistake(tmp_path):
    with pytest.raises(ConfigError, match=r"log\.access: cannot write to .*is a directory"):
        AccessLog(str(tmp_path))


def test_a_reader_that_does_not_read_holds_nobody_up_and_what_is_left_out_is_counted(tmp_path):
    path, dropped = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(str(path), dropped.append, most=5)
    for _ in range(100):
        log.put({"text": "x" * 50_000})
    assert sum(dropped) > 0
    found = b""
    while found.count(b"\n") < 100 - sum(dropped):
        try:
            found += os.read(reader, 1 << 20)
        except BlockingIOError:
            time.sleep(0.001)
    log.close()
    os.close(reader)
    assert [json.loads(line)["text"] for line in found.splitlines()] == ["x" * 50_000] * (100 - sum(dropped))


def test_a_full_disk_leaves_lines_out_and_the_next_one_begins_a_line(tmp_path, monkeypatch):
    real, calls, broken, dropped = os.write, [0], threading.Event(), []

    def some(file, data):
        calls[0] += 1
        if calls[0] == 1:
            return real(file, bytes(data)[:7])
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        return real(file, data)

    def left_out(count):
        dropped.append(count)
        broken.set()

    monkeypatch.setattr("anabranch.gateway.observe.access_log.os.write", some)
    log = AccessLog(str(tmp_path / "a.log"), left_out)
    log.put({"number": 1})
    assert broken.wait(60)
    log.put({"number": 2})
    log.close()
    assert (tmp_path / "a.log").read_text() == '{"numbe\n{"number":2}\n'
    assert dropped == [1]


def test_keys_and_teams_beyond_the_bound_count_as_other(tmp_path):
    async def main():
        async with Gateway(config(tmp_path, metrics=MetricsConfig(senders=1))) as gateway:
            for at in range(3):
                secret, _ = await gateway.store.create_key(name=f"key{at}", team=f"team{at % 2}")
                await gateway.handle("chat", body(), key=secret)
            await gateway.handle("chat", body())
            await gateway.settled()
            return gateway.metrics_text().decode()

    text = asyncio.run(main())
    found = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if "sender" in line and line[0] != "#"
    }
    counted = {name: value for name, value in found.items() if name.startswith("anabranch_sender_requests_total")}
    assert counted == {
        'anabranch_sender_requests_total{key="key0",status="2xx",team="team0"}': 1,
        'anabranch_sender_requests_total{key="other",status="2xx",team="other"}': 1,
        'anabranch_sender_requests_total{key="other",status="2xx",team="team0"}': 1,
        'anabranch_sender_requests_total{key="none",status="2xx",team="none"}': 1,
    }
    assert found['anabranch_sender_tokens_total{direction="completion",key="key0",team="team0"}'] == 4
    assert found['anabranch_sender_spend_nano_dollars_total{key="key0",team="team0"}'] > 8000


def test_a_reload_that_fails_leaves_the_log_as_it_is(tmp_path):
    async def main():
        async with Gateway(config(tmp_path)) as gateway:
            with pytest.raises(ConfigError):
                await gateway.reload(config(tmp_path, log=LogConfig(access=str(tmp_path))))
            await gateway.handle("chat", body())
            other = LogConfig(access=str(tmp_path / "other.log"))
            await gateway.reload(config(tmp_path, log=other))
            await gateway.handle("chat", body())
            await gateway.reload(config(tmp_path, log=LogConfig()))
            await gateway.handle("chat", body())

    asyncio.run(main())
    assert len(lines(tmp_path / "access.log")) == len(lines(tmp_path / "other.log")) == 1
